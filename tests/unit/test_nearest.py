"""From a store and a name to nearest models, with an index and without one."""

import pytest

from llfast import KLIndex, ModelSpace, SearchError
from llfast.nearest import build_index, find_nearest
from tests.indexes import make_store, name

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("created > now() - to_days(1)", 23),
        ("created > '2026-01-01' and number < 3", 2),
        ("year(created) < 2026", 0),
    ],
)
def test_when_a_model_came_is_known_with_an_index_and_without_one(store, where, count):
    def found():
        return find_nearest(name(0), store.folder, k=50, where=where)[1]

    assert len(found()) == count
    build_index(store.folder)
    assert len(found()) == count


def test_a_space_that_knows_no_times_has_no_condition_on_them(store):
    index = KLIndex.build(ModelSpace.fit(store.matrix()))
    with pytest.raises(SearchError, match='"created" not found'):
        index.search(name(0), where="created > '2026-01-01'")

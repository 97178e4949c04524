"""Indexes that are damaged, foreign or out of date, and what must never reach faiss."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from llfast import KLIndex, SearchError, Store, StoreError
from tests.indexes import assert_right, index_result, make_store, model_values, name
from tests.spaces import make_matrix, make_result

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def shards(store):
    return sorted(store.folder.glob("textset=*/*.parquet"))


# ------------------------------------------------------------------ a store that changes


@pytest.mark.parametrize("merged", [False, True])
def test_a_removed_model_that_a_compaction_carries_on_stays_away(store, tmp_path, merged):
    """A compaction that began before the removal writes its row once more, in a new shard."""
    index = KLIndex.build(store, "certified")
    store.add(index_result(30))
    late = tmp_path / "late.parquet"
    shutil.copy(shards(store)[-1], late)
    store.remove([name(30)])
    index.refresh()
    if merged:
        index.merge()
    else:
        index = KLIndex.build(store, "certified", refit=True)
    shutil.copy(late, shards(store)[0].with_name(f"{10**19}-late.parquet"))
    for each in (index, KLIndex.build(store, "certified")):
        each.refresh()
        assert_right(each, store)


def test_a_shard_that_is_moved_away_after_a_compaction_takes_its_models_along(store, tmp_path):
    for number in (24, 25):
        store.add(index_result(number))
    index = KLIndex.build(store)
    store.compact()
    index.refresh()
    index.merge()
    store.add(index_result(26))
    index.refresh()
    merged = shards(store)[0]
    merged.rename(tmp_path / "moved away")
    for number in (27, 28):
        store.add(index_result(number))
    for each in (index, KLIndex.build(store)):
        each.refresh()
        assert_right(each, store)


def test_a_shard_that_is_another_one_now_is_read_again(store):
    index = KLIndex.build(store)
    (shard,) = shards(store)
    other = make_store(store.folder.parent / "other", 20)
    shutil.copy(shards(other)[0], shard)
    index.refresh()
    assert_right(index, store)


def fails_once(monkeypatch, place, attribute, before):
    """Have something happen at the next call of a function."""
    whole = getattr(place, attribute)
    left = [before]

    def call(*args, **options):
        if left:
            left.pop()()
        return whole(*args, **options)

    monkeypatch.setattr(place, attribute, call)


def test_a_compaction_amid_a_refresh_is_nothing_to_it(store, monkeypatch):
    index = KLIndex.build(store, "certified")
    for number in range(24, 27):
        store.add(index_result(number))
    fails_once(monkeypatch, Store, "read_shards", store.compact)
    assert index.refresh() == 3
    assert_right(index, store)
    store.add(index_result(27))
    fails_once(monkeypatch, Store, "scan", store.compact)
    index.refresh()
    index.refresh()
    assert_right(index, store)


@pytest.mark.parametrize("what", ["read_shards", "scan", "texts", "rows", "shards"])
@pytest.mark.parametrize("change", ["compact", "remove", "replace"])
def test_a_store_that_changes_amid_a_build_or_refresh(store, monkeypatch, what, change):
    store.add(index_result(24))

    def act():
        if change == "remove":
            store.remove([name(24), name(3)])
        elif change == "replace":
            store.add(index_result(3, values=model_values(99)))
        store.compact()

    fails_once(monkeypatch, Store, what, act)
    index = KLIndex.build(store, "certified")
    index.refresh()
    assert_right(index, store)
    store.add(index_result(24, values=model_values(98)))
    fails_once(monkeypatch, Store, what, lambda: (store.add(index_result(25)), store.compact()))
    index.refresh()
    index.refresh()
    assert_right(index, store)


# ------------------------------------------------------------------ rows that fp32 cannot hold


@pytest.mark.parametrize("size", [1e18, 1e25, 1e40, 1e200, 1e308])
@pytest.mark.filterwarnings("ignore:(overflow|invalid)", "ignore:.*below the clip")
def test_a_row_too_large_for_fp32_is_refused_before_anything_changes(store, size):
    values = size * np.cos(np.arange(40.0))
    index = KLIndex.build(store, "certified")
    before = len(store.rows())
    with pytest.raises(SearchError, match=r"norms below 1e18 nats"):
        index.add(index_result(30, values=values))
    assert len(store.rows()) == before, "what cannot be found is not kept, either"
    assert_right(index, store)
    with pytest.raises(SearchError, match=r"norms below 1e18 nats"):
        index.search(index_result(30, values=values))
    # Of another writer, who knows nothing of the index.
    store.add(index_result(3))
    store.add(index_result(30, values=values))
    for _ in range(2):
        with pytest.raises(SearchError, match=f"'{name(30)}' must have norms below 1e18 nats"):
            index.refresh()
        assert index.search(name(3), 1)
        assert len(index) == 24
    store.remove([name(30)])
    index.refresh()
    assert_right(index, store)


@pytest.mark.parametrize("size", [1e25, 1e40, 1e200])
@pytest.mark.filterwarnings("ignore:(overflow|invalid)", "ignore:.*below the clip")
def test_an_index_of_rows_too_large_for_fp32_is_not_built(tmp_path, size):
    values = np.array([model_values(number) for number in range(8)])
    values[5] = size * np.cos(np.arange(40.0))
    store = Store(tmp_path / "store")
    store.add_matrix(make_matrix(values))
    with pytest.raises(SearchError, match=r"'model 5' must have norms below 1e18 nats.*got"):
        KLIndex.build(store, "certified")
    folder = store.folder / "_index"
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["lock"]


# ------------------------------------------------------------------ what is added


def test_a_second_revision_is_refused_before_the_store_has_it(store):
    index = KLIndex.build(store)
    with pytest.raises(StoreError, match=f"{name(3)}.*newest=True"):
        index.add(index_result(3, revision="second"))
    assert_right(index, store)
    newest = KLIndex.build(store, newest=True)
    newest.add(index_result(3, revision="second", values=model_values(50)))
    assert_right(newest, store, duplicates="newest")


def test_a_result_that_was_added_in_memory_leaves_itself_out():
    from llfast import ModelSpace

    values = np.array([model_values(number) for number in range(9)])
    for mode in ("exact", "certified"):
        index = KLIndex.build(ModelSpace.fit(make_matrix(values)), mode)
        result = make_result(model_values(30), model="added")
        index.add(result)
        assert "added" not in {hit.model for hit in index.search(result, 20)}
        kls = [hit.kl for hit in index.search("added", 20)]
        assert [hit.kl for hit in index.search(result, 20)] == pytest.approx(kls, rel=1e-5)


def test_a_merge_by_an_exact_index_leaves_the_bounds_to_others(store):
    certified = KLIndex.build(store, "certified")
    exact = KLIndex.build(store, "exact")
    exact.add(index_result(24))
    exact.merge()
    again = KLIndex.build(store, "certified")
    assert again.basis.digest == certified.basis.digest
    assert again._segment_name() == exact._segment_name()
    assert_right(again, store)

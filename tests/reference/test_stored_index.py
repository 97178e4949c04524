"""An index of a store: what is in the store is found, now and after every change."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from llfast import KLIndex, ModelSpace, SearchError, SpaceError, Store, StoreError
from llfast.search import snapshot as snapshots
from tests.reference.test_certified import lineage
from tests.spaces import make_matrix, make_result

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")

N = 300


@pytest.fixture
def values():
    return lineage(np.random.default_rng(0), 500, N)


def name(number):
    return f"model {number:04d}"


def result(values, number, **options):
    options = {"text_bytes": np.full(N, 500), "scoring_version": 0} | options
    return make_result(values[number], model=options.pop("model", name(number)), **options)


@pytest.fixture
def store(tmp_path, values):
    made = Store(tmp_path / "store")
    models = [name(number) for number in range(300)]
    metadata = [{"family": number % 7} for number in range(300)]
    made.add_matrix(make_matrix(values[:300], models=models, metadata=metadata))
    return made


def truth(index, store, query, k, **selection):
    """What brute force over the store finds, in the index's basis and precision."""
    matrix = store.matrix(**selection)
    points = index.basis.place(matrix.values).astype(np.float32).astype(np.float64)
    row = matrix.models.index(query)
    kls = (
        np.square(points - points[row]).sum(axis=1) / (2 * N) * index.basis.per_nat("bits_per_byte")
    )
    order = sorted((kl, each) for kl, each in zip(kls, matrix.models, strict=True) if each != query)
    return order[:k]


def check(index, store, **selection):
    matrix = store.matrix(**selection)
    assert len(index) == len(matrix.models)
    for query in (matrix.models[0], matrix.models[len(matrix.models) // 2], matrix.models[-1]):
        expected = truth(index, store, query, 15, **selection)
        hits = index.search(query, 15)
        assert [hit.model for hit in hits] == [each for _, each in expected]
        np.testing.assert_allclose([hit.kl for hit in hits], [kl for kl, _ in expected], rtol=1e-9)
        inside = index.range_search(query, expected[7][0] * (1 + 1e-9))
        assert [hit.model for hit in inside] == [each for _, each in expected[:8]]


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_an_index_finds_what_brute_force_over_the_store_finds(store, mode):
    index = KLIndex.build(store, mode)
    assert index.mode == mode
    check(index, store)
    assert index.basis.digest == ModelSpace.fit(store.matrix()).digest
    hit = index.search(name(3), 1)[0]
    assert hit.metadata == {"family": int(hit.model[-4:]) % 7}
    check(KLIndex.build(store, mode), store)


def test_hits_have_the_intervals_of_the_space(store):
    index, space = KLIndex.build(store, "certified"), ModelSpace.fit(store.matrix())
    for hit in index.search(name(5), 5):
        expected = space.kl(name(5), hit.model)
        assert hit.kl == pytest.approx(expected.value, rel=1e-6)
        assert hit.interval == pytest.approx(expected.interval, rel=1e-6)
        assert hit.standard_error == pytest.approx(expected.standard_error, rel=1e-6)


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_what_is_added_removed_and_replaced_is_so_at_once(store, values, mode):
    index = KLIndex.build(store, mode)
    other = KLIndex.build(store, mode)
    for number in range(300, 320):
        index.add(result(values, number))
        index.remove(name(number - 300))
    check(index, store)
    # The same weights again, with other numbers: as if a release had mended something.
    index.add(result(values, 400, model=name(50)))
    check(index, store)
    assert other.search(name(310 - 300), 1)  # a reader that has not looked has what it had
    assert other.refresh() == 41 - 0
    check(other, store)
    assert other.refresh() == 0
    check(KLIndex.build(store, mode), store)


def test_an_added_model_of_its_own_store_is_durable(store, values):
    KLIndex.build(store).add(result(values, 301))
    assert name(301) in store.matrix().models


def test_a_store_that_was_compacted_needs_no_new_index(store, values):
    index = KLIndex.build(store, "certified")
    for number in range(300, 310):
        store.add(result(values, number))
    store.remove([name(7)])
    assert store.compact()
    segment = index.segment.folder.name
    check(KLIndex.build(store), store)
    assert index.refresh() == 11
    check(index, store)
    assert index.segment.folder.name == segment


def test_models_that_a_second_compaction_drops_are_gone(store, values):
    index = KLIndex.build(store, "certified")
    for number in (300, 301):
        store.add(result(values, number))
        store.compact()
        index.refresh()
    # As where the removal itself has been forgotten: the row is simply not there any more.
    (shard,) = store.shards(store.find_textset())
    table = pq.read_table(next(store.folder.glob(f"*/{shard}")))
    kept = table.filter(pc.not_equal(table["model"], name(5)))
    pq.write_table(kept, next(store.folder.glob("textset=*")) / f"{time.time_ns():020d}.parquet")
    next(store.folder.glob(f"*/{shard}")).unlink()
    assert name(5) not in store.matrix().models
    assert index.refresh() == 1
    check(index, store)


def test_many_additions_are_merged_when_it_is_opened(store, values):
    index = KLIndex.build(store, "certified")
    before = index.segment.folder.name
    for number in range(300, 345):
        store.add(result(values, number))
    opened = KLIndex.build(store)
    assert opened.segment.folder.name != before
    assert len(opened._added) == 0
    check(opened, store)
    assert opened.basis.digest == index.basis.digest
    check(KLIndex.build(store), store)


def test_merging_keeps_every_answer(store, values):
    index = KLIndex.build(store, "certified")
    for number in range(300, 330):
        index.add(result(values, number))
    index.remove(name(12))
    queries = [name(number) for number in (0, 100, 299, 300, 329)]
    before = index.search(queries, 25)
    ranges = [index.range_search(query, 1.0) for query in queries]
    index.merge()
    assert index.search(queries, 25) == before
    assert [index.range_search(query, 1.0) for query in queries] == ranges
    assert KLIndex.build(store).search(queries, 25) == before
    index.add(result(values, 340))
    check(index, store)


def test_a_new_basis_is_for_who_asks_for_it(store, values):
    first = KLIndex.build(store)
    for number in range(300, 330):
        store.add(result(values, number))
    assert KLIndex.build(store).basis.digest == first.basis.digest
    refitted = KLIndex.build(store, refit=True)
    assert refitted.basis.digest == ModelSpace.fit(store.matrix()).digest
    assert refitted.basis.digest != first.basis.digest
    check(refitted, store)


def test_several_rows_of_a_model_are_an_error_unless_the_newest_is_asked_for(store, values):
    index = KLIndex.build(store)
    newest = KLIndex.build(store, newest=True)
    store.add(result(values, 400, model=name(1), revision="second"))
    for build in (lambda: KLIndex.build(store), index.refresh, lambda: store.matrix()):
        with pytest.raises(StoreError, match="one row a model"):
            build()
    assert newest.refresh() == 2
    check(newest, store, duplicates="newest")
    check(KLIndex.build(store, newest=True), store, duplicates="newest")
    # With the newest gone, the older one counts again.
    store.remove([f"{name(1)}@second"])
    newest.refresh()
    check(newest, store, duplicates="newest")


def test_what_is_not_selected_is_not_found(store, values):
    index = KLIndex.build(store, dtype="")
    store.add(result(values, 300, dtype="bfloat16"))
    store.add(result(values, 301, convention="always-bos"))
    assert index.refresh() == 0
    assert len(index) == 300
    assert len(KLIndex.build(store, convention="always-bos")) == 1
    with pytest.raises(SpaceError, match=name(300)):
        index.search(name(300))


def test_a_certified_index_serves_exact_searches_but_not_the_other_way_round(store):
    KLIndex.build(store, "exact")
    certified = KLIndex.build(store, "certified")
    assert certified.mode == "certified"
    assert KLIndex.build(store, "auto").mode == "certified"
    exact = KLIndex.build(store, "exact")
    assert exact.mode == "exact"
    assert exact.search(name(9), 30) == certified.search(name(9), 30)


def test_an_index_may_be_elsewhere(store, tmp_path):
    index = KLIndex.build(store, folder=tmp_path / "indexes")
    check(index, store)
    assert not (store.folder / "_index").exists()
    assert (tmp_path / "indexes").is_dir()


def test_an_index_in_a_store_disturbs_nobody_who_reads_the_store(store):
    pyarrow_dataset = pytest.importorskip("pyarrow.dataset")
    KLIndex.build(store, "certified")
    assert pyarrow_dataset.dataset(store.folder, format="parquet").count_rows() == 300
    assert len(Store(store.folder).rows()) == 300
    assert store.compact() == 0


def test_a_deleted_index_is_built_again(store):
    index = KLIndex.build(store, "certified")
    before = index.search(name(5), 20)
    shutil.rmtree(store.folder / "_index")
    assert index.search(name(5), 20) == before  # its files are open
    assert KLIndex.build(store, "certified").search(name(5), 20) == before


def test_an_empty_store_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="must hold"):
        KLIndex.build(Store(tmp_path / "none"))


# ------------------------------------------------------------------ conditions on models


@pytest.mark.parametrize("where", ["family = 3", "family in (1, 2) and model < 'model 0200'"])
def test_a_condition_is_applied_before_the_search(store, values, where):
    for number in range(300, 320):
        store.add(result(values, number, metadata={"family": number % 7}))
    store.remove([name(3)])
    for index in (KLIndex.build(store, "certified"), KLIndex.build(ModelSpace.fit(store.matrix()))):
        everything = index.search(name(8), 400)
        families = {3} if where == "family = 3" else {1, 2}
        wanted = [
            hit
            for hit in everything
            if hit.metadata["family"] in families and (3 in families or hit.model < name(200))
        ]
        assert len(wanted) > 20
        assert index.search(name(8), 400, where=where) == wanted
        assert index.search(name(8), 7, where=where) == wanted[:7]
        assert index.search([name(8)], 7, where=where) == [wanted[:7]]
        radius = wanted[4].kl * (1 + 1e-9)
        assert index.range_search(name(8), radius, where=where) == wanted[:5]
        assert index.search(name(8), 7, where=where).certificate.models == len(wanted)
        assert index.search(name(8), where="family = 99") == []


def test_what_is_no_condition_is_an_error(store):
    index = KLIndex.build(store)
    for where in ("nothing = 3", "family = 3; drop table models", ""):
        with pytest.raises(SearchError, match="where must be a SQL condition over model"):
            index.search(name(8), where=where)


def test_a_merge_between_two_looks_of_a_search_changes_nothing(store, values, monkeypatch):
    index = KLIndex.build(store, "certified")
    index.remove(name(0))  # so that rows have other numbers after a merge
    index.add(result(values, 300))
    expected = index.search(name(9), 20)
    nearest = snapshots.first_bounds

    def merge_meanwhile(*arguments):
        found = nearest(*arguments)
        index.merge()
        return found

    monkeypatch.setattr(snapshots, "first_bounds", merge_meanwhile)
    assert index.search(name(9), 20) == expected
    monkeypatch.undo()
    assert index.search(name(9), 20) == expected

"""Stores that change under an index, and rows that are no points."""

from __future__ import annotations

import math
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llfast import KLIndex, ModelSpace, SearchError, SpaceError, Store, StoreError
from llfast.intervals import half_variances
from tests.indexes import N, assert_right, index_result, make_store, model_values, name
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


def test_layers_of_models_are_no_models_of_an_index(store):
    store.add(index_result(3, layer=1, values=model_values(3) + 1))
    index = KLIndex.build(store, "certified")
    assert_right(index, store)
    store.add(index_result(3, layer=2, values=model_values(3) + 2))
    store.add(index_result(24))
    store.remove([f"{name(3)}@layer=1"])
    assert index.refresh() == 1
    assert_right(index, store)
    index.merge()
    store.compact()
    for each in (index, KLIndex.build(store, "certified", refit=True)):
        each.refresh()
        assert_right(each, store)


def test_a_layer_is_added_beside_its_model(store):
    layer, label = index_result(3, layer=1, values=model_values(40)), f"{name(3)}@layer=1"
    index = KLIndex.build(ModelSpace.fit(store.matrix()))
    index.add(layer)
    assert len(index) == 25
    assert [hit.model for hit in index.search(name(0), 50, where="layer = 1")] == [label]
    assert index.kl(name(3), label).value > 0
    assert label not in {hit.model for hit in index.search(layer, 50)}
    stored = KLIndex.build(store)
    stored.add(layer)
    assert_right(stored, store)
    assert label in store.matrix(layers=True).models


def test_what_is_nan_in_metadata_a_model_that_is_added_lacks(store):
    index = KLIndex.build(ModelSpace.fit(store.matrix()))
    index.add(index_result(24, metadata={"size": math.nan, "number": np.int64(24)}))
    for where in ("size is null and number = 24", "size > 1"):
        found = [hit.model for hit in index.search(name(0), 50, where=where)]
        assert found == [name(24)] * where.startswith("size is null")


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


def test_of_two_who_add_a_model_at_once_the_newer_one_counts(store, monkeypatch):
    index = KLIndex.build(store, "certified")
    add = Store.add

    def add_and_another(self, result):
        added = add(self, result)
        add(self, index_result(30, values=model_values(88)))
        return added

    for compacted in (False, True):
        monkeypatch.setattr(Store, "add", add_and_another)
        if compacted:
            fails_once(monkeypatch, Store, "shards", store.compact)
        index.add(index_result(30))
        monkeypatch.undo()
        assert_right(index, store)


def test_a_result_that_was_added_in_memory_leaves_itself_out():
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
    assert again.segment.folder.name == exact.segment.folder.name
    assert_right(again, store)


# ------------------------------------------------------------------ stores with odd rows


def rewrite_row(store, values):
    """Another row of numbers in the first shard, as another program may write it."""
    (shard,) = shards(store)[:1]
    table = pq.read_table(shard, partitioning=None)
    lists = table["loglikelihoods"].to_pylist()
    lists[7] = values
    column = table.column_names.index("loglikelihoods")
    field = table.schema.field(column)
    pq.write_table(table.set_column(column, field, pa.array(lists, field.type)), shard)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([math.nan] + [0.0] * (N - 1), "must be finite"),
        ([0.0] * (N - 1) + [-math.inf], "must be finite"),
        ([None] + [0.0] * (N - 1), "must be finite"),
        ([0.0] * (N - 1), f"must have {N}"),
        ([0.0] * (N + 1), f"must have {N}"),
        ([], f"must have {N}"),
        (None, f"must have {N}"),
    ],
)
def test_a_row_that_is_no_point_is_refused_in_one_line(store, values, message):
    index = KLIndex.build(store, "certified")
    rewrite_row(store, values)
    for act in (
        lambda: KLIndex.build(store, "certified", refit=True),
        lambda: KLIndex.build(store, "exact", newest=True),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            act()
        assert name(7) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert index.search(name(3), 5)


def test_texts_of_another_number_are_refused(store):
    KLIndex.build(store, "certified")
    (texts,) = store.folder.glob("*/_texts.json")
    good = texts.read_text()
    texts.write_text(good.replace('"text 0", ', "", 1).replace("500.0, ", "", 1))
    with pytest.raises(StoreError, match=f"must have {N - 1}"):
        KLIndex.build(store, "certified", refit=True)
    texts.write_text("{")
    with pytest.raises(StoreError, match="must describe the texts"):
        KLIndex.build(store, "certified", refit=True)


def test_a_store_that_is_deleted_under_an_index(store):
    index = KLIndex.build(store, "certified")
    before = index.search(name(3), 20)
    shutil.rmtree(store.folder)
    assert index.search(name(3), 20) == before
    with pytest.raises(StoreError, match="must hold"):
        KLIndex.build(store)
    assert index.refresh() == 24
    assert len(index) == 0
    with pytest.raises(SpaceError, match=name(3)):
        index.search(name(3))
    with pytest.raises(SearchError, match="must have a model"):
        index.merge()
    index.add(index_result(3))
    index.add(index_result(4))
    assert_right(index, store)


# ------------------------------------------------------------------ threads


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_searches_are_right_while_models_come_go_and_are_merged(store, mode, untyped):
    """Rows are numbered anew by a merge: no search may take the old for the new."""
    index = KLIndex.build(store, mode)
    points = {name(row): index.basis.place(model_values(row)[None])[0] for row in range(80)}
    points = {key: each.astype(np.float32).astype(np.float64) for key, each in points.items()}
    factor = index.basis.per_nat("bits_per_byte")
    problems, done = [], threading.Event()

    def search():
        try:
            while not done.is_set():
                several = index.search([name(0), name(1)], 9)
                for hits in (*several, index.range_search(name(2), 0.2)):
                    kls = [hit.kl for hit in hits]
                    assert kls == sorted(kls)
                    for hit in hits[:3]:
                        assert hit.metadata.get("number") in (int(hit.model[-3:]), None)
                        assert hit.estimate.value == hit.kl
                assert len(index.names) > 20
                for hit in index.search(name(0), 40):
                    differences = points[name(0)] - points[hit.model]
                    assert hit.kl == half_variances(differences[None])[0] * factor
        except Exception as error:
            problems.append(error)
            raise

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(24, 45):
            index.add(index_result(number))
            index.remove(name(number - 21))
            if number % 5 == 0:
                index.merge()
            if number % 7 == 0:
                store.compact()
                index.refresh()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not problems
    assert_right(index, store)
    assert_right(KLIndex.build(store), store)

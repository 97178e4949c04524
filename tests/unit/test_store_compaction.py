"""Merging shards loses and changes nothing, whoever reads, writes or dies meanwhile."""

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llfast import Store, StoreError, compaction, scans, shards
from llfast.errors import LlfastWarning
from llfast.rows import order_of
from tests.stores import (
    DIGEST,
    N,
    add_together,
    make_result,
    numbers,
    rewrite,
    store_contents,
    store_shards,
)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def statuses(store):
    return sorted(row.status for row in store.read_shards(DIGEST, store.shards(DIGEST)))


def test_compaction_changes_nothing_that_is_read(store):
    for model in ("a", "b", "c"):
        store.add(make_result(model, metadata={"family": model}))
    store.add(make_result("a", loglikelihoods=numbers("newer")))
    store.add_failure(make_result("d").key, "truncated")
    store.add_failure(make_result("b").key, "stale")
    store.add(make_result("e", textset_digest="e" * 64))
    before = store_contents(store)
    held = store.rows()
    assert store.compact() == 6, "the other text set has one shard"
    assert len(store_shards(store)) == 2
    assert store_contents(store) == before
    assert ds.dataset(store_shards(store)[0]).to_table().num_rows == 4, "what is replaced is gone"
    # Rows that were read before know where their numbers have gone.
    assert [store.load(row).values.tolist() for row in held if not row.error] == [
        each[-1] for each in before if not each[1]
    ]
    assert store.compact() == 0
    store.add(make_result("f"))
    assert store.compact() == 2
    assert store.matrix(DIGEST).models == ("a", "b", "c", "f")


def test_a_row_that_is_gone_is_said_to_be(store):
    store.add(make_result("a"))
    (row,) = store.rows()
    row.shard.unlink()
    with pytest.raises(StoreError, match="must hold the result of a, got none any more"):
        store.load(row)


@pytest.mark.parametrize("torn", [[], ["d"]], ids=["all missed", "all but one missed"])
def test_a_listing_that_misses_a_compaction_is_noticed(store, monkeypatch, torn):
    # A folder is not listed in one moment: the listing may miss the merged shard, made after it
    # has passed that place, as well as the old ones, removed before it gets there.
    for model in ("a", "b", "c"):
        store.add(make_result(model))
    store.compact()
    merged = store_shards(store)
    for model in torn:
        store.add(make_result(model))
    listings = [[path for path in store_shards(store) if path not in merged]]
    glob = type(store.folder).glob

    def listed(folder, pattern):
        if pattern == "*.parquet" and listings:
            return iter(listings.pop())
        return glob(folder, pattern)

    monkeypatch.setattr(type(store.folder), "glob", listed)
    assert [row.key.model for row in store.rows(DIGEST)] == ["a", "b", "c", *torn]


def test_a_store_that_is_not_there_is_not_nothing_to_merge(tmp_path):
    with pytest.raises(StoreError, match="typo must be a store, got no such folder"):
        Store(tmp_path / "typo").compact()
    assert not (tmp_path / "typo").exists()


# ------------------------------------------------------------------------------ large shards


@pytest.fixture
def small_groups(monkeypatch):
    """Row groups of about three results, and shards of one row group."""
    monkeypatch.setattr(compaction, "GROUP_BYTES", 600)
    monkeypatch.setattr(compaction, "SHARD_BYTES", 1)


def test_rows_go_by_name_into_row_groups_that_readers_can_hold(store, monkeypatch):
    monkeypatch.setattr(compaction, "GROUP_BYTES", 600)
    for model in "gbfadce":
        store.add(make_result(model))
    before = store_contents(store)
    assert store.compact() == 7
    (shard,) = store_shards(store)
    assert ds.dataset(shard).to_table()["model"].to_pylist() == list("abcdefg")
    footer = pq.ParquetFile(shard).metadata
    sizes = [footer.row_group(each).num_rows for each in range(footer.num_row_groups)]
    assert sum(sizes) == 7
    assert 1 < max(sizes) < 4
    assert store_contents(store) == before


def test_large_shards_that_count_whole_stay_as_they_are(store, monkeypatch):
    add_together(store, [f"old {each}" for each in range(9)])
    (large,) = store_shards(store)
    monkeypatch.setattr(compaction, "LARGE_BYTES", large.stat().st_size)
    content = large.read_bytes()
    for model in ("a", "b"):
        store.add(make_result(model))
    before = store_contents(store)
    assert store.compact() == 2
    assert large.read_bytes() == content
    assert len(store_shards(store)) == 2
    assert store.compact() == 0, "one small shard is left as well"
    assert store_contents(store) == before
    store.add(make_result("old 3", loglikelihoods=numbers("newer")))
    store.remove(["old 4"])
    before = store_contents(store)
    assert store.compact() == 4, "a row of the large one is replaced"
    assert store_contents(store) == before
    assert len(store_shards(store)) == 1


def test_a_large_shard_that_replaces_others_has_to_be_whole(store, monkeypatch):
    store.add(make_result("a"))
    add_together(store, [f"m{each}" for each in range(20)], n=N)
    store.add(make_result("b"))
    large = max(store_shards(store), key=lambda shard: shard.stat().st_size)
    table = pq.read_table(large, partitioning=None)
    place = table.column_names.index("model")
    names = pa.array(["a", *table["model"].to_pylist()[1:]])
    table = table.set_column(place, "model", names)
    for name, value in (("revision", "r1"), ("dtype", "float32")):
        column = pa.array([value] * len(table))
        table = table.set_column(table.column_names.index(name), name, column)
    version = pa.array([1] * len(table), pa.int32())
    table = table.set_column(
        table.column_names.index("scoring_version"), "scoring_version", version
    )
    pq.write_table(table, large, compression="zstd", write_page_checksum=True)
    assert store.matrix().models[0] == "a"
    np.testing.assert_array_equal(store.matrix().row("a"), numbers("m0"))
    monkeypatch.setattr(compaction, "LARGE_BYTES", large.stat().st_size)
    data = bytearray(large.read_bytes())
    column = pq.ParquetFile(large).metadata.row_group(0).column(9)
    data[column.dictionary_page_offset + 60] ^= 1
    large.write_bytes(data)
    with pytest.warns(LlfastWarning, match="left out of the store"):
        assert store.compact() == 2
    large.unlink()
    np.testing.assert_array_equal(store.matrix().row("a"), numbers("a"))
    assert store.matrix().models == ("a", "b")


def test_several_shards_are_written_and_old_ones_go_on_the_way(store, small_groups, monkeypatch):
    for each in range(11):
        store.add(make_result(f"m{each:02}"))
    before, steps = store_contents(store), []
    unlink = type(store.folder).unlink

    def seen(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        if path.suffix == ".parquet":
            assert store_contents(store) == before, "every row is somewhere"
            steps.append(len(store_shards(store)))

    with monkeypatch.context() as patch:
        patch.setattr(type(store.folder), "unlink", seen)
        assert store.compact() == 11
    assert max(steps) < 13, "at no time is there more than a row group twice"
    assert 3 < len(store_shards(store)) < 11
    assert store_contents(store) == before


@given(
    shards=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    again=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=4),
    removed=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=3),
    group_bytes=st.sampled_from([1, 300, 1000, 1 << 20]),
    shard_bytes=st.sampled_from([1, 4000, 2 << 30]),
    large_bytes=st.sampled_from([1, 12_000, 1 << 30]),
)
@settings(max_examples=30, deadline=None)
def test_whatever_the_sizes_are_nothing_changes(
    tmp_path_factory, shards, again, removed, group_bytes, shard_bytes, large_bytes
):
    store = Store(tmp_path_factory.mktemp("sizes") / "store")
    for number, size in enumerate(shards):
        add_together(store, [f"{number} {each}" for each in range(size)])
    for number, each in again:
        add_together(store, [f"{number} {each}"])
    there = {row.label for row in store.rows()}
    store.remove([name for name in (f"{n} {e}" for n, e in set(removed)) if name in there])
    before = store_contents(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "GROUP_BYTES", group_bytes)
        patch.setattr(compaction, "SHARD_BYTES", shard_bytes)
        patch.setattr(compaction, "LARGE_BYTES", large_bytes)
        for _ in range(2):
            store.compact()
            assert store_contents(store) == before
    statuses = [
        row.status for row in store.read_shards(DIGEST, store.shards(DIGEST)) if row.key.model
    ]
    assert statuses.count("complete") == len(before), "what was replaced or removed is gone"


def test_few_shards_are_left_however_much_there_is(store, monkeypatch):
    assert compaction.MOST_SHARDS == 100
    monkeypatch.setattr(compaction, "MOST_SHARDS", 10)
    for name in ("GROUP_BYTES", "SHARD_BYTES", "LARGE_BYTES"):
        monkeypatch.setattr(compaction, name, 1)  # all shards are large, and none is needed larger
    for number in range(12):
        add_together(store, [f"{number}"])
    for round_ in range(3):
        before = store.matrix()
        assert store.compact()
        assert len(store_shards(store)) <= 10
        assert store.matrix().models == before.models
        assert store.matrix().values.tobytes() == before.values.tobytes()
        for number in range(9):
            add_together(store, [f"more {round_} {number}"])


def test_columns_of_others_are_kept(store):
    for model in "ab":
        store.add(make_result(model))
    shard = store_shards(store)[0]
    rewrite(shard, use_compliant_nested_type=False)
    table = pq.read_table(shard, partitioning=None)
    pq.write_table(table.append_column("more", pa.array([7])), shard)
    before = store_contents(store)
    store.compact()
    assert store_contents(store) == before
    assert ds.dataset(store_shards(store)[0]).to_table()["more"].to_pylist() == [7, None]


# ------------------------------------------------------------------------------ others at work


@pytest.mark.parametrize("moment", ["sorted_glob", "read_rows", "read_batches", "_write"])
def test_what_another_compaction_takes_is_left_to_it_however_often(store, monkeypatch, moment):
    for model in "abc":
        store.add(make_result(model))
    store.remove(["b"])
    step, own = getattr(compaction, moment), []

    def overtaken(*arguments, **named):
        if not own:
            own.append(True)
            store.compact()
            for _ in range(2):
                store.add(make_result("a", loglikelihoods=numbers("newer")))
            own.clear()
        return step(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "_TRIES", 3)
        patch.setattr(compaction, moment, overtaken)
        store.compact()
        store.compact()
    assert store.matrix().models == ("a", "c")
    np.testing.assert_array_equal(store.matrix().values, [numbers("newer"), numbers("c")])
    store.compact()
    assert statuses(store) == ["complete", "complete", "removed"]


@pytest.mark.parametrize("name", ["part-0.parquet", f"{2**62:020d}-{'a' * 16}.parquet"])
def test_of_copies_the_later_one_counts_whatever_names_and_clocks(store, monkeypatch, name):
    for model in ("a", "b"):
        store.add(make_result(model))
    store_shards(store)[0].rename(store_shards(store)[0].with_name(name))
    left, remove, write = [], compaction._remove, compaction._write
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "_remove", left.extend)
        store.compact()  # which has written copies, and removes later what they are of
        (copy,) = set(store_shards(store)) - set(left)
        assert order_of(copy.name) > max(order_of(shard.name) for shard in left)

        def overtaken(*arguments, **named):
            remove(left)
            return write(*arguments, **named)

        patch.setattr(compaction, "_remove", remove)
        patch.setattr(compaction, "_write", overtaken)
        store.compact()
    assert store.matrix().models == ("a", "b")


@pytest.mark.parametrize("rows_before", [0, 1])
def test_a_shard_that_only_seems_to_be_gone_stays(store, monkeypatch, rows_before):
    # A network file system can say so (ESTALE) of a file that is there.
    for models in ("ab", "cd"):
        add_together(store, models)
    read, left = compaction.read_batches, [None]

    def gone(shard, **named):
        for row, (start, batch) in enumerate(read(shard, **{**named, "batch_bytes": 1})):
            if "positions" in named and row == rows_before and left:
                left.pop()
                raise FileNotFoundError(shard)
            yield start, batch

    monkeypatch.setattr(compaction, "read_batches", gone)
    assert store.compact() == 2
    assert store.matrix().models == ("a", "b", "c", "d")
    assert not left


def test_a_removal_is_not_forgotten_while_a_shard_is_away(store, monkeypatch):
    monkeypatch.setattr(compaction, "REMOVALS_LAST", timedelta(0))
    store.add(make_result("a"))
    (shard,), away = store_shards(store), store.folder / "away"
    shard.rename(away)
    shard.symlink_to(away)
    store.remove(["a"])
    away = away.rename(store.folder / "further")
    store.add(make_result("b"))
    store.compact()
    away.rename(store.folder / "away")
    assert store.matrix().models == ("b",)


@pytest.mark.parametrize(("module", "step"), [(shards, "read_rows"), (scans, "read_batches")])
def test_readers_get_on_however_often_a_compaction_comes_first(store, monkeypatch, module, step):
    store.add(make_result("a"))
    read, left = getattr(module, step), [None] * 50

    def overtaken(*arguments, **named):
        if left:
            left.pop()
            store.add(make_result("a"))
            store.compact()
        return read(*arguments, **named)

    monkeypatch.setattr(module, step, overtaken)
    assert store.matrix().models == ("a",)
    assert not left


def test_a_shard_that_is_listed_and_never_there_is_an_error(store):
    store.add(make_result("a"))
    store_shards(store)[0].with_name("dangling.parquet").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"dangling\.parquet"):
        store.rows()


# ------------------------------------------------------------------------------ removals


def test_a_removal_is_forgotten_when_nothing_can_come_up_any_more(store, monkeypatch):
    store.add(make_result("a"))
    store.add(make_result("b"))
    store.remove(["a"])
    assert store.compact() == 3
    assert statuses(store) == ["complete", "removed"]
    assert store.compact() == 0, "another compaction may still be writing what it hides"
    monkeypatch.setattr(compaction, "REMOVALS_LAST", timedelta(0))
    shard = store_shards(store)[0]
    damaged = shard.with_name("damaged.parquet")
    damaged.write_bytes(b"PAR1")
    with pytest.warns(LlfastWarning, match="left out"):
        assert store.compact() == 0
    damaged.unlink()
    assert store.compact() == 1
    assert statuses(store) == ["complete"]
    assert store.matrix().models == ("b",)
    assert store.compact() == 0


def test_a_removal_stays_as_long_as_what_it_hides(store, monkeypatch):
    monkeypatch.setattr(compaction, "REMOVALS_LAST", timedelta(0))
    store.add(make_result("a"))
    store.remove(["a"])
    assert store.compact() == 2
    assert statuses(store) == ["removed"], "a kill in between may have left what it hides"
    assert store.compact() == 1
    assert store_shards(store) == []
    assert store.rows() == []
    assert store.compact() == 0
    store.add(make_result("a"))
    assert store.matrix().models == ("a",)

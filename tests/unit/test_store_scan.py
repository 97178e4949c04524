"""Numbers of many rows come a block at a time, whatever happens to the store meanwhile."""

import errno

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llfast import Store, StoreError
from llfast.shards import SCHEMA
from tests.stores import N, add_together, make_result, numbers, rewrite, store_shards


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def collect(store, rows, **options):
    """(numbers, values) of a scan in one array each."""
    taken, blocks = [], []
    for part, values in store.scan(rows, **options):
        assert values.shape == (len(part), values.shape[1])
        assert values.dtype == np.float64
        taken += part
        blocks.append(values)
    return taken, np.concatenate(blocks)


def check_scan(store, rows, **options):
    taken, values = collect(store, rows, **options)
    assert sorted(taken) == list(range(len(rows)))
    np.testing.assert_array_equal(values, [numbers(rows[number].key.model) for number in taken])


# ------------------------------------------------------------------------------ what comes


@pytest.mark.parametrize("block_rows", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("group_rows", [1, 4, 1000])
def test_every_row_comes_once_in_blocks_of_the_size_asked_for(store, block_rows, group_rows):
    for model in ("x", "y"):
        store.add(make_result(model))
    add_together(store, [f"m{each:02}" for each in range(19)])
    for shard in store_shards(store):
        rewrite(shard, row_group_size=group_rows)
    rows = store.rows()
    check_scan(store, rows, block_bytes=8 * N * block_rows)
    sizes = [len(part) for part, _ in store.scan(rows, block_bytes=8 * N * block_rows)]
    assert max(sizes) == min(max(1, block_rows), 21)
    assert len(set(sizes[:-1])) <= 1, "only the last block is smaller"


def test_some_rows_in_any_order_and_twice(store):
    add_together(store, [f"m{each}" for each in range(9)])
    store.add(make_result("x"))
    rows = store.rows()
    check_scan(store, [rows[7], rows[9], rows[2], rows[7], rows[0]], block_bytes=16 * N)
    assert list(store.scan([])) == []


def test_blocks_belong_to_the_caller(store):
    add_together(store, ["a", "b", "c"])
    blocks = []
    for _, values in store.scan(store.rows(), block_bytes=8 * N):
        values += 1
        blocks.append(values)
    np.testing.assert_array_equal(np.concatenate(blocks), [numbers(each) + 1 for each in "abc"])


@given(
    shards=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    block_rows=st.integers(1, 7),
    group_rows=st.integers(1, 4),
    compact_after=st.integers(0, 12),
    data=st.data(),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_scan_gives_what_was_stored(
    tmp_path_factory, shards, block_rows, group_rows, compact_after, data
):
    store = Store(tmp_path_factory.mktemp("scan") / "store")
    for number, size in enumerate(shards):
        add_together(store, [f"{number} {each}" for each in range(size)])
    for shard in store_shards(store):
        rewrite(shard, row_group_size=group_rows)
    rows = data.draw(st.lists(st.sampled_from(store.rows()), min_size=1, max_size=12))
    taken = []
    for part, values in store.scan(rows, block_bytes=8 * N * block_rows):
        np.testing.assert_array_equal(values, [numbers(rows[each].key.model) for each in part])
        taken += part
        if len(taken) >= compact_after:
            store.compact()
    assert sorted(taken) == list(range(len(rows)))


# ------------------------------------------------------------------------------ meanwhile


def test_rows_that_a_compaction_moves_are_found_again(store):
    for model in "abcdef":
        store.add(make_result(model))
    rows = store.rows()
    scan = store.scan(rows, block_bytes=8 * N)
    taken = [next(scan)[0][0]]
    store.add(make_result("f", loglikelihoods=numbers("newer")))
    store.compact()
    values = {}
    for part, block in scan:
        taken += part
        values |= {rows[number].key.model: row for number, row in zip(part, block, strict=True)}
        store.add(make_result("g"))
        store.compact()
    assert sorted(taken) == list(range(6))
    np.testing.assert_array_equal(values.pop("f"), numbers("newer"))
    assert len(values) == 4
    for model, row in values.items():
        np.testing.assert_array_equal(row, numbers(model))


def test_a_shard_that_is_open_is_read_to_its_end(store):
    add_together(store, ["a", "b", "c"])
    scan = store.scan(store.rows(), block_bytes=8 * N)
    next(scan)
    for shard in store_shards(store):
        shard.unlink()
    assert len(list(scan)) == 2


def test_a_shard_that_goes_while_it_is_open_is_read_on_where_its_rows_are_now(store, monkeypatch):
    """As on NFS, when another machine has compacted meanwhile."""
    add_together(store, [f"m{each}" for each in range(9)])
    rewrite(store_shards(store)[0], row_group_size=2)
    store.add(make_result("x"))
    rows, own, gone = store.rows(), pq.ParquetFile.iter_batches, []

    def iter_batches(self, *arguments, row_groups, **options):
        if row_groups == [2] and not gone:
            gone.append(True)
            assert store.compact() == 2
            raise OSError(errno.ESTALE, "Stale file handle")
        return own(self, *arguments, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    check_scan(store, rows, block_bytes=8 * N)
    assert gone


def test_a_row_that_is_gone_is_said_to_be(store):
    for model in "abc":
        store.add(make_result(model))
    scan = store.scan(store.rows(), block_bytes=8 * N)
    next(scan)
    store_shards(store)[2].unlink()
    next(scan)
    with pytest.raises(StoreError, match="must hold the result of c, got none any more"):
        next(scan)


# ------------------------------------------------------------------------------ what is refused


def replace_numbers(shard, values):
    table = pq.read_table(shard, partitioning=None)
    place = table.column_names.index("loglikelihoods")
    column = pa.array(values, SCHEMA.field("loglikelihoods").type)
    pq.write_table(table.set_column(place, table.schema.field(place), column), shard)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-1.0] * (N - 1), r"must have 8 loglikelihoods a model, got 7 for b"),
        (None, r"must have 8 loglikelihoods a model, got 0 for b"),
        ([np.nan] + [-1.0] * (N - 1), r"must be finite, got a NaN or inf for b in .*parquet; move"),
        ([-1.0] * (N - 1) + [-np.inf], r"must be finite, got a NaN or inf for b"),
        ([None] + [-1.0] * (N - 1), r"must be finite, got a NaN or inf for b"),
    ],
)
def test_numbers_that_cannot_be_are_refused(store, values, message):
    add_together(store, ["a", "b", "c"])
    (shard,) = store_shards(store)
    replace_numbers(shard, [numbers("a").tolist(), values, numbers("c").tolist()])
    for read in (lambda: list(store.scan(store.rows())), store.matrix):
        with pytest.raises(StoreError, match=message) as caught:
            read()
        assert str(shard) in str(caught.value)
        assert "\n" not in str(caught.value)
    # What is not asked for is not looked at.
    a, _, c = store.rows()
    assert collect(store, [a, c])[0] == [0, 1]


def test_a_damaged_page_is_refused_where_it_is_needed(store):
    add_together(store, ["a", "b", "c", "d"], n=100)
    (shard,) = store_shards(store)
    rewrite(shard, row_group_size=2, compression="zstd", write_page_checksum=True)
    rows = store.rows()
    column = pq.ParquetFile(shard).metadata.row_group(1).column(9)
    assert column.path_in_schema.startswith("loglikelihoods")
    data = bytearray(shard.read_bytes())
    data[column.dictionary_page_offset + 100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="must be a whole shard.*move it away") as caught:
        list(store.scan(rows))
    assert str(shard) in str(caught.value)
    taken, values = collect(store, rows[:2])
    assert taken == [0, 1]
    np.testing.assert_array_equal(values, [numbers("a", 100), numbers("b", 100)])


def test_rows_without_numbers_and_of_two_text_sets_are_refused(store):
    store.add(make_result("a"))
    store.add(make_result("b", textset_digest="e" * 64))
    store.add_failure(make_result("c").key, "truncated")
    a, b, c = store.rows()
    with pytest.raises(ValueError, match="rows must be on one text set, got another for b"):
        store.scan([a, b])
    with pytest.raises(ValueError, match="must be complete, got the failure of c: truncated"):
        store.scan([a, c])


# ------------------------------------------------------------------------------ memory


def test_shards_are_written_in_small_row_groups(store, monkeypatch):
    monkeypatch.setattr("llfast.shards.GROUP_BYTES", 5 * 8 * N)
    models = [f"m{each:02}" for each in range(12)]
    add_together(store, models)
    (shard,) = store_shards(store)
    footer = pq.ParquetFile(shard).metadata
    assert [footer.row_group(each).num_rows for each in range(3)] == [5, 5, 2]
    check_scan(store, store.rows())
    assert store.matrix().models == tuple(models)
    assert [store.load(row).values.tolist() for row in store.rows()] == [
        numbers(model).tolist() for model in models
    ]

"""A store that is larger than memory is read in a memory of its own, measured in a process."""

import pyarrow.parquet as pq
import pytest

from llfast import Store
from tests.stores import add_together, numbers, rewrite, run_python, store_shards

MODELS = TEXTS = 2000  # 32 MB of numbers

# Arrow's own allocator keeps what was freed, up to some tens of MB.
PEAK = """
import os, sys
from pathlib import Path
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
import pyarrow as pa
from llfast import Store

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
"""

SCAN = (
    PEAK
    + """
def scan(store):
    rows = store.rows()
    count, total = 0, 0.0
    for numbers, values in store.scan(rows, block_bytes=1 << 20):
        assert values.nbytes <= 1 << 20
        count, total = count + len(numbers), total + values.sum()
    assert count == len(rows)
    return total

scan(Store(sys.argv[1]))  # which loads what it takes to read at all
before = peak_bytes()
total = scan(Store(sys.argv[2]))
print(peak_bytes() - before, pa.default_memory_pool().max_memory(), total)
"""
)


@pytest.fixture
def stores(tmp_path):
    """A store of a few models, and one of many."""
    small, large = Store(tmp_path / "small"), Store(tmp_path / "large")
    add_together(small, ["m0", "m1"], n=TEXTS)
    add_together(large, [f"m{each}" for each in range(MODELS)], n=TEXTS)
    return small, large


def test_a_large_row_group_is_read_in_little_memory(stores):
    (shard,) = store_shards(stores[1])
    rewrite(shard, compression="zstd", write_page_checksum=True)
    assert pq.ParquetFile(shard).metadata.num_row_groups == 1
    assert shard.stat().st_size > 25 << 20
    run = run_python(SCAN, *(store.folder for store in stores))
    resident, arrow, total = run.stdout.split()
    expected = sum(numbers(f"m{each}", TEXTS).sum() for each in range(MODELS))
    assert float(total) == pytest.approx(expected, rel=1e-12)
    assert int(arrow) < 6 << 20, "a quarter of a block, pages, and the rows' names"
    assert int(resident) < 20 << 20


COMPACT = (
    PEAK
    + """
from llfast import compaction

def compact(store, shards):
    compaction.GROUP_BYTES, compaction.SHARD_BYTES = 1 << 20, 8 << 20
    assert store.compact() == shards

compact(Store(sys.argv[1]), 2)
before = peak_bytes()
compact(Store(sys.argv[2]), 6)
print(peak_bytes() - before, pa.default_memory_pool().max_memory())
"""
)


def test_shards_are_merged_in_little_memory(stores):
    small, large = stores
    add_together(small, ["m2"], n=TEXTS)
    for part in range(5):
        add_together(large, [f"{part} {each}" for each in range(100)], n=TEXTS)
    for shard in store_shards(large):
        rewrite(shard, compression="zstd", write_page_checksum=True)  # as one row group
    run = run_python(COMPACT, *(store.folder for store in stores))
    resident, arrow = map(int, run.stdout.split())
    assert arrow < 14 << 20, "a row group twice, a quarter of one, pages, and what writing takes"
    assert resident < 36 << 20, "of 50 MB of numbers, and with the names of 2,500 rows"
    assert len(store_shards(large)) > 3
    matrix = large.matrix()
    assert len(matrix) == MODELS + 500
    for number in (0, 777, len(matrix) - 1):
        assert matrix.values[number].tolist() == numbers(matrix.models[number], TEXTS).tolist()

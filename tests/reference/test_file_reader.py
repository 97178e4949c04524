"""The reader of extents against Python's own reads, on real files."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from llfast._native import FileReader, Memory
from tests.extents import (
    MIB,
    SIZES,
    cached_bytes,
    check,
    laid_out,
    make_cold,
    make_file,
    make_files,
    opened,
    rows,
    view,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Skips where a file cannot be read past the page cache, or does not leave it."""
    path = make_file(tmp_path_factory.mktemp("disk") / "probe", 4096)
    with contextlib.suppress(OSError), opened(path, os.O_RDONLY | os.O_DIRECT):
        make_cold([path])
        if cached_bytes(path) == 0:
            return
    pytest.skip("needs temporary files on a file system with direct reads and a page cache")


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("chunk_bytes", [4096, 3 * 4096, 8 * MIB])
def test_whole_files(files, chunk_bytes, direct, cold):
    for aligned in (False, True):
        extents = laid_out([(i, 0, size) for i, size in enumerate(SIZES)], lies_as_blocks=aligned)
        check(files, extents, chunk_bytes=chunk_bytes, direct=direct, cold=cold)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_edges_of_blocks_and_chunks(files, threads, direct, cold):
    edges = [0, 1, 4095, 4096, 4097, 8192, 65535, 65536, 65537, 262_144, 300_001]
    cases = [(6, begin, end - begin) for begin in edges for end in edges if begin <= end]
    cases += [(6, SIZES[6] - tail, tail) for tail in edges]
    for lies_as_blocks in (False, True, None):
        extents = laid_out(cases, lies_as_blocks=lies_as_blocks)
        for chunk_bytes in (4096, 65536):
            # One at a time, so that nothing is read together, and all at once.
            options = {"threads": threads, "chunk_bytes": chunk_bytes, "direct": direct}
            check(files, extents, cold=cold, **options)
    for extent in extents[:: max(1, len(extents) // 12)]:
        check(files, extent[None], cold=cold, **options)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("order", ["sorted", "shuffled", "twice", "overlapping"])
def test_rows_of_a_table(files, order, direct):
    random = np.random.default_rng(1)
    row = 1031
    offsets = random.choice(SIZES[6] // row, 1500, replace=False) * row
    if order == "sorted":
        offsets = np.sort(offsets)
    if order == "twice":
        offsets = random.permutation(np.concatenate([offsets, offsets]))
    sizes = np.full(len(offsets), row)
    if order == "overlapping":
        sizes = np.minimum(random.integers(0, 20_000, len(offsets)), SIZES[6] - offsets)
    extents = laid_out([(6, offset, size) for offset, size in zip(offsets, sizes, strict=True)])
    for chunk_bytes in (4096, 64 * 4096, 8 * MIB):
        check(files, extents, direct=direct, chunk_bytes=chunk_bytes, cold=True)
    check(files, extents, direct=direct)


def test_rows_near_each_other_are_read_together_and_far_ones_are_not(tmp_path, disk):
    path = make_file(tmp_path / "table", 4 * MIB)
    near = laid_out([(0, offset, 100) for offset in range(0, 2 * MIB, 20_480)])
    assert check([path], near, cold=True).read_bytes == 2_088_960 + 4096
    far = laid_out([(0, offset, 100) for offset in range(0, 4 * MIB, 65_536)])
    assert check([path], far, cold=True).read_bytes == 64 * 4096


def test_several_files_in_any_order(files):
    extents = [(i, size // 3, size // 2) for i, size in enumerate(SIZES)] * 3
    np.random.default_rng(2).shuffle(extents)
    for direct in (False, True):
        check(files, laid_out(extents), direct=direct, threads=5, cold=True)


def test_neighbours_in_file_and_memory_are_one_read(tmp_path, disk):
    path = make_file(tmp_path / "file", MIB)
    extents = rows(*((0, i * 1000, 1000, 4096 + i * 1000) for i in range(1000)))
    assert check([path], extents, cold=True).read_bytes == 245 * 4096


def test_nothing_to_read(files):
    assert check(files, rows()).read_bytes == 0
    statistics = check(files, rows((6, 5, 0, 0), (0, 0, 0, 5000), (6, SIZES[6] + 9, 0, 1)))
    assert (statistics.bytes, statistics.read_bytes, statistics.cached_bytes) == (0, 0, 0)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_file_in_memory():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = make_file(Path(folder) / "file", 300_001)
        extents = laid_out([(0, 0, 300_001), (0, 5, 10), (0, 4096, 8192), (0, 299_999, 2)])
        for direct in (False, True):
            statistics = check([path], extents, direct=direct)
            assert statistics.read_bytes + statistics.cached_bytes >= statistics.bytes


@pytest.mark.parametrize("offset", [0, 1000])
def test_statistics_say_where_bytes_come_from(tmp_path, disk, offset):
    path = make_file(tmp_path / "file", 4 * MIB)
    extents = rows((0, offset, 3 * MIB, 4096))
    blocks = 3 * MIB + (4096 if offset else 0)
    cold = check([path], extents, cold=True, chunk_bytes=4 * MIB)
    assert (cold.read_bytes, cold.cached_bytes) == (blocks, 0)
    again = check([path], extents, cold=True, chunk_bytes=4 * MIB)
    assert (again.read_bytes, again.cached_bytes) == (blocks, 0)
    warm = check([path], extents)  # it has been read for comparison
    assert (warm.read_bytes, warm.cached_bytes) == (0, 3 * MIB)


def test_reads_leave_nothing_in_the_page_cache_and_take_each_byte_once(tmp_path, disk):
    path = make_file(tmp_path / "file", 16 * MIB)
    memory = Memory(16 * MIB)
    make_cold([path])
    reader = FileReader([path], chunk_bytes=MIB)
    for _ in range(2):
        before = bytes_from_disk()
        statistics = reader.read(memory, rows((0, 0, 16 * MIB, 0)))
        assert statistics.read_bytes == 16 * MIB
        assert bytes_from_disk() - before <= 16.5 * MIB
    assert view(memory).tobytes() == path.read_bytes()


def bytes_from_disk():
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def test_what_is_cached_in_part(tmp_path, disk):
    path = make_file(tmp_path / "file", 8 * MIB)
    expected = path.read_bytes()
    memory = Memory(8 * MIB)
    make_cold([path])
    with opened(path, os.O_RDONLY) as file:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file, 2 * MIB, 0)
    statistics = FileReader([path]).read(memory, rows((0, 0, 8 * MIB, 0)))
    assert (statistics.read_bytes, statistics.cached_bytes) == (6 * MIB, 2 * MIB)
    assert view(memory).tobytes() == expected


def test_what_was_just_written(tmp_path):
    path = make_file(tmp_path / "file", MIB + 1)
    check([path], laid_out([(0, 0, MIB + 1)]))
    reader, memory = FileReader([path]), Memory(2 * MIB)
    with path.open("r+b") as file:
        file.seek(5)
        file.write(b"new bytes")
        file.seek(0, os.SEEK_END)
        file.write(bytes(8191) + b"!")
    reader.read(memory, rows((0, 0, MIB + 8193, 7)))
    assert view(memory)[7 : MIB + 8200].tobytes() == path.read_bytes()


def test_two_threads_share_a_reader(files):
    expected = files[6].read_bytes()
    reader = FileReader(files, threads=2, chunk_bytes=65536)
    memories = [Memory(SIZES[6]) for _ in range(4)]
    make_cold(files)
    threads = [
        threading.Thread(target=reader.read, args=(memory, rows((6, 0, SIZES[6], 0))))
        for memory in memories
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [view(memory).tobytes() == expected for memory in memories] == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_chunk_of_more_than_one_call_reads(tmp_path, cold):
    """Linux reads at most 2 GiB - 4 KiB in a call; the rest of a chunk takes another."""
    size = 2**31 + 10_001
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for place in (1, 4095, 2**31 - 4097, 2**31 - 4096, 2**31, size - 1):
            file.seek(place)
            file.write(b"%d" % (place % 7))
    memory = Memory(size + 4096)
    make_cold([path] if cold else [])
    for offset in (0, 1):
        for destination in (offset, 9):
            extents = rows((0, offset, size - offset, destination))
            FileReader([path], chunk_bytes=2**32).read(memory, extents)
            got = view(memory)[destination : destination + size - offset]
            assert np.array_equal(got, np.memmap(path, np.uint8)[offset:])

"""The reader of extents over drawn files, extents and settings."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llfast._native import FileReader, Memory

BLOCK = 4096
LENGTHS = st.one_of(
    st.integers(0, 300_000),
    st.builds(
        lambda blocks, more: max(0, blocks * BLOCK + more), st.integers(0, 50), st.integers(-2, 2)
    ),
)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(LENGTHS, min_size=1, max_size=3),
    extents=st.lists(st.tuples(st.integers(0, 2), LENGTHS, LENGTHS, LENGTHS), max_size=30),
    threads=st.integers(1, 8),
    chunk_blocks=st.integers(1, 40),
    direct=st.booleans(),
)
def test_extents(folder, sizes, extents, threads, chunk_blocks, direct):
    files = [np.random.default_rng(size).bytes(size) for size in sizes]
    paths = [folder / str(i) for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    end, rows, expected = 0, [], bytearray()
    for number, offset, size, gap in extents:
        data = files[number % len(files)][offset : offset + size]
        end += gap
        rows.append((number % len(files), offset, len(data), end))
        expected += bytes(gap) + data
        end += len(data)
    memory = Memory(end + 1)
    reader = FileReader(paths, threads=threads, chunk_bytes=chunk_blocks * BLOCK, direct=direct)
    statistics = reader.read(memory, np.array(rows, np.int64).reshape(-1, 4))
    assert bytes(memoryview(memory)) == bytes(expected) + b"\0"
    assert statistics.bytes == sum(row[2] for row in rows)

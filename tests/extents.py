"""Files, and extents of them that are compared with what Python reads."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llfast._native import FileReader, Memory

SIZES = [0, 1, 4095, 4096, 4097, 100_003, 2_500_001]
MIB = 1 << 20
_CANARY = 0xA5


def make_file(path, size, seed=0):
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


def rows(*extents):
    return np.array(extents, np.int64).reshape(-1, 4)


def view(memory):
    return np.frombuffer(memory, np.uint8)


def laid_out(extents, *, lies_as_blocks=None):
    """Rows of (file, offset, size) with destinations after each other, and a gap after each."""
    end, result = 3, []
    for i, (file, offset, size) in enumerate(extents):
        if lies_as_blocks or (lies_as_blocks is None and i % 2):
            end += (offset - end) % 4096
        result.append((file, offset, size, end))
        end += size + 1 + i % 7
    return rows(*result)


def check(paths, extents, **options):
    """Reads, and compares each byte of memory, also those that no extent goes to."""
    files = [Path(path).read_bytes() for path in paths]
    memory = Memory(int((extents[:, 2] + extents[:, 3]).max(initial=0)) + 5000)
    view(memory)[:] = _CANARY
    expected = np.full(len(memory), _CANARY, np.uint8)
    for file, offset, size, destination in extents.tolist():
        data = files[file][offset : offset + size]
        assert len(data) == size
        expected[destination : destination + size] = np.frombuffer(data, np.uint8)
    if options.pop("cold", False):
        make_cold(paths)
    statistics = FileReader(paths, **options).read(memory, extents)
    np.testing.assert_array_equal(view(memory), expected)
    assert statistics.bytes == extents[:, 2].sum()
    assert statistics.seconds > 0
    return statistics


@contextmanager
def opened(path, flags):
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_cold(paths):
    for path in paths:
        with opened(path, os.O_RDONLY) as file:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(path):
    """Of a file's beginning, in the page cache; does not bring any there."""
    size = path.stat().st_size
    with opened(path, os.O_RDONLY) as file:
        came = 0
        while came < size:
            try:
                read = os.preadv(file, [bytearray(min(4096, size - came))], came, os.RWF_NOWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                return size  # a file system in memory
            came += read
    return came


def make_files(folder):
    """One of each size."""
    return [make_file(folder / str(size), size, size) for size in SIZES]

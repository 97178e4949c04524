"""The reader of extents where something is wrong, changes, or ends early; its memory."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from llfast._native import FileReader, Memory
from tests.extents import MIB, check, laid_out, make_cold, make_file, make_files, rows, view

NOBODY = 65534


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def somebody_else():
    """Root, who may do anything, becomes a user who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_folder():
    """A folder that others may look into, unlike those that pytest makes."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_may_not_know_what_is_cached(public_folder, somebody_else):
    os.seteuid(0)
    path = make_file(public_folder / "file", MIB)
    os.seteuid(NOBODY)
    statistics = FileReader([path]).read(Memory(MIB), rows((0, 0, MIB, 0)))
    assert (statistics.read_bytes, statistics.cached_bytes) == (MIB, 0)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("size", [0, 1, 4096, 70_001])
def test_file_that_ends_too_early(tmp_path, size, direct, cold):
    whole = make_file(tmp_path / "whole", 100_000)
    path = make_file(tmp_path / "shört", size)
    for offset, chunk_bytes in [(0, 4096), (4000, 8192), (65_536, MIB), (90_000, MIB)]:
        if cold:
            make_cold([path])
        reader = FileReader([whole, path], direct=direct, chunk_bytes=chunk_bytes)
        memory = Memory(200_000)
        extents = rows((0, 0, 100_000, 0), (1, offset, 99_000 - offset, 100_001))
        with pytest.raises(EOFError) as caught:
            reader.read(memory, extents)
        assert str(caught.value) == f"{path} ends at byte {size}, where 99000 were expected"
        assert not view(memory)[199_001 - offset :].any()


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_file_cut_while_open(tmp_path, direct):
    path = make_file(tmp_path / "file", 3 * MIB)
    reader = FileReader([path], direct=direct)
    os.truncate(path, MIB + 5)
    with pytest.raises(EOFError, match=f"ends at byte {MIB + 5}, where {3 * MIB} were expected"):
        reader.read(Memory(3 * MIB), rows((0, 0, 3 * MIB, 0)))


def test_a_read_that_the_system_refuses():
    """Nothing lies at the beginning of a process's memory, and to read there is an EIO."""
    reader = FileReader(["/proc/self/mem"])
    with pytest.raises(OSError, match="Input/output error at byte 0") as caught:
        reader.read(Memory(4096), rows((0, 0, 4096, 0)))
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "/proc/self/mem")


def test_files_that_cannot_be_opened(tmp_path):
    def error_of(path):
        with pytest.raises(OSError, match=".") as caught:
            FileReader([make_file(tmp_path / "good", 5), path])
        assert caught.value.filename == str(path)
        return caught.value

    missing = error_of(tmp_path / "missing")
    assert type(missing) is FileNotFoundError
    assert str(missing) == f"[Errno 2] No such file or directory: '{tmp_path}/missing'"
    assert type(error_of(tmp_path)) is IsADirectoryError
    assert type(error_of(tmp_path / "good" / "below")) is NotADirectoryError
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in str(error_of(tmp_path / "pipe"))
    assert "too long" in str(error_of(tmp_path / ("x" * 300)))


def test_file_that_may_not_be_read(public_folder, somebody_else):
    if os.geteuid() == NOBODY:
        os.seteuid(0)
    path = make_file(public_folder / "secret", 10)
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    with pytest.raises(PermissionError) as caught:
        FileReader([path])
    assert caught.value.filename == str(path)


def test_path_of_any_bytes(tmp_path):
    path = make_file(tmp_path / os.fsdecode(b"no\xff\xfeutf-8"), 100)
    check([str(path)], laid_out([(0, 3, 90)]))
    reader = FileReader([os.fsencode(path)])
    with pytest.raises(EOFError, match="ends at byte 100"):
        reader.read(Memory(200), rows((0, 0, 101, 0)))
    path.unlink()
    assert reader.changed() == str(path)


@pytest.mark.parametrize(
    ("extent", "message"),
    [
        ((2, 0, 1, 0), "extent 1 must be of one of 2 files, got number 2"),
        ((-1, 0, 1, 0), "must be of one of 2 files, got number -1"),
        ((0, -1, 1, 0), "must lie in a file, got offset -1 and size 1"),
        ((0, 0, -1, 0), "must lie in a file, got offset 0 and size -1"),
        ((0, 2**62, 2**62, 0), "must lie in a file"),
        ((0, 2**63 - 1, 1, 0), "must lie in a file"),
        ((0, 0, 1, -1), "must go into 1000 bytes, got destination -1 and size 1"),
        ((0, 0, 1001, 0), "must go into 1000 bytes, got destination 0 and size 1001"),
        ((0, 0, 2, 999), "must go into 1000 bytes"),
        ((0, 0, 1, 2**63 - 1), "must go into 1000 bytes"),
        ((0, 0, 0, 1001), "must go into 1000 bytes"),
    ],
)
def test_extents_out_of_bounds(files, extent, message):
    memory = Memory(1000)
    with pytest.raises(ValueError, match=message):
        FileReader([files[4], files[5]]).read(memory, rows((1, 0, 500, 0), extent))
    assert not view(memory).any()


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((3, 4), np.int32), TypeError, "must be an array of int64, got items of type 'i'"),
        (np.zeros((3, 4), np.uint64), TypeError, "int64"),
        (np.zeros((3, 4), ">i8"), TypeError, "int64"),
        (np.zeros((3, 4)), TypeError, "int64"),
        (np.zeros((3, 5), np.int64), ValueError, r"of shape \(n, 4\)"),
        (np.zeros(4, np.int64), ValueError, r"of shape \(n, 4\)"),
        (np.zeros((4, 3), np.int64).T, ValueError, "C-contiguous"),
        (np.zeros((6, 4), np.int64)[::2], ValueError, "C-contiguous"),
        ([(0, 0, 1, 0)], TypeError, "incompatible function arguments"),
    ],
)
def test_arrays_of_other_kinds(files, array, error, message):
    with pytest.raises(error, match=message):
        FileReader(files).read(Memory(10), array)


def test_wrong_arguments(files):
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        FileReader(files, threads=0)
    for wrong in (0, -4096, 4095, 5000):
        with pytest.raises(
            ValueError, match=f"chunk_bytes must be a multiple of 4096, got {wrong}"
        ):
            FileReader(files, chunk_bytes=wrong)
    with pytest.raises(TypeError, match="paths must be a list, got a str"):
        FileReader(str(files[0]))
    with pytest.raises(TypeError):
        FileReader([5])
    with pytest.raises(ValueError, match="null"):
        FileReader(["a\0b"])


def test_changed(tmp_path):
    def reader_of_new_files():
        reader = FileReader([make_file(tmp_path / name, 100) for name in "ab"])
        assert reader.changed() == ""
        return reader

    path = tmp_path / "b"
    reader = reader_of_new_files()
    with path.open("ab") as file:
        file.write(b"more")
    assert reader.changed() == str(path)

    reader = reader_of_new_files()
    kept = path.stat()
    path.write_bytes(bytes(100))
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns + 1))
    assert reader.changed() == str(path)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert reader.changed() == ""

    reader = reader_of_new_files()
    kept = path.stat()
    other = make_file(tmp_path / "other", 100, seed=1)
    os.utime(other, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    other.rename(path)
    assert reader.changed() == str(path)

    reader = reader_of_new_files()
    path.unlink()
    assert reader.changed() == str(path)
    (tmp_path / "a").unlink()
    assert reader.changed() == str(tmp_path / "a")
    memory = Memory(100)
    reader.read(memory, rows((0, 0, 100, 0)))  # what is open is still there
    assert view(memory).any()


@contextmanager
def once_it_reads(memory, act):
    """Has a thread act as soon as the first byte has arrived in memory."""
    view(memory)[0] = 0

    def wait():
        while not view(memory)[0]:
            pass
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        view(memory)[0] = 1
        thread.join()


@pytest.fixture
def long_read(tmp_path):
    """The path of a file, and extents of it that take minutes."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (4 * MIB))
    return path, np.tile(rows((0, 0, 4 * MIB, 0)), (200_000, 1))


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_cancel_from_another_thread(long_read, direct):
    path, extents = long_read
    memory = Memory(4 * MIB)
    reader = FileReader([path], direct=direct)
    with once_it_reads(memory, reader.cancel):  # noqa: SIM117
        with pytest.raises(RuntimeError, match="^the reader was cancelled$"):
            reader.read(memory, extents)
    for later in (extents[:1], rows()):
        with pytest.raises(RuntimeError, match="^the reader was cancelled$"):
            reader.read(memory, later)


def test_ctrl_c(long_read):
    path, extents = long_read
    memory = Memory(4 * MIB)
    reader = FileReader([path], threads=2)
    with once_it_reads(memory, lambda: os.kill(os.getpid(), signal.SIGINT)):  # noqa: SIM117
        with pytest.raises(KeyboardInterrupt):
            reader.read(memory, extents)
    assert reader.read(memory, extents[:1]).bytes == 4 * MIB


def test_descriptors_and_maps_are_given_back(files):
    def held():
        maps = Path("/proc/self/maps").read_text()
        return len(list(Path("/proc/self/fd").iterdir())), sum(str(path) in maps for path in files)

    before = held()
    reader = FileReader(files)
    assert held()[0] > before[0]
    reader.read(Memory(5000), rows((5, 5, 5000, 0)))
    del reader
    assert held() == before
    with pytest.raises(FileNotFoundError):
        FileReader([*files, files[0].with_name("missing")])
    assert held() == before


def test_memory_is_a_buffer(files):
    memory = Memory(5001)
    assert len(memory) == 5001
    assert memory.address % 4096 == 0
    with memoryview(memory) as bytes_of:
        assert (bytes_of.format, bytes_of.nbytes, bytes_of.readonly) == ("B", 5001, False)
        assert not any(bytes_of)
    tensor = torch.frombuffer(memory, dtype=torch.int16, count=2000, offset=2)
    assert tensor.data_ptr() == memory.address + 2
    reader = FileReader(files)
    reader.read(memory, rows((5, 0, 5000, 0)))
    del memory, reader
    others = [Memory(5001) for _ in range(50)]  # would get the place if it were free
    expected = np.frombuffer(files[5].read_bytes(), np.int16, 2000, 2)
    assert torch.equal(tensor, torch.from_numpy(expected.copy()))
    assert len({memory.address for memory in others} | {tensor.data_ptr() - 2}) == 51


def test_memory_that_is_not_to_be_had():
    with pytest.raises(MemoryError, match=f"cannot get {2**60} bytes of memory"):
        Memory(2**60)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"size must be at least 1 byte, got {wrong}"):
            Memory(wrong)

"""Pages against safetensors' own reader, and files that change while they are read."""

import gc
import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llfast._native import FileReader
from llfast.dtypes import STORED_DTYPES
from llfast.errors import CannotPageError, CheckpointError
from llfast.paging import pages as pages_module
from llfast.paging.layout import Page, Part, lay_out
from llfast.paging.pages import Pages
from llfast.paging.statistics import LoadingStatistics
from llfast.safetensors_file import StoredTensor, read_header
from tests.paging import make_tensor, plain_file, same_bits

SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (5, 3), (2, 3, 4), (64, 33)]


@dataclass
class Files:
    """As much of a checkpoint as pages ask for."""

    weights: tuple[Path, ...]
    pages: dict = field(default_factory=dict)  # that were asked for, by their names

    @property
    def tensors(self):
        return {name: each for path in self.weights for name, each in read_header(path).items()}


def pages_of(files):
    return Pages(files.weights, torch.device("cpu"), LoadingStatistics())


@pytest.fixture
def files(tmp_path):
    """Two files with a dozen matrices."""
    paths = []
    for number in range(2):
        tensors = {
            f"{number}.{layer}": make_tensor(torch.float32, (40 + layer, 50), 6 * number + layer)
            for layer in range(6)
        }
        paths.append(tmp_path / f"shard-{number}.safetensors")
        save_file(tensors, paths[-1])
    return Files(tuple(paths))


def tensors_page(name, tensors):
    """A page of whole tensors, by their stored names."""
    return Page(name, {tensor.name: Part(tensor) for tensor in tensors})


def page(files, *names):
    if names not in files.pages:
        tensors = [files.tensors[name] for name in names]
        files.pages[names] = tensors_page("+".join(names), tensors)
    return files.pages[names]


def truth(files):
    return {name: each for path in files.weights for name, each in load_file(path).items()}


@pytest.mark.parametrize("dtype", sorted(STORED_DTYPES))
def test_every_dtype_and_shape(dtype, tmp_path):
    kind = STORED_DTYPES[dtype]
    tensors = {f"t{n}": make_tensor(kind, shape, n) for n, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "a.safetensors")
    files = Files((tmp_path / "a.safetensors",))
    stored = files.tensors
    assert {each.dtype for each in stored.values()} == {dtype}
    with pages_of(files) as pages:
        found = pages.take(tensors_page("all", stored.values()))
        assert found.keys() == tensors.keys()
        for name, tensor in load_file(tmp_path / "a.safetensors").items():
            same_bits(found[name], tensor)


@pytest.mark.parametrize("shift", range(8))
def test_headers_of_any_length(shift, tmp_path):
    """Numbers that do not lie on whole addresses are copied."""
    tensors = {
        "x" * (1 + shift): make_tensor(torch.uint8, (3,)),
        "f64": make_tensor(torch.float64, (5, 3), 1),
        "bf16": make_tensor(torch.bfloat16, (4,), 2),
        "c64": make_tensor(torch.complex64, (2,), 3),
    }
    files = Files((plain_file(tmp_path / "a.safetensors", tensors),))
    with pages_of(files) as pages:
        found = pages.take(tensors_page("all", files.tensors.values()))
        for name, tensor in tensors.items():
            same_bits(found[name], tensor)


def test_a_dtype_that_torch_has_not(tmp_path):
    tensor = StoredTensor("t", tmp_path / "a", "F6_E2M3", (4,), 8, 11)
    (tmp_path / "a").write_bytes(bytes(20))
    with (
        pages_of(Files((tmp_path / "a",))) as pages,
        pytest.raises(CannotPageError, match="must be of a dtype that torch has, got F6_E2M3"),
    ):
        pages.take(tensors_page("all", [tensor]))


def test_neighbours_are_one_run_and_lie_as_in_the_file(files):
    stored = files.tensors
    order = {path: number for number, path in enumerate(files.weights)}
    names = ["1.3", "0.4", "0.1", "0.0", "1.2"]
    layout = lay_out({name: Part(stored[name]) for name in names}, order)
    assert layout.extents[:, 0].tolist() == [0, 0, 1]
    runs = [("0.0", "0.1"), ("0.4", "0.4"), ("1.2", "1.3")]
    end = 0
    for (_, offset, size, place), (first, last) in zip(layout.extents.tolist(), runs, strict=True):
        assert (offset, offset + size) == (stored[first].begin, stored[last].end)
        assert place % 4096 == offset % 4096
        assert place >= end
        end = place + size
    assert layout.nbytes == end
    for name in names:
        assert layout.places[name] % 4096 == stored[name].begin % 4096


def test_a_page_over_two_files_in_any_order(files):
    with pages_of(files) as pages:
        found = pages.take(page(files, "1.5", "0.2", "1.0", "0.3"))
        assert found.keys() == {"1.5", "0.2", "1.0", "0.3"}
        for name, tensor in found.items():
            same_bits(tensor, truth(files)[name])


def test_parts_are_rows(files):
    stored = files.tensors["0.3"]
    parts = {"low": Part(stored, 0, 7), "high": Part(stored, 30, 43), "none": Part(stored, 5, 5)}
    several = Page("rows", parts)
    assert several.nbytes == 20 * 50 * 4
    with pages_of(files) as pages:
        found = pages.take(several)
        expected = truth(files)["0.3"]
        for name, part in parts.items():
            same_bits(found[name], expected[part.first : part.last])


def test_single_rows(files):
    expected = truth(files)["1.1"]
    with pages_of(files) as pages:
        for rows in ([3], [0, 40], list(range(41)), [7, 7, 2], []):
            found = pages.rows(files.tensors["1.1"], np.array(rows, dtype=np.int64))
            same_bits(found, expected[rows])
        assert pages.statistics.rows_bytes == (1 + 2 + 41 + 3) * 50 * 4


def test_rows_stay_when_the_reader_is_gone(files):
    with pages_of(files) as pages:
        found = pages.rows(files.tensors["1.1"], np.arange(5))
    del pages
    gc.collect()
    same_bits(found, truth(files)["1.1"][:5])


def test_two_slots_take_turns(files):
    expected = truth(files)
    with pages_of(files) as pages:
        addresses = set()
        names = [f"{file}.{layer}" for file in range(2) for layer in range(6)]
        for name, following in zip(names, [*names[1:], None], strict=True):
            found = pages.take(page(files, name))
            if following:
                pages.read_ahead(page(files, following))
            same_bits(found[name], expected[name])
            addresses.add(found[name].data_ptr())
            del found
            pages.release(page(files, name))
        largest = max(pages.slot_bytes(page(files, name)) for name in names)
        assert pages.statistics.slot_bytes <= 2 * largest
        assert len(pages._slots) <= 2
        assert [read.name for read in pages.statistics.pages] == names


def test_a_page_is_not_written_over_before_it_is_released(files):
    """Neither by what is read ahead, nor by what is discarded, kept or taken beside it."""
    expected = truth(files)
    with pages_of(files) as pages:
        found = pages.take(page(files, "0.0"))
        for name in ("0.1", "0.2", "0.3", "1.0"):
            pages.read_ahead(page(files, name))
        for name in ("1.1", "1.2", "1.3"):
            kept = pages.take(page(files, name), keep=True)
            same_bits(kept[name], expected[name])
        pages.rows(files.tensors["1.1"], np.arange(5))
        other = pages.take(page(files, "1.4"))
        same_bits(found["0.0"], expected["0.0"])
        same_bits(other["1.4"], expected["1.4"])
    same_bits(found["0.0"], expected["0.0"])


def test_another_page_than_was_read_ahead(files):
    with pages_of(files) as pages:
        for wrong, right in (("0.0", "0.1"), ("0.0", "1.1"), ("1.2", "0.2")):
            pages.read_ahead(page(files, wrong))
            found = pages.take(page(files, right))
            same_bits(found[right], truth(files)[right])
            pages.release(page(files, right))
        assert [read.name for read in pages.statistics.pages] == ["0.1", "1.1", "0.2"]
        assert len(pages._slots) <= 2


def test_wrong_guesses_are_not_kept(files):
    """Where pages stay, what was read ahead for nothing goes."""
    names = [f"{file}.{layer}" for file in range(2) for layer in range(6)]
    with pages_of(files) as pages:
        for right, wrong in zip(names[::2], names[1::2], strict=True):
            pages.read_ahead(page(files, wrong), keep=True)
            same_bits(pages.take(page(files, right), keep=True)[right], truth(files)[right])
        assert sum(slot.nbytes for slot in pages._slots) <= 2 * pages.slot_bytes(page(files, "0.5"))


def test_a_page_is_taken_once_and_given_back(files):
    with pages_of(files) as pages:
        pages.take(page(files, "0.0"))
        with pytest.raises(AssertionError, match=r"page 0\.0 was not released"):
            pages.take(page(files, "0.0"))
        pages.release(page(files, "0.0"))
        with pytest.raises(KeyError):
            pages.release(page(files, "0.0"))
        with pytest.raises(KeyError):
            pages.release(page(files, "0.1"))


def test_additions_lie_beside_pages(files):
    """In slots of their own, of their own size."""
    expected = truth(files)
    with pages_of(files) as pages:
        for name, addition in (("0.5", "1.0"), ("0.4", "1.1"), ("0.3", "1.0")):
            large = page(files, name, "1.5")
            small = Page(f"{addition} of another", page(files, addition).parts, is_addition=True)
            found = pages.take(large)
            pages.read_ahead(small)
            added = pages.take(small)
            pages.read_ahead(page(files, "0.2", "1.4"))
            same_bits(found[name], expected[name])
            same_bits(added[addition], expected[addition])
            del found, added
            pages.release(large)
            pages.release(small)
        largest = pages.slot_bytes(page(files, "0.5", "1.5"))
        addition = pages.slot_bytes(page(files, "1.1"))
        assert pages.statistics.slot_bytes <= 2 * (largest + addition)
        assert sum(slot.nbytes for slot in pages._slots) <= 2 * (largest + addition)


def test_memory_outlives_the_reader_and_not_the_tensors(files):
    with pages_of(files) as pages:
        slot = pages.take(page(files, "0.0"))["0.0"]
        kept = pages.take(page(files, "0.1"), keep=True)["0.1"]
        pages.read_ahead(page(files, "0.2"))
        storage = weakref.ref(pages)
    del pages
    gc.collect()
    assert storage() is None
    same_bits(slot, truth(files)["0.0"])
    same_bits(kept, truth(files)["0.1"])


def test_leaving_in_the_middle_of_a_read(files, monkeypatch):
    """The thread ends, whatever it was reading."""
    with pages_of(files) as pages:
        pages.take(page(files, "0.0"))
        pages.read_ahead(page(files, *[f"1.{layer}" for layer in range(6)]))
        threads = pages._thread._threads
    assert not any(thread.is_alive() for thread in threads)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def append(path):
    with path.open("ab") as file:
        file.write(b"more")


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def touch(path):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def write_over(path):
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"12345678")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))


CHANGED = "must stay as it is while it is scored, got another file while 1.5 was read; score it"


@pytest.mark.parametrize("how", ["take", "read ahead", "rows"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "ends at byte .* were expected, while 1.5 was read; is something still writing"),
        (append, CHANGED),
        (replace, CHANGED),
        (touch, CHANGED),
        (write_over, CHANGED),
        (Path.unlink, CHANGED),
    ],
)
def test_a_file_that_changes_is_named(files, change, message, how):
    with pages_of(files) as pages:
        pages.take(page(files, "0.0"))
        wanted, tensor = page(files, "1.5"), files.tensors["1.5"]
        change(files.weights[1])
        with pytest.raises(CheckpointError, match=message) as caught:
            if how == "rows":
                pages.rows(tensor, np.array([44]))
            if how == "read ahead":
                pages.read_ahead(wanted)
            pages.take(wanted)
        assert str(caught.value).startswith(str(files.weights[1]))
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(files, monkeypatch):
    class Broken:
        def __init__(self, paths):
            self.paths = paths

        def read(self, *_):
            raise OSError(5, "Input/output error", self.paths[1])

        def cancel(self):
            pass

    monkeypatch.setattr(pages_module, "FileReader", Broken)
    with pages_of(files) as pages, pytest.raises(CheckpointError) as caught:
        pages.take(page(files, "1.5"))
    assert str(caught.value) == (
        f"{files.weights[1]} must be readable, got Input/output error while 1.5 was read"
    )
    assert isinstance(caught.value.__cause__, OSError)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        pages_of(Files((tmp_path / "gone",)))
    assert caught.value.filename == str(tmp_path / "gone")


def test_an_error_leaves_a_reader_that_closes(files):
    with pytest.raises(CheckpointError), pages_of(files) as pages:
        truncate(files.weights[1])
        pages.read_ahead(page(Files(files.weights[:1]), "0.1"))
        stored = StoredTensor("late", files.weights[1], "F32", (9,), 10**6, 10**6 + 36)
        pages.take(tensors_page("late", [stored]))
    assert pages._ahead is None
    assert not pages._taken


def test_without_the_native_module(files, monkeypatch):
    monkeypatch.setattr(pages_module, "FileReader", None)
    with pytest.raises(CannotPageError, match="without its C\\+\\+ module; build it with"):
        pages_of(files)
    assert FileReader is not None

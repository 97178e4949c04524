"""Which tensors are equal, against a comparison of all their bytes."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llfast import cache
from llfast.checkpoint import Checkpoint
from llfast.errors import CheckpointError
from llfast.paging import LoadingStatistics, comparing, relatives, sharing
from llfast.paging.sharing import at_place, in_other_places
from llfast.safetensors_file import StoredTensor
from tests.families import age

CONFIG = '{"model_type": "llama"}'


def make(folder, tensors, config=CONFIG):
    """A folder that `Checkpoint.open` takes; the files are old."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    save_file(tensors, folder / "model.safetensors")
    age(folder)
    return Checkpoint.open(folder)


def numbers(seed, count=10_000):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(count, dtype=np.float32))


def changed(tensor, place):
    copy = tensor.clone()
    copy[place] += 1
    return copy


def find_equals(checkpoints, statistics=None):
    """For each checkpoint the tensors that an earlier one has, too, by that name."""
    contents = comparing.contents_of(checkpoints, statistics or LoadingStatistics())
    return sharing._equals(checkpoints, contents, range(len(checkpoints)))


@pytest.fixture
def family(tmp_path):
    """What each has of a and b: by letters, the same letter for the same numbers."""
    base = numbers(0)
    a = {"x": base, "y": changed(base, 0), "z": changed(base, -1), "w": numbers(1)}
    b = {"x": numbers(2), "y": numbers(3)}
    kinds = ["xx", "yx", "xy", "zx", "wy", "xx", "yy"]
    return kinds, [
        make(tmp_path / str(number), {"a": a[kind[0]].clone(), "b": b[kind[1]].clone()})
        for number, kind in enumerate(kinds)
    ]


def test_the_first_of_all_that_are_equal(family):
    """Also where only the first or the last of many numbers differs."""
    kinds, checkpoints = family
    statistics = LoadingStatistics()
    found = find_equals(checkpoints, statistics)
    for number, (kind, equals) in enumerate(zip(kinds, found, strict=True)):
        for place, name in enumerate("ab"):
            first = next(n for n, each in enumerate(kinds) if each[place] == kind[place])
            expected = None if first == number else checkpoints[first].tensors[name]
            assert equals.get(name) == expected, (number, name)
    assert statistics.compared_bytes == 6 * 40_000 + 7 * 40_000, "w differs in its sample"


def test_digests_are_remembered(family):
    _, checkpoints = family
    first = find_equals(checkpoints[:2])
    statistics = LoadingStatistics()
    assert find_equals(checkpoints[:2], statistics) == first
    assert statistics.compared_bytes == 0
    find_equals(checkpoints, statistics)
    assert 0 < statistics.compared_bytes <= 5 * 80_000
    again = LoadingStatistics()
    find_equals(checkpoints, again)
    assert again.compared_bytes == 0


def test_a_file_that_was_written_over_is_read_again(tmp_path):
    one = make(tmp_path / "one", {"a": numbers(0)})
    two = make(tmp_path / "two", {"a": numbers(0)})
    assert find_equals([one, two])[1]
    shutil.rmtree(tmp_path / "two")
    two = make(tmp_path / "two", {"a": changed(numbers(0), 0)})
    os.utime(two.weights[0], (2e9, 1e9 + 1))
    assert not find_equals([one, two])[1]


def test_what_was_just_written_is_not_remembered(tmp_path):
    checkpoints = [make(tmp_path / name, {"a": numbers(0)}) for name in ("one", "two")]
    for each in checkpoints:
        each.weights[0].touch()
    for _ in range(2):
        statistics = LoadingStatistics()
        find_equals(checkpoints, statistics)
        assert statistics.compared_bytes == 2 * 40_000


def test_links_to_one_file_need_no_reading(tmp_path):
    """As the Hub's cache has them."""
    make(tmp_path / "one", {"a": numbers(0), "b": numbers(1)})
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.json").write_text(CONFIG)
    (tmp_path / "two" / "model.safetensors").symlink_to(tmp_path / "one" / "model.safetensors")
    checkpoints = [Checkpoint.open(tmp_path / name) for name in ("one", "two")]
    statistics = LoadingStatistics()
    _, equals = find_equals(checkpoints, statistics)
    assert equals == dict(checkpoints[0].tensors)
    assert statistics.compared_bytes == 0


@pytest.mark.parametrize(
    "other",
    [
        numbers(0).view(100, 100),
        numbers(0).view(torch.int32),
        numbers(0)[:-1],
        torch.zeros(0),
    ],
    ids=["shape", "dtype", "length", "nothing"],
)
def test_equal_bytes_of_another_shape_or_dtype(other, tmp_path):
    checkpoints = [
        make(tmp_path / "one", {"a": numbers(0)}),
        make(tmp_path / "two", {"a": other.clone()}),
    ]
    assert find_equals(checkpoints) == [{}, {}]


def test_empty_tensors_and_scalars(tmp_path):
    tensors = {"e": torch.zeros(0, 4), "s": torch.tensor(3.0)}
    checkpoints = [make(tmp_path / name, dict(tensors)) for name in ("one", "two")]
    assert set(find_equals(checkpoints)[1]) == {"s"}


def test_a_file_that_is_cut_short_or_gone(tmp_path):
    checkpoints = [make(tmp_path / name, {"a": numbers(0)}) for name in ("one", "two")]
    path = checkpoints[1].weights[0]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="two/model.safetensors must hold .* while a was"):
        find_equals(checkpoints)
    path.unlink()
    with pytest.raises(CheckpointError, match="must be readable, got No such file"):
        find_equals(checkpoints)


def test_a_file_that_goes_between_a_look_and_a_digest(tmp_path, monkeypatch):
    checkpoints = [make(tmp_path / name, {"a": numbers(0)}) for name in ("one", "two")]
    own = comparing._digests

    def remove(tensors):
        checkpoints[1].weights[0].unlink()
        return own(tensors)

    monkeypatch.setattr(comparing, "_digests", remove)
    with pytest.raises(CheckpointError, match="must be readable, got No such file"):
        find_equals(checkpoints)


@pytest.mark.parametrize(
    "arrays",
    [
        {"begins": np.array(5), "sha256s": np.zeros((1, 32), np.uint8)},
        {"begins": np.array([72]), "sha256s": np.zeros(32, np.uint8)},
        {"begins": np.array([72]), "sha256s": np.zeros((2, 32), np.uint8)},
        {"begins": np.array([72.0]), "sha256s": np.zeros((1, 32), np.uint8)},
        {"begins": np.array([72]), "sha256s": np.array(["0" * 64])},
        {"begins": np.array([72])},
        {},
    ],
)
def test_a_damaged_cache_costs_time_only(tmp_path, arrays):
    checkpoints = [make(tmp_path / name, {"a": numbers(0)}) for name in ("one", "two")]
    expected = find_equals(checkpoints)
    for each in checkpoints:
        cache.save_arrays(cache.file_key("tensors", each.weights[0])[0], **arrays)
    statistics = LoadingStatistics()
    assert find_equals(checkpoints, statistics) == expected
    assert statistics.compared_bytes == 2 * 40_000


def test_an_interrupt_does_not_wait_for_whole_files(tmp_path, monkeypatch):
    """Nor is what was not read to its end remembered."""
    checkpoints = [make(tmp_path / name, {"a": numbers(0)}) for name in ("one", "two")]
    monkeypatch.setattr(comparing, "_CHUNK_BYTES", 100)
    own, asked = comparing._file_digests, threading.Event()

    def first_fails(tensors, *, stop):
        if tensors[0].path == checkpoints[0].weights[0]:
            asked.wait(5)
            raise KeyboardInterrupt
        asked.set()
        assert stop.wait(5)
        return own(tensors, stop=stop)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(comparing, "_file_digests", first_fails)
        find_equals(checkpoints)
    statistics = LoadingStatistics()
    assert find_equals(checkpoints, statistics)[1]
    assert statistics.compared_bytes == 2 * 40_000


def numbers_of(checkpoints):
    """Of each group; what they share must be what comparing its members alone says."""
    found = relatives(checkpoints, LoadingStatistics())
    for group in found:
        assert list(group.equals) == find_equals([checkpoints[each] for each in group.numbers])
    return [group.numbers for group in found]


def test_relatives_are_who_shares_bytes(tmp_path):
    def one(name, a, b, config=CONFIG):
        return make(tmp_path / name, {"a": numbers(a), "b": numbers(b, 100)}, config)

    checkpoints = [
        one("base", 1, 1),
        one("stranger", 2, 1),  # it shares less than a twentieth
        one("tuned", 1, 2),
        one("other kind", 1, 1, '{"model_type": "gpt2"}'),
        one("of the stranger", 2, 3),
        make(tmp_path / "other shape", {"a": numbers(1).view(100, 100), "b": numbers(1, 100)}),
        make(tmp_path / "other names", {"a": numbers(1), "c": numbers(1, 100)}),
        make(tmp_path / "more words", {"a": numbers(1), "b": numbers(1, 108)}),
    ]
    assert numbers_of(checkpoints) == [(0, 2, 7), (1, 4), (3,), (5,), (6,)]
    assert numbers_of([]) == []
    assert numbers_of([checkpoints[0]] * 2) == [(0, 1)]


def test_relatives_of_relatives(tmp_path):
    """0 and 2 share with 1, but not with one another."""
    checkpoints = [
        make(tmp_path / str(n), {"a": numbers(a), "b": numbers(b)})
        for n, (a, b) in enumerate([(1, 2), (3, 4), (1, 4), (5, 6)])
    ]
    assert numbers_of(checkpoints) == [(0, 1, 2), (3,)]


def test_groups_that_open_too_many_files(tmp_path, monkeypatch):
    checkpoints = [make(tmp_path / str(n), {"a": numbers(0)}) for n in range(5)]
    monkeypatch.setattr(sharing, "_MOST_FILES", 2)
    assert numbers_of(checkpoints) == [(0, 1), (2, 3), (4,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
@pytest.mark.parametrize("begin", [0, 8, 16, 56, 64, 4088, 1 << 40])
def test_at_place(dtype, begin):
    tensor = torch.arange(24).view(4, 6).to(dtype)
    moved = at_place(tensor, begin)
    assert moved.data_ptr() % 64 == begin % 64
    assert torch.equal(moved, tensor)
    assert moved.dtype == dtype
    assert at_place(moved, begin) is moved


def test_on_a_device_tensors_stay_where_they_are():
    """There they lie on whole addresses, alone as together, which no file's offsets are."""
    tensor = torch.ones(20, device="meta")
    assert at_place(tensor, 8) is tensor
    own, read = (StoredTensor("a", Path(), "F32", (20,), begin, begin + 80) for begin in (8, 64))
    assert in_other_places([own], {"a": read}, torch.device("cpu"))
    assert not in_other_places([own], {"a": read}, torch.device("cuda"))


def test_at_place_leaves_what_cannot_lie_there():
    tensor = torch.ones(5)
    assert at_place(tensor, 2).data_ptr() % 64 == 0, "a copy of it lies so"
    assert torch.equal(at_place(tensor, 2), tensor)
    assert at_place(torch.ones(0), 8).numel() == 0

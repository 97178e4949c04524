"""Files that are whole or not there, what is remembered of them, and runs that go on."""

import hashlib
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llfast import TextSet, cache
from llfast.batches import Batch, given_tokens
from llfast.files import atomic_write, read_npz
from llfast.partial import PartialScores
from llfast.runs import Run
from tests.comparisons import counting
from tests.tiny import make_tokenizer


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ------------------------------------------------------------------------------ files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"new, but not yet who")
        raise KeyError
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_goes_wrong_is_said_of_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "no" / "file"):
        pass
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path}/no/file'"
    with pytest.raises(IsADirectoryError, match="'.*/folder'$"), atomic_write(tmp_path / "folder"):
        pass
    # An error of the caller's own stays what it was.
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "file"):
        Path("elsewhere").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path):
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    for content in (b"first", b"second"):
        with atomic_write(link) as file:
            file.write(content)
        assert link.is_symlink()
        assert target.read_bytes() == content


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    """And so do devices: no file must take the place of /dev/null."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(path) as file:
        file.write(b"content")
    assert os.read(reading, 100) == b"content"
    os.close(reading)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def damaged(whole, rounds):
    """The file cut short or with one bit changed, again and again."""
    rng = random.Random(0)
    for length in range(0, len(whole), 37):
        yield whole[:length]
    for _ in range(rounds):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield bytes(content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_arrays_are_refused_or_unchanged(tmp_path, save):
    path = tmp_path / "file.npz"
    arrays = {"a": np.arange(20.0), "b": np.array("text")}
    save(path, **arrays)
    refused = 0
    for content in damaged(path.read_bytes(), 400):
        path.write_bytes(content)
        try:
            found = read_npz(path)
        except ValueError as error:
            refused += str(path) in str(error) and "\n" not in str(error)
            continue
        for name in found.keys() & arrays.keys():
            np.testing.assert_array_equal(found[name], arrays[name])
    assert refused > 200


# ------------------------------------------------------------------------------ the cache


def test_the_cache_is_where_it_is_said_to_be(monkeypatch):
    monkeypatch.setenv("LLFAST_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache.folder() == Path("/a")
    monkeypatch.delenv("LLFAST_CACHE")
    assert cache.folder() == Path("/b/llfast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path("/c/.cache/llfast")


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    """As in a container that runs under a number nobody has."""
    for name in ("LLFAST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    with pytest.raises(FileNotFoundError, match="set LLFAST_CACHE"):
        cache.folder()
    cache.save_arrays("x", a=np.arange(5))
    assert cache.load_arrays("x") is None


def test_keys_tell_where_one_part_ends():
    assert cache.key("ab", "c") != cache.key("a", "bc") != cache.key("a", "b", "c")
    assert cache.key("a") == cache.key("a")


def test_a_cache_that_is_damaged_or_cannot_be_written_is_no_error(own_cache):
    arrays = {"a": np.arange(5)}
    assert cache.load_arrays("x") is None
    cache.save_arrays("x", **arrays)
    np.testing.assert_array_equal(cache.load_arrays("x")["a"], arrays["a"])
    path = own_cache / "x.npz"
    for content in damaged(path.read_bytes(), 200):
        path.write_bytes(content)
        found = cache.load_arrays("x")
        assert found is None or "a" not in found or found["a"].tolist() == [0, 1, 2, 3, 4]
    path.unlink()
    own_cache.rmdir()
    own_cache.write_bytes(b"a file where the folder should be")
    cache.save_arrays("x", **arrays)
    assert cache.load_arrays("x") is None


def test_a_file_is_read_again_when_it_may_have_changed(tmp_path, own_cache, monkeypatch):
    path = tmp_path / "weights"
    reads = []
    digest = hashlib.file_digest

    def counted(file, name):
        reads.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)

    def check(read):
        reads.clear()
        assert cache.file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert len(reads) == read

    hour_ago = time.time_ns() - 3_600_000_000_000
    path.write_bytes(b"content")
    os.utime(path, ns=(hour_ago, hour_ago))
    check(read=1)
    check(read=0)
    path.write_bytes(b"longer content")
    os.utime(path, ns=(hour_ago, hour_ago))
    check(read=1)
    path.write_bytes(b"others content")
    os.utime(path, ns=(hour_ago, hour_ago + 1))
    check(read=1)
    check(read=0)
    (tmp_path / "new").write_bytes(b"other  content")
    os.utime(tmp_path / "new", ns=(hour_ago, hour_ago + 1))
    (tmp_path / "new").replace(path)
    check(read=1)


def test_a_file_changed_within_a_tick_of_its_clock_is_read_again(tmp_path, own_cache):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    now = path.stat().st_mtime_ns
    for content in (b"one", b"two"):
        path.write_bytes(content)
        os.utime(path, ns=(now, now))  # a coarse clock, and both writes within one tick
        assert cache.file_sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_tokenizer_is_known_by_what_it_does_and_not_by_its_last_call():
    tokenizer, other = make_tokenizer(adds_bos=False), make_tokenizer(adds_bos=True)
    tokenizer.add_special_tokens({"pad_token": '}],"padding":{'})
    known = cache.tokenizer_fingerprint(tokenizer)
    for options in ({"padding": False}, {"padding": "max_length"}, {"padding": True}):
        tokenizer(["a", "b c"], truncation=True, max_length=2, **options)
        assert cache.tokenizer_fingerprint(tokenizer) == known
    assert cache.tokenizer_fingerprint(other) != known
    assert cache.tokenizer_fingerprint(object()) is None


# ------------------------------------------------------------------------------ partial scores

IDS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def partial(path, *, ids=IDS, key="run", per_token=True):
    return PartialScores.open(given_tokens(ids, None), path, key=key, per_token=per_token)


@pytest.fixture
def saved(tmp_path):
    """A run of three texts of which the last is scored, and one has nothing to score."""
    path = tmp_path / "partial" / "run.npz"
    with pytest.raises(KeyboardInterrupt), partial(path) as scores:
        assert scores.done == 1
        scores.keep(2, -6.0, np.array([-1, -2, -3], dtype=np.float32), 512)
        raise KeyboardInterrupt
    return path


def test_a_run_that_was_interrupted_goes_on(saved):
    scores = partial(saved)
    assert scores.done == 2
    np.testing.assert_array_equal(scores.loglikelihoods, [np.nan, 0.0, -6.0])
    assert scores.token_budgets.tolist() == [0, 0, 512]
    assert scores.logprobs[2].tolist() == [-1, -2, -3]


@pytest.mark.parametrize(
    "changes",
    [{"key": "other weights"}, {"ids": [[1, 2, 3], [4], [5, 6, 7, 9]]}, {"per_token": False}],
)
def test_another_run_starts_afresh(saved, changes):
    assert partial(saved, **changes).done == 1
    assert partial(None, **changes).done == 1


def test_a_run_that_ends_well_or_has_no_file_saves_nothing(tmp_path):
    with partial(tmp_path / "run.npz") as scores:
        scores.keep(2, -6.0, np.zeros(3, dtype=np.float32), 512)
    with pytest.raises(KeyboardInterrupt), partial(None) as scores:
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_running_one_saves_every_few_seconds(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    path = tmp_path / "run.npz"
    scores = partial(path)
    for seconds, there in ((4.9, False), (0.2, True)):
        clock[0] += seconds
        scores.save_now_and_then()
        assert path.exists() == there
    path.unlink()
    clock[0] += 4.9
    scores.save_now_and_then()
    assert not path.exists()


def test_a_damaged_file_costs_time_and_nothing_else(saved):
    for content in damaged(saved.read_bytes(), 200):
        saved.write_bytes(content)
        scores = partial(saved)
        assert scores.done in (1, 2)
        assert scores.loglikelihoods[2] == -6.0 or scores.done == 1
        assert np.isnan(scores.loglikelihoods[0])


def test_a_text_is_done_only_once_all_of_it_is_kept():
    """Ctrl-C may come between any two statements."""
    tokens = given_tokens([[0, 1, 2]], None)
    scores = PartialScores(tokens, per_token=True)

    class Interrupting:
        def __getitem__(self, text):
            raise KeyboardInterrupt

    scores.logprobs = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        scores.keep(0, -3.0, np.array([-1.0, -2.0], dtype=np.float32), 512)
    assert scores.done == 0


def test_a_batch_of_many_short_texts_is_kept_in_one_pass():
    number, compared = counting(int)
    tokens = given_tokens([[1, 2]] * 2000, None)
    run = Run(
        job=SimpleNamespace(tokens=tokens),
        texts=TextSet.from_texts(["a"]),
        text_bytes=np.ones(1, dtype=np.int64),
        convention="paper",
        adds_bos=None,
        per_token=False,
        metadata={},
        partial=None,
        verification=None,
    )
    run.scores = PartialScores(tokens, per_token=False)
    batch = Batch((2000, 16), tuple(map(number, range(2000))))
    logprobs = -torch.ones(int(tokens.token_counts.sum()))
    finished = SimpleNamespace(batch=batch, logprobs=logprobs, token_budget=32_000)
    assert run.keep(finished) == (2000, len(logprobs))
    assert run.keep(finished) == (0, 0)
    assert len(compared) < 10_000

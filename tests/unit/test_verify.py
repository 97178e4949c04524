"""Weights that are compared with their sha256 while they are used."""

import errno
import hashlib
import shutil
import threading
import time

import pytest

import llfast
import llfast.models
import llfast.partial
from llfast import CheckpointError, LoadingStatistics, Store, TextSet
from llfast.checkpoint import Checkpoint
from llfast.fleet import score_models
from llfast.model_list import ModelRequest
from llfast.verify import Verification, read_manifest
from tests.tiny import TEXTS, make_model, make_tokenizer, save


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "whole"
    return save(make_model("llama"), make_tokenizer(adds_bos=True), folder)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "m")


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spoil(path):
    """Other numbers of the same size."""
    content = bytearray(path.read_bytes())
    content[-1000:] = bytes(1000)
    path.write_bytes(content)


def manifest_of(folder):
    path = folder.parent / "SHA256SUMS"
    path.write_text(f"{digest(folder / 'model.safetensors')}  model.safetensors\n")
    return path


def as_snapshot(folder):
    """Laid out as the Hub's cache does: links to files that are named by their sha256."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    path = folder / "model.safetensors"
    blob = blobs / digest(path)
    path.rename(blob)
    path.symlink_to(blob)
    return blob


@pytest.mark.parametrize("weights", ["resident", "auto", "paged"])
def test_the_right_bytes_pass(folder, weights):
    expected = llfast.score(folder, TEXTS, weights=weights).values
    for verify in (manifest_of(folder), str(manifest_of(folder))):
        found = llfast.score(folder, TEXTS, weights=weights, verify=verify).values
        assert found.tobytes() == expected.tobytes()
    as_snapshot(folder)
    found = llfast.score(folder, TEXTS, weights=weights, verify=True).values
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("weights", ["resident", "auto", "paged"])
def test_wrong_bytes_give_no_result_and_are_not_kept(folder, tmp_path, weights):
    manifest = manifest_of(folder)
    spoil(folder / "model.safetensors")
    partial = tmp_path / "partial.npz"
    with pytest.raises(CheckpointError, match=r"must have the sha256 \w{64}, got"):
        llfast.score(folder, TEXTS, weights=weights, verify=manifest, partial=partial)
    assert not partial.exists()


@pytest.mark.parametrize("weights", ["resident", "auto", "paged"])
def test_what_it_took_is_measured(folder, weights):
    """Every byte of the files is read once, their headers too, and no time is made up."""
    size = (folder / "model.safetensors").stat().st_size
    options = {"verify": manifest_of(folder), "weights": weights}
    loading = LoadingStatistics()
    start = time.perf_counter()
    llfast.score(folder, TEXTS, loading=loading, **options)
    seconds = time.perf_counter() - start
    assert loading.verified_bytes == size
    assert 0 < loading.verify_seconds < seconds
    assert 0 < loading.verify_wait_seconds < seconds
    llfast.score(folder, TEXTS, loading=loading, **options)
    assert loading.verified_bytes == 2 * size, "it grows"
    llfast.score(folder, TEXTS, loading=(plain := LoadingStatistics()), weights=weights)
    assert (plain.verified_bytes, plain.verify_seconds, plain.verify_wait_seconds) == (0, 0, 0)


def test_what_is_waited_for_is_what_was_left_to_hash(folder, monkeypatch):
    """A thread that does not get on until it is waited for, on a clock that only it moves."""
    now = [0.0]
    began, waited_for = threading.Event(), threading.Event()
    digest_of, join = Verification._digest, threading.Thread.join

    def hold(self, path):
        began.set()
        waited_for.wait(60)
        now[0] += 7.0
        return digest_of(self, path)

    def release(self, timeout=None):
        waited_for.set()
        join(self, timeout)

    monkeypatch.setattr("llfast.verify.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Verification, "_digest", hold)
    loading = LoadingStatistics()
    with Verification(Checkpoint.open(folder), manifest_of(folder), loading) as verification:
        began.wait(60)
        now[0] = 3.0  # texts are scored
        monkeypatch.setattr(threading.Thread, "join", release)
        verification.check(wait=True)
    assert (loading.verify_seconds, loading.verify_wait_seconds) == (10.0, 7.0)


@pytest.mark.parametrize("weights", ["resident", "paged"])
def test_without_an_answer_there_is_no_result(folder, monkeypatch, weights):
    """Whatever ends the thread that hashes: memory, for one, may run out there alone."""

    def run_out(*_):
        raise MemoryError("none left")

    monkeypatch.setattr(Verification, "_digest", run_out)
    with pytest.raises(MemoryError, match="none left"):
        llfast.score(folder, TEXTS, weights=weights, verify=manifest_of(folder))


def test_weights_that_cannot_be_read_fail_one_model(folder, tmp_path, monkeypatch):
    """Not all of a run, as they would if the store could not be read."""
    manifest = manifest_of(folder)
    other = shutil.copytree(folder, tmp_path / "other")
    own = Verification._digest

    def fail(self, path):
        if path.parent == folder:
            raise OSError(errno.EIO, "Input/output error")
        return own(self, path)

    monkeypatch.setattr(Verification, "_digest", fail)
    requests = [ModelRequest(model=str(each)) for each in (folder, other)]
    texts = TextSet.from_texts(TEXTS)
    outcomes = score_models(requests, texts, Store(tmp_path / "store"), verify=manifest)
    assert [each.status for each in outcomes] == ["failed", "scored"]
    assert str(folder / "model.safetensors") in outcomes[0].error
    assert "Input/output error" in outcomes[0].error


def test_wrong_bytes_in_the_hub_cache(folder):
    spoil(as_snapshot(folder))
    with pytest.raises(CheckpointError, match="download it again"):
        llfast.score(folder, TEXTS, verify=True)


def test_what_wrong_bytes_began_is_not_gone_on_with(folder, tmp_path, monkeypatch):
    """A run over spoilt weights that was broken off, then the same one over the right ones."""
    expected = llfast.score(folder, TEXTS).values
    right = (folder / "model.safetensors").read_bytes()
    blob = as_snapshot(folder)
    spoil(blob)
    partial = tmp_path / "partial.npz"
    options = {"partial": partial, "weights": "paged", "token_budget": 64}
    commit = llfast.models.open_model(folder)
    monkeypatch.setattr("llfast.paging.waves._MOST_FORWARDS", 1)
    saves = []
    own = llfast.partial.PartialScores.save

    def save_once(self):
        own(self)
        saves.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llfast.partial.PartialScores, "save", save_once)
        with pytest.raises(KeyboardInterrupt):
            llfast.score(commit, TEXTS, **options)
    assert saves
    assert partial.exists()
    blob.write_bytes(right)
    again = llfast.models.open_model(folder)
    object.__setattr__(again, "revision", commit.revision)  # as of one commit of the Hub
    found = llfast.score(again, TEXTS, verify=True, **options).values
    assert found.tobytes() == expected.tobytes()


def test_what_cannot_be_verified(folder):
    with pytest.raises(CheckpointError, match="must have a sha256 to be verified, got none from"):
        llfast.score(folder, TEXTS, verify=True)
    pair = make_model("llama"), make_tokenizer(adds_bos=True)
    with pytest.raises(ValueError, match="verify must be False for a loaded model, got True"):
        llfast.score(pair, TEXTS, verify=True)


@pytest.mark.parametrize("verify", [None, 1, b"sums"])
def test_what_is_no_manifest_is_refused_by_name(folder, tmp_path, untyped, verify):
    message = f"verify must be True, False or the path of a manifest, got {verify!r}"
    with pytest.raises(TypeError, match=message):
        llfast.score(folder, TEXTS, verify=verify)
    store, request = Store(tmp_path / "store"), ModelRequest(model=str(folder))
    with pytest.raises(TypeError, match=message):
        score_models([request], TextSet.from_texts(TEXTS), store, verify=verify)
    assert not store.folder.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no digest here", "line 1 must be a sha256 and a file name, got 'no digest here'"),
        (f"{'a' * 64}  x\n{'b' * 64}  y/x\n", "must have one sha256 for x, got two"),
    ],
)
def test_a_manifest_that_is_none(tmp_path, text, message):
    path = tmp_path / "sums"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(path)


def test_a_manifest_as_sha256sum_writes_it(tmp_path):
    path = tmp_path / "sums"
    path.write_text(f"# made today\n{'A' * 64} *one.safetensors\n\n{'b' * 64}  two three\n")
    found = {"one.safetensors": "a" * 64, "two three": "b" * 64}
    assert read_manifest(path) == found
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_manifest(path) == found, "as it is after a Windows editor"

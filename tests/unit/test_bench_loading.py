"""The benchmark of loading, on a checkpoint of a few kilobytes."""

import errno
import hashlib
import importlib
import json
import os
import sys
from types import SimpleNamespace

import pytest

import llfast
from llfast.bench import loading
from llfast.checkpoint import Checkpoint
from llfast.errors import MissingDependencyError
from llfast.verify import read_manifest
from tests.conftest import ROOT
from tests.tiny import make_model, make_tokenizer, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "llama"
    return save(make_model("llama"), make_tokenizer(adds_bos=True), folder)


@pytest.fixture(scope="module")
def found(folder):
    return loading.measure(str(folder), tokens=600, repetitions=2, device="cpu")


def test_without_the_cpp_module_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "llfast._native", None)
    monkeypatch.delitem(sys.modules, loading.__name__)
    with pytest.raises(MissingDependencyError, match=r"needs llfast's C\+\+ module; build it with"):
        importlib.import_module(loading.__name__)


def test_every_rate_is_measured(found, folder):
    assert found["tokens"] == 600
    assert found["model"]["weight_bytes"] == Checkpoint.open(folder).weight_bytes
    assert set(found["ceilings"]) == {"disk", "disk, one reader", "memory copy"}
    runs = found["runs"].values()
    for rate in (
        *found["ceilings"].values(),
        *(run[name] for run in runs for name in ("read_rate", "compute_rate")),
    ):
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    stored = sum(each.end - each.begin for each in Checkpoint.open(folder).tensors.values())
    for run in found["runs"].values():
        assert run["waves"]["median"] == 1
        # The small embedding is kept, the head is read for itself.
        assert run["bytes"]["median"] == pytest.approx(stored, rel=1e-3)
    assert found["runs"]["warm"]["cached_bytes"]["min"] > 0
    json.dumps(found)


def test_rates_are_shown_side_by_side(found, capsys):
    loading.show(found)
    printed = capsys.readouterr().out
    words = ("disk, one reader", "memory copy", "weights, cold", "computing, warm", "600 tokens in")
    for word in words:
        assert word in printed


def test_one_reader_reads_all_of_the_files(tmp_path, monkeypatch):
    """Also where files end in the middle of a block, and where nothing can go past the cache."""
    for number, size in enumerate((3, loading._BLOCK_BYTES + 4097)):
        (tmp_path / str(number)).write_bytes(bytes(size))
    seconds = iter((0.0, 2.0) * 2)
    monkeypatch.setattr(loading.time, "perf_counter", lambda: next(seconds))
    rate = (3 + loading._BLOCK_BYTES + 4097) / 2
    assert loading.sequential_rate(sorted(tmp_path.iterdir())) == rate
    own = os.open

    def refuse(path, flags):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return own(path, flags)

    monkeypatch.setattr(loading.os, "open", refuse)
    assert loading.sequential_rate(sorted(tmp_path.iterdir())) == rate


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(llfast.CheckpointError, match="must be a checkpoint folder"):
        loading.measure(str(tmp_path / "nothing"))


def test_runs_with_and_without_verifying_take_turns(tmp_path, monkeypatch):
    """The benchmark's part for `--verify`, with runs that say how long they took."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from loading_verify import measure_verify

    shards = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, path in enumerate(shards):
        path.write_bytes(bytes([number]) * 1000)
    seconds = iter((2.0, 3.0, 4.0, 4.0, 10.0, 20.0))
    asked = []

    def run(provider, size, verify=None):
        asked.append((provider, size, verify))
        extra = {"verified_bytes": 2000, "verify_seconds": 1.5, "verify_wait_seconds": 0.5}
        return {"seconds": next(seconds), "disk_bytes": 3000 if verify else 2000, "extra": extra}

    bench = SimpleNamespace(shards=shards, folder=tmp_path / "c", repetitions=3, run=run)
    (case,) = measure_verify(bench, [(8, 64)])
    manifest = str(tmp_path / "c.sha256")
    assert asked == [("llfast", (8, 64), None), ("llfast", (8, 64), manifest)] * 3
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}
    assert read_manifest(tmp_path / "c.sha256") == digests
    assert (case["tokens"], case["verified_bytes"]) == (512, 2000)
    assert case["plain_seconds"] == {"median": 4.0, "min": 2.0, "max": 10.0}
    assert case["verified_seconds"] == {"median": 4.0, "min": 3.0, "max": 20.0}
    assert case["over_plain"] == {"median": 1.5, "min": 1.0, "max": 2.0}, "within a repetition"
    assert case["disk_bytes_over_plain"]["median"] == 1.5
    assert case["wait_seconds"]["median"] == 0.5

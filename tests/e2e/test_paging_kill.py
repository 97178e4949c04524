"""A paged `llfast score` that is killed, interrupted, or robbed of its files between two waves."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

import llfast
from llfast import TextSet
from tests import processes
from tests.paging import least_budget
from tests.tiny import WORDS, copy_checkpoint, one_thread

OPTIONS = {"token_budget": 64, "dtype": "float32"}
# It stops at a place of the second wave, says so, and goes on when it is told to.
CODE = """
import resource, sys
from llfast.paging import pages
from llfast.paging.pages import Pages
from llfast.partial import PartialScores
from transformers.models.llama.modeling_llama import LlamaAttention

where = sys.argv.pop(1)
saves, stops = [], []

def stop_after(owner, name, place):
    own = getattr(owner, name)
    def call(*given, **named):
        if name == "save" and where == f"full at save {len(saves) + 1}":
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        result = own(*given, **named)
        if name == "save":
            saves.append(True)
        if place == where and saves and not stops:
            stops.append(True)
            print("here", flush=True)
            sys.stdin.readline()
        return result
    setattr(owner, name, call)

class Failing:  # a reader to whom the disk says no in the second wave
    def __init__(self, paths):
        self.paths, self.own = paths, Reader(paths)

    def read(self, *given):
        if where == "unreadable" and saves:
            raise OSError(5, "Input/output error", self.paths[0])
        return self.own.read(*given)

    def __getattr__(self, name):
        return getattr(self.own, name)

Reader, pages.FileReader = pages.FileReader, Failing
stop_after(PartialScores, "save", "saved")
stop_after(Pages, "take", "read")
stop_after(LlamaAttention, "forward", "computed")
from llfast.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return TextSet.from_texts([" ".join(rng.choice(WORDS, 2 + n)) for n in range(24)])


@pytest.fixture(scope="module")
def truth(checkpoints, texts):
    with one_thread():
        return llfast.score(checkpoints / "llama", texts, weights="resident", **OPTIONS)


class Trial:
    """A model and a store of its own, and the command that takes the one to the other."""

    def __init__(self, model, texts, folder):
        self.model, self.texts, self.store = model, texts, folder / "store"
        self.log = folder / "log"
        texts.save(folder / "texts.jsonl")
        least = least_budget(model, texts, **OPTIONS)
        self.arguments = [
            *("score", model, "--texts", folder / "texts.jsonl", "--store", self.store),
            *("--token-budget", OPTIONS["token_budget"], "--dtype", OPTIONS["dtype"]),
            *("--weights", "paged", "--memory-budget", least),
        ]

    def start(self, where):
        """The command, in the second wave, stopped there."""
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, where, *map(str, self.arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if where in ("saved", "read", "computed"):
            assert process.stdout.readline() == "here\n", process.communicate()[1]
        return process

    def go_on(self, process):
        """(exit status, what it said on stderr) of the rest."""
        _, said = process.communicate("\n", timeout=processes.DEADLINE_SECONDS)
        assert "Traceback" not in said
        return process.returncode, said

    def finish(self):
        return processes.run(self.arguments, self.log)

    @property
    def partial(self):
        """Of the one file with finished texts: its path and arrays."""
        (path,) = self.store.glob("*partial/[!.]*")
        with np.load(path) as arrays:
            return path, dict(arrays)

    def check_kept(self, truth):
        """Some texts are there, and right; returns which."""
        _, arrays = self.partial
        finished = np.isfinite(arrays["loglikelihoods"])
        assert 0 < finished.sum() < len(self.texts)
        values = arrays["loglikelihoods"][finished]
        assert values.tobytes() == truth.values[finished].tobytes()
        return finished

    @property
    def rows(self):
        shards = self.store.glob("textset=*/[!.]*.parquet")
        return [row for shard in shards for row in pq.ParquetFile(shard).read().to_pylist()]

    def check(self, values):
        """One result, to the bit; and nothing else is left."""
        (row,) = [row for row in self.rows if row["status"] == "complete"]
        assert np.array(row["loglikelihoods"]).tobytes() == values.tobytes()
        assert list(self.store.rglob(".*")) == []
        assert list(self.store.glob("*partial/*")) == []


@pytest.fixture
def trial(checkpoints, texts, tmp_path):
    return Trial(checkpoints / "llama", texts, tmp_path)


def test_a_run_without_trouble(trial, truth):
    assert trial.finish() == 0, trial.log.read_text()
    trial.check(truth.values)


@pytest.mark.parametrize("where", ["saved", "computed"])
def test_a_kill_after_the_first_wave(trial, truth, where):
    """The next run goes on from there: what is finished is not scored again."""
    process = trial.start(where)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = trial.check_kept(truth)
    path, arrays = trial.partial
    # Finished texts are given numbers of their own: they come out as they are.
    marked = np.where(finished, -1e6 - np.arange(len(finished)), truth.values)
    arrays["loglikelihoods"] = np.where(finished, marked, arrays["loglikelihoods"])
    with path.open("wb") as file:
        np.savez(file, **arrays)
    assert trial.finish() == 0, trial.log.read_text()
    trial.check(marked)


@pytest.mark.parametrize("where", ["read", "computed"])
def test_ctrl_c_keeps_the_waves_that_are_through(trial, truth, where):
    process = trial.start(where)
    process.send_signal(signal.SIGINT)
    code, said = trial.go_on(process)
    assert code == 130
    assert re.fullmatch("llfast: interrupted; .*\n", said)
    trial.check_kept(truth)
    assert list(trial.store.rglob(".*.tmp")) == []
    assert trial.finish() == 0, trial.log.read_text()
    trial.check(truth.values)


@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_a_shard_that_changes_between_waves(checkpoints, texts, truth, tmp_path, change):
    trial = Trial(copy_checkpoint(checkpoints / "llama", tmp_path / "m"), texts, tmp_path)
    weights = trial.model / "model.safetensors"
    content = weights.read_bytes()
    process = trial.start("read")
    if change == "cut":
        os.truncate(weights, len(content) // 2)
    else:
        (tmp_path / "newer").write_bytes(content)
        (tmp_path / "newer").replace(weights)
    code, said = trial.go_on(process)
    assert code == 1
    assert said == "llfast: 1 of 1 models failed; the store has why\n"
    (row,) = trial.rows
    assert row["status"] == "failed"
    assert str(weights) in row["error"]
    reason = {"cut": "is something still writing it?", "replaced": "must stay as it is"}[change]
    assert reason in row["error"]
    trial.check_kept(truth)
    weights.write_bytes(content)
    assert trial.finish() == 0, trial.log.read_text()
    trial.check(truth.values)


def test_a_shard_that_cannot_be_read_any_more(trial, truth):
    code, said = trial.go_on(trial.start("unreadable"))
    assert code == 1
    assert said == "llfast: 1 of 1 models failed; the store has why\n"
    (row,) = trial.rows
    weights = trial.model / "model.safetensors"
    assert row["error"].startswith(f"{weights} must be readable, got Input/output error while ")
    trial.check_kept(truth)
    assert list(trial.store.rglob(".*.tmp")) == []
    assert trial.finish() == 0, trial.log.read_text()
    trial.check(truth.values)


@pytest.mark.parametrize("save", [1, 2])
def test_a_disk_that_is_full(trial, truth, save):
    code, said = trial.go_on(trial.start(f"full at save {save}"))
    assert code == 1
    assert re.fullmatch("llfast: .*File too large.*\n", said)
    assert str(trial.store) in said
    assert list(trial.store.rglob(".*.tmp")) == []
    if save > 1:
        trial.check_kept(truth)
    assert trial.finish() == 0, trial.log.read_text()
    trial.check(truth.values)


def test_weights_with_another_sha256(trial, truth, tmp_path):
    """Nothing that was scored with them is kept."""
    (tmp_path / "sums").write_text(f"{'0' * 64}  model.safetensors\n")
    assert processes.run([*trial.arguments, "--manifest", tmp_path / "sums"], trial.log) == 1
    said = trial.log.read_text().splitlines()
    assert len(said) == 2
    assert f"must have the sha256 {'0' * 64}, got " in said[0]
    assert said[1] == "llfast: 1 of 1 models failed; the store has why"
    assert list(trial.store.glob("*partial/*")) == []
    assert list(trial.store.rglob(".*.tmp")) == []
    assert trial.finish() == 0, trial.log.read_text()
    trial.check(truth.values)

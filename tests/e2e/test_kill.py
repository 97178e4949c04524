"""`llfast score`, killed at any moment and started again: every number once, to the bit."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

import llfast
from llfast import Store, TextSet
from tests import processes
from tests.tiny import WORDS, one_thread

KINDS = ("gpt2", "llama", "mixtral")
BUDGET = 128  # small batches, so that there are many moments between two of them


@pytest.fixture(scope="module")
def work(checkpoints, tmp_path_factory):
    """(arguments but for the store, texts) of a run of some 120 batches."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    texts = TextSet.from_texts([" ".join(rng.choice(WORDS, 2 + n // 2)) for n in range(80)])
    texts.save(folder / "texts.jsonl")
    models = [checkpoints / kind for kind in KINDS]
    return ["score", *models, "--texts", folder / "texts.jsonl", "--token-budget", BUDGET], texts


@pytest.fixture(scope="module")
def truth(work, checkpoints):
    """By name, what a run without any trouble gives, by the library in this process."""
    folders = [checkpoints / kind for kind in KINDS]
    with one_thread():
        results = [llfast.score(folder, work[1], token_budget=BUDGET) for folder in folders]
    return {result.model: result for result in results}


@pytest.fixture(scope="module")
def whole_run(work, tmp_path_factory):
    """Seconds that a run takes, once the fork server is there."""
    seconds = 0.0
    for _ in range(2):
        start = time.monotonic()
        assert Trial(work, tmp_path_factory.mktemp("whole")).finish(save_seconds=0.01) == 0
        seconds = time.monotonic() - start
    return seconds


class Trial:
    """One store, and the command that fills it, as often as it takes."""

    def __init__(self, work, folder):
        self.folder = folder / "store"
        self.log = folder / "log"
        self.arguments = [*work[0], "--store", self.folder]

    def start(self, **options):
        return processes.start(self.arguments, self.log, **options)

    def finish(self, **options):
        return processes.run(self.arguments, self.log, **options)

    @property
    def partial(self):
        """Finished texts of the model that was running, by the file they are kept in."""
        found = {}
        for path in self.folder.glob("*partial/[!.]*"):
            with np.load(path) as arrays:
                found[path] = np.isfinite(arrays["loglikelihoods"])
        return found

    @property
    def rows(self):
        """Every row of every shard, whichever of them count."""
        shards = sorted(self.folder.glob("textset=*/[!.]*.parquet"))
        return [row for shard in shards for row in pq.ParquetFile(shard).read().to_pylist()]

    def check(self, truth):
        """Every model once, every text once, to the bit; and nothing else is left."""
        rows = {row["model"]: row for row in self.rows}
        assert len(self.rows) == len(rows) == len(truth), "each model has one row"
        for name, expected in truth.items():
            assert rows[name]["status"] == "complete"
            values = np.array(rows[name]["loglikelihoods"])
            assert values.tobytes() == expected.values.tobytes()
            assert rows[name]["token_counts"] == expected.token_counts.tolist()
            assert rows[name]["token_budgets"] == expected.token_budgets.tolist()
        assert self.partial == {}
        names = {path.name for path in self.folder.rglob("*") if path.is_file()}
        kept = {name for name in names if not re.fullmatch(r"\..*\.tmp", name)}
        assert len(kept) == len(truth) + 2, "shards, texts, and what says that it is a store"


@pytest.fixture
def trial(work, tmp_path):
    return Trial(work, tmp_path)


def test_a_run_without_trouble(trial, truth):
    assert trial.finish() == 0, trial.log.read_text()
    trial.check(truth)
    assert list(trial.folder.rglob(".*")) == []


def test_a_kill_at_every_file_that_is_touched(trial, truth):
    """At the first, at the second of the next run, and so on: in the end one has all it needs."""
    finished = stored = 0
    for step in range(1, 300):
        code = trial.finish(save_seconds=0, die_at=(trial.folder, step))
        if code == 0:
            break
        assert code == -signal.SIGKILL, trial.log.read_text()
        rows = len(trial.rows)
        # What a kill left of a model that had just been stored does not count.
        store = Store(trial.folder)
        over = {store.partial_path(key) for key in store.completed()} if rows else ()
        done = sum(int(each.sum()) for path, each in trial.partial.items() if path not in over)
        assert (rows, done) >= (stored, finished), "what was finished is never lost"
        stored, finished = rows, done
    assert step > 15, "it was killed at that many steps, and more"
    trial.check(truth)


def kill_at_random(trial_in, truth, whole_run, kills, seed):
    """Kill runs until there were so many kills; what was found in the store after each."""
    rng = np.random.default_rng(seed)
    seen = []
    number = 0
    trial = trial_in(number)
    while len(seen) < kills:
        process = trial.start(save_seconds=0.01)
        process.join(rng.uniform(0, whole_run))
        process.kill()
        if processes.finish(process) == 0:
            trial.check(truth)
            number += 1
            trial = trial_in(number)
        else:
            seen.append((len(trial.rows), bool(trial.partial)))
    assert trial.finish(save_seconds=0.01) == 0, trial.log.read_text()
    trial.check(truth)
    return seen


@pytest.fixture
def trial_in(work, tmp_path):
    def make(number):
        (tmp_path / str(number)).mkdir()
        return Trial(work, tmp_path / str(number))

    return make


def test_kills_at_random_moments(trial_in, truth, whole_run):
    kill_at_random(trial_in, truth, whole_run, kills=15, seed=0)


@pytest.mark.slow
def test_many_kills_at_random_moments(trial_in, truth, whole_run):
    seen = kill_at_random(trial_in, truth, whole_run, kills=150, seed=1)
    stages = {(rows, partial) for rows, partial in seen}
    assert stages >= {(0, False), (0, True), (1, True), (2, True)}, "all stages were hit"


def test_a_real_command_is_killed_while_it_starts_and_later(trial, truth):
    """As `test_kills_at_random_moments`, but from the first instruction of Python on."""
    command = [sys.executable, "-m", "llfast", *map(str, trial.arguments)]
    rng = np.random.default_rng(2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for longest in (0.5, 3.0, None):
        with trial.log.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                process.wait(
                    processes.DEADLINE_SECONDS if longest is None else rng.uniform(0, longest)
                )
            except subprocess.TimeoutExpired:
                process.kill()
                assert process.wait() == -signal.SIGKILL
    assert process.returncode == 0, trial.log.read_text()
    trial.check(truth)


def test_a_restart_scores_only_what_is_missing(trial, truth, work):
    """Finished texts are given numbers of their own: they come out as they are."""
    # The store, its marker, its texts: a few files; then three for every batch that is kept.
    assert trial.finish(save_seconds=0, die_at=(trial.folder, 40)) == -signal.SIGKILL
    ((path, finished),) = trial.partial.items()
    assert 5 < finished.sum() < len(work[1])
    with np.load(path) as arrays:
        kept = dict(arrays)
    marks = -1e6 - np.arange(len(finished))
    kept["loglikelihoods"] = np.where(finished, marks, kept["loglikelihoods"])
    with path.open("wb") as file:
        np.savez(file, **kept)
    assert trial.finish() == 0, trial.log.read_text()
    rows = {row["model"]: np.array(row["loglikelihoods"]) for row in trial.rows}
    name, *others = truth
    assert rows[name].tobytes() == np.where(finished, marks, truth[name].values).tobytes()
    for other in others:
        assert rows[other].tobytes() == truth[other].values.tobytes()


def test_ctrl_c_keeps_what_is_done(trial, truth, work):
    """A real command; what it keeps on Ctrl-C it has not kept before."""
    code = (
        "import sys; from llfast import batchwise; run = batchwise.run_model\n"
        "def told(*args):\n    print('batch', flush=True); return run(*args)\n"
        "batchwise.run_model = told; from llfast.__main__ import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, trial.arguments), "--weights", "resident"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for _ in range(5):
        assert process.stdout.readline() == "batch\n"
    assert trial.partial == {}
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=processes.DEADLINE_SECONDS)
    assert process.returncode == 130
    assert re.fullmatch("llfast: interrupted; .*\n", errors)
    ((path, finished),) = trial.partial.items()
    assert 4 <= finished.sum() < len(work[1])
    with np.load(path) as arrays:
        expected = truth[next(iter(truth))].values
        assert arrays["loglikelihoods"][finished].tobytes() == expected[finished].tobytes()
    assert trial.finish() == 0
    trial.check(truth)


def interrupt_at_random(trial_in, truth, whole_run, times, seed):
    rng = np.random.default_rng(seed)
    number = 0
    trial = trial_in(number)
    codes = []
    while codes.count(130) < times:
        meet = processes.barrier(2)
        process = trial.start(save_seconds=0.01, meet=meet)
        meet.wait(processes.DEADLINE_SECONDS)
        process.join(rng.uniform(0.01, whole_run))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGINT)
        codes.append(processes.finish(process))
        said = trial.log.read_text()
        assert codes[-1] in (0, 130), said
        assert "Traceback" not in said
        if codes[-1] == 0:
            trial.check(truth)
            number += 1
            trial = trial_in(number)
        else:
            assert said.endswith("the same command goes on from there\n")
    assert trial.finish() == 0
    trial.check(truth)


def test_ctrl_c_at_random_moments(trial_in, truth, whole_run):
    interrupt_at_random(trial_in, truth, whole_run, times=6, seed=3)


@pytest.mark.slow
def test_ctrl_c_at_many_random_moments(trial_in, truth, whole_run):
    interrupt_at_random(trial_in, truth, whole_run, times=100, seed=4)


def test_what_killed_writers_left_is_removed_in_time(trial, truth):
    """A temporary file of a writer that may still live is left alone, an old one is not."""
    for step in range(2, 30, 4):
        trial.finish(save_seconds=0, die_at=(trial.folder, step))
    assert trial.finish() == 0
    left = list(trial.folder.rglob(".*.tmp"))
    assert left, "kills leave temporary files"
    assert trial.finish() == 0
    assert list(trial.folder.rglob(".*.tmp")) == left, "they might be in use"
    old = time.time() - 2 * 3600
    for path in left:
        os.utime(path, (old, old))
    assert trial.finish() == 0
    assert list(trial.folder.rglob(".*.tmp")) == []
    trial.check(truth)

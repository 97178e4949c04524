"""Results to store, with numbers that follow from a model's name in any process."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from llfast import LogLikelihoodMatrix, LogLikelihoods

ROOT = Path(__file__).parents[1]
N = 8
DIGEST = "d" * 64


def numbers(model, n=N):
    """The log-likelihoods (n,) that a model of this name has."""
    rng = np.random.default_rng(zlib.crc32(model.encode()))
    return -700 + 100 * rng.standard_normal(n)


def make_result(model, *, n=N, **changes):
    fields = {
        "model": model,
        "revision": "r1",
        "textset_digest": DIGEST,
        "convention": "paper",
        "dtype": "float32",
        "scoring_version": 1,
        "ids": tuple(f"text {row}" for row in range(n)),
        "loglikelihoods": numbers(model, n),
        "token_counts": np.arange(n) + 5,
        "text_bytes": 10 * (np.arange(n) + 5),
        "truncated": np.arange(n) == 2,
        "token_budgets": np.full(n, 512, dtype=np.int32),
    }
    return LogLikelihoods(**fields | changes)


def add_together(store, models, n=N, digest=DIGEST):
    """Keep models in one shard; its numbers are those of their names."""
    store.add_matrix(
        LogLikelihoodMatrix(
            models,
            np.array([numbers(model, n) for model in models]),
            10.0 * (np.arange(n) + 5),
            ids=[f"text {row}" for row in range(n)],
            textset_digest=digest,
            convention="paper",
        )
    )


def rewrite(shard, **options):
    """Write a shard anew as somebody else would have done it."""
    pq.write_table(pq.read_table(shard, partitioning=None), shard, **options)


def store_shards(store):
    return sorted(store.folder.glob("textset=*/*.parquet"))


def store_contents(store):
    """What a reader sees: the rows without their places, and all numbers."""
    return [
        (row.key, row.error, row.created, row.provenance, row.metadata)
        + (() if row.error else (store.load(row).values.tolist(),))
        for row in store.rows()
    ]


def run_python(code, *args):
    """Run code in a process of its own; it must not end with an error."""
    return _run([sys.executable, "-c", code, *map(str, args)])


def run_with_mount(mount, code, folder):
    """As `run_python`, with something mounted on a folder that nobody else sees.

    It holds back root, too, to whom file permissions mean nothing; skips where it may not be done.
    """
    if not _may_mount():
        pytest.skip("needs `unshare -rm` and mount, which are not allowed here")
    script = f'{mount} && exec "$2" -c "$3" "$1"'
    return _run(["unshare", "-rm", "sh", "-ec", script, "sh", str(folder), sys.executable, code])


def _run(command):
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    return run


@functools.cache
def _may_mount():
    try:
        run = subprocess.run(
            ["unshare", "-rm", "sh", "-ec", "mount -t tmpfs -o size=16k tmpfs /tmp"],
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        return False
    return run.returncode == 0


@contextlib.contextmanager
def process(code, *args):
    """Code in a process of its own, which says when it is ready and goes on at a line of input."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as running:
        try:
            assert running.stdout.readline() == "ready\n"
            yield running
        finally:
            running.kill()


def tell(running, line="go"):
    running.stdin.write(f"{line}\n")
    running.stdin.flush()


def die_before(place, name, left):
    """Have this process killed at the call of such a function that `left[0]` others come before."""
    whole = getattr(place, name)

    def step(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **options)

    setattr(place, name, step)

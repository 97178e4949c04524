"""What it costs to score models as one of a fleet, and to find out what is left to do.

    python benchmarks/bench_fleet.py

Claim: leases, events and the ledger cost at most 5 % of a plain loop over small models, which have
little else to do, and so does a Ray cluster of this machine once it has started; and what is left
of 100,000 names is known in under two seconds.

Models are random GPT-2 shapes, scored on the same texts into stores of their own: by
`score_models`, by one worker's `score_share`, and by `score_on_ray` with one worker that has all
cores, in turn; what they have stored is compared. Each is a new process, timed from the end of its
first three models, for what a process does once (loading modules, growing its memory) is no part of
it. The store of 100,000 rows is compacted; it is on few texts, for only keys are read.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from llfast import LogLikelihoods, Store, TextSet
from llfast.bench import report
from llfast.fleet import score_models, score_share
from llfast.fleet.events import JsonLog
from llfast.fleet.ledger import Ledger
from llfast.model_list import ModelRequest
from llfast.outcomes import Outcome
from llfast.zoo_corpora import installed_corpora
from llfast.zoo_training import train_tokenizer

RESULTS = Path(__file__).parent / "results"
MOST_OVERHEAD = 1.05
MOST_SECONDS = 2.0
NAMES = 100_000
WARM = 3  # models before those that are timed
TEXTS = 8  # of the store of so many names

Report: TypeAlias = Callable[[Outcome], None]


def make_models(folder: Path, count: int, texts: int) -> tuple[list[ModelRequest], TextSet]:
    """Checkpoints of 4 million parameters each, and what they are scored on."""
    corpora = installed_corpora()
    tokenizer = train_tokenizer(corpora.training, 2048)
    sizes = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": len(tokenizer)}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    requests = []
    disable_progress_bar()
    for number in range(count):
        torch.manual_seed(number)
        place = folder / f"model-{number}"
        GPT2LMHeadModel(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
        requests.append(ModelRequest(model=str(place), name=f"m{number}"))
    return requests, corpora.evaluation_texts(texts)[0]


def measure_overhead(folder: Path, models: int, texts: int, repetitions: int) -> dict[str, Any]:
    """A plain loop, a fleet of one and a cluster of one, in turn."""
    requests, sample = make_models(folder, models + WARM, texts)
    score_models(requests, sample, Store(folder / "digests"), progress=False)  # which are kept
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    starts = []
    for repetition in range(repetitions):
        stores = {name: Store(folder / f"{name} {repetition}") for name in WAYS}
        names = list(WAYS)
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            started, took = time_apart(name, requests, sample, stores[name])
            seconds[name].append(took)
            if name == "ray":
                starts.append(started)
        loop, *others = (each.matrix() for each in stores.values())
        for other in others:
            if loop.models != other.models or not np.array_equal(loop.values, other.values):
                raise SystemExit("all must store the same bits")
    return {
        "models": models,
        "texts": texts,
        "seconds": {name: report.spread(each) for name, each in seconds.items()},
        "over_loop": report.paired(seconds["fleet"], seconds["loop"]),
        "ray_over_loop": report.paired(seconds["ray"], seconds["loop"]),
        "ray_starts": report.spread(starts),
    }


def time_apart(
    name: str, requests: Sequence[ModelRequest], sample: TextSet, store: Store
) -> tuple[float, float]:
    """Seconds of a process of its own, until the first models are done, and those of the others."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_timed, args=(theirs, name, requests, sample, store.folder))
    begin = time.time()
    process.start()
    theirs.close()
    try:
        done = ours.recv()
    except EOFError:
        raise SystemExit(f"{name} must score all models") from None
    process.join()
    return done[WARM - 1] - begin, done[-1] - done[WARM - 1]


def _timed(
    pipe: Connection, name: str, requests: list[ModelRequest], sample: TextSet, folder: Path
) -> None:
    """Tell when each model was done."""
    disable_progress_bar()
    done: list[float] = []
    WAYS[name](requests, sample, Store(folder), lambda _: done.append(time.time()))
    pipe.send(done)


def run_loop(
    requests: Sequence[ModelRequest], sample: TextSet, store: Store, report: Report
) -> None:
    """One model after the other."""
    score_models(requests, sample, store, progress=False, report=report)


def run_fleet(
    requests: Sequence[ModelRequest], sample: TextSet, store: Store, report: Report
) -> None:
    """As the only worker of a fleet."""
    log = JsonLog(Path(f"{store.folder} events"))
    score_share(requests, sample, store, progress=False, log=log, report=report)


def run_ray(
    requests: Sequence[ModelRequest], sample: TextSet, store: Store, report: Report
) -> None:
    """By a cluster of this machine, whose worker has all cores."""
    from llfast.fleet.ray_driver import score_on_ray

    threads = torch.get_num_threads()
    score_on_ray(requests, sample, store, address="local", cpus=threads, report=report)


WAYS = {"loop": run_loop, "fleet": run_fleet, "ray": run_ray}


def measure_listing(folder: Path, repetitions: int) -> dict[str, Any]:
    """What is left of 100,000 names, of which the store lacks a hundred."""
    store = Store(folder / "large")
    n = TEXTS
    first = LogLikelihoods(
        model="",
        revision="",
        textset_digest="0" * 64,
        convention="paper",
        dtype="bfloat16",
        scoring_version=1,
        ids=tuple(map(str, range(n))),
        loglikelihoods=np.linspace(-900, -500, n),
        token_counts=np.full(n, 200),
        text_bytes=np.full(n, 900),
        truncated=np.zeros(n, dtype=bool),
        token_budgets=np.full(n, 512, dtype=np.int32),
        provenance={"device": "a processor with a long name", "torch": torch.__version__},
        metadata={"family": "a family", "parameters": 7_000_000_000},
    )
    names = [f"organisation-{number % 5000}/model-{number}" for number in range(NAMES)]
    for at in range(0, NAMES, 10_000):
        store.add_all(
            [
                dataclasses.replace(first, model=name, revision=f"{at + number:040x}")
                for number, name in enumerate(names[at : at + 10_000])
            ]
        )
    store.compact()
    requests = [ModelRequest(model=name) for name in [*names[100:], *(f"new/{n}" for n in names)]]
    requests = requests[:NAMES]
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        ledger = Ledger(Store(folder / "large"), "0" * 64, "paper")
        ledger.refresh()
        left = [each for each in requests if not ledger.has(each, "auto")]
        seconds.append(time.perf_counter() - start)
        if len(left) != 100:
            raise SystemExit(f"a hundred must be left, got {len(left)}")
    return {
        "names": NAMES,
        "shards": len(store.shards("0" * 64)),
        "seconds": report.spread(seconds),
    }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=15)
    parser.add_argument("--texts", type=int, default=30)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "fleet.json")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llfast-fleet-"))
    try:
        found = {
            "benchmark": "fleet",
            "command": "python benchmarks/bench_fleet.py",
            "commit": report.commit(),
            "hardware": report.hardware(),
            "versions": report.versions("llfast", "torch", "transformers", "pyarrow", "ray"),
            "overhead": measure_overhead(
                folder, options.models, options.texts, options.repetitions
            ),
            "listing": measure_listing(folder, options.repetitions),
        }
    finally:
        shutil.rmtree(folder)
    report.write(found, options.out)
    overhead, listing = found["overhead"], found["listing"]["seconds"]
    for what, figure, limit in (
        ("fleet over a plain loop", overhead["over_loop"]["median"], MOST_OVERHEAD),
        ("Ray over a plain loop", overhead["ray_over_loop"]["median"], MOST_OVERHEAD),
        ("seconds to list 100,000 names", listing["median"], MOST_SECONDS),
    ):
        print(f"{'met   ' if figure <= limit else 'MISSED'} {what}: {figure:.3g} (limit {limit})")


if __name__ == "__main__":
    main()

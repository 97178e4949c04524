"""Weights that are paged, beside the disk, a resident model, and others that keep weights on disk.

    python benchmarks/bench_loading.py --folder /tmp/loading_bench --airllm /tmp/airllm

Claim: a model that is far larger than memory is scored at the rate at which its disk can be read,
or its processor can compute, whichever is slower, and is read once for all texts.

The checkpoint has the shape of Llama-3.2-3B and random weights; it is written first unless it is
there. Every run is a process of its own, which first does the same with a tiny checkpoint; memory
is the highest resident size beyond what it took then. Providers are interleaved, ratios are taken
within a repetition, and what providers return is compared before anything is timed, and in every
run. Cold means: dropped from the page cache, which mincore confirms; for peers also before every
batch, so that they find a checkpoint that no cache holds. The machine beneath a virtual one may
still have it in its memory; the raw reads that everything is compared to have that, too.

llfast names a local checkpoint by the sha256 of its weights, which it remembers by size and time of
change. That is computed before, as it is once in a checkpoint's life. AirLLM's own copy of the
checkpoint is written before, too.

AirLLM: `pip install --no-deps --target /tmp/airllm airllm sentencepiece`; all else that it needs is
there with llfast. `--quick` shows that all of it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from loading_aims import aims_of, memory_of_all
from loading_limits import SEQUENTIAL, WAYS, memory_copy_rate, read_rate
from loading_others import PEERS, described, measure_peers, measure_read_bound
from loading_peers import drop
from loading_verify import measure_verify
from make_checkpoint import MOST_SHARD_BYTES, SMALL, Shape, make_checkpoint

from llfast.bench import report
from llfast.bench.loading import read_into_cache

_PROVIDERS = Path(__file__).with_name("loading_peers.py")
RESULTS = Path(__file__).parent / "results"
TINY = Shape(
    layers=4, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocabulary=4096
)
LIMIT_MIB = 2048  # beyond the interpreter
TOLERANCE = 2e-2  # of a log-likelihood in bf16, to peers that make other batches


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is scored: (texts, tokens of each)."""

    few: tuple[int, int] = (1, 16)
    read_bound: tuple[int, int] = (8, 16)
    many: tuple[tuple[int, int], ...] = ((2, 256), (16, 256))
    peers: tuple[int, int] = (8, 64)
    limit_mib: int = 1024
    batch: int | None = None  # of peers; found out if it is not given


QUICK = Sizes(many=((16, 32),), peers=(8, 16), limit_mib=32, batch=4)


@dataclass(slots=True)
class Bench:
    """Where things are.

    Attributes:
        left_out: why a peer does not run.
        found: what was returned, by checkpoint, texts and tokens, and by provider.
    """

    folder: Path
    tiny: Path
    cache: Path
    airllm: Path | None
    repetitions: int
    slow_repetitions: int
    left_out: dict[str, str] = field(default_factory=dict)
    found: dict[tuple[Any, ...], dict[str, list[float]]] = field(default_factory=dict)

    @property
    def shards(self) -> list[Path]:
        """The checkpoint's files."""
        return sorted(self.folder.glob("*.safetensors"))

    def run(self, provider: str, size: tuple[int, int], **task: Any) -> dict[str, Any]:
        """One run in a process of its own.

        Raises:
            RuntimeError: with the last line that it printed, if it failed.
        """
        texts, tokens = size
        given = {"folder": str(self.folder), "tiny": str(self.tiny), **task}
        given |= {"texts": texts, "tokens": tokens}
        paths = [os.environ.get("PYTHONPATH", "")]
        if provider == "AirLLM":
            given["shards"] = str(self.cache / "airllm")
            paths.insert(0, str(self.airllm))
        done = subprocess.run(
            [sys.executable, str(_PROVIDERS), provider, json.dumps(given)],
            env={
                **os.environ,
                "LLFAST_CACHE": str(self.cache / "llfast-cache"),
                "PYTHONPATH": ":".join(filter(None, paths)),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{provider}: {(done.stderr.splitlines() or ['failed'])[-1]}")
        outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if task.get("cold", True) and outcome["cached_before"] > 0.01:
            raise RuntimeError(f"{provider} must start cold, got {outcome['cached_before']:.0%}")
        way = "llfast" if provider == "resident" else provider
        if "token_budget" in task:  # another shape of batch may round otherwise
            way = f"{way}, {task['token_budget']} tokens a batch"
        self._compare(way, (given["folder"], *size), outcome["values"])
        say(f"{provider} {texts} x {tokens}: {outcome['seconds']:.1f} s")
        return outcome

    def peer(self, provider: str, size: tuple[int, int], **task: Any) -> dict[str, Any] | None:
        """One run of a peer; None if it does not run, for a reason that is kept."""
        if provider in self.left_out:
            return None
        if provider == "AirLLM" and self.airllm is None:
            self.left_out[provider] = "not installed: see --airllm"
            return None
        try:
            return self.run(provider, size, **task)
        except RuntimeError as error:
            self.left_out[provider] = str(error)[:300]
            return None

    def _compare(self, way: str, size: tuple[Any, ...], values: list[float]) -> None:
        """The same bits from llfast for batches of one shape, and about the same from peers."""
        found = self.found.setdefault(size, {})
        if found.setdefault(way, values) != values and way.startswith("llfast"):
            raise SystemExit(f"{way} must return the same bits for {size}, got others")
        reference = np.array(next(iter(found.values())))
        worst = float((abs(np.array(values) - reference) / abs(reference)).max())
        if not worst <= TOLERANCE:
            raise SystemExit(f"{way} must agree within {TOLERANCE}, got {worst:.3g}")


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------- sections


def measure_rate(bench: Bench, sizes: Sizes) -> dict[str, Any]:
    """Few tokens, so that the disk is what takes time."""
    raw: dict[str, list[float]] = {way: [] for way in WAYS}
    copies, runs, warm = [], [], []
    for _ in range(bench.repetitions):
        for way in WAYS:
            drop(bench.shards)
            raw[way].append(read_rate(bench.shards, way))
        copies.append(memory_copy_rate())
        runs.append(bench.run("llfast", sizes.few, token_budget=sizes.few[1]))
        read_into_cache(bench.shards)
        warm.append(bench.run("llfast", sizes.few, token_budget=sizes.few[1], cold=False))
    best = [max(each) for each in zip(*raw.values(), strict=True)]  # of every repetition
    fastest = max(raw, key=lambda way: report.spread(raw[way])["median"])
    rates = [1e-9 * each["extra"]["nbytes"] / each["extra"]["read_seconds"] for each in runs]
    walls = [1e-9 * each["extra"]["nbytes"] / each["seconds"] for each in runs]
    return {
        "texts": sizes.few,
        "raw_gb_a_second": {way: report.spread(each) for way, each in raw.items()},
        "fastest_way": fastest,
        "memory_copy_gb_a_second": report.spread(copies),
        "read_gb_a_second": report.spread(rates),
        "wall_gb_a_second": report.spread(walls),
        "share_of_raw": report.paired(rates, best),
        "share_of_sequential": report.paired(rates, raw[SEQUENTIAL]),
        "wall_share_of_raw": report.paired(walls, best),
        "cold_seconds": report.spread([each["seconds"] for each in runs]),
        "warm_seconds": report.spread([each["seconds"] for each in warm]),
        "warm_read_gb_a_second": report.spread(
            [1e-9 * each["extra"]["nbytes"] / each["extra"]["read_seconds"] for each in warm]
        ),
        "runs": [described(each) for each in runs],
    }


def measure_overlap(
    bench: Bench, size: tuple[int, int], way: str, repetitions: int
) -> dict[str, Any]:
    """Cold and paged, beside what reading and computing would take alone."""
    paged, resident, reads = [], [], []
    for _ in range(repetitions):
        drop(bench.shards)
        rate = read_rate(bench.shards, way)
        paged.append(bench.run("llfast", size))
        reads.append(1e-9 * paged[-1]["extra"]["nbytes"] / rate)
        resident.append(bench.run("resident", size))
    seconds = [each["seconds"] for each in paged]
    computing = [each["score_seconds"] for each in resident]
    floors = [max(read, compute) for read, compute in zip(reads, computing, strict=True)]
    return {
        "texts": size,
        "tokens": size[0] * size[1],
        "read_seconds": report.spread(reads),
        "compute_seconds": report.spread(computing),
        "paged_seconds": report.spread(seconds),
        "over_floor": report.paired(seconds, floors),
        "over_resident": report.paired(seconds, computing),
        "over_resident_with_load": report.paired(seconds, [each["seconds"] for each in resident]),
        "runs": [described(each) for each in paged],
        "resident_runs": [described(each) for each in resident],
    }


def measure_limited(bench: Bench, sizes: Sizes) -> dict[str, Any]:
    """Where the system refuses more memory, with the bits of a run that may have all of it."""
    size = sizes.many[-1]
    if (str(bench.folder), *size) not in bench.found:  # else it has run already
        bench.run("resident", size)
    run = bench.run("llfast", size, limit_mib=LIMIT_MIB, memory_budget="1GiB")
    return {
        "texts": size,
        "limit_mib": LIMIT_MIB,
        "peak_mib": round(run["peak_mib"], 1),
        "statistics_mib": round(run["extra"]["peak_bytes"] / 2**20, 1),
        "runs": [described(run)],
    }


# ------------------------------------------------------------------------------------------ main


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint and copies of it are kept"
    )
    parser.add_argument("--airllm", type=Path, help="where AirLLM is installed, by pip --target")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--slow-repetitions", type=int, default=2, help="of 4,096 tokens and peers")
    parser.add_argument("--quick", action="store_true", help="a tiny checkpoint")
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", help="measure these again, into what was written"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "loading.json")
    options = parser.parse_args()
    if options.quick and options.out == RESULTS / "loading.json":
        options.out = Path(tempfile.gettempdir(), "loading_quick.json")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        bench = Bench(
            folder=root / ("small" if options.quick else "checkpoint"),
            tiny=root / "tiny",
            cache=root,
            airllm=options.airllm,
            repetitions=1 if options.quick else options.repetitions,
            slow_repetitions=1 if options.quick else options.slow_repetitions,
        )
        sizes = QUICK if options.quick else Sizes()
        prepare(bench, sizes, quick=options.quick)
        if options.only:
            found = json.loads(options.out.read_text())
            before = found["commit"]
            found["commit"] = before if isinstance(before, dict) else {"all else": before}
            for part in options.only:
                found[part] = PARTS[part](bench, sizes)
                found["commit"][part] = report.commit()
            found["memory"] = memory_of_all(found, shape_of(quick=options.quick).hidden)
            found["aims"] = aims_of(found)
        else:
            found = run_all(bench, sizes, quick=options.quick)
        report.write(found, options.out)
    for aim in found["aims"]:
        word = "met   " if aim["met"] else "MISSED"
        print(f"{word} {aim['aim']}: {aim['figure']:.4g} (limit {aim['limit']:.4g})")
    print(f"wrote {options.out}")


def run_all(bench: Bench, sizes: Sizes, *, quick: bool) -> dict[str, Any]:
    """All of the measurements, as what the JSON holds."""
    start = time.perf_counter()
    shape = shape_of(quick=quick)
    rate = measure_rate(bench, sizes)
    overlap = [
        measure_overlap(bench, size, rate["fastest_way"], repetitions)
        for size, repetitions in zip(
            sizes.many, (bench.repetitions, bench.slow_repetitions), strict=False
        )
    ]
    peers = measure_peers(bench, sizes)
    found = {
        "benchmark": "loading",
        "command": f"python benchmarks/bench_loading.py --repetitions {bench.repetitions} "
        f"--slow-repetitions {bench.slow_repetitions}",
        "model": {
            "shape": f"Llama, {shape.layers} layers of {shape.hidden}",
            "weight_bytes": sum(path.stat().st_size for path in bench.shards),
            "shards": len(bench.shards),
            "dtype": "bfloat16",
        },
        "rate": rate,
        "overlap": overlap,
        "peers": peers,
        "read_bound": measure_read_bound(bench, sizes),
        "verify": _verify(bench, sizes),
        "limited": measure_limited(bench, sizes),
        "left_out": bench.left_out,
        "seconds": round(time.perf_counter() - start),
        "hardware": report.hardware(),
        "versions": report.versions("torch", "transformers", "accelerate", "safetensors", "llfast")
        | {"airllm": _airllm_version(bench.airllm)},
        "commit": report.commit(),
    }
    found["memory"] = memory_of_all(found, shape.hidden)
    return {**found, "aims": aims_of(found)}


def shape_of(*, quick: bool) -> Shape:
    """Of the checkpoint."""
    return SMALL if quick else Shape()


def _verify(bench: Bench, sizes: Sizes) -> list[dict[str, Any]]:
    return measure_verify(bench, (sizes.few, sizes.peers))


# What can be measured by itself.
PARTS = {
    "rate": measure_rate,
    "read_bound": measure_read_bound,
    "verify": _verify,
    "limited": measure_limited,
}


def prepare(bench: Bench, sizes: Sizes, *, quick: bool) -> None:
    """Checkpoints; correctness before time; and what is done once in a checkpoint's life."""
    shape, most_bytes = shape_of(quick=quick), 16_000_000 if quick else MOST_SHARD_BYTES
    for folder, each in ((bench.tiny, TINY), (bench.folder, shape)):
        if not (folder / "config.json").exists():
            say(f"writing {folder}")
            make_checkpoint(folder, each, most_shard_bytes=most_bytes)
    if quick:
        return
    for provider in ("llfast", "resident", "from_pretrained", *PEERS):
        run = bench.peer if provider in PEERS else bench.run
        run(provider, (4, 16), folder=str(bench.tiny), cold=False)
    for provider in ("llfast", "resident", "AirLLM"):
        run = bench.peer if provider in PEERS else bench.run
        run(provider, sizes.few, cold=False, token_budget=sizes.few[1])
    drop(bench.shards)


def _airllm_version(folder: Path | None) -> str:
    paths = [] if folder is None else [str(folder)]
    for distribution in importlib.metadata.distributions(name="airllm", path=paths):
        return distribution.version
    return ""


if __name__ == "__main__":
    main()

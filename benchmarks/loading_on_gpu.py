"""A model that is paged to a GPU with 4 GiB for its weights, beside the same model all on it.

    python benchmarks/loading_on_gpu.py [--folder DIR] [--out FILE]

Claim: with more tokens than T*, a model of 7 billion parameters whose weights are never on the GPU
all at once is scored at the rate of one that is, for files are read and copied while it computes.

The checkpoint has the shape of Llama-2-7B and random weights; it is written first unless it is
there. Disk, copies to the device, products, and both ways of scoring take turns within a
repetition, and whether log-likelihoods are the same to the bit is told. Cold means: dropped from
the page cache. What overlaps is read off a profile of a run whose files are cached: T* of the page
cache is less than that of a disk.

The JSON is written twice in every repetition, so that a run that is killed keeps what it had.
`--device cpu --quick` shows that all of it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_checkpoint import SMALL, Shape, draw_texts, make_checkpoint
from torch.profiler import ProfilerActivity, profile

import llfast
from llfast.bench import report
from llfast.bench.loading import copy_rate, forget, read_into_cache, read_rate
from llfast.bench.products import TORCH_MM, product_rates
from llfast.bench.shapes import Flops
from llfast.devices import default_token_budget
from llfast.models import open_model
from llfast.paging import LoadingStatistics

RESULTS = Path(__file__).parent / "results"
LLAMA_2_7B = Shape(
    layers=32,
    hidden=4096,
    intermediate=11008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocabulary=32000,
    tied=False,
)
BUDGET, SMALL_BUDGET = "4GiB", "32MiB"
TEXTS, SMALL_TEXTS = (1024, 256), (16, 32)  # how many, and tokens of each
MOST_OVER_RESIDENT = 1.10

Span = tuple[float, float]


class Bench:
    """A checkpoint, the same model on the device, and texts.

    Attributes:
        runs: seconds and statistics of each way, one a repetition.
        ceilings: what the machine can do, in bytes or FLOP a second, likewise.
        same_bits: whether all have returned the same log-likelihoods so far.
    """

    def __init__(self, folder: Path, device: torch.device, *, quick: bool) -> None:
        shape = SMALL if quick else LLAMA_2_7B
        if not (folder / "config.json").exists():
            make_checkpoint(folder, shape, device=device)
        self.source = open_model(str(folder))
        self.device, self.budget = device, SMALL_BUDGET if quick else BUDGET
        self.size = SMALL_TEXTS if quick else TEXTS
        self.ids = draw_texts(*self.size, shape.vocabulary)
        self.flops = Flops.of(self.source.config)
        self.same_bits = True
        self._values: np.ndarray | None = None
        self.runs: dict[str, list[dict[str, Any]]] = {"cold": [], "cached": [], "resident": []}
        self.ceilings: dict[str, list[float]] = {}
        self._resident = self.source.load(torch.bfloat16, device)

    @property
    def files(self) -> Sequence[Path]:
        """Of the checkpoint."""
        files: Sequence[Path] = self.source.checkpoint.weights
        return files

    def warm_up(self) -> None:
        """Compile and load what a process does once."""
        few = self.ids[: self.size[0] // 8]
        self._paged(few)
        self._scored(self._resident, few)

    def repeat(self, save: Callable[[], None]) -> None:
        """Measure everything once more, the disk last, whose rate nobody knows beforehand."""
        read_into_cache(self.files)
        self._add("copy to device", copy_rate(self.device))
        self._run("cached", self._paged(self.ids))
        rows = default_token_budget(self.device, self.source.config)
        products = product_rates(self.flops.linear, rows, torch.bfloat16, self.device, packed=False)
        self._add(TORCH_MM, products[TORCH_MM])
        self._run("resident", self._scored(self._resident, self.ids))
        save()
        forget(self.files)
        self._add("disk", read_rate(self.files))
        forget(self.files)
        self._run("cold", self._paged(self.ids))
        save()

    def _run(self, name: str, found: dict[str, Any]) -> None:
        """Keep what was measured, and compare what was returned."""
        values = found.pop("values")
        if self._values is None:
            self._values = values
        self.same_bits = self.same_bits and np.array_equal(values, self._values)
        self.runs[name].append(found)

    def profiled(self) -> dict[str, float]:
        """How much of the copies to the device is done while kernels run, in seconds."""
        read_into_cache(self.files)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self._paged(self.ids)
        kernels: list[Span] = []
        copies: list[Span] = []
        for event in seen.events() or ():
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
            if "HtoD" in event.name:
                copies.append(span)
            elif not event.name.startswith(("Memcpy", "Memset")):
                kernels.append(span)
        return overlap(kernels, copies)

    def found(self) -> dict[str, Any]:
        """All that was measured."""
        texts, tokens = self.size
        work = self.flops.body([self.size]) + self.flops.head(texts * (tokens - 1))
        seconds = {
            name: [run["seconds"] for run in runs] for name, runs in self.runs.items() if runs
        }
        rates = {name: [work / each for each in taken] for name, taken in seconds.items()}
        products, resident = self.ceilings[TORCH_MM], seconds["resident"]
        disk = {}
        if cold := self.runs["cold"]:
            read = [run["read_rate"] for run in cold]
            share = report.paired(read, self.ceilings["disk"])
            cached = report.paired(
                [run["cached_bytes"] for run in cold], [run["nbytes"] for run in cold]
            )
            disk = {
                "read_rate": report.spread(read),
                "share_of_disk": share,
                "cold_share_cached": cached,
            }
        return {
            "benchmark": "loading on a GPU",
            "commit": report.commit(),
            "hardware": report.hardware(),
            "versions": report.versions("llfast", "torch", "triton", "transformers"),
            "parameters": self.source.checkpoint.parameters,
            "weight_bytes": self.source.checkpoint.weight_bytes,
            "memory_budget": self.budget,
            "texts": self.size,
            "seconds": {name: report.spread(each) for name, each in seconds.items()},
            "tokens_a_second": {
                name: report.spread([texts * tokens / each for each in taken])
                for name, taken in seconds.items()
            },
            "over_resident": {
                name: report.paired(each, resident[: len(each)])
                for name, each in seconds.items()
                if name != "resident"
            },
            "utilisation": {
                name: report.paired(each, products[: len(each)]) for name, each in rates.items()
            },
            "same_bits": self.same_bits,
            **disk,
            "ceilings": {name: report.spread(each) for name, each in self.ceilings.items()},
            "runs": self.runs,
        }

    def _add(self, name: str, rate: float) -> None:
        self.ceilings.setdefault(name, []).append(rate)

    def _paged(self, ids: Sequence[np.ndarray]) -> dict[str, Any]:
        loading = LoadingStatistics()
        found = self._scored(
            self.source, ids, weights="paged", memory_budget=self.budget, loading=loading
        )
        names = (
            "nbytes",
            "read_rate",
            "read_seconds",
            "stall_seconds",
            "waves",
            "wave_tokens",
            "peak_bytes",
        )
        # Files that lie in memory are never cold, and a small cache never holds all of them.
        cached = sum(page.cached_bytes for page in loading.pages)
        return found | {name: getattr(loading, name) for name in names} | {"cached_bytes": cached}

    def _scored(self, model: Any, ids: Sequence[np.ndarray], **options: Any) -> dict[str, Any]:
        held = _held_bytes(self.device)
        start = time.perf_counter()
        result = llfast.score(
            model,
            token_ids=ids,
            dtype="bfloat16",
            device=str(self.device),
            progress=False,
            **options,
        )
        seconds = time.perf_counter() - start
        grown = _highest_bytes(self.device) - held
        return {"seconds": seconds, "values": result.values, "device_bytes": grown}


def overlap(kernels: Sequence[Span], copies: Sequence[Span]) -> dict[str, float]:
    """For how long each of two was under way, and both; spans of either may overlap."""
    alone = {"kernel_seconds": busy(kernels), "copy_seconds": busy(copies)}
    either = busy([*kernels, *copies])
    return {**alone, "both_seconds": sum(alone.values()) - either}


def busy(spans: Sequence[Span]) -> float:
    """The length of what spans cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def _held_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _highest_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def measure(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """A repetition, the profile, and more repetitions while there is time for them."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llfast-loading-") as temporary:
        folder = options.folder or Path(temporary, "checkpoint")
        bench = Bench(folder, torch.device(options.device), quick=options.quick)
        bench.warm_up()
        seen: dict[str, Any] = {}

        def save_all() -> None:
            save({**bench.found(), **seen})

        took = 0.0
        for number in range(options.repetitions):
            start = time.monotonic()
            if number and start - begin + took > options.most_seconds:
                break
            bench.repeat(save_all)
            took = time.monotonic() - start
            print(f"{start - begin:.0f} s; a repetition: {took:.1f} s", file=sys.stderr, flush=True)
            if not number and bench.device.type == "cuda":
                seen["profile"] = bench.profiled()
                save_all()


def main() -> int:
    """Measure, print, and write the JSON; 1 if paged models have other bits than resident ones."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--most-seconds", type=float, default=300.0, help="later repetitions are left out"
    )
    parser.add_argument("--quick", action="store_true", help="a small model; written only to --out")
    parser.add_argument("--commit", help="which is measured, where there is no repository")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or (None if options.quick else RESULTS / "loading_gpu.json")
    latest: dict[str, Any] = {}

    def save(found: dict[str, Any]) -> None:
        found["command"] = "python benchmarks/loading_on_gpu.py"
        found["commit"] = options.commit or found["commit"]
        latest.update(found)
        if out is not None:
            report.write(found, out)

    measure(options, save)
    show(latest)
    return 0 if latest["same_bits"] else 1


def show(found: dict[str, Any]) -> None:
    """Print what was found."""
    for name, rate in found["ceilings"].items():
        print(f"{name}: {_range(rate, 1e-9)} G/s")
    if "read_rate" in found:
        cached = f"{found['cold_share_cached']['max']:.0%} of them cached"
        print(f"weights, cold: {_range(found['read_rate'], 1e-9)} GB/s, {cached}")
    for name, seconds in found["seconds"].items():
        print(
            f"{name}: {_range(seconds)} s, {_range(found['tokens_a_second'][name])} tokens/s, "
            f"{_range(found['utilisation'][name])} of torch.mm's FLOP/s"
        )
    for name, ratio in found["over_resident"].items():
        word = "met   " if ratio["median"] <= MOST_OVER_RESIDENT else "MISSED"
        print(f"{word} {name} over resident: {_range(ratio)} (limit {MOST_OVER_RESIDENT})")
    print(f"log-likelihoods: {'the same bits' if found['same_bits'] else 'NOT THE SAME BITS'}")
    if "profile" in found:
        seen = found["profile"]
        print(
            f"copies took {seen['copy_seconds']:.2f} s, {seen['both_seconds']:.2f} of them while "
            f"kernels ran, which took {seen['kernel_seconds']:.2f} s"
        )


def _range(value: dict[str, float], scale: float = 1.0) -> str:
    middle, least, most = (f"{scale * value[name]:,.4g}" for name in ("median", "min", "max"))
    return f"{middle} ({least} to {most})"


if __name__ == "__main__":
    sys.exit(main())

"""Time tiles for the Triton kernel on a GPU: what belongs into `llfast/kernels/tuning.py`.

    python benchmarks/tune_kernel.py [--dtype bfloat16] [--seconds 120]

Every tile is timed on a head with many tokens and on one with few, in turns; one that does not
compile, does not fit, or gives other log-probabilities than the table's is listed with its reason.
The search runs here, and never when llfast is used.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from llfast.bench import report
from llfast.bench.problems import Problem, make_problem
from llfast.bench.timing import one_line, seconds_a_call
from llfast.dtypes import DTYPES
from llfast.kernels import cuda, token_logprobs, tuning
from llfast.kernels.tuning import Schedules, Tile

# T, V, D: many tokens, and few.
_MANY, _FEW = (8192, 128256, 4096), (64, 128256, 4096)
_QUICK_MANY, _QUICK_FEW = (300, 2100, 128), (64, 2100, 128)
SHAPES = {"specialised": _MANY, "many": _MANY, "few": _FEW}
QUICK_SHAPES = {"specialised": _QUICK_MANY, "many": _QUICK_MANY, "few": _QUICK_FEW}
ROUNDS = 3
MOST_DIFFERENCE = 1e-4  # nats; other chunks are summed in another order


def tiles(schedule: str) -> Iterator[Tile]:
    """What to try."""
    if schedule == "specialised":
        for (block_d, stages), panel in itertools.product(
            ((64, 4), (64, 3), (32, 8), (32, 6), (128, 2)), (16, 8, 32)
        ):
            yield Tile(
                block_t=128,
                block_v=256,
                block_d=block_d,
                warps=4,
                stages=stages,
                panel=panel,
                specialised=True,
            )
        return
    sizes = {
        "many": ((128, 256, 64), (128, 128, 64), (256, 128, 64), (128, 256, 32), (128, 256, 128)),
        "few": ((64, 256, 64), (64, 128, 64), (128, 256, 64), (64, 256, 128), (16, 128, 128)),
    }
    panels = (8, 16, 32) if schedule == "many" else (16,)
    for (block_t, block_v, block_d), stages, panel in itertools.product(
        sizes[schedule], (3, 4, 5, 6), panels
    ):
        for warps in (4, 8):
            for programs in (1, 2):
                yield Tile(
                    block_t=block_t,
                    block_v=block_v,
                    block_d=block_d,
                    warps=warps,
                    stages=stages,
                    panel=panel,
                    programs=programs,
                )


def run(problem: Problem) -> torch.Tensor:
    """The whole call, folds included."""
    return token_logprobs(problem.hidden, problem.lm_head, problem.targets, softcap=problem.softcap)


def search(schedule: str, problem: Problem, end: float) -> list[dict[str, Any]]:
    """Each tile's ms, the fastest first; those that cannot be used last."""
    device, dtype = problem.device, problem.hidden.dtype
    row = tuning.schedules_of(cuda.chip_of(device).capability, dtype)
    key = next(key for key, each in tuning.SCHEDULES.items() if each is row and key[1] == dtype)
    expected = run(problem)
    found = []
    try:
        for tile in tiles(schedule):
            if time.monotonic() > end:
                break
            tuning.SCHEDULES[key] = (
                replace(row, specialised=tile)
                if tile.specialised
                else Schedules(many=tile, few=tile, tma=row.tma)
            )
            entry: dict[str, Any] = {"schedule": schedule, "tile": repr(tile)}
            try:
                off = float((run(problem) - expected).abs().max())
                times = [seconds_a_call(lambda: run(problem), 3, device) for _ in range(ROUNDS)]
            except Exception as error:
                entry["failed"] = one_line(error)
            else:
                if off <= MOST_DIFFERENCE:
                    entry["ms"] = report.spread([1e3 * each for each in times])
                else:
                    entry["failed"] = f"off by {off:.3g} nats"
            found.append(entry)
    finally:
        tuning.SCHEDULES[key] = row
    return sorted(found, key=lambda entry: entry.get("ms", {}).get("median", float("inf")))


def main() -> int:
    """Search, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=120.0, help="for each schedule")
    parser.add_argument("--quick", action="store_true", help="small heads: that it runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    row = tuning.schedules_of(cuda.chip_of(torch.device("cuda")).capability, DTYPES[options.dtype])
    for schedule, shape in (QUICK_SHAPES if options.quick else SHAPES).items():
        if schedule == "specialised" and row.specialised is None:
            continue
        problem = make_problem(shape, DTYPES[options.dtype], "cuda")
        for entry in search(schedule, problem, time.monotonic() + options.seconds):
            print(schedule, entry.get("ms", entry.get("failed")), entry["tile"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The fused output head on a CPU, beside torch's ways and the processor's limits.

    python benchmarks/bench_cpu_kernel.py [--instruction-set avx2] [--repetitions 5]

Claim: log-probabilities take about the time of torch's matrix product alone, those of few tokens
little more than reading the output head once, and memory does not grow with the vocabulary.

Errors against fp64 are looked at before anything is timed. Providers are interleaved, each
repetition beginning with another one, and ratios are taken within a repetition; so is the share of
the multiply-add peak, which is measured in every repetition. With few tokens, every call comes
right after a read of the same head by as many threads, to which its time is compared. Memory is
measured in processes of their own, after a small call that loads what is loaded once.

`--instruction-set` takes llfast and torch down to what such a processor has. The environment says
so to both, and is set before torch is imported: the script starts itself again. `--quick` shows
that all of it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_limits import Limits, fastest_multiply_add
from cpu_peers import CHECKED_ROWS, MATMUL_INTO, check, providers_for, skipped_providers
from memory import highest_growth_mib, measured_elsewhere

from llfast.bench import report
from llfast.bench.heads import run_llfast, run_matmul
from llfast.bench.problems import Problem, make_problem
from llfast.kernels import instruction_set

Shape = tuple[int, int, int]  # T, V, D

RESULTS = Path(__file__).parent / "results"

SHAPES: tuple[Shape, ...] = ((1024, 50304, 768), (256, 128256, 1024), (2048, 32000, 4096))
QUICK_SHAPES: tuple[Shape, ...] = ((96, 5000, 128), (64, 4100, 256))
FEW_TOKENS = (1, 2, 4, 8)
FEW_ROUNDS = 5  # reads and calls in turn, a repetition: each takes only milliseconds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETTLE_SECONDS = 0.05  # for some milliseconds after a call, torch's threads spin in others' way

# What takes torch down to the instructions of a set.
TORCH_LIMITS = {
    "portable": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
}

# Time over that of torch's matrix product, at most, by (--instruction-set, dtype).
MOST_OVER_MATMUL = {
    (None, "float32"): 0.50,
    (None, "bfloat16"): 0.85,
    ("avx2", "float32"): 1.0,
}
LEAST_SHARE_OF_PEAK = 0.70
LEAST_SHARE_OF_READ = 0.85
MOST_MIB_A_THREAD = 4.0
MOST_ERROR_RATIO = 2.0


# ------------------------------------------------------------------------------------------ time


def seconds(run: Callable[[Problem], object], problem: Problem) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run(problem)
    return time.perf_counter() - start


def measure_many_tokens(problem: Problem, limits: Limits, repetitions: int) -> dict[str, Any]:
    """All providers and the peak, interleaved."""
    errors = check(problem)
    providers = providers_for(problem)
    multiply_add = fastest_multiply_add(instruction_set(), problem.hidden.dtype)
    times: dict[str, list[float]] = {name: [] for name in providers}
    peaks = []
    names = list(providers)
    providers[MATMUL_INTO](problem)  # the others ran when they were checked, as this one has not
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(SETTLE_SECONDS)
            times[name].append(seconds(providers[name], problem))
        time.sleep(SETTLE_SECONDS)
        peaks.append(limits.gflops(multiply_add))
    rates = [problem.gflop / each for each in times["llfast"]]
    return {
        **described(problem),
        "errors": errors,
        "error_ratio": float(f"{errors['llfast'] / errors['product in fp32']:.3g}"),
        "seconds": {name: report.spread(each) for name, each in times.items()},
        "llfast_over": {
            name: report.paired(times["llfast"], each)
            for name, each in times.items()
            if name != "llfast"
        },
        "llfast_gflops": report.spread(rates),
        "matmul_gflops": report.spread([problem.gflop / each for each in times["matmul"]]),
        "peak": multiply_add,
        "peak_gflops": report.spread(peaks),
        "share_of_peak": report.paired(rates, peaks),
    }


def measure_few_tokens(problem: Problem, limits: Limits, repetitions: int) -> dict[str, Any]:
    """Calls beside reads of the same head; torch's product is timed apart, before the next calls.

    Rounds that are dropped come first: after idling, or torch's product, both are slow for a while.
    """
    size_gb = problem.lm_head_gb
    calls, reads, products = [], [], []
    run_matmul(problem)
    for _ in range(repetitions):
        rounds = []
        for _ in range(2 * FEW_ROUNDS):
            read = limits.read_seconds(problem.lm_head)
            rounds.append((read, seconds(run_llfast, problem)))
        reads += [read for read, _ in rounds[FEW_ROUNDS:]]
        calls += [call for _, call in rounds[FEW_ROUNDS:]]
        products += [seconds(run_matmul, problem) for _ in range(FEW_ROUNDS)]
    return {
        **described(problem),
        "pairs": len(calls),
        "llfast_gb_a_second": report.spread([size_gb / each for each in calls]),
        "matmul_gb_a_second": report.spread([size_gb / each for each in products]),
        "read_gb_a_second": report.spread([size_gb / each for each in reads]),
        "share_of_read": report.paired(reads, calls),
    }


def described(problem: Problem) -> dict[str, Any]:
    """Shape and dtype."""
    tokens, words, width = problem.shape
    return {"T": tokens, "V": words, "D": width, "dtype": problem.dtype_name}


# ---------------------------------------------------------------------------------------- memory


def measure_memory(shape: Shape, dtype: torch.dtype) -> float:
    """In this process: MiB a thread of a call, beyond inputs and output."""
    run_llfast(make_problem((8, 512, 64), dtype))
    problem = make_problem(shape, dtype)
    output_mib = 4 * shape[0] / 2**20
    grown = highest_growth_mib(lambda: run_llfast(problem)) - output_mib
    return max(grown, 0.0) / torch.get_num_threads()


def measure_all_memory(shapes: tuple[Shape, ...], dtypes: list[str]) -> list[dict[str, Any]]:
    """In a process each: the shapes as they are, and with few tokens."""
    found = []
    for dtype in dtypes:
        for tokens, words, width in shapes:
            for few in (tokens, FEW_TOKENS[-1]):
                what = f"{few},{words},{width},{dtype}"
                each = {"T": few, "V": words, "D": width, "dtype": dtype}
                mib = measured_elsewhere([__file__, "--measure-memory", what])
                found.append({**each, "mib_a_thread": mib})
    return found


# ------------------------------------------------------------------------------------------ aims


def aims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each aim with its figure."""
    judged = []

    def judge(aim: str, case: dict[str, Any], figure: float, bound: float, *, most: bool) -> None:
        where = f"T {case['T']}, V {case['V']}, D {case['D']}, {case['dtype']}"
        met = figure <= bound if most else figure >= bound
        sign = "at most" if most else "at least"
        judged.append({"aim": f"{aim} {sign} {bound}", "case": where, "figure": figure, "met": met})

    for case in found["many_tokens"]:
        bound = MOST_OVER_MATMUL.get((found["limited_to"], case["dtype"]))
        if bound is not None:
            for name in ("matmul", MATMUL_INTO):
                ratio = case["llfast_over"][name]["median"]
                judge(f"time over torch's {name}", case, ratio, bound, most=True)
        share = case["share_of_peak"]["median"]
        judge("share of the multiply-add peak", case, share, LEAST_SHARE_OF_PEAK, most=False)
        judge("error over fp32 product's", case, case["error_ratio"], MOST_ERROR_RATIO, most=True)
    for case in found["few_tokens"]:
        share = case["share_of_read"]["median"]
        judge("share of a read of the head", case, share, LEAST_SHARE_OF_READ, most=False)
    for case in found["memory"]:
        judge("MiB a thread", case, case["mib_a_thread"], MOST_MIB_A_THREAD, most=True)
    return judged


def show(found: dict[str, Any]) -> None:
    """Print the aims with their figures, and the peers."""
    for case in found["many_tokens"]:
        print(
            "\nT {T}, V {V}, D {D}, {dtype}: llfast {rate:.0f} GFLOP/s, torch's matmul {matmul:.0f}"
            ", peak ({peak}) {most:.0f}".format(
                **case,
                rate=case["llfast_gflops"]["median"],
                matmul=case["matmul_gflops"]["median"],
                most=case["peak_gflops"]["median"],
            )
        )
        for name, ratio in case["llfast_over"].items():
            error = case["errors"].get(name)
            off = "" if error is None else f", which is off by up to {error:.1e}"
            print(
                f"  time {ratio['median']:5.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}) of "
                f"{name}{off}"
            )
        print(f"  llfast is off by up to {case['errors']['llfast']:.1e}")
    print()
    for case in found["few_tokens"]:
        print(
            "T {T}, V {V}, D {D}, {dtype}: GB/s of the head: llfast {rate:.1f}, torch's matmul "
            "{matmul:.1f}, read {read:.1f} (most {most:.1f})".format(
                **case,
                rate=case["llfast_gb_a_second"]["median"],
                matmul=case["matmul_gb_a_second"]["median"],
                read=case["read_gb_a_second"]["median"],
                most=case["read_gb_a_second"]["max"],
            )
        )
    print()
    for aim in found["aims"]:
        met = "met   " if aim["met"] else "MISSED"
        print(f"{met} {aim['figure']:8.3f}  {aim['aim']:70s}  {aim['case']}")
    for name, reason in found["skipped"].items():
        print(f"skipped {name}: {reason}")


# ------------------------------------------------------------------------------------------ main


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """All of the measurements, as what the JSON holds."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    limits = Limits()
    many, few = [], []
    for dtype in options.dtypes:
        for shape in shapes:
            problem = make_problem(shape, DTYPES[dtype])
            many.append(measure_many_tokens(problem, limits, options.repetitions))
            few += [
                measure_few_tokens(problem.first(tokens), limits, options.repetitions)
                for tokens in FEW_TOKENS
            ]
    limited = options.instruction_set
    command = "python benchmarks/bench_cpu_kernel.py"
    if limited is not None:
        command += f" --instruction-set {limited}"
    if options.quick:
        command += " --quick"
    if options.dtypes != list(DTYPES):
        command += f" --dtypes {' '.join(options.dtypes)}"
    command += f" --repetitions {options.repetitions}"
    found: dict[str, Any] = {
        "benchmark": "cpu_kernel",
        "command": command,
        "quick": options.quick,
        "limited_to": limited,
        "torch_environment": {} if limited is None else TORCH_LIMITS[limited],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "repetitions": options.repetitions,
        "checked_rows": CHECKED_ROWS,
        "many_tokens": many,
        "few_tokens": few,
        "memory": measure_all_memory(shapes, options.dtypes),
        "skipped": skipped_providers(),
        "hardware": report.hardware(),
        "versions": report.versions("torch", "llfast"),
        "commit": report.commit(),
    }
    found["aims"] = aims(found)
    return found


def limit_to(name: str) -> None:
    """Start this script again in an environment that holds llfast and torch to a set."""
    wanted = {"LLFAST_ISA": name, **TORCH_LIMITS[name]}
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--instruction-set", choices=TORCH_LIMITS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small shapes; written only to --out")
    parser.add_argument("--out", type=Path, help="results/cpu_kernel_<instruction set>.json")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.instruction_set is not None:
        limit_to(options.instruction_set)
    elif "LLFAST_ISA" in os.environ and options.measure_memory is None:
        raise SystemExit("LLFAST_ISA must not be set, for it holds llfast alone; use the option")
    with torch.inference_mode():
        if options.measure_memory is not None:
            *shape, dtype = options.measure_memory.split(",")
            tokens, words, width = map(int, shape)
            print(json.dumps(measure_memory((tokens, words, width), DTYPES[dtype])))
            return
        if instruction_set() == "torch":
            raise SystemExit("llfast must have its C++ module here; install it with a compiler")
        found = run_all(options)
    show(found)
    out = options.out
    if out is None and not options.quick:
        out = RESULTS / f"cpu_kernel_{instruction_set()}.json"
    if out is not None:
        report.write(found, out)
        print(f"wrote {out}")


if __name__ == "__main__":
    main()

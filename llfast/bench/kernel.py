"""The fused output head on a device, beside torch's ways, those of other packages, and its limits.

For every head and number of tokens: how far each way is off against fp64, then the time of each,
interleaved, with ratios taken within a repetition; few tokens are timed as CUDA graphs, so that
what Python takes to launch a call is not what is measured. Last, whether a row keeps its bits
whatever stands beside it.

Device time of a default run on an H200: all cases once are 3.8e14 FLOP, 0.63 s at 600 TFLOP/s. At
nine providers, half as slow again on average, called six times at least (a check, memory, one call
to plan by, three repetitions), that is 52 s. Faster calls are repeated until a case has taken a
second, half a minute for all. Compiling some sixty Triton kernels takes one to two minutes, heads
and fp64 some ten seconds. A case that does not fit into `most_seconds` any more is left out.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llfast.devices import parse_device
from llfast.dtypes import DTYPES
from llfast.kernels import instruction_set

from . import report
from .aims import judged
from .bits import same_bits
from .cases import NOT_MEASURED, is_lost, measure_case
from .problems import Problem, make_problem
from .timing import Copy, one_line

# What a case takes, for deciding if it still fits: its product at this rate, by every provider.
_FLOPS = {"float32": 40e12, "float16": 600e12, "bfloat16": 600e12}
_CALLS = 9 * 1.5 * 6
_SECONDS_TO_COMPILE = 5.0

Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The output head of a model."""

    vocabulary: int
    width: int
    softcap: float | None = None


HEADS = {  # those that say most first, for the last ones are left out where time is short
    "Llama-3-8B": Head(vocabulary=128256, width=4096),
    "GPT-2": Head(vocabulary=50257, width=768),
    "Gemma-2-9B": Head(vocabulary=256000, width=3584, softcap=30.0),
    "256000 x 8192": Head(vocabulary=256000, width=8192),
    "Qwen3-8B": Head(vocabulary=151936, width=4096),
    "Pythia-2.8B": Head(vocabulary=50304, width=2560),
}
QUICK_HEADS = {
    "small": Head(vocabulary=1003, width=96),
    "small, softcap": Head(vocabulary=1024, width=128, softcap=30.0),
}
TOKENS = (64, 256, 2048, 8192, 32768)
FEWER_TOKENS = {"Llama-3-8B": (1, 16, 128)}  # in addition, where no numbers of tokens are given
QUICK_TOKENS = (1, 64, 300)
SAME_BITS_HEADS = ("GPT-2", "Gemma-2-9B", "small, softcap")  # a ragged vocabulary, and a softcap
SAME_BITS_TOKENS = 2048


def measure(
    *,
    device: str = "auto",
    dtype: str = "bfloat16",
    tokens: Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    quick: bool = False,
    case_seconds: float = 1.0,
    most_seconds: float = 300.0,
    save: Save | None = None,
) -> dict[str, Any]:
    """Measure `llfast.kernels.token_logprobs`, as a value that JSON can hold.

    Args:
        device: auto, cpu or cuda; auto takes CUDA where it is.
        dtype: bfloat16, float16 or float32.
        tokens: how many, a case each; None for those of `TOKENS`.
        heads: names out of `HEADS` (with `quick`, out of `QUICK_HEADS`); None for all.
        quick: small heads, which show that all of it runs.
        case_seconds: what the repetitions of a case may take; three there always are.
        most_seconds: cases that would end later are left out, and listed.
        save: is given what has been found after every case.

    Raises:
        ValueError: if a name is none of those above.
    """
    place = parse_device(device)
    known = QUICK_HEADS if quick else HEADS
    chosen = {name: _one_of(known, name, "heads") for name in heads or known}
    element = _one_of(DTYPES, dtype, "dtype")
    if any(count < 1 for count in tokens or ()):
        raise ValueError(f"tokens must be positive, got {list(tokens or ())}; leave the others out")
    start = time.monotonic()
    found: dict[str, Any] = {
        "benchmark": "kernel",
        "device": place.type,
        "kernel": instruction_set(place),
        "dtype": dtype,
        "quick": quick,
        "case_seconds": case_seconds,
        "cases": [],
        "left_out": [],
        "same_bits": [],
        "stopped": None,
        "hardware": _hardware(place),
        "versions": report.versions(
            "torch", "triton", "llfast", "liger-kernel", "cut-cross-entropy"
        ),
        "commit": report.commit(),
    }

    def note() -> None:
        found["aims"] = judged(found)
        found["seconds"] = round(time.monotonic() - start, 1)
        if save is not None:
            save(found)

    def seconds_left() -> float:
        return max(most_seconds - (time.monotonic() - start), 0.0)

    # For events and streams.
    current = torch.cuda.device(place) if place.type == "cuda" else nullcontext()
    with current, torch.no_grad():
        copy = Copy(place)
        for name, head in chosen.items():
            for problem in _problems(
                head, _token_counts(name, tokens, quick=quick), element, place
            ):
                case = {"head": name, **_described(problem)}
                needed = _estimated_seconds(problem, case_seconds)
                if needed > (left := seconds_left()):
                    reason = f"{needed:.0f} s needed, {left:.0f} left"
                    found["left_out"].append({**case, "reason": reason})
                    continue
                found["cases"].append(case | _measured(problem, copy, case_seconds))
                if is_lost(place):
                    found["stopped"] = "the device does not answer any more, after an error"
                    break
                note()
            if found["stopped"]:
                break
            if name in SAME_BITS_HEADS and seconds_left():
                found["same_bits"].append({"head": name, **_bits(head, element, place)})
                note()
    note()
    return found


def wrong_cases(found: dict[str, Any]) -> list[str]:
    """Where llfast is off by more than its arithmetic allows, a line each."""
    return [
        f"{case['head']}, T {case['T']}: {case['wrong']}"
        for case in found["cases"]
        if case["wrong"]
    ]


def _problems(
    head: Head, counts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[Problem]:
    """One head with each number of tokens."""
    shape = (max(counts), head.vocabulary, head.width)
    problem = make_problem(shape, dtype, device, softcap=head.softcap)
    for count in counts:
        yield problem.first(count)


def _measured(problem: Problem, copy: Copy, case_seconds: float) -> dict[str, Any]:
    try:
        return measure_case(problem, copy, case_seconds)
    except Exception as error:  # the other cases count without this one
        return NOT_MEASURED | {"failed": {"the case": one_line(error)}}


def _bits(head: Head, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    (problem,) = _problems(head, [SAME_BITS_TOKENS], dtype, device)
    try:
        return {**_described(problem), **same_bits(problem)}
    except Exception as error:  # the cases count without it
        return {**_described(problem), "failed": one_line(error)}


def _described(problem: Problem) -> dict[str, Any]:
    tokens, words, width = problem.shape
    dtype = problem.dtype_name
    return {"T": tokens, "V": words, "D": width, "dtype": dtype, "softcap": problem.softcap}


def _token_counts(head: str, tokens: Sequence[int] | None, *, quick: bool) -> list[int]:
    if tokens:
        return sorted(set(tokens))
    return list(QUICK_TOKENS) if quick else sorted({*TOKENS, *FEWER_TOKENS.get(head, ())})


def _estimated_seconds(problem: Problem, case_seconds: float) -> float:
    if problem.device.type != "cuda":
        return 0.0
    product = problem.gflop * 1e9 / _FLOPS[problem.dtype_name]
    return _CALLS * product + case_seconds + _SECONDS_TO_COMPILE


def _one_of(known: dict[str, Any], name: str, what: str) -> Any:
    if name not in known:
        raise ValueError(f"{what} must be among {', '.join(known)}, got {name!r}; take one of them")
    return known[name]


def _hardware(device: torch.device) -> dict[str, Any]:
    with warnings.catch_warnings():
        if device.type == "cuda":  # that the CPU's kernels are not built does not matter here
            warnings.simplefilter("ignore")
        found = report.hardware()
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        found["gpu"] = chip.name
        found["multiprocessors"] = chip.multi_processor_count
        found["memory_gib"] = round(chip.total_memory / 2**30, 1)
        found["l2_mib"] = round(chip.L2_cache_size / 2**20, 1)
        found["cuda"] = torch.version.cuda
    return found

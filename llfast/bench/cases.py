"""One head with one number of tokens: errors, times and memory of every provider."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import report
from .heads import LLFAST, MATMUL, PROVIDERS, why_skipped
from .problems import Problem
from .timing import Call, Copy, Times, captured, extra_mib, interleaved, one_line
from .truth import IN_FP32, Truth, error_ratio

CHECKED_ROWS = 256
MOST_LOGITS_BYTES = 40 << 30
# Up to so many, calls are timed as CUDA graphs: a narrow head's product takes a quarter of a
# millisecond then, in which Python can hardly launch a call.
GRAPH_TOKENS = 2048
FEW_TOKENS = 128  # up to so many, a call is held against a copy of as many bytes
EAGER = "llfast, eager"
_COPY = "copy"

# The columns of a case.
NOT_MEASURED: dict[str, Any] = {
    "errors": {},
    "error_ratio": None,
    "wrong": None,
    "extra_mib": {},
    "skipped": {},
    "failed": {},
    "timed_by": {},
    "repetitions": 0,
    "calls": {},
    "ms": {},
    "llfast_over": {},
    "tflops": None,
    "matmul_tflops": None,
    "eager_ms": None,
    "head_gb_a_second": None,
    "copy_gb_a_second": None,
    "share_of_copy": None,
}


def measure_case(problem: Problem, copy: Copy, case_seconds: float) -> dict[str, Any]:
    """All columns of a case; None for what does not apply.

    A provider that cannot run is listed under "skipped" with its reason, one that raises under
    "failed" with its error. Where llfast is wrong, "wrong" says how.
    """
    skipped = why_skipped(problem, most_logits_bytes=MOST_LOGITS_BYTES)
    failed: dict[str, str] = {}
    memory: dict[str, float | None] = {}
    truth = Truth.of(problem, CHECKED_ROWS)
    errors = {IN_FP32: truth.errors_in_fp32()}
    ready: dict[str, Call] = {}
    for name, run in PROVIDERS.items():
        if name not in skipped:
            call = partial(run, problem)
            with _noting(name, failed, problem.device):
                _check(name, call, truth, errors)
                memory[name] = extra_mib(call, problem.device)
                ready[name] = call
    case: dict[str, Any] = {
        **NOT_MEASURED,
        "errors": errors,
        "error_ratio": error_ratio(errors) if LLFAST in errors else None,
        "wrong": truth.why_wrong(errors[LLFAST]["max"]) if LLFAST in errors else None,
        "extra_mib": memory,
        "skipped": skipped,
        "failed": failed,
    }
    if LLFAST not in ready:
        return case
    timed, timed_by = _to_time(ready, problem, failed)
    if len(problem.hidden) <= FEW_TOKENS:
        timed[_COPY] = copy
    times = interleaved(timed, problem.device, case_seconds)
    return case | {"timed_by": timed_by} | _columns(problem, times, timed_by, copy)


def is_lost(device: torch.device) -> bool:
    """Whether a CUDA device no longer answers, as after an access to memory that is not there."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _check(
    name: str, call: Callable[[], Tensor], truth: Truth, errors: dict[str, dict[str, float]]
) -> None:
    result = call()
    if name != MATMUL:  # has no log-probabilities
        errors[name] = truth.errors_of(result)


def _to_time(
    ready: dict[str, Call], problem: Problem, failed: dict[str, str]
) -> tuple[dict[str, Call], dict[str, str]]:
    """What to time, and how that is: as a CUDA graph, or call by call."""
    timed, timed_by = {}, {}
    has_graphs = problem.device.type == "cuda" and len(problem.hidden) <= GRAPH_TOKENS
    for name, call in ready.items():
        with _noting(name, failed, problem.device):
            run, how = captured(call) if has_graphs else (call, "eager")
            run()
            timed[name], timed_by[name] = run, how
    if timed_by.get(LLFAST) == "graph":
        timed[EAGER], timed_by[EAGER] = ready[LLFAST], "eager"
    return timed, timed_by


def _columns(
    problem: Problem, times: Times, timed_by: dict[str, str], copy: Copy
) -> dict[str, Any]:
    """Rates and ratios, each within a repetition; graphs are compared with graphs alone."""
    seconds = dict(times.seconds)
    eager, copies = seconds.pop(EAGER, None), seconds.pop(_COPY, None)
    llfast = seconds[LLFAST]

    def rates(amount: float, each: list[float]) -> dict[str, float]:
        return report.spread([amount / one for one in each])

    def ms(each: list[float]) -> dict[str, float]:
        return report.spread([1e3 * one for one in each])

    tflop = problem.gflop / 1e3
    found: dict[str, Any] = {
        "repetitions": times.repetitions,
        "calls": times.calls,
        "ms": {name: ms(each) for name, each in seconds.items()},
        "llfast_over": {
            name: report.paired(
                llfast if eager is None or timed_by[name] == "graph" else eager, each
            )
            for name, each in seconds.items()
            if name != LLFAST
        },
        "tflops": rates(tflop, llfast),
        "eager_ms": None if eager is None else ms(eager),
    }
    if MATMUL in seconds:
        found["matmul_tflops"] = rates(tflop, seconds[MATMUL])
    if copies is not None:
        found["head_gb_a_second"] = rates(problem.lm_head_gb, llfast)
        found["copy_gb_a_second"] = rates(copy.gb, copies)
        # The head at the copy's rate, over what the call took.
        at_its_rate = [each * problem.lm_head_gb / copy.gb for each in copies]
        found["share_of_copy"] = report.paired(at_its_rate, llfast)
    return found


@contextlib.contextmanager
def _noting(name: str, failed: dict[str, str], device: torch.device) -> Iterator[None]:
    """Note what a provider raises, and go on."""
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize()  # errors of the device are raised by what waits for it
    except Exception as error:
        failed[name] = one_line(error)
        if not is_lost(device) and device.type == "cuda":
            torch.cuda.empty_cache()

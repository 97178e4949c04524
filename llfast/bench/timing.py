"""How long calls take on a device, and how much memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]

LEAST_REPETITIONS, MOST_REPETITIONS = 3, 9
MOST_CALLS = 200  # a repetition
_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds a call in each repetition, and how many calls a repetition had, by name."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]

    @property
    def repetitions(self) -> int:
        """The same for all."""
        return len(next(iter(self.seconds.values())))


def interleaved(timed: Mapping[str, Call], device: torch.device, budget_seconds: float) -> Times:
    """Time calls in turn, each repetition beginning with another one.

    What is slow is called once a repetition, in three of them; what is fast shares the budget
    evenly, and so is called the more often.
    """
    once = {name: seconds_a_call(call, 1, device) for name, call in timed.items()}
    fitting = int(budget_seconds / sum(once.values()))
    repetitions = min(max(fitting, LEAST_REPETITIONS), MOST_REPETITIONS)
    share = budget_seconds / (repetitions * len(timed))
    calls = {name: min(max(int(share / each), 1), MOST_CALLS) for name, each in once.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(seconds_a_call(timed[name], calls[name], device))
    return Times(seconds, calls)


def seconds_a_call(call: Call, calls: int, device: torch.device) -> float:
    """The mean of some calls in a row: by events on CUDA, else by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls


def captured(call: Call) -> tuple[Call, str]:
    """The call as a CUDA graph, which leaves out what Python takes to launch it.

    Returns: what to time, and how that is: "graph", or "eager: " and why the call cannot be
        captured.
    """
    reason = _why_it_waits(call)
    if reason is not None:
        return call, f"eager: {reason}"
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return call, f"eager: {one_line(error)}"
    return graph.replay, "graph"


def _why_it_waits(call: Call) -> str | None:
    """A call that waits for the device cannot be captured, and a capture that fails costs memory.

    torch keeps the pool of a capture that was broken off, and gives back no other memory then.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its check does not find every wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            return one_line(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return None


def extra_mib(call: Callable[[], Tensor], device: torch.device) -> float | None:
    """Device memory at its highest beyond what was held before and the result; None on a CPU.

    A call before this one must have made what is made once.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before
    size = result.numel() * result.element_size()
    return round(max(grown - size, 0) / 2**20, 1)


class Copy:
    """A copy from one place of a device's memory to another, larger than its caches."""

    def __init__(self, device: torch.device) -> None:
        size = 1 << 30 if device.type == "cuda" else 1 << 26
        self._source = torch.ones(size, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)
        self.gb = 2 * size / 1e9  # bytes read and bytes written

    def __call__(self) -> Tensor:
        """Copy all of it."""
        return self._target.copy_(self._source)


def one_line(error: BaseException) -> str:
    """An error's kind and the beginning of what it says."""
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""What the loading benchmark is to show, and whether it does."""

from __future__ import annotations

from typing import Any

LEAST_SHARE_OF_DISK = 0.90
MOST_OVER_FLOOR = 1.10
MOST_OVER_RESIDENT = 1.10
LEAST_SPEEDUP = 5.0
STATES = 2.1  # hidden states of a wave that memory may hold
ALLOWANCE_MIB = 256


def memory_of(run: dict[str, Any], hidden: int) -> dict[str, float]:
    """The peak of a paged run, in MiB, and what it may be."""
    states = STATES * run["wave_tokens"] * hidden * 2  # bf16
    allowed = (2 * run["page_bytes"] + states) / 2**20 + ALLOWANCE_MIB
    return {"peak_mib": round(run["peak_mib"], 1), "allowed_mib": round(allowed, 1)}


def memory_of_all(found: dict[str, Any], hidden: int) -> dict[str, dict[str, float]]:
    """Of the last run of each case."""
    runs = {"few": found["rate"]["runs"][-1]}
    runs |= {f"{case['tokens']}": case["runs"][-1] for case in found["overlap"]}
    return {f"{name} tokens": memory_of(run, hidden) for name, run in runs.items()}


def aims_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each aim with its figure, and whether it is met."""
    aims: list[tuple[str, float, float, bool]] = []  # what, figure, limit, whether more is better

    def add(what: str, figure: float, limit: float, more: bool = False) -> None:
        aims.append((what, figure, limit, more))

    share = found["rate"]["share_of_sequential"]["median"]
    add("cold read rate over raw sequential O_DIRECT", share, LEAST_SHARE_OF_DISK, more=True)
    for case in found["overlap"]:
        tokens = case["tokens"]
        over = case["over_floor"]["median"]
        add(f"{tokens} tokens: time over reading or computing", over, MOST_OVER_FLOOR)
        over = case["over_resident"]["median"]
        add(f"{tokens} tokens: paged over resident", over, MOST_OVER_RESIDENT)
    for name, peer in found["peers"]["peers"].items():
        if "batches" in peer and peer["largest_batch"]:
            figure = peer["llfast_bytes_times_batches"]["median"]
            add(f"bytes a text, times batches, over {name}", figure, 1.0)
    for name, over in found.get("read_bound", {}).get("over_llfast", {}).items():
        add(f"faster than {name}, where both read", over["median"], LEAST_SPEEDUP, more=True)
    for what, each in found["memory"].items():
        add(f"peak MiB of {what}", each["peak_mib"], each["allowed_mib"])
    limited = found["limited"]
    add("peak MiB where no more may be had", limited["peak_mib"], limited["limit_mib"])
    return [
        {"aim": what, "figure": figure, "limit": limit, "met": (figure >= limit) == more}
        if figure != limit
        else {"aim": what, "figure": figure, "limit": limit, "met": True}
        for what, figure, limit, more in aims
    ]

"""The README's lines on fleets."""

from __future__ import annotations

from typing import Any


def fleet(found: dict[str, Any]) -> list[str]:
    """What being one of many costs, and how fast a worker knows what is left."""
    overhead, listing = found["overhead"], found["listing"]
    chip = found["hardware"]
    line = (
        f"One worker of a fleet takes {_range(overhead['over_loop'], 2)} of the time of a plain "
        f"loop over {overhead['models']} models of 4 million parameters on "
        f"{overhead['texts']} texts, one of a Ray cluster that has started "
        f"{_range(overhead['ray_over_loop'], 2)}; all store the same bits. What a compacted "
        f"store lacks of {listing['names']:,} names is known in "
        f"{_range(listing['seconds'], 1)} seconds. "
        f"{chip['threads']} threads of {chip['processor']}; medians, least to most in brackets. "
        f"Command: `{found['command']}`."
    )
    return [line]


def _range(value: dict[str, float], digits: int) -> str:
    middle, least, most = (f"{value[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({least} to {most})"

"""How memory is shared out between weights and texts, known before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from .members import Plan

_ROOM_FOR_WORK = 1.1  # times the weights, where all of them are to stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What memory is for.

    Attributes:
        keeps_weights: whether layers stay once they are read.
        weights_bytes: what weights take: two pages and what stays, or all of them.
        states_bytes: what is left for suspended forwards.
    """

    keeps_weights: bool
    weights_bytes: int
    states_bytes: int


def share_out(plan: Plan, memory_bytes: int, *, may_keep: bool, name: str) -> Room:
    """Weights stay if they all fit; otherwise two pages of them must.

    Raises:
        ValueError: if `memory_bytes` does not hold two pages.
    """
    keeps = may_keep and plan.kept_bytes * _ROOM_FOR_WORK <= memory_bytes
    taken = plan.kept_bytes if keeps else plan.paged_bytes
    if memory_bytes <= taken:
        largest = plan.largest
        raise ValueError(
            f"memory_budget must hold two pages of {name}, whose largest is {largest.name} with "
            f"{largest.nbytes:,} bytes, and what stays in memory, got {memory_bytes:,}; it "
            f"takes more than {taken:,}"
        )
    return Room(keeps_weights=keeps, weights_bytes=taken, states_bytes=memory_bytes - taken)

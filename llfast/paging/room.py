"""How memory is shared out between weights and texts, known before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llfast.errors import CannotPageError

from .members import Plan

_ROOM_FOR_WORK = 1.1  # times the weights, where all of them are to stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How memory is shared out.

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


def refuse_if_alone_is_less(
    plan: Plan, room: Room, alone: Room, tokens: Sequence[int], bytes_per_token: float
) -> None:
    """Refuse to go through several models together where that reads more than one after the other.

    So it is where memory is left for few texts: nearly every wave is of one model then, and shared
    weights are read again and again.

    Args:
        plan: of all of them.
        room: for all of them.
        alone: for one of them.
        tokens: that each is given.
        bytes_per_token: what a suspended forward holds.

    Raises:
        CannotPageError: if it does not pay.
    """

    def waves(count: int, states_bytes: int) -> int:
        return max(math.ceil(count * bytes_per_token / states_bytes), 1)

    one, all_once = plan.together_bytes
    together = waves(sum(tokens), room.states_bytes) * one + all_once - one
    apart = sum(1 if alone.keeps_weights else waves(each, alone.states_bytes) for each in tokens)
    if together > apart * one:
        raise CannotPageError(
            f"memory must hold texts of several models for them to go together, got room for "
            f"{room.states_bytes / max(bytes_per_token, 1):,.0f} tokens"
        )

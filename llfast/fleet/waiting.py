"""Models that wait for a worker of a cluster, by what a worker for them reserves."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Collection
from dataclasses import dataclass, replace

from llfast.model_list import ModelRequest

from .ledger import name_of
from .needs import Machines, Size, Slot, place
from .terms import Terms
from .worker import lease_of


@dataclass(slots=True, eq=False)
class Model:
    """One of the list, and what it has been through.

    Attributes:
        request: as the list has it.
        size: of it, if that is known.
        lost: how many workers were lost while they were at it.
        ran_out: how often memory has run out, as far as is known.
        is_held: whether others were at it when last it was its turn.
    """

    request: ModelRequest
    size: Size | None
    lost: int = 0
    ran_out: int = 0
    is_held: bool = False

    @property
    def name(self) -> str:
        """What its rows are kept under."""
        return name_of(self.request)


class Waiting:
    """Models in the order in which they came; of those that take the same lease, one at a time.

    Workers of a run take over leases from each other at once: two at one lease would each believe
    that the other has died.
    """

    def __init__(self, terms: Terms, machines: Machines) -> None:
        self._terms, self._machines = terms, machines
        self._now: defaultdict[Slot, deque[Model]] = defaultdict(deque)
        self._later: list[tuple[float, Model]] = []
        self._behind: dict[str, deque[Model]] = {}  # another one, by their lease

    def slots(self) -> Collection[Slot]:
        """Those that models wait for now."""
        return self._now.keys()

    def count(self, slot: Slot) -> int:
        """How many models wait for one."""
        return len(self._now.get(slot, ()))

    def put_off(self) -> list[Model]:
        """Those whose time has not come."""
        return [model for _, model in self._later]

    def behind(self, model: Model) -> list[Model]:
        """Those that take its lease after it."""
        return list(self._behind[lease_of(model.request)])

    def come(self, model: Model) -> None:
        """Let a model of the list wait, now or behind another one."""
        lease = lease_of(model.request)
        if lease in self._behind:
            self._behind[lease].append(model)
        else:
            self._behind[lease] = deque()
            self.queue(model)

    def queue(self, model: Model) -> None:
        """Let a model wait whose turn it is."""
        self._now[self.place(model)[0]].append(model)

    def queue_later(self, model: Model, seconds: float) -> None:
        """Let a model wait again after some seconds."""
        self._later.append((time.monotonic() + seconds, model))

    def due(self) -> list[Model]:
        """Those that were put off and whose time has come; they are not put off any more."""
        now, later = time.monotonic(), self._later
        self._later = [each for each in later if each[0] > now]
        return [model for due, model in later if due <= now]

    def take(self, slot: Slot) -> Model | None:
        """The next model for a worker, which waits no more."""
        waiting = self._now.get(slot)
        if not waiting:
            return None
        model = waiting.popleft()
        if not waiting:
            del self._now[slot]
        return model

    def end(self, model: Model) -> Model | None:
        """Be done with a model; the one behind it, whose turn it is and which does not wait yet."""
        lease = lease_of(model.request)
        if self._behind[lease]:
            return self._behind[lease].popleft()
        del self._behind[lease]
        return None

    def place(self, model: Model) -> tuple[Slot, ModelRequest]:
        """What a worker reserves for it, and the model with the memory budget that this leaves."""
        request, terms = model.request, self._terms
        weights, budget = request.weights or terms.weights, request.memory_budget
        if budget is None and terms.memory_budget is not None and weights != "resident":
            budget = str(terms.memory_budget)
        asked = replace(request, weights=weights, memory_budget=budget)
        return place(asked, model.size, terms.dtype, self._machines, model.ran_out)

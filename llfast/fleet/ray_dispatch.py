"""Hands models of a list to workers of a Ray cluster, and what is lost with one to another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llfast.errors import ScoringError, StoreError, needed
from llfast.model_list import ModelRequest
from llfast.outcomes import Outcome

from .events import Log
from .needs import Slot, size_of
from .ray_cluster import on_node, why_lost
from .ray_workers import Assignment, Broken, ScoringWorker, TokenIds
from .share import poll_seconds
from .waiting import Model, Waiting
from .worker import Worker, died_at

with needed("ray", "a Ray cluster needs Ray; pip install 'llfast[ray]'"):
    import ray

_LOOKING_UP = 16  # models at a time
_WAIT_SECONDS = 1.0
_MOST_BROKEN = 20  # workers that could not begin, in a row
_NO_ROOM_SECONDS = 600.0  # in which a cluster may grow


@dataclass(slots=True, eq=False)
class _Actor:
    """A worker of the cluster, and what it is at."""

    name: str
    slot: Slot
    handle: Any
    model: Model | None = None
    reserved: Model | None = None


class Dispatch:
    """Models wait by what they need; workers of that kind take them.

    Attributes:
        outcomes: of all tries.
    """

    def __init__(
        self,
        own: Worker,
        assignment: Assignment,
        waiting: Waiting,
        report: Callable[[Outcome], None] | None,
        log: Log,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._own, self._waiting, self._report, self._log = own, waiting, report, log
        self._terms, self._assignment = assignment.terms, ray.put(assignment)
        self._tokens = (
            ray.remote(TokenIds)
            .options(
                num_cpus=0, scheduling_strategy=on_node(ray.get_runtime_context().get_node_id())
            )
            .remote()
        )
        self._actors: dict[Any, _Actor] = {}  # by what is to come of them
        self._idle: list[_Actor] = []
        self._started = self._broken = 0
        self._without_room: float | None = None  # since when

    def run(self, requests: Sequence[ModelRequest], *, wait: bool) -> list[ModelRequest]:
        """Models that others are at, once nothing else is left; without `wait` there may be some.

        Raises:
            ScoringError: if no machine has room for what is left, or no worker can begin.
            StoreError: if a worker does not see the store, or cannot write to it.
        """
        todo = [each for each in requests if not self._own.is_settled(each)]
        self._log("started", models=len(requests), to_do=len(todo))
        with ThreadPoolExecutor(_LOOKING_UP) as pool:
            sizes = list(pool.map(size_of, todo))
        for request, size in zip(todo, sizes, strict=True):
            self._waiting.come(Model(request, size))
        try:
            while self._waiting.put_off() or self._is_at_work():
                if not wait and not self._is_at_work() and self._is_all_held():
                    break
                self._look_again()
                self._hand_out()
                self._hire()
                for reference in self._done():
                    self._finish(reference)
        except BaseException:
            self._free_all()
            raise
        held = self._waiting.put_off()
        left = [each.request for model in held for each in (model, *self._waiting.behind(model))]
        made = ray.get(self._tokens.made.remote())
        self._log("ended", outcomes=len(self.outcomes), left=len(left), tokenised=made)
        return left

    def _done(self) -> list[Any]:
        if not self._actors:  # models are put off
            time.sleep(_WAIT_SECONDS)
            return []
        return list(ray.wait(list(self._actors), num_returns=1, timeout=_WAIT_SECONDS)[0])

    def _free_all(self) -> None:
        """Give back at once the models that workers are at, for these end with this run."""
        for actor in self._actors.values():
            if actor.model is not None:
                with contextlib.suppress(Exception):  # which must not hide what has ended this
                    ray.kill(actor.handle)
                    self._own.free(actor.model.request)

    # ------------------------------------------------------------------ models

    def _look_again(self) -> None:
        """Look again at models that were put off."""
        due = self._waiting.due()
        if due:
            self._own.ledger.refresh()
        for model in due:
            if model.is_held and self._own.is_held(model.request):
                self._put_off(model)  # no worker is started to see that
            else:
                self._queue(model)

    def _queue(self, model: Model) -> None:
        """Let a model wait, unless others have settled it."""
        if self._own.is_settled(model.request):
            self._end(model)
        else:
            self._waiting.queue(model)

    def _end(self, model: Model) -> None:
        following = self._waiting.end(model)
        if following is not None:
            self._queue(following)

    def _is_at_work(self) -> bool:
        """Whether models are waiting, or at workers."""
        workers = (*self._actors.values(), *self._idle)
        return bool(self._waiting.slots()) or any(each.model or each.reserved for each in workers)

    def _is_all_held(self) -> bool:
        return all(model.is_held for model in self._waiting.put_off())

    # ------------------------------------------------------------------ workers

    def _hire(self) -> None:
        """Start as many workers of a kind as have something to do and may have room, and one more.

        Those without room are what a cluster that can grow sees to.
        """
        machines = [each["Resources"] for each in ray.nodes() if each["Alive"]]
        workers = [*self._actors.values(), *self._idle]
        wanted_slots = {*self._waiting.slots(), *(each.slot for each in workers if each.reserved)}
        for reference, each in list(self._actors.items()):
            if each.model is None and each.slot not in wanted_slots:
                del self._actors[reference]  # it has not begun, and need not any more
        is_without_room = bool(wanted_slots) and not any(each.model for each in workers)
        for slot in wanted_slots:
            there = [each for each in workers if each.slot == slot]
            models = sum((each.model is not None) + (each.reserved is not None) for each in there)
            wanted = models + self._waiting.count(slot)
            room = sum(slot.times_in(machine) for machine in machines)
            is_without_room = is_without_room and not room
            for _ in range(min(wanted, room + 1) - len(there)):
                self._start(slot)
        if is_without_room:
            self._wait_for_room(max(wanted_slots))
        else:
            self._without_room = None

    def _wait_for_room(self, slot: Slot) -> None:
        """Wait, but not for ever: machines may have been lost that nobody replaces."""
        needed = slot.resources()
        if self._without_room is None:
            self._without_room = time.monotonic()
            self._log("no machine has room", **needed)
        if time.monotonic() - self._without_room > _NO_ROOM_SECONDS:
            raise ScoringError(
                f"a machine of the cluster must have {needed}, got none for {_NO_ROOM_SECONDS:g} s"
                "; a new run asks for what the machines have that are there now"
            )

    def _start(self, slot: Slot) -> None:
        self._started += 1
        name = f"worker {self._started}"
        actor = ray.remote(ScoringWorker).options(
            num_cpus=slot.cpus,
            num_gpus=slot.gpus,
            memory=slot.memory,
            scheduling_strategy="SPREAD",
        )
        handle = actor.remote(name, self._assignment, self._tokens, slot.gpus)
        self._actors[handle.begin.remote()] = _Actor(name, slot, handle)

    def _hand_out(self) -> None:
        idle, self._idle = self._idle, []
        for actor in idle:
            model = actor.reserved or self._next(actor.slot)
            if model is None:
                self._log("worker ended", worker=actor.name)
                continue  # without a handle it ends, and leaves its place to others
            actor.model, actor.reserved = model, self._waiting.take(actor.slot)
            following = actor.reserved and self._waiting.place(actor.reserved)[1]
            _, given = self._waiting.place(model)
            self._log(
                "began",
                model=model.name,
                worker=actor.name,
                gpus=actor.slot.gpus,
                memory=actor.slot.memory,
                memory_budget=given.memory_budget,
            )
            reference = actor.handle.attempt.remote(given, following)
            self._actors[reference] = actor

    def _next(self, slot: Slot) -> Model | None:
        """A model that waits, or that another one of this kind has reserved and is not at yet."""
        model = self._waiting.take(slot)
        if model is not None:
            return model
        for other in self._actors.values():
            if other.slot == slot and other.reserved is not None:
                model, other.reserved = other.reserved, None
                return model
        return None

    def _finish(self, reference: Any) -> None:
        """Take in what came of a worker's start, or of its model."""
        lost = None
        try:
            found = ray.get(reference)
        except ray.exceptions.RayError as error:
            lost = why_lost(error)
        actor = self._actors.pop(reference)
        model, actor.model = actor.model, None
        if lost is not None:
            self._lose(actor, model, *lost)
            return
        if isinstance(found, Broken):
            if found.is_of_store:
                raise StoreError(found.reason)
            self._lose(actor, model, found.reason, is_memory=False)
            return
        self._broken = 0
        self._idle.append(actor)
        if actor.reserved or self._waiting.count(actor.slot):
            self._hand_out()  # before anything else: the worker waits for it
        if model is None:
            return
        model.is_held = found == "held"
        if found == "held":
            self._put_off(model)
        elif found == "settled":
            self._end(model)
        else:
            self._take_in(model, found)

    def _take_in(self, model: Model, outcome: Outcome) -> None:
        self._own.note(model.request, outcome)
        self._tell(outcome)
        if outcome.status == "failed" and not self._own.is_settled(model.request):
            model.ran_out += outcome.ran_out_of_memory
            self._put_off(model)
        else:
            self._end(model)

    def _lose(self, actor: _Actor, model: Model | None, reason: str, is_memory: bool) -> None:
        """Take note that a worker is gone, or cannot be reached, which comes to the same."""
        at = None if model is None else model.name
        self._log("worker lost", worker=actor.name, model=at, reason=reason)
        ray.kill(actor.handle)
        self._tokens.give_up_on.remote(actor.name)
        if actor.reserved is not None:
            self._waiting.queue(actor.reserved)
        if model is None:
            self._broken += 1
            is_any_at_work = any(each.model for each in self._actors.values())
            if self._broken >= _MOST_BROKEN and not is_any_at_work:
                raise ScoringError(f"workers must be able to begin, got none that did: {reason}")
            return
        model.lost += 1
        model.ran_out += is_memory
        if model.lost >= self._terms.attempts:
            why = f"{died_at(model.name, model.lost)} ({reason})"
            self._tell(self._own.give_up(model.request, why))
            self._end(model)
        else:
            self._waiting.queue(model)

    def _put_off(self, model: Model) -> None:
        self._waiting.queue_later(model, poll_seconds(self._terms.lease_seconds))

    def _tell(self, outcome: Outcome) -> None:
        self._log(outcome.status, **outcome.summary())
        self.outcomes.append(outcome)
        if self._report is not None:
            self._report(outcome)

"""One of many workers at a list of models; they know of one another by the store alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

from llfast.model_list import ModelRequest
from llfast.outcomes import Outcome
from llfast.store import Store
from llfast.texts import TextSet

from .events import Log, no_log
from .ledger import Failure, Ledger, name_of
from .ranks import in_order
from .terms import Options, agree, told_apart
from .worker import Worker

_POLLS = 20  # in the time after which a lease is taken over, while others are at all that is left
_MOST_POLL_SECONDS = 5.0


def score_share(
    requests: Sequence[ModelRequest],
    texts: TextSet,
    store: Store,
    *,
    rank: int = 0,
    world_size: int = 1,
    retry_failed: bool = False,
    wait: bool = True,
    progress: bool | None = None,
    report: Callable[[Outcome], None] | None = None,
    log: Log = no_log,
    **options: Unpack[Options],
) -> Shared:
    """Score what the store lacks of a list, together with others who do the same.

    Every worker is given the whole list. It begins with its own share, then helps others; a model
    is at one worker at a time, which holds a lease on it. When a worker dies, its model goes to
    another one, which goes on with the texts that are finished if its machine is like the other.
    Models of no revision, or of a whole commit, are done if the store has that name; others are
    looked up, and so is a model of no revision whose name has others in the list.

    Args:
        requests: all models, the same for all workers.
        texts: N texts.
        store: on a disk that all workers see, or at s3://.
        rank: which worker this is, from 0 on.
        world_size: how many there are; more or fewer may turn up.
        retry_failed: try what has failed before, too.
        wait: until all models are done or have failed, to take over those of workers that die;
            False ends when nothing is left that nobody is at.
        progress: show a bar a model.
        report: is called with each outcome of this worker.
        log: is called with each event.
        options: see `Options`.

    Returns: what this worker did, and what became of the list.

    Raises:
        OSError: if the store cannot be written.
        ValueError: for arguments that make no sense, and two models of one name.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    requests, terms = told_apart(requests), agree(requests, store, options)
    ledger = Ledger(store, texts.digest, terms.convention)
    ledger.refresh()
    with Worker(
        texts,
        store,
        terms,
        facts={"rank": rank},
        ledger=ledger,
        forgiven=ledger.tries(requests, terms.dtype) if retry_failed else {},
        progress=progress,
        log=log,
    ) as worker:
        return _Share(worker, report, log).run(
            in_order(requests, rank, world_size), poll_seconds(terms.lease_seconds), wait=wait
        )


def poll_seconds(lease_seconds: float) -> float:
    """How long to wait for others before another look."""
    return min(lease_seconds / _POLLS, _MOST_POLL_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What came of a worker's run.

    Attributes:
        outcomes: what it did itself; a model that was tried again is there again.
        failed: models of the list that have no result, and no other try due; by name.
        left: models of the list that others are at, where they were not waited for.
    """

    outcomes: tuple[Outcome, ...]
    failed: dict[str, Failure]
    left: tuple[str, ...]

    @classmethod
    def of(
        cls,
        worker: Worker,
        requests: Sequence[ModelRequest],
        outcomes: Sequence[Outcome],
        left: Sequence[ModelRequest],
    ) -> Shared:
        """As the store has it now."""
        worker.ledger.refresh()
        names = tuple(name_of(each) for each in left)
        failed = [(name_of(each), worker.failure(each)) for each in requests]
        return cls(
            outcomes=tuple(outcomes),
            failed={name: each for name, each in failed if each and name not in names},
            left=names,
        )


class _Share:
    """A worker's way through the list."""

    def __init__(self, worker: Worker, report: Callable[[Outcome], None] | None, log: Log) -> None:
        self._worker, self._report, self._log = worker, report, log
        self._outcomes: list[Outcome] = []
        self._done: set[int] = set()  # requests that were looked at here

    def run(self, requests: Sequence[ModelRequest], poll: float, *, wait: bool) -> Shared:
        """What this worker did."""
        left = [each for each in requests if not self._is_settled(each)]
        self._log("started", models=len(requests), to_do=len(left))
        while left:
            count = len(self._outcomes)
            left = [each for each in left if not self._is_done_after(each)]
            new = self._outcomes[count:]
            if not left or any(each.status != "failed" for each in new):
                continue
            if not (new or wait):
                break
            # Others are at what is left, or it fails for a reason that may pass.
            time.sleep(poll)
            self._worker.ledger.refresh()
            left = [each for each in left if not self._is_settled(each)]
        self._log("ended", outcomes=len(self._outcomes), left=len(left))
        return Shared.of(self._worker, requests, self._outcomes, left)

    def _is_settled(self, request: ModelRequest) -> bool:
        """Whether there is nothing to be done."""
        found = self._worker.is_settled(request)
        return id(request) in self._done if found is None else found

    def _is_done_after(self, request: ModelRequest) -> bool:
        """Score a model unless others are at it; whether nothing is left to be done."""
        outcome = self._worker.attempt(request)
        if isinstance(outcome, str):
            return outcome == "settled"
        if outcome.status == "failed":
            is_done = bool(self._is_settled(request))
        else:
            self._done.add(id(request))
            is_done = True
        self._outcomes.append(outcome)
        if self._report is not None:
            self._report(outcome)
        return is_done

"""What a worker of a fleet does with one model, whoever gives it the model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Literal, Self

from llfast.errors import ScoringError, StoreError
from llfast.model_list import ModelRequest
from llfast.outcomes import Outcome
from llfast.store import Store
from llfast.texts import TextSet

from .events import Log, no_log
from .leases import Lease, Leases
from .ledger import Asked, Failure, Ledger, name_of
from .session import Session
from .terms import Terms

LEASES = "_leases"  # within a store


class Worker:
    """One at a time, models that nobody else is at; its leases live as long as the context.

    Attributes:
        ledger: what the store has.
    """

    def __init__(
        self,
        texts: TextSet,
        store: Store,
        terms: Terms,
        *,
        facts: Mapping[str, Any],
        ledger: Ledger,
        forgiven: Mapping[Asked, int] | None = None,
        run: str | None = None,
        progress: bool | None = None,
        log: Log = no_log,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            texts: N texts.
            store: where results go.
            terms: of the run.
            facts: what others are told of this worker.
            ledger: of the store, these texts and this convention.
            forgiven: tries that do not count, of `Ledger.tries`.
            run: whose models are given out by one who knows which workers are gone; see `Leases`.
            progress: show a bar a model.
            log: is called with each event.

        Raises:
            OSError: if the store cannot be written.
        """
        self.ledger = ledger
        self._terms, self._forgiven, self._log = terms, forgiven, log
        self._subject = f"{texts.digest} {terms.convention}"
        self._leases = Leases(
            store.folder / LEASES,
            seconds=terms.lease_seconds,
            facts={**facts, "textset": texts.digest, "convention": terms.convention},
            run=run,
        )
        self._session = Session(
            texts,
            store,
            completed=ledger,
            attempts=self._tried,
            progress=progress,
            **terms.of_session(),
        )

    def __enter__(self) -> Self:
        self._leases.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._leases.__exit__()

    def is_settled(self, request: ModelRequest) -> bool | None:
        """Whether there is nothing to be done; None where only a look at the model tells."""
        terms = self._terms
        return self.ledger.settled(request, terms.dtype, terms.attempts, self._forgiven)

    def failure(self, request: ModelRequest) -> Failure | None:
        """Why a model has no result."""
        return self.ledger.failure(request, self._terms.dtype)

    def attempt(self, request: ModelRequest) -> Outcome | Literal["held", "settled"]:
        """Score a model, unless others are at it, or have settled it meanwhile.

        Raises:
            OSError: if the store cannot be written.
            StoreError: if it is damaged.
        """
        lease = self._take(request)
        if lease is None:
            return "held"
        with lease:
            # Whoever held it before has stored what it found.
            self.ledger.refresh()
            if self.is_settled(request):
                return "settled"
            outcome = self._try(request, lease)
        self.note(request, outcome)
        return outcome

    def note(self, request: ModelRequest, outcome: Outcome) -> None:
        """Take in what came of a try, here or at another worker of this run."""
        self.ledger.refresh()
        self.ledger.note(request, self._terms.dtype, outcome.attempts)

    def give_up(self, request: ModelRequest, reason: str) -> Outcome:
        """Write down why a model is not tried any more, and take it from whom it was lost with."""
        lease = self._take(request)
        with lease or contextlib.nullcontext():
            outcome = self._session.fail(request, ScoringError(reason))
        self.note(request, outcome)
        return outcome

    def is_held(self, request: ModelRequest) -> bool:
        """Whether others, and nobody of this run, are at a model."""
        return self._leases.is_held(self._subject_of(request))

    def free(self, request: ModelRequest) -> None:
        """Give a model back to others, whose worker of this run is gone."""
        with self._take(request) or contextlib.nullcontext():
            pass

    def _take(self, request: ModelRequest) -> Lease | None:
        return self._leases.take(self._subject_of(request), model=name_of(request))

    def _subject_of(self, request: ModelRequest) -> str:
        return f"{lease_of(request)} {self._subject}"

    def _tried(self, request: ModelRequest) -> int:
        failure = self.failure(request)
        return 0 if failure is None else failure.attempts

    def _try(self, request: ModelRequest, lease: Lease) -> Outcome:
        name = name_of(request)
        died = lease.generation - 1
        if died:
            self._log("taken over", model=name, after=died)
        if died >= self._terms.attempts:
            outcome = self._session.fail(request, ScoringError(died_at(name, died)))
        else:
            self._log("began", model=name)
            try:
                outcome = self._session.score_one(request)
            except (KeyboardInterrupt, SystemExit, StoreError, OSError):
                raise  # which is not about this model
            except BaseException as error:  # a package that is missing; a tokenizer's panic
                outcome = self._session.fail(request, error)
        self._log(outcome.status, **outcome.summary())
        return outcome


def lease_of(request: ModelRequest) -> str:
    """What a worker has to itself while it is at a model: the same for all that may be one row."""
    is_default = request.revision in (None, "main")
    return name_of(request) if is_default else f"{name_of(request)} {request.revision}"


def died_at(name: str, count: int) -> str:
    """What is said of a model that workers did not outlive."""
    return (
        f"{name} must leave its worker alive, got {count} that ended without a word while they "
        "were at it; memory may have run out: give it weights 'paged' and a memory_budget, and try "
        "it again with --retry-failed"
    )

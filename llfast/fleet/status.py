"""How far a fleet is, from its store alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from llfast.errors import StoreError
from llfast.model_list import ModelRequest
from llfast.rows import is_own_name
from llfast.shards import read_batches
from llfast.store import Store
from llfast.storefiles import only_textset

from .leases import read_leases
from .ledger import Failure, Ledger
from .terms import told_apart
from .worker import LEASES

_RECENT_SECONDS = 3600.0  # that rates are taken over
_BATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a fleet is.

    Attributes:
        done: models of the list that have a result; without a list, names that have one.
        to_do: models of the list that are still to be tried; None without a list. A branch is to be
            tried if no result was asked for by that name, whatever it has become since.
        running: what workers are at: `model`, `host`, `rank`, `seconds` since they began, and
            `silent_seconds` since they last gave a sign.
        failed: why models have no result.
        models_an_hour: over the last hour, or since the first result in it; None before the second.
        tokens_a_second: scored tokens of the same models in the same time.
        seconds_left: at that rate; None if it or the list is not known.
    """

    done: int
    to_do: int | None
    running: tuple[dict[str, Any], ...]
    failed: dict[str, Failure]
    models_an_hour: float | None
    tokens_a_second: float | None
    seconds_left: float | None

    def summary(self) -> dict[str, Any]:
        """What programs are told of it."""
        failed = {
            name: {"reason": each.reason, "attempts": each.attempts, "lasting": each.is_lasting}
            for name, each in sorted(self.failed.items())
        }
        facts = {each.name: getattr(self, each.name) for each in fields(self)}
        return facts | {"running": list(self.running), "failed": failed}


class Watch:
    """A store's results on one text set under one convention, look after look.

    Each look reads what is new alone.

    Attributes:
        digest: of the text set.
        convention: which tokens are scored.
        ledger: what there is.
    """

    def __init__(self, store: Store, digest: str, convention: str) -> None:
        self.digest, self.convention = digest, convention
        self.ledger = Ledger(store, digest, convention)
        self._store = store
        self._tokens: dict[str, list[tuple[datetime, int]]] = {}  # of each result, by shard

    def tokens_since(self, since: float) -> int:
        """Scored tokens of results that were written after a time, in seconds since 1970."""
        recent = [
            name
            for name in self._store.shards(self.digest)
            if not is_own_name(name) or int(name.partition("-")[0]) >= since * 1e9  # when written
        ]
        known = self._tokens
        self._tokens = {name: known[name] if name in known else self._read(name) for name in recent}
        start = datetime.fromtimestamp(since, UTC)
        return sum(
            count for each in self._tokens.values() for created, count in each if created > start
        )

    def _read(self, name: str) -> list[tuple[datetime, int]]:
        columns = ["status", "convention", "layer", "created", "token_counts"]
        path, found = self._store.partition(self.digest) / name, []
        with contextlib.suppress(FileNotFoundError, StoreError):
            for _, batch in read_batches(path, columns, batch_bytes=_BATCH_BYTES):
                rows = batch.select(columns[:-1]).to_pylist()
                for row, counts in zip(rows, batch.column(columns[-1]), strict=True):
                    own = (row["status"], row["convention"], row["layer"])
                    if own == ("complete", self.convention, None) and counts.is_valid:
                        found.append((row["created"], counts.values.sum().as_py() or 0))
        return found


def find_textset(store: Store, digest: str | None, convention: str) -> str | None:
    """The text set of a store's results and failures, or of what workers are at.

    Args:
        store: where workers write.
        digest: how it begins, where there are several.
        convention: of the workers.

    Returns: its whole digest; None before anything is known of any.

    Raises:
        StoreError: if there are several, or others alone.
    """
    leases = (each.facts for each in read_leases(store.folder / LEASES))
    held = (facts["textset"] for facts in leases if facts.get("convention") == convention)
    found = {*store.textsets(failures=True), *(each for each in held if isinstance(each, str))}
    return only_textset(store.folder, sorted(found), digest) if found else None


def fleet_status(
    store: Store,
    textset_digest: str | None,
    *,
    convention: str = "paper",
    requests: Sequence[ModelRequest] | None = None,
    dtype: str = "auto",
    attempts: int = 3,
    watch: Watch | None = None,
) -> Status:
    """What the store says of a text set under a convention.

    Args:
        store: where workers write.
        textset_digest: of their texts; None as long as nothing is known of any.
        convention: which tokens they score.
        requests: their list, if it is to be told how much is left.
        dtype: that they were told to run models in.
        attempts: how often they try a model.
        watch: of the text set and convention, from an earlier look; only what is new is read then.
    """
    if textset_digest is None:
        return Status(
            done=0,
            to_do=None if requests is None else len(requests),
            running=(),
            failed={},
            models_an_hour=None,
            tokens_a_second=None,
            seconds_left=None,
        )
    watch = watch or Watch(store, textset_digest, convention)
    ledger = watch.ledger
    ledger.refresh()
    done, failed = len({key.model for key in ledger.completed_us()}), ledger.failures()
    now = time.time()
    written = sorted(when / 1e6 for when in ledger.completed_us().values())
    recent = [when for when in written if when > now - _RECENT_SECONDS]
    rate = tokens = None
    if len(recent) > 1:  # the first one began before
        seconds = max(recent[-1] - recent[0], 1e-3)
        rate = (len(recent) - 1) * 3600 / seconds
        tokens = watch.tokens_since(recent[0]) / seconds
    to_do = None
    if requests is not None:
        requests = told_apart(requests)
        has = [bool(ledger.has(each, dtype, by_name=True)) for each in requests]
        settled = (ledger.settled(each, dtype, attempts) for each in requests)
        done, to_do = sum(has), sum(not any(each) for each in zip(has, settled, strict=True))
    held = {each.path.stem: each for each in read_leases(store.folder / LEASES)}  # the last holds
    running = tuple(
        {
            "model": each.facts.get("model"),
            "host": each.facts.get("host"),
            "rank": each.facts.get("rank"),
            "seconds": now - _number(each.facts.get("since"), now),
            "silent_seconds": max(now - each.changed_ns / 1e9, 0.0),
        }
        for each in held.values()
        if (each.facts.get("textset"), each.facts.get("convention")) == (textset_digest, convention)
    )
    return Status(
        done=done,
        to_do=to_do,
        running=running,
        failed=failed,
        models_an_hour=rate,
        tokens_a_second=tokens,
        seconds_left=None if rate is None or to_do is None else to_do * 3600 / rate,
    )


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise

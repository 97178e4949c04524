"""A list of models over a Ray cluster: Ray places workers, and they are handed models."""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Unpack

from llfast.model_list import ModelRequest
from llfast.outcomes import Outcome
from llfast.store import Store
from llfast.texts import TextSet

from .events import Log, no_log
from .ledger import Ledger
from .ray_cluster import connected, machines_of
from .ray_dispatch import Dispatch
from .ray_workers import Assignment, sign_of, spare_collections
from .share import Shared
from .terms import Options, agree, told_apart
from .waiting import Waiting
from .worker import Worker


def score_on_ray(
    requests: Sequence[ModelRequest],
    texts: TextSet,
    store: Store,
    *,
    address: str = "auto",
    cpus: float | None = None,
    retry_failed: bool = False,
    wait: bool = True,
    report: Callable[[Outcome], None] | None = None,
    log: Log = no_log,
    **options: Unpack[Options],
) -> Shared:
    """Score what the store lacks of a list on the machines of a Ray cluster.

    Each model is placed by the memory that it needs, as the headers of its weights say. A model
    whose worker or machine is lost goes to another one; one that ran out of memory is given more,
    and uses less of it. What fails `attempts` times is left, with the reason in the store.

    Workers of a cluster, and others on the same store, do not get in each other's way: they hold
    leases as `score_share` does.

    Args:
        requests: all models.
        texts: N texts.
        store: where all machines see it.
        address: of the cluster; "auto" for the one that this machine is part of, "local" for one
            that is started on this machine and ends with the run.
        cpus: cores a model; None for one where GPUs are used, else for all of a machine.
        retry_failed: try what has failed before, too.
        wait: for models that others outside this run are at.
        report: is called with each outcome.
        log: is called with each event.
        options: see `Options`.

    Raises:
        ConnectionError: if there is no such cluster.
        MissingDependencyError: without Ray.
        OSError: if the store cannot be written.
        ScoringError: if no machine has room for what is left, or no worker can begin.
        StoreError: if not all machines see the store.
        ValueError: for arguments that make no sense, and two models of one name.
    """
    if cpus is not None and not cpus > 0:
        raise ValueError(f"cpus must be positive, got {cpus}")
    requests, terms = told_apart(requests), agree(requests, store, options)
    ledger = Ledger(store, texts.digest, terms.convention)
    ledger.refresh()
    forgiven = ledger.tries(requests, terms.dtype) if retry_failed else {}
    assignment = Assignment(
        texts=texts,
        folder=str(store.folder.absolute()),
        terms=terms,
        forgiven=forgiven,
        run=secrets.token_hex(8),
        working_folder=str(Path.cwd()),
    )
    own = Worker(
        texts,
        store,
        terms,
        facts={"rank": "driver"},
        ledger=ledger,
        forgiven=forgiven,
        run=assignment.run,
        log=log,
    )
    with own, connected(address), _with_sign(store, assignment.run), _spared_collections():
        waiting = Waiting(terms, machines_of(terms.device, cpus))
        dispatch = Dispatch(own, assignment, waiting, report, log)
        left = dispatch.run(requests, wait=wait)
        return Shared.of(own, requests, dispatch.outcomes, left)


@contextmanager
def _with_sign(store: Store, run: str) -> Iterator[None]:
    """Let workers see that a folder is the store of this run."""
    sign = sign_of(store, run)
    sign.write_bytes(b"")
    try:
        yield
    finally:
        with suppress(OSError):  # which must not hide another error
            sign.unlink(missing_ok=True)


@contextmanager
def _spared_collections() -> Iterator[None]:
    """Spare this process's collections, too, unless the caller has seen to them."""
    if gc.get_freeze_count():
        yield
        return
    spare_collections()
    try:
        yield
    finally:
        gc.unfreeze()

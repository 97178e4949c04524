"""Score many models into a store: what is done is skipped, what fails is written down."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence

from llfast.batches import CONVENTIONS
from llfast.devices import check_token_budget
from llfast.dtypes import parse_dtype
from llfast.engines import check_budget
from llfast.estimate import Estimate, estimate
from llfast.model_list import ModelRequest
from llfast.outcomes import Outcome
from llfast.remote import AnyPath, RemotePath
from llfast.store import Store
from llfast.storefiles import refuse_unwritable_store
from llfast.texts import TextSet
from llfast.verify import manifest_path, read_manifest

from .ledger import Ledger
from .session import Opened, Session, open_request, options_of

_LEFTOVER_SECONDS = 3600.0


def score_models(
    requests: Sequence[ModelRequest],
    texts: TextSet,
    store: Store,
    *,
    convention: str = "paper",
    dtype: str = "auto",
    device: str = "auto",
    token_budget: int | None = None,
    weights: str = "auto",
    memory_budget: int | str | None = None,
    verify: bool | str | os.PathLike[str] = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: bool | None = None,
    report: Callable[[Outcome], None] | None = None,
    together: bool = False,
) -> list[Outcome]:
    """Score models one after the other; a model that fails does not stop the rest.

    A killed run goes on where it was: models in the store are skipped, and of the one that was
    running, finished texts are kept beside the store.

    Args:
        requests: which models.
        texts: N texts.
        store: where results and reasons of failure go.
        convention: as for `score`, and so are:
        dtype: "auto" or a dtype.
        device: "auto" or a device.
        token_budget: the most tokens in a batch.
        weights: "auto", "resident" or "paged".
        memory_budget: for weights and texts on their way.
        verify: compare sha256 digests of weights.
        trust_remote_code: let checkpoints bring code of their own.
        allow_pickle: let weights be pickles.
        progress: show a bar a model.
        report: is called with each outcome as it is known.
        together: let relatives be paged as one, see `score_many`; all models are looked up first.

    Raises:
        OSError: if the store cannot be written.
        ValueError: for a convention, dtype, device or token budget that there is not.
        MissingDependencyError: if a model needs a package that is not installed.
    """
    memory_budget = begin(
        requests,
        store,
        convention=convention,
        dtype=dtype,
        token_budget=token_budget,
        weights=weights,
        memory_budget=memory_budget,
        verify=verify,
    )
    ledger = Ledger(store, texts.digest, convention)
    ledger.refresh()
    session = Session(
        texts,
        store,
        completed=ledger,
        convention=convention,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        token_budget=token_budget,
        weights=weights,
        memory_budget=memory_budget,
        verify=verify,
        progress=progress,
    )
    outcomes: dict[int, Outcome] = {}

    def note(number: int, outcome: Outcome) -> None:
        outcomes[number] = outcome
        if report is not None:
            report(outcome)

    numbers = range(len(requests))
    for part in [numbers] if together else [[number] for number in numbers]:
        opened: dict[int, Opened] = {}
        for number in part:
            found = session.open(requests[number])
            if isinstance(found, Outcome):
                note(number, found)
            else:
                opened[number] = found
        for group in session.groups(opened):
            for number, outcome in session.score(opened, group):
                note(number, outcome)
    return [outcomes[number] for number in numbers]


def estimate_models(
    requests: Sequence[ModelRequest],
    texts: TextSet,
    *,
    convention: str = "paper",
    dtype: str = "auto",
    device: str = "auto",
    token_budget: int | None = None,
    weights: str = "auto",
    memory_budget: int | str | None = None,
    verify: bool | str | os.PathLike[str] = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> list[Estimate]:
    """What `score_models` would take; reads no weights and writes nothing.

    Raises: as `estimate` says of any of the models, and as `score_models` of the options.
    """
    _check(requests, convention, dtype, token_budget, weights, memory_budget, verify)
    options = {
        "convention": convention,
        "device": device,
        "token_budget": token_budget,
        "weights": weights,
        "memory_budget": memory_budget,
        "verify": verify,
    }
    return [
        estimate(
            open_request(request, trust_remote_code, allow_pickle),
            texts,
            dtype=request.dtype or dtype,
            **options_of(request, options),
        )
        for request in requests
    ]


def begin(
    requests: Sequence[ModelRequest],
    store: Store,
    *,
    convention: str,
    dtype: str,
    token_budget: int | None,
    weights: str,
    memory_budget: int | str | None,
    verify: bool | str | os.PathLike[str],
) -> int | None:
    """Refuse a run in which every model would fail for one slip of the pen.

    A store that is not there is not made yet: that is for the first model that is run.

    Returns: the memory budget in bytes.

    Raises:
        ValueError: for a convention, dtype, way of having weights, or budget that there is not.
        TypeError: for a `verify` that is no path.
        OSError: if a manifest cannot be read, or the store not be made.
    """
    budget_bytes = _check(requests, convention, dtype, token_budget, weights, memory_budget, verify)
    if not store.folder.is_dir():
        refuse_unwritable_store(store.folder)
    _remove_leftovers(store.folder)
    return budget_bytes


def _check(
    requests: Sequence[ModelRequest],
    convention: str,
    dtype: str,
    token_budget: int | None,
    weights: str,
    memory_budget: int | str | None,
    verify: bool | str | os.PathLike[str],
) -> int | None:
    """Refuse what would fail for one slip of the pen; the memory budget in bytes."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    for name in (dtype, *(request.dtype or dtype for request in requests)):
        if name != "auto":
            parse_dtype(name)
    check_token_budget(token_budget)
    for request in requests:
        check_budget(request.weights or weights, request.memory_budget)
    if (manifest := manifest_path(verify)) is not None:
        read_manifest(manifest)
    return check_budget(weights, memory_budget)


def _remove_leftovers(folder: AnyPath) -> None:
    """Remove what killed writers were writing; what a living one writes is younger."""
    if isinstance(folder, RemotePath):
        return  # there is none: what is not whole is not there
    for path in folder.rglob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()

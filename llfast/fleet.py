"""Score many models into a store: what is done is skipped, what fails is written down."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .batches import CONVENTIONS
from .devices import resolve_device
from .dtypes import parse_dtype
from .engines import check_budget, find_relatives
from .errors import CheckpointError, LlfastError, MissingDependencyError, StoreError
from .estimate import Estimate, estimate
from .files import as_utf8
from .model_list import ModelRequest
from .models import ModelSource, open_model
from .outcomes import Outcome
from .paging import LoadingStatistics, Relatives
from .results import LogLikelihoods, ResultKey
from .runs import SCORING_VERSION, carry_out_together, prepare
from .scoring import score
from .store import Store
from .texts import TextSet
from .verify import read_manifest

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
        ValueError: for a convention, dtype or device that there is not.
        MissingDependencyError: if a model needs a package that is not installed.
    """
    _refuse_unknown_options(requests, convention, dtype)
    memory_budget = check_budget(weights, memory_budget)
    if not isinstance(verify, bool):
        read_manifest(Path(verify))  # what is wrong with it is wrong for all
    store.prepare()
    _remove_leftovers(store.folder)
    session = _Session(
        texts,
        store,
        convention=convention,
        device=device,
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
        opened: dict[int, _Opened] = {}
        for number in part:
            found = session.open(requests[number], dtype, trust_remote_code, allow_pickle)
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
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> list[Estimate]:
    """What `score_models` would take; reads no weights and writes nothing."""
    return [
        estimate(
            _open(request, trust_remote_code, allow_pickle),
            texts,
            dtype=request.dtype or dtype,
            **options,
        )
        for request in requests
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A model that is not in the store yet."""

    request: ModelRequest
    source: ModelSource
    key: ResultKey
    dtype: torch.dtype
    device: torch.device


class _Session:
    """What is the same for all models of a call."""

    def __init__(
        self, texts: TextSet, store: Store, *, convention: str, device: str, **options: Any
    ) -> None:
        self._texts, self._store, self._convention, self._device = texts, store, convention, device
        self._options = {"convention": convention, "device": device, **options}
        self._completed = store.completed()
        self._compared_bytes = 0  # to find out who is related, and not reported yet

    def open(
        self, request: ModelRequest, dtype: str, trust_remote_code: bool, allow_pickle: bool
    ) -> _Opened | Outcome:
        """Look a model up; an outcome if it is there already, or cannot be opened."""
        asked = request.dtype or dtype
        key = ResultKey(
            request.name or as_utf8(os.path.normpath(request.model)),
            request.revision or "",
            self._texts.digest,
            self._convention,
            asked,
            None,
            SCORING_VERSION,
        )
        try:
            source = _open(request, trust_remote_code, allow_pickle)
        except MissingDependencyError:
            raise
        except Exception as error:
            return self._failed(request, key, error)
        place = resolve_device(self._device, source)  # what is wrong with it is wrong for all
        own = source.dtype(asked, place)
        name = str(own).removeprefix("torch.")
        key = key._replace(model=source.name, revision=source.revision, dtype=name)
        opened = _Opened(request=request, source=source, key=key, dtype=own, device=place)
        return self._skipped(opened) if key in self._completed else opened

    def groups(self, opened: Mapping[int, _Opened]) -> list[Relatives]:
        """The numbers of models, relatives together; what is there twice is in one of them once."""
        alone = [Relatives.alone(number) for number in opened]
        if len(opened) < 2:
            return alone
        numbers: list[int] = []
        others: list[int] = []
        keys: set[ResultKey] = set()
        for number, each in opened.items():
            is_fit = each.key not in keys and _is_unchanged(each)
            (numbers if is_fit else others).append(number)
            keys.add(each.key)
        fit = [opened[number] for number in numbers]
        kinds = [(each.source, each.dtype, each.device) for each in fit]
        statistics = LoadingStatistics()
        try:
            found = find_relatives(kinds, self._options["weights"], statistics)
        except CheckpointError:  # of one that cannot be read: it will say so when it is alone
            return alone
        self._compared_bytes += statistics.compared_bytes
        return [*(group.among(numbers) for group in found), *map(Relatives.alone, others)]

    def score(
        self, opened: Mapping[int, _Opened], group: Relatives
    ) -> Iterator[tuple[int, Outcome]]:
        """The outcomes of a group, by number."""
        members = [opened[number] for number in group.numbers]
        known = self._together(members, group) if len(members) > 1 else {}
        for number, each in zip(group.numbers, members, strict=True):
            if each.key in self._completed:  # it was twice in the list
                yield number, self._skipped(each)
                continue
            outcome = known.get(each.key) or self._alone(each)
            if outcome.status == "scored":
                self._completed.add(each.key)
            yield number, outcome

    def _together(self, members: Sequence[_Opened], group: Relatives) -> dict[ResultKey, Outcome]:
        """The outcomes of relatives; none if anything is wrong with one of them."""
        _refuse_read_only(self._store.folder)
        start = time.monotonic()
        loading = LoadingStatistics(compared_bytes=self._compared_bytes)
        self._compared_bytes = 0
        options = {**self._options}
        progress = options.pop("progress")
        try:
            runs = [
                prepare(
                    each.source,
                    self._texts,
                    token_ids=None,
                    dtype=each.key.dtype,
                    per_token=False,
                    metadata=each.request.metadata,
                    partial=self._store.partial_path(each.key),
                    loading=loading,
                    **options,
                )
                for each in members
            ]
            results = carry_out_together(runs, group.equals, options["weights"], progress)
        except Exception as error:
            self._raise_if_of_all(error)
            results = None  # alone, each says what is wrong with it; what was finished is kept
        seconds = (time.monotonic() - start) / len(members)
        return {
            each.key: self._keep(each, result, seconds, loading, relatives=len(members) - 1)
            for each, result in zip(members, results or (), strict=False)
        }

    def _alone(self, opened: _Opened) -> Outcome:
        _refuse_read_only(self._store.folder)
        start, loading = time.monotonic(), LoadingStatistics()
        try:
            result = score(
                opened.source,
                self._texts,
                dtype=opened.key.dtype,
                metadata=opened.request.metadata,
                partial=self._store.partial_path(opened.key),
                loading=loading,
                **self._options,
            )
        except Exception as error:
            self._raise_if_of_all(error)
            return self._failed(opened.request, opened.key, error)
        return self._keep(opened, result, time.monotonic() - start, loading)

    def _keep(
        self,
        opened: _Opened,
        result: LogLikelihoods,
        seconds: float,
        loading: LoadingStatistics,
        relatives: int = 0,
    ) -> Outcome:
        try:
            self._store.add(result)
        except OSError as error:
            self._raise_if_of_all(error)
            return self._failed(opened.request, opened.key, error)
        self._store.partial_path(opened.key).unlink(missing_ok=True)
        return Outcome(
            request=opened.request,
            status="scored",
            result=result,
            seconds=seconds,
            loading=loading,
            relatives=relatives,
        )

    def _skipped(self, opened: _Opened) -> Outcome:
        with contextlib.suppress(OSError):  # a kill may have come between a result and this
            self._store.partial_path(opened.key).unlink(missing_ok=True)
        return Outcome(request=opened.request, status="skipped")

    def _failed(self, request: ModelRequest, key: ResultKey, error: Exception) -> Outcome:
        reason = _one_line(error)
        self._store.add_failure(key, reason)
        return Outcome(request=request, status="failed", error=reason)

    def _raise_if_of_all(self, error: Exception) -> None:
        """Raise what is no model's own fault."""
        if isinstance(error, StoreError | MissingDependencyError):
            raise error
        if isinstance(error, OSError) and _is_of_store(error, self._store):
            error.filename = error.filename or str(self._store.folder)
            raise error


def _is_unchanged(opened: _Opened) -> bool:
    """Whether a model's files are still what they were when it was looked up."""
    try:
        if opened.source.checkpoint is not None:
            opened.source.checkpoint.refuse_changes()
    except (CheckpointError, OSError):
        return False
    return True


def _open(request: ModelRequest, trust_remote_code: bool, allow_pickle: bool) -> ModelSource:
    return open_model(
        request.model,
        name=request.name,
        revision=request.revision,
        tokenizer=request.tokenizer,
        adapter_base=request.adapter_base,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


def _refuse_unknown_options(requests: Sequence[ModelRequest], convention: str, dtype: str) -> None:
    """Before every model fails for one slip of the pen, and the store is told so."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    for name in (dtype, *(request.dtype or dtype for request in requests)):
        if name != "auto":
            parse_dtype(name)


def _refuse_read_only(folder: Path) -> None:
    """Before a model has run in vain."""
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "The store cannot be written to", str(folder))


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers were writing; what a living one writes is younger."""
    for path in folder.rglob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()


def _is_of_store(error: OSError, store: Store) -> bool:
    """A full or read-only disk fails every model: it must stop the run, not be noted as one's."""
    if error.filename is None:
        return error.errno is not None  # a failed write does not say of which file
    return Path(str(error.filename)).is_relative_to(store.folder)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = as_utf8(lines[0]) if lines else ""
    return (
        text if isinstance(error, LlfastError | ValueError) else f"{type(error).__name__}: {text}"
    )

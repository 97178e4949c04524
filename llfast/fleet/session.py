"""One model after the other into a store: the unit of work of all that scores many models."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from llfast.batchwise import is_out_of_memory
from llfast.devices import resolve_device
from llfast.dtypes import dtype_name
from llfast.engines import find_relatives
from llfast.errors import CheckpointError, MissingDependencyError, RemoteError, StoreError
from llfast.loading import refuse_without_peft
from llfast.model_list import ModelRequest
from llfast.models import FolderSource, ModelSource, open_model
from llfast.outcomes import Outcome
from llfast.paging import LoadingStatistics, Relatives
from llfast.remote import RemotePath
from llfast.results import LogLikelihoods, ResultKey
from llfast.runs import SCORING_VERSION, carry_out_together, prepare
from llfast.scoring import score
from llfast.store import Store
from llfast.storefiles import refuse_unwritable_store
from llfast.texts import TextSet

from .failures import is_lasting, reason_of
from .ledger import asked_of, name_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model that is not in the store yet."""

    request: ModelRequest
    source: ModelSource
    key: ResultKey
    dtype: torch.dtype
    device: torch.device


class Completed(Protocol):
    """The keys of what a store has."""

    def __contains__(self, key: ResultKey, /) -> bool: ...

    def add(self, key: ResultKey, /) -> None:
        """Add the key of a result that was stored just now."""


class Session:
    """What is the same for all models of a call."""

    def __init__(
        self,
        texts: TextSet,
        store: Store,
        *,
        convention: str,
        dtype: str,
        device: str,
        trust_remote_code: bool,
        allow_pickle: bool,
        completed: Completed,
        attempts: Callable[[ModelRequest], int] = lambda _: 0,
        **options: Any,
    ) -> None:
        """Begin.

        Args:
            texts: N texts.
            store: where results and failures go.
            convention: as for `score_models`, and so are:
            dtype: unless a model has its own.
            device: where models run.
            trust_remote_code: for all models; a request may ask for it, too.
            allow_pickle: for all.
            completed: what is there already.
            attempts: how often a model has been tried before.
            options: of `score`.
        """
        self._texts, self._store, self._convention, self._device = texts, store, convention, device
        self._dtype, self._attempts = dtype, attempts
        self._trust_remote_code, self._allow_pickle = trust_remote_code, allow_pickle
        self._options = {"convention": convention, "device": device, **options}
        self._completed = completed
        self._compared_bytes = 0  # to find out who is related, and not reported yet

    def score_one(self, request: ModelRequest) -> Outcome:
        """The unit of work: one model, looked up, scored and stored."""
        found = self.open(request)
        if isinstance(found, Outcome):
            return found
        outcome = self._alone(found)
        if outcome.status == "scored":
            self._completed.add(found.key)
        return outcome

    def fail(self, request: ModelRequest, error: BaseException) -> Outcome:
        """Write down why a model has no result, without having tried."""
        return self._failed(request, self._asked_key(request), error)

    def open(self, request: ModelRequest) -> Opened | Outcome:
        """Look a model up; an outcome if it is there already, or cannot be opened."""
        key = self._asked_key(request)
        try:
            source = open_request(request, self._trust_remote_code, self._allow_pickle)
        except MissingDependencyError:
            raise
        except Exception as error:
            return self._failed(request, key, error)
        place = resolve_device(self._device, source)  # what is wrong with it is wrong for all
        own = source.dtype(key.dtype, place)
        key = key._replace(model=source.name, revision=source.revision, dtype=dtype_name(own))
        opened = Opened(request=request, source=source, key=key, dtype=own, device=place)
        return self._skipped(opened) if key in self._completed else opened

    def _asked_key(self, request: ModelRequest) -> ResultKey:
        """The key as far as it is known before the model is looked up."""
        return ResultKey(
            name_of(request),
            request.revision or "",
            self._texts.digest,
            self._convention,
            request.dtype or self._dtype,
            None,
            SCORING_VERSION,
        )

    def groups(self, opened: Mapping[int, Opened]) -> list[Relatives]:
        """The numbers of models, relatives together; what is there twice is in one of them once."""
        alone = [Relatives.alone(number) for number in opened]
        if len(opened) < 2:
            return alone
        numbers: list[int] = []
        others: list[int] = []
        keys: set[ResultKey] = set()
        for number, each in opened.items():
            is_ordinary = options_of(each.request, self._options) == self._options
            is_fit = is_ordinary and each.key not in keys and _is_unchanged(each)
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
        self, opened: Mapping[int, Opened], group: Relatives
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

    def _together(self, members: Sequence[Opened], group: Relatives) -> dict[ResultKey, Outcome]:
        """The outcomes of relatives; none if anything is wrong with one of them."""
        self._make_ready(members)
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
                    dtype=each.key.dtype,
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

    def _alone(self, opened: Opened) -> Outcome:
        self._make_ready([opened])
        start, loading = time.monotonic(), LoadingStatistics()
        try:
            result = score(
                opened.source,
                self._texts,
                dtype=opened.key.dtype,
                metadata=opened.request.metadata,
                partial=self._store.partial_path(opened.key),
                loading=loading,
                **options_of(opened.request, self._options),
            )
        except Exception as error:
            self._raise_if_of_all(error)
            return self._failed(opened.request, opened.key, error)
        return self._keep(opened, result, time.monotonic() - start, loading)

    def _make_ready(self, opened: Sequence[Opened]) -> None:
        """Make sure that the store can be written to, before a model runs in vain."""
        if any(isinstance(each.source, FolderSource) and each.source.adapter for each in opened):
            refuse_without_peft()
        refuse_unwritable_store(self._store.folder)
        self._store.prepare()

    def _keep(
        self,
        opened: Opened,
        result: LogLikelihoods,
        seconds: float,
        loading: LoadingStatistics,
        relatives: int = 0,
    ) -> Outcome:
        asked = list(asked_of(opened.request, self._dtype))
        result = replace(result, provenance={**result.provenance, "asked": asked})
        try:
            self._store.add(result)
        except OSError as error:
            self._raise_if_of_all(error)
            return self._failed(opened.request, opened.key, error)
        self._forget_partial(opened.key)
        return Outcome(
            request=opened.request,
            status="scored",
            result=result,
            seconds=seconds,
            loading=loading,
            relatives=relatives,
        )

    def _skipped(self, opened: Opened) -> Outcome:
        with contextlib.suppress(OSError):  # a kill may have come between a result and this
            self._forget_partial(opened.key)
        return Outcome(request=opened.request, status="skipped")

    def _forget_partial(self, key: ResultKey) -> None:
        path = self._store.partial_path(key)
        if path is not None:
            path.unlink(missing_ok=True)

    def _failed(self, request: ModelRequest, key: ResultKey, error: BaseException) -> Outcome:
        reason, attempts = reason_of(error), self._attempts(request) + 1
        self._store.add_failure(
            key,
            reason,
            attempts=attempts,
            is_lasting=is_lasting(error),
            asked=asked_of(request, self._dtype),
        )
        ran_out = is_out_of_memory(error) or is_out_of_memory(error.__cause__)
        return Outcome(
            request=request,
            status="failed",
            error=reason,
            attempts=attempts,
            ran_out_of_memory=ran_out,
        )

    def _raise_if_of_all(self, error: Exception) -> None:
        """Raise what is no model's own fault."""
        if isinstance(error, StoreError | MissingDependencyError | RemoteError):
            raise error
        if isinstance(error, OSError) and _is_of_store(error, self._store):
            error.filename = error.filename or str(self._store.folder)
            raise error


def _is_unchanged(opened: Opened) -> bool:
    """Whether a model's files are still what they were when it was looked up."""
    try:
        if opened.source.checkpoint is not None:
            opened.source.checkpoint.refuse_changes()
    except (CheckpointError, OSError):
        return False
    return True


def open_request(
    request: ModelRequest, trust_remote_code: bool = False, allow_pickle: bool = False
) -> ModelSource:
    """Find a model without reading its weights, see `open_model`.

    Args:
        request: the model, which may ask for code of its own to be trusted.
        trust_remote_code: for all models.
        allow_pickle: for all.
    """
    return open_model(
        request.model,
        name=request.name,
        revision=request.revision,
        tokenizer=request.tokenizer,
        adapter_base=request.adapter_base,
        trust_remote_code=trust_remote_code or request.trust_remote_code,
        allow_pickle=allow_pickle,
    )


def options_of(request: ModelRequest, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `score` for all models, with the weights and memory budget that one asks for."""
    own: dict[str, Any] = {}
    if request.weights is not None:
        own["weights"] = request.weights
    if request.memory_budget is not None or request.weights == "resident":
        own["memory_budget"] = request.memory_budget
    return {**options, **own}


def _is_of_store(error: OSError, store: Store) -> bool:
    """A full or read-only disk fails every model: it must stop the run, not be noted as one's."""
    if error.filename is None or isinstance(store.folder, RemotePath):
        # A failed write does not say of which file, and what a store at s3:// has here is no model.
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    folder = store.folder
    return isinstance(folder, Path) and Path(str(error.filename)).is_relative_to(folder)

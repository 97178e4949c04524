"""Score many models into a store: what is done is skipped, what fails is written down."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .batches import CONVENTIONS
from .devices import resolve_device
from .dtypes import parse_dtype
from .engines import check_budget
from .errors import LlfastError, MissingDependencyError, StoreError
from .estimate import Estimate, estimate
from .files import as_utf8
from .models import ModelSource, open_model
from .paging import LoadingStatistics
from .results import LogLikelihoods, ResultKey
from .scoring import SCORING_VERSION, score
from .store import Store
from .texts import TextSet
from .verify import read_manifest

_LEFTOVER_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """One model to score.

    Attributes:
        model: a checkpoint folder or Hub id.
        name: what to call it; its path or id by default.
        revision: branch, tag or commit of a Hub id.
        tokenizer: the folder of another tokenizer.
        adapter_base: the model that a LoRA adapter belongs to.
        dtype: what it runs in, if not what all others do.
        metadata: columns to keep with the result.
    """

    model: str
    name: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    adapter_base: str | None = None
    dtype: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one model: "scored", "skipped" (it was in the store) or "failed"."""

    request: ModelRequest
    status: str
    result: LogLikelihoods | None = None
    error: str | None = None
    seconds: float = 0.0
    loading: LoadingStatistics | None = None

    def summary(self) -> dict[str, Any]:
        """What people and programs are told of it."""
        facts: dict[str, Any] = {
            "model": self.request.name or self.request.model,
            "status": self.status,
        }
        if self.error is not None:
            facts["error"] = self.error
        if self.result is not None:
            facts |= {
                "model": self.result.model,
                "revision": self.result.revision,
                "dtype": self.result.dtype,
                "bits_per_byte": self.result.mean_bits_per_byte,
                "tokens": int(self.result.token_counts.sum()),
                "truncated_texts": len(self.result.truncated_ids),
                "truncated_ids": self.result.truncated_ids,
                "unscored_texts": len(self.result.unscored_ids),
                "unscored_ids": self.result.unscored_ids,
                "seconds": self.seconds,
            }
        paged = self.result is not None and self.result.provenance.get("weights") == "paged"
        if paged and self.loading is not None:
            facts["paged"] = {
                "waves": self.loading.waves,
                "bytes": self.loading.nbytes,
                "read_bytes_per_second": self.loading.read_rate,
                "stall_seconds": self.loading.stall_seconds,
            }
        if self.result is not None and self.loading is not None and self.loading.verified_bytes:
            facts["verified"] = {
                "bytes": self.loading.verified_bytes,
                "seconds": self.loading.verify_seconds,
                "waited_seconds": self.loading.verify_wait_seconds,
            }
        return facts


def read_model_list(path: str | Path) -> list[ModelRequest]:
    """Models from a file: a name or path a line, or (.jsonl) one object a line.

    An object has `model`, and may have the other fields of `ModelRequest`; what else it has is
    metadata. Empty lines and lines that begin with # are passed over.

    Raises:
        OSError: if the file cannot be read.
        ValueError: with the line, if one cannot be used.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got {error}") from None
    requests = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        requests.append(
            _parse_request(line, f"{path}, line {number}")
            if path.suffix == ".jsonl"
            else ModelRequest(model=line.strip())
        )
    return requests


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
    completed = store.completed()
    outcomes = []
    for request in requests:
        asked = request.dtype or dtype
        key = ResultKey(
            request.name or as_utf8(os.path.normpath(request.model)),
            request.revision or "",
            texts.digest,
            convention,
            asked,
            None,
            SCORING_VERSION,
        )
        try:
            source = _open(request, trust_remote_code, allow_pickle)
        except MissingDependencyError:
            raise
        except Exception as error:
            outcome = _failed(request, key, error, store)
        else:
            place = resolve_device(device, source)  # what is wrong with it is wrong for all
            own = str(source.dtype(asked, place)).removeprefix("torch.")
            key = key._replace(model=source.name, revision=source.revision, dtype=own)
            if key in completed:
                outcome = _skipped(request, key, store)
            else:
                outcome = _scored(
                    request,
                    source,
                    key,
                    texts,
                    store,
                    convention=convention,
                    dtype=asked,
                    device=device,
                    token_budget=token_budget,
                    weights=weights,
                    memory_budget=memory_budget,
                    verify=verify,
                    progress=progress,
                )
            if outcome.status == "scored":
                completed.add(key)
        outcomes.append(outcome)
        if report is not None:
            report(outcome)
    return outcomes


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


def _skipped(request: ModelRequest, key: ResultKey, store: Store) -> Outcome:
    with contextlib.suppress(OSError):  # a kill may have come between a result and this
        store.partial_path(key).unlink(missing_ok=True)
    return Outcome(request=request, status="skipped")


def _scored(
    request: ModelRequest,
    source: ModelSource,
    key: ResultKey,
    texts: TextSet,
    store: Store,
    **options: Any,
) -> Outcome:
    _refuse_read_only(store.folder)
    partial = store.partial_path(key)
    start = time.monotonic()
    loading = LoadingStatistics()
    try:
        result = score(
            source, texts, metadata=request.metadata, partial=partial, loading=loading, **options
        )
        seconds = time.monotonic() - start
        store.add(result)
    except (StoreError, MissingDependencyError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and _is_of_store(error, store):
            error.filename = error.filename or str(store.folder)
            raise
        return _failed(request, key, error, store)
    partial.unlink(missing_ok=True)
    return Outcome(
        request=request, status="scored", result=result, seconds=seconds, loading=loading
    )


def _failed(request: ModelRequest, key: ResultKey, error: Exception, store: Store) -> Outcome:
    reason = _one_line(error)
    store.add_failure(key, reason)
    return Outcome(request=request, status="failed", error=reason)


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


def _parse_request(line: str, where: str) -> ModelRequest:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a JSON object, got {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), str):
        raise ValueError(f'{where} must be an object with a string "model", got {line[:60]!r}')
    own: dict[str, Any] = {}
    for name in ("model", "name", "revision", "tokenizer", "adapter_base", "dtype"):
        value = fields.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: {name} must be a string, got {value!r}")
        own[name] = value
    nested = fields.pop("metadata", None) or {}
    if not isinstance(nested, dict):
        raise ValueError(f"{where}: metadata must be an object, got {nested!r}")
    return ModelRequest(**own, metadata=fields | nested)


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

"""Score many models into a store: what is done is skipped, what fails is written down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import LlfastError, MissingDependencyError, StoreError
from .estimate import Estimate, estimate
from .models import ModelSource, open_model
from .results import LogLikelihoods, ResultKey
from .scoring import SCORING_VERSION, resolve_device, score
from .store import Store
from .texts import TextSet


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """One model to score.

    Attributes:
        model: a checkpoint folder or Hub id.
        name: what to call it; its path or id by default.
        revision: branch, tag or commit of a Hub id.
        tokenizer: the folder of another tokenizer.
        adapter_base: the model that a LoRA adapter belongs to.
        metadata: columns to keep with the result.
    """

    model: str
    name: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    adapter_base: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one model: "scored", "skipped" (it was in the store) or "failed"."""

    request: ModelRequest
    status: str
    result: LogLikelihoods | None = None
    error: str | None = None
    seconds: float = 0.0

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
                "unscored_texts": len(self.result.unscored_ids),
                "seconds": self.seconds,
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
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
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
        trust_remote_code: let checkpoints bring code of their own.
        allow_pickle: let weights be pickles.
        progress: show a bar a model.
        report: is called with each outcome as it is known.

    Raises:
        OSError: if the store cannot be written.
    """
    store.prepare()
    completed = store.completed()
    outcomes = []
    for request in requests:
        key = None
        try:
            source = _open(request, trust_remote_code, allow_pickle)
            place = resolve_device(device, source)
            key = ResultKey(
                source.name,
                source.revision,
                texts.digest,
                convention,
                str(source.dtype(dtype, place)).removeprefix("torch."),
                None,
                SCORING_VERSION,
            )
            if key in completed:
                outcome = Outcome(request=request, status="skipped")
            else:
                partial = store.partial_path(key)
                start = time.monotonic()
                result = score(
                    source,
                    texts,
                    convention=convention,
                    dtype=dtype,
                    device=device,
                    token_budget=token_budget,
                    metadata=request.metadata,
                    partial=partial,
                    progress=progress,
                )
                seconds = time.monotonic() - start
                store.add(result)
                partial.unlink(missing_ok=True)
                completed.add(key)
                outcome = Outcome(request=request, status="scored", result=result, seconds=seconds)
        except (StoreError, MissingDependencyError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and _is_of_store(error, store):
                raise
            outcome = Outcome(request=request, status="failed", error=_one_line(error))
            failed = key or ResultKey(
                request.name or request.model,
                request.revision or "",
                texts.digest,
                convention,
                dtype,
                None,
                SCORING_VERSION,
            )
            store.add_failure(failed, outcome.error or "")
        outcomes.append(outcome)
        if report is not None:
            report(outcome)
    return outcomes


def estimate_models(
    requests: Sequence[ModelRequest],
    texts: TextSet,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> list[Estimate]:
    """What `score_models` would take; reads no weights and writes nothing."""
    return [
        estimate(_open(request, trust_remote_code, allow_pickle), texts, **options)
        for request in requests
    ]


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
    for name in ("model", "name", "revision", "tokenizer", "adapter_base"):
        value = fields.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: {name} must be a string, got {value!r}")
        own[name] = value
    nested = fields.pop("metadata", {})
    return ModelRequest(**own, metadata=fields | (nested if isinstance(nested, dict) else {}))


def _is_of_store(error: OSError, store: Store) -> bool:
    """A full or read-only disk fails every model: it must stop the run, not be noted as one's."""
    return error.filename is None or str(error.filename).startswith(str(store.folder))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return (
        text if isinstance(error, LlfastError | ValueError) else f"{type(error).__name__}: {text}"
    )

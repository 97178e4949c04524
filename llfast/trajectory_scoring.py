"""The checkpoints of one training, scored and followed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Checkpoint
from .errors import ScoringError, SpaceError, UnsupportedModelError
from .files import as_utf8
from .fleet import open_request, score_models
from .model_list import ModelRequest
from .models import MemorySource, ModelSource
from .outcomes import Outcome
from .results import LogLikelihoodMatrix, ResultKey
from .runs import result_key
from .store import Store
from .texts import TextSet
from .trajectory import Trajectory, check_options, find_steps, follow, split_step
from .weight_distances import comparable_weights, squared_weight_distances


def trajectory_of(
    requests: Sequence[ModelRequest],
    texts: TextSet,
    store: Store,
    *,
    steps: Sequence[int] | None = None,
    clip_quantile: float | None = 0.02,
    drop_share: float = 0.03,
    warm_up: int = 0,
    window: int = 10,
    compare_weights: bool = True,
    convention: str = "paper",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    report: Callable[[Outcome], None] | None = None,
    **options: Any,
) -> Trajectory:
    """Score the checkpoints of one training, except those that the store has, and follow them.

    Args:
        requests: folders, or revisions of a Hub id; of LoRA adapters, each names its base.
        texts: N texts.
        store: where results go, with `run` and `step` in their metadata.
        steps: of each of them, see `find_steps`.
        clip_quantile: as for `follow`, and so are:
        drop_share: of the texts.
        warm_up: a step.
        window: checkpoints after each start.
        compare_weights: read the weights again, for distances between them.
        convention: as for `score_models`, and so are:
        dtype: what they run in.
        device: where they run.
        trust_remote_code: let them bring code of their own.
        allow_pickle: let weights be pickles, which are not compared.
        report: is called with each outcome as it is known.
        options: the others.

    Raises:
        CheckpointError: if one cannot be found, or weights cannot be compared. As for all that can
            be known from names, headers and options, nothing is scored then.
        ScoringError: if one cannot be scored; it says why.
        Others: as `follow` and `score_models` say.
    """
    sources = {}
    for each in requests:
        source = open_request(each, trust_remote_code, allow_pickle)
        if source.name in sources:
            raise SpaceError(f"checkpoints must be different ones, got {source.name} twice")
        sources[source.name] = source
    rows = store.rows(texts.digest)
    # By their weights, too: what is in a folder called `last` is not what was there.
    known = {row.key[:2]: row.metadata for row in rows if "step" in row.metadata}
    metadata = [
        {**known.get((name, source.revision), {}), **each.metadata}
        for (name, source), each in zip(sources.items(), requests, strict=True)
    ]
    found = find_steps(list(sources), metadata, steps)
    check_options(found, len(texts), clip_quantile, drop_share, warm_up, window)
    checkpoints = _checkpoints(sources) if compare_weights else {}
    run = _run([each.model for each in requests])
    numbered = [
        replace(each, metadata={**run, **each.metadata, "step": step})
        for each, step in zip(requests, found, strict=True)
    ]
    outcomes = score_models(
        numbered,
        texts,
        store,
        convention=convention,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        report=report,
        together=True,
        **options,
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        raise ScoringError(
            f"all {len(outcomes)} checkpoints must be scored, got {len(failed)} failures, the "
            f"first of {failed[0].request.name or failed[0].request.model}: {failed[0].error}"
        )
    keys = [
        result_key(source, texts, convention=convention, dtype=each.dtype or dtype, device=device)
        for each, source in zip(requests, sources.values(), strict=True)
    ]
    _note(store, {key: each.metadata for key, each in zip(keys, numbered, strict=True)})
    matrix = _matrix(store, keys)
    step_of = dict(zip(sources, found, strict=True))
    found = [step_of[name] for name in matrix.models]
    distances = None
    if checkpoints:
        distances = squared_weight_distances(
            [checkpoints[name] for name in matrix.models], _windows(found, window)
        )
    return follow(
        matrix,
        found,
        clip_quantile=clip_quantile,
        drop_share=drop_share,
        warm_up=warm_up,
        window=window,
        weight_distances=distances,
    )


def _checkpoints(sources: Mapping[str, ModelSource]) -> dict[str, Checkpoint]:
    """The checkpoints by name, once it is known that their weights can be compared."""
    found = {}
    for name, source in sources.items():
        if isinstance(source, MemorySource) or source.adapter is not None:
            raise UnsupportedModelError(
                f"{name} must be a whole checkpoint for distances between weights, got an adapter; "
                "leave these distances out (--no-weights)"
            )
        found[name] = source.checkpoint
    comparable_weights(list(found.values()))
    return found


def _matrix(store: Store, keys: Sequence[ResultKey]) -> LogLikelihoodMatrix:
    """The matrix of just these results: each of a checkpoint in the dtype that it runs in."""
    by_dtype: dict[str, list[str]] = {}
    for key in keys:
        by_dtype.setdefault(key.dtype, []).append(f"{key.model}@{key.revision}")
    digest, convention = keys[0].textset_digest, keys[0].convention
    parts = [
        store.matrix(digest, convention, dtype, models=models, duplicates="newest")
        for dtype, models in sorted(by_dtype.items())
    ]
    joined: dict[str, Any] = {
        name: [each for part in parts for each in getattr(part, name)]
        for name in ("models", "metadata", "dtypes", "revisions")
    }
    return replace(parts[0], values=np.concatenate([part.values for part in parts]), **joined)


def _note(store: Store, wanted: Mapping[ResultKey, Mapping[str, Any]]) -> None:
    """Add the step, and the run if none is named, to results that were in the store already.

    Others than this command score checkpoints, too, and a step may have been given wrong.
    """
    for row in store.rows(next(iter(wanted)).textset_digest):
        if row.error is None and row.key in wanted:
            told = wanted[row.key]
            metadata = {**told, **row.metadata, "step": told["step"]}
            if metadata != row.metadata:
                store.add(replace(store.load(row), metadata=metadata))


def _run(models: Sequence[str]) -> dict[str, str]:
    """The metadata that says what they are checkpoints of.

    That is a Hub id, or the folder of folders, with what stands before the step in all their names:
    the checkpoints of several runs may lie side by side.
    """
    if len(set(models)) == 1:
        return {"run": models[0]}
    if not all(Path(each).is_dir() for each in models):
        return {}
    paths = [Path(as_utf8(os.path.normpath(Path(each).absolute()))) for each in models]
    found = [split_step(path.name) for path in paths]
    runs = {
        path.parent / (path.name if each is None else each[0])
        for path, each in zip(paths, found, strict=True)
    }
    return {"run": str(runs.pop()) if len(runs) == 1 else os.path.commonpath(paths)}


def _windows(steps: Sequence[int], window: int) -> list[tuple[int, int]]:
    """Pairs of rows whose distances an exponent is fitted to."""
    order = np.argsort(steps).tolist()
    return [
        (row, other)
        for place, row in enumerate(order)
        for other in order[place + 1 : place + 1 + window]
    ]

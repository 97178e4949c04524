"""From a store on disk to a space, and from a model's name to its nearest relatives."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import SearchError
from .models import open_model
from .results import LogLikelihoodMatrix, LogLikelihoods
from .scoring import score
from .search import Hit, KLIndex
from .space import ModelSpace
from .store import Store
from .texts import TextSet


def load_space(
    store: str | os.PathLike[str],
    *,
    textset: str | None = None,
    convention: str | None = None,
    dtype: str | None = None,
    newest: bool = False,
) -> ModelSpace:
    """Fit a space to a store's models; the arguments choose among them as in `Store.matrix`."""
    return ModelSpace.fit(_matrix(store, textset, convention, dtype, newest))


def find_nearest(
    model: str,
    store: str | os.PathLike[str],
    *,
    k: int = 10,
    radius: float | None = None,
    texts: str | os.PathLike[str] | None = None,
    textset: str | None = None,
    convention: str | None = None,
    dtype: str | None = None,
    newest: bool = False,
    unit: str = "bits_per_byte",
) -> tuple[str, list[Hit]]:
    """The nearest models of a store to one that is in it, or that can be scored.

    Args:
        model: a name of the store; or the folder or Hub id of a model, which counts as the stored
            one if its weights are the same, and is scored on `texts` otherwise.
        store: the folder of results.
        k: how many relatives.
        radius: instead of `k`, all models within this KL (in `unit`).
        texts: the text set that the store's models were scored on, for a model it lacks.
        textset: the start of a text set's digest, for a store with several.
        convention: only results under this convention.
        dtype: only models that ran in it.
        newest: of several rows of one model, take the newest.
        unit: "bits_per_byte" or "nats_per_text".

    Returns: the query's name, and the hits, nearest first.

    Raises:
        SearchError: if the model is not in the store and there are no texts to score it on.
        StoreError: if the store does not have what is asked for.
    """
    matrix = _matrix(store, textset, convention, dtype, newest)
    space = ModelSpace.fit(matrix)
    index = KLIndex.build(space)
    stored = _stored_name(model, matrix)
    query: str | LogLikelihoods
    if stored is not None:
        query = stored
    elif texts is None:
        raise SearchError(
            f"model must be in the store, got {model!r}; to score it first, give the text set "
            "with --texts"
        )
    else:
        text_set = TextSet.load(texts)
        query = score(model, text_set, convention=matrix.convention, dtype=dtype or "auto")
    hits = (
        index.search(query, k, unit=unit)
        if radius is None
        else index.range_search(query, radius, unit=unit)
    )
    return query if isinstance(query, str) else query.model, hits


def _matrix(
    store: str | os.PathLike[str],
    textset: str | None,
    convention: str | None,
    dtype: str | None,
    newest: bool,
) -> LogLikelihoodMatrix:
    duplicates = "newest" if newest else "error"
    return Store(store).matrix(textset, convention, dtype, duplicates=duplicates)


def _stored_name(model: str, matrix: LogLikelihoodMatrix) -> str | None:
    if model in matrix.models:
        return model
    if not Path(model).is_dir():
        return None
    normal = os.path.normpath(model)
    if normal in matrix.models:
        return normal
    revision = open_model(model).revision
    return next(
        (
            name
            for name, own in zip(matrix.models, matrix.revisions, strict=True)
            if own == revision
        ),
        None,
    )

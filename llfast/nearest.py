"""From a store on disk to a space, and from a model's name to its nearest relatives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from .errors import SearchError
from .models import open_model
from .results import KLEstimate, LogLikelihoodMatrix, LogLikelihoods
from .scoring import score
from .search import Hit, KLIndex
from .space import ModelSpace
from .store import Store
from .texts import TextSet


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
        SearchError: if the model is not in the store and there are no texts to score it on, or
            others than the store's.
        StoreError: if the store does not have what is asked for.
    """
    matrix = _matrix(store, textset, convention, dtype, newest)
    query: str | LogLikelihoods | None = _stored_name(model, matrix)
    if query is None:
        if texts is None:
            raise SearchError(
                f"{_unknown(model, matrix.models)} To score it first, give the text set with "
                "--texts"
            )
        text_set = TextSet.load(texts)
        if text_set.digest != matrix.textset_digest:
            raise SearchError(
                f"{os.fspath(texts)} must be the texts that the store's models were scored on "
                f"({matrix.textset_digest[:12]}), got others ({text_set.digest[:12]})"
            )
        query = score(model, text_set, convention=matrix.convention, dtype=dtype or "auto")
    index = KLIndex.build(ModelSpace.fit(matrix))
    hits = (
        index.search(query, k, unit=unit)
        if radius is None
        else index.range_search(query, radius, unit=unit)
    )
    return query if isinstance(query, str) else query.model, hits


def find_kl(
    a: str,
    b: str,
    store: str | os.PathLike[str],
    *,
    textset: str | None = None,
    convention: str | None = None,
    dtype: str | None = None,
    newest: bool = False,
    unit: str = "bits_per_byte",
) -> tuple[str, str, KLEstimate]:
    """The KL divergence between two models of a store; arguments as for `find_nearest`.

    Returns: the names that the store has for the two, and the estimate.

    Raises:
        SearchError: if one of them is not in the store.
        StoreError: if the store does not have what is asked for.
    """
    matrix = _matrix(store, textset, convention, dtype, newest)
    names = []
    for model in (a, b):
        name = _stored_name(model, matrix)
        if name is None:
            raise SearchError(_unknown(model, matrix.models))
        names.append(name)
    return names[0], names[1], ModelSpace.fit(matrix).kl(names[0], names[1], unit=unit)


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


def _unknown(model: str, names: Sequence[str]) -> str:
    """Says that there is no such model, and which ones might be meant."""
    by_end = [name for name in names if Path(name).name == Path(model).name]
    close = by_end or get_close_matches(model, names, n=3)
    if close:
        hint = f"did you mean {' or '.join(close[:3])}?"
    else:
        others = len(names) - 5
        hint = f"it has {', '.join(names[:5])}" + (f" and {others} more." if others > 0 else ".")
    return f"model must be in the store, got {model!r}; {hint}"

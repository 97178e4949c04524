"""From a store on disk to a space, and from a model's name to its nearest relatives."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .batches import CONVENTIONS
from .checkpoint import is_adapter
from .errors import SearchError
from .models import open_model
from .results import KLEstimate, LogLikelihoodMatrix, LogLikelihoods
from .scoring import score
from .search import Hits, KLIndex, Selection, StoredIndex, check_mode
from .space import ModelSpace
from .store import Store
from .texts import TextSet

_MOST_IN_MEMORY = 1 << 29  # of log-likelihoods: 6,700 models of 10,000 texts, fitted in 3 s


def find_nearest(
    model: str,
    store: str | os.PathLike[str],
    *,
    k: int = 10,
    radius: float | None = None,
    where: str | None = None,
    mode: str = "auto",
    texts: str | os.PathLike[str] | None = None,
    textset: str | None = None,
    convention: str | None = None,
    dtype: str | None = None,
    newest: bool = False,
    unit: str = "bits_per_byte",
) -> tuple[str, Hits]:
    """The nearest models of a store to one that is in it, or that can be scored.

    Args:
        model: a name of the store; or the folder of a model, which counts as the stored one if its
            weights are the same; or a Hub id. What is not stored is scored on `texts`.
        store: the folder of results, or s3://bucket/prefix.
        k: how many relatives.
        radius: instead of `k`, all models within this KL (in `unit`).
        where: only models of which this SQL condition holds, see `KLIndex.search`.
        mode: how to search, see `KLIndex.build`.
        texts: the text set that the store's models were scored on, for a model it lacks; of
            several it says which one, as `textset` does.
        textset: the start of a text set's digest, for a store with several.
        convention: only results under this convention.
        dtype: only models that ran in it.
        newest: of several rows of one model, take the newest.
        unit: "bits_per_byte" or "nats_per_text".

    Returns: the query's name, and the hits, nearest first.

    Raises:
        ValueError: if there is no such mode.
        SearchError: if the model is not in the store and there are no texts to score it on, or
            others than the store's.
        StoreError: if the store does not have what is asked for.
    """
    check_mode(mode)
    opened = Store(store)
    text_set = None if texts is None else TextSet.load(texts)
    if textset is None and text_set is not None and text_set.digest in opened.textsets():
        textset = text_set.digest
    selection = Selection(
        textset=opened.find_textset(textset), convention=convention, dtype=dtype, newest=newest
    )
    source, created = _open(opened, selection, mode)
    names, find_revision = _names(source)
    texts_of = source.basis if isinstance(source, StoredIndex) else source
    digest, convention = texts_of.textset_digest, texts_of.convention
    if text_set is not None and text_set.digest != digest:
        raise SearchError(
            f"{texts} must be the texts that the store's models were scored on "
            f"({digest[:12]}), got others ({text_set.digest[:12]})"
        )
    query: str | LogLikelihoods | None = _stored_name(model, names, find_revision)
    if query is None:
        if convention not in CONVENTIONS:  # that of an imported matrix, or of token ids
            raise SearchError(
                f"{_unknown(model, names)} It cannot be scored as these are, under {convention!r}; "
                f"import them under their own convention ({', '.join(CONVENTIONS)}) if it is known"
            )
        if is_adapter(Path(model)):  # it could not be told here what it belongs to
            raise SearchError(
                f"{_unknown(model, names)} Score an adapter first, with `llfast score "
                "--adapter-base`"
            )
        if text_set is None:
            raise SearchError(
                f"{_unknown(model, names)} To score it first, give the text set with --texts"
            )
    if isinstance(source, StoredIndex):
        index: KLIndex = source
    else:  # for one question, reading all takes less than finding bounds, or asking a GPU
        mode = "exact" if mode == "auto" else mode
        index = KLIndex.of_space(ModelSpace.fit(source), mode, device="cpu", created=created)
    del source, texts_of  # a model may need the memory of numbers that are in the index now

    def ask(query: str | LogLikelihoods) -> Hits:
        if radius is None:
            return index.search(query, k, unit=unit, where=where)
        return index.range_search(query, radius, unit=unit, where=where)

    if query is None:
        for known in names[:1]:  # so that a wrong unit or condition is told before a model runs
            ask(known)
        assert text_set is not None
        query = score(model, text_set, convention=convention, dtype=dtype or "auto")
    return query if isinstance(query, str) else query.model, ask(query)


def build_index(
    store: str | os.PathLike[str],
    mode: str = "auto",
    *,
    textset: str | None = None,
    convention: str | None = None,
    dtype: str | None = None,
    newest: bool = False,
    refit: bool = False,
) -> dict[str, Any]:
    """Bring the index of a store up to date, see `KLIndex.build`.

    Returns: facts about it.
    """
    check_mode(mode)
    start = time.perf_counter()
    opened = Store(store)
    selection = Selection(
        textset=opened.find_textset(textset), convention=convention, dtype=dtype, newest=newest
    )
    index = StoredIndex.open(opened, selection, mode=mode, refit=refit)
    index.merge()
    return index.summary() | {"seconds": round(time.perf_counter() - start, 3)}


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
    """The KL divergence between two models of a store, as `find_nearest` tells it.

    Arguments are as for that.

    Returns: the names that the store has for the two, and the estimate.

    Raises:
        SearchError: if one of them is not in the store.
        StoreError: if the store does not have what is asked for.
    """
    opened = Store(store)
    selection = Selection(
        textset=opened.find_textset(textset), convention=convention, dtype=dtype, newest=newest
    )
    source, _ = _open(opened, selection, "auto")
    names, find_revision = _names(source)
    pair = []
    for model in (a, b):
        name = _stored_name(model, names, find_revision)
        if name is None:
            raise SearchError(_unknown(model, names))
        pair.append(name)
    space = source if isinstance(source, StoredIndex) else ModelSpace.fit(source)
    return pair[0], pair[1], space.kl(pair[0], pair[1], unit=unit)


def _open(
    store: Store, selection: Selection, mode: str
) -> tuple[StoredIndex | LogLikelihoodMatrix, dict[str, datetime]]:
    """The index of a store if there is one or its models are many; else its rows and dates."""
    if StoredIndex.is_built(store, selection):  # reading all rows takes longer than opening it
        return StoredIndex.open(store, selection, mode=mode), {}
    digest = selection.textset
    rows = [row for row in store.rows(digest) if row.key.layer is None and row.error is None]
    if 8 * len(rows) * len(store.texts(digest)["ids"]) > _MOST_IN_MEMORY:
        return StoredIndex.open(store, selection, mode=mode), {}
    duplicates = "newest" if selection.newest else "error"
    matrix = store.matrix(digest, selection.convention, selection.dtype, duplicates=duplicates)
    wanted = {*zip(matrix.models, matrix.revisions, matrix.dtypes, strict=True)}
    return matrix, {
        row.key.model: row.created
        for row in rows
        if row.key.convention == matrix.convention
        and (row.key.model, row.key.revision, row.key.dtype) in wanted
    }


def _names(
    source: StoredIndex | LogLikelihoodMatrix,
) -> tuple[Sequence[str], Callable[[str], str | None]]:
    """The names of all models, and what finds the first of them by its revision."""
    if isinstance(source, StoredIndex):
        return source.names, source.find_revision
    names = zip(reversed(source.revisions), reversed(source.models), strict=True)
    return source.models, dict(names).get


def _stored_name(
    model: str, names: Sequence[str], find_revision: Callable[[str], str | None]
) -> str | None:
    if model in names:
        return model
    if not Path(model).is_dir():
        return None
    normal = os.path.normpath(model)
    if normal in names or is_adapter(Path(model)):
        return normal if normal in names else None
    return find_revision(open_model(model).revision)


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

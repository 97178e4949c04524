"""How the index of a store is built: which rows, in which basis, in one step for all readers."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from llfast import cache
from llfast.basis import Basis
from llfast.errors import LlfastWarning, SearchError
from llfast.files import atomic_write
from llfast.remote import RemotePath
from llfast.results import LogLikelihoodMatrix, ResultKey
from llfast.rows import StoredRow, changes, matrix_metadata, one_row_a_model
from llfast.store import Store

from .contents import choose_mode
from .flat import refuse_large_rows
from .models import IndexedModel
from .projection import Projection, draw_sample
from .segment import Segment
from .writer import SegmentWriter, relabelled

_CURRENT, _LOCK = "current", "lock"
_FORMAT = "2"  # raised when segments change their meaning
_TRIES = 20  # to read what is just being replaced


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows of a store are indexed, as `Store.matrix` chooses them.

    Attributes:
        textset: the text set's whole digest.
        convention: which tokens were scored; None for the store's own choice.
        dtype: only models that ran in it; None for all.
        newest: of several rows of one name take the newest; otherwise they are an error.
    """

    textset: str
    convention: str | None = None
    dtype: str | None = None
    newest: bool = False

    @property
    def digest(self) -> str:
        """A folder's name."""
        parts = [_FORMAT, self.textset, self.convention, self.dtype, self.newest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def build(
    store: Store, selection: Selection, folder: Path, mode: str, basis: Basis | None = None
) -> Segment:
    """A segment of what a store has, in a basis of its own unless one is given.

    Call it as the only builder. Memory: the sample that the basis is fitted to, a block of rows,
    and what the index itself will hold.

    Raises:
        StoreError: if there is nothing to choose, or a model twice.
        OSError: if it cannot be written.
    """
    shards = store.shards(selection.textset)
    known = changes({}, store.read_shards(selection.textset, sorted(shards)))
    convention, chosen = choose(known.new, selection, selection.convention)
    if not chosen:
        raise SearchError(f"{store.folder} must hold complete results to be indexed, got none")
    texts = store.texts(selection.textset)
    n = len(texts["ids"])
    some = [chosen[row] for row in draw_sample(len(chosen), n)]
    values = np.empty((len(some), n))
    for numbers, block in store.scan(some):
        values[numbers] = block
    sample = LogLikelihoodMatrix(
        [row.label for row in some],
        values,
        np.array(texts["text_bytes"], dtype=np.float64),
        ids=texts["ids"],
        groups=texts["groups"],
        textset_digest=selection.textset,
        convention=convention,
    )
    basis = with_groups(basis, store) if basis else Basis.fit(sample)
    placed = basis.place(values)
    refuse_large_rows(placed, sample.models)
    projection = None
    if choose_mode(mode, 4 * len(chosen) * n) != "exact":
        projection = Projection.fit(placed)
    del values, sample, placed

    def found() -> Iterator[tuple[list[IndexedModel], np.ndarray]]:
        for numbers, block in store.scan(chosen):
            yield [indexed(chosen[number]) for number in numbers], basis.place(block)

    facts = facts_of(shards, known.removed, len(chosen))
    folder.mkdir(parents=True, exist_ok=True)  # it may have been removed since
    return write(folder, basis, projection, found(), facts)


def with_groups(basis: Basis, store: Store) -> Basis:
    """The basis with its texts' documents, which a later result may be the first to know.

    Intervals depend on them, coordinates do not.
    """
    if basis.groups is None and (groups := store.texts(basis.textset_digest)["groups"]):
        return replace(basis, groups=tuple(groups))
    return basis


def directions(
    segment: Segment, count: int, point: Callable[[int], np.ndarray]
) -> tuple[Projection | None, int]:
    """The directions of a segment, or better ones where there are far more models than it had.

    Args:
        segment: whose basis points are in.
        count: how many models there are.
        point: coordinates (N,) of one of them, by number.

    Returns: and how many models there were when they were found; None for few models.
    """
    old, fitted, n = segment.projection, segment.facts["fitted"], len(segment.basis)
    if old is None and choose_mode("auto", 4 * count * n) == "exact":
        return None, count
    if old is not None and count < 2 * fitted:
        return old, fitted
    return Projection.fit(np.array([point(row) for row in draw_sample(count, n).tolist()])), count


def write(
    folder: Path,
    basis: Basis,
    projection: Projection | None,
    found: Iterable[tuple[Sequence[IndexedModel], np.ndarray]],
    facts: Mapping[str, Any],
) -> Segment:
    """A new segment in the place of the current one; call it as the only builder."""

    def fill(temporary: Path) -> str:
        with SegmentWriter(temporary, basis, projection) as writer:
            for models, points in found:
                writer.append(models, points)
            return writer.finish({**facts, "selection": folder.name})

    return _replace(folder, fill)


def relabel(
    folder: Path, segment: Segment, models: Sequence[IndexedModel], facts: Mapping[str, Any]
) -> Segment:
    """The same points with other facts, in the place of the current segment, without a copy."""
    facts = {**segment.facts, **facts, "selection": folder.name}
    return _replace(folder, lambda temporary: relabelled(segment, temporary, models, facts))


def _replace(folder: Path, fill: Callable[[Path], str]) -> Segment:
    token = secrets.token_hex(8)
    temporary = folder / f".{token}.tmp"
    try:
        digest = fill(temporary)
        whole = folder / digest
        if whole.exists() and not _is_whole(whole):
            whole.rename(folder / f".{token}.old")
        if not whole.exists():  # else it has been the same before: it stays, at every moment
            temporary.rename(whole)
        with atomic_write(folder / _CURRENT) as file:
            file.write(digest.encode())
    finally:
        _clean(folder)
    return Segment(whole)


def _is_whole(folder: Path) -> bool:
    try:
        Segment(folder).verify()
    except (OSError, SearchError):
        return False
    return True


def _clean(folder: Path) -> None:
    """Remove what other builders have left behind, some of them killed."""
    with contextlib.suppress(OSError):
        for other in folder.iterdir():
            if other.name in (_LOCK, _CURRENT, current(folder)):
                continue
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink()


def facts_of(
    shards: Mapping[str, int], removed: Mapping[ResultKey, datetime], fitted: int
) -> dict[str, Any]:
    """What of the store a segment has: which shards, and the removals in them.

    Args:
        shards: as `Store.shards` gives them.
        removed: when each key was removed last.
        fitted: how many models there were when its directions were found.
    """
    when = [[list(key), each.isoformat()] for key, each in removed.items()]
    return {"shards": dict(shards), "removed": when, "fitted": fitted}


@contextlib.contextmanager
def only_builder(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only builder of a folder: others wait, or get a BlockingIOError. A kill ends it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def find_or_warn(folder: Path) -> Segment | None:
    """The current segment, if it is whole; a damaged one is warned of."""
    try:
        return find(folder)
    except SearchError as error:
        warnings.warn(f"an index is built again: {error}", LlfastWarning, stacklevel=5)
        return None


def find(folder: Path) -> Segment | None:
    """The current segment, if there is one; raises SearchError if it is damaged."""
    for _ in range(_TRIES):
        name = current(folder)
        if name is None:
            if (folder / _CURRENT).exists():
                raise SearchError(f"{folder / _CURRENT} must name an index, got something else")
            return None
        try:
            segment = Segment(folder / name)
            len(segment.table)  # read now, so that it is found out if it is damaged
        except FileNotFoundError as error:
            if name == current(folder):
                raise SearchError(f"{error.filename} must be there, got no such file") from None
            continue  # a builder has put another one in its place
        if segment.facts.get("selection") != folder.name:
            raise SearchError(f"{segment.folder} must be an index of this selection, got another")
        return segment
    return None


def serves(segment: Segment, mode: str) -> bool:
    """Whether a segment has what a mode needs."""
    return mode in ("auto", "exact") or segment.projection is not None


def current(folder: Path) -> str | None:
    """The name of the segment that counts, if any does."""
    try:
        name = (folder / _CURRENT).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return name if re.fullmatch(r"[0-9a-f]{32}", name) else None


def folder_of(store: Store, selection: Selection, folder: Path | None) -> Path:
    """Where the segments of a selection are; `folder` is for all indexes, None for the store's."""
    if folder is None:
        own = store.folder  # an index is mapped into memory: at s3:// it is kept on this machine
        if isinstance(own, RemotePath):
            folder = cache.folder() / "index" / cache.key(str(own))
        else:
            folder = own / "_index"
    return folder / selection.digest


def choose(
    rows: Iterable[StoredRow], selection: Selection, convention: str | None
) -> tuple[str, list[StoredRow]]:
    """The convention, and which of these rows are to be indexed, by name."""
    duplicates = "newest" if selection.newest else "error"
    return one_row_a_model(rows, convention, selection.dtype, None, duplicates, layers=False)


def chooses_another(store: Store, selection: Selection, segment: Segment) -> bool:
    """Whether a convention that was left to the store is by now another than a segment's."""
    if selection.convention is not None or segment.basis.convention == "paper":
        return False  # which comes first in any store
    found, chosen = choose(store.rows(selection.textset), selection, None)
    return bool(chosen) and found != segment.basis.convention


def indexed(row: StoredRow) -> IndexedModel:
    """What an index keeps of a row."""
    return IndexedModel(
        row.label,
        row.key.revision,
        row.key.dtype,
        matrix_metadata(row),
        row.key.scoring_version,
        row.created,
        row.shard.name,
    )

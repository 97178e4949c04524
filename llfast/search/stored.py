"""The index of a store, kept on disk and brought up to date with what the store has since.

    STORE/_index/<what is indexed>/current      the name of the folder that counts
    STORE/_index/<what is indexed>/<digest>/    a segment: models as they were when it was built
    in memory                                   models that came later, and which are gone

The store is the only truth: an index can always be built again. A segment is whole before `current`
names it, so that a kill at any moment leaves the old one or the new one; readers go on with theirs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np

from llfast.basis import Basis
from llfast.errors import LlfastWarning, SearchError
from llfast.files import atomic_write
from llfast.results import LogLikelihoodMatrix, LogLikelihoods, ResultKey
from llfast.rows import StoredRow, changes, one_row_a_model
from llfast.store import Store, matrix_metadata

from .index import EXACT_BYTES, KLIndex, blocks, draw_sample
from .models import IndexedModel
from .projection import Projection
from .segment import Segment, SegmentWriter

_CURRENT = "current"
_MOST_ADDED = 1 / 8  # of a segment's rows: with more, opening an index writes a new one
_FORMAT = "1"  # raised when segments change their meaning
_TRIES = 20  # to open what a builder may be replacing


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


class StoredIndex(KLIndex):
    """An index of a store's models. `KLIndex.build(store)` makes it.

    Attributes:
        store: what it is an index of.
        selection: which of its rows.
        folder: where it is kept.
    """

    def __init__(
        self, store: Store, selection: Selection, folder: Path, segment: Segment, mode: str
    ) -> None:
        super().__init__(segment.basis, mode=_mode(segment, mode))
        self.store, self.selection, self.folder = store, selection, folder
        self._refreshing = Lock()
        self._shards: Mapping[str, int]
        self._removed: Mapping[ResultKey, datetime]
        self._adopt(segment)

    @classmethod
    def open(
        cls,
        store: Store,
        selection: Selection,
        *,
        mode: str = "auto",
        folder: Path | None = None,
        refit: bool = False,
    ) -> Self:
        """The index on disk with what the store has since; built first if there is none.

        Args:
            store: whose models.
            selection: which of them.
            mode: one of `MODES`.
            folder: where indexes are kept; None for within the store.
            refit: build it again in any case, in a basis of all models that are there now.

        Raises: as `KLIndex.build` says.
        """
        folder = (folder or store.folder / "_index") / selection.digest
        segment = None if refit else _find(folder, mode)
        if segment is None:
            with _builder(folder):
                # Another builder may have been here meanwhile.
                segment = None if refit else _find(folder, mode)
                segment = segment or _build(store, selection, folder, mode)
        index = cls(store, selection, folder, segment, mode)
        index.refresh()
        if len(index._added) > len(segment) * _MOST_ADDED:
            with contextlib.suppress(OSError):  # it can be searched as it is, only slower
                index.merge()
        return index

    # ------------------------------------------------------------------ changing

    def add(self, result: LogLikelihoods) -> None:
        """Put a result into the store, durably, and have it found from now on.

        Raises:
            OSError: if it cannot be written.
            SpaceError: if it was scored on other texts or under another convention.
        """
        self._project(result)  # refuses what does not fit before the store has it
        self.store.add(result)
        self.refresh()

    def remove(self, model: str) -> None:
        """Take a model out of the store, and have it not found any more.

        Raises:
            SpaceError: if there is no such model.
        """
        with self._lock:
            self._models.row(model)  # refuses what is not there
        self.store.remove([model])
        self.refresh()

    def refresh(self) -> int:
        """Have what the store has now; returns how many models came, changed or went.

        Only shards that are new are read.

        Raises:
            StoreError: if a model is there twice now, and the newest was not asked for.
        """
        with self._refreshing:
            shards = self.store.shards(self.selection.textset)
            new, vanished = shards.keys() - self._shards.keys(), self._shards.keys() - shards.keys()
            if not new and not vanished:
                return 0
            rows = self.store.read_shards(self.selection.textset, sorted(new))
            came, gone = self._changes(rows, vanished)
            points: dict[int, np.ndarray] = {}
            for numbers, values in self.store.scan(came):
                points |= dict(zip(numbers, self.basis.place(values), strict=True))
            with self._lock:
                for name in gone:
                    self._models.remove(name)
                for number, row in enumerate(came):
                    self._append(points[number], _indexed(row))
                self._shards = shards
            return len(gone) + len(came)

    def merge(self) -> None:
        """Write a new segment of all models that are there now, in the same basis.

        Raises:
            OSError: if it cannot be written; the old one counts then.
        """
        with self._refreshing:
            with self._lock:
                shards, models = self._shards, self._models
                rows = [number for number in range(models.count) if number not in models.gone]
            if not rows:
                raise SearchError("an index must have a model, got none; build it again")
            snapshot, _ = self._snapshot([])
            found = (
                ([models[row] for row in some], np.array([snapshot.point(row) for row in some]))
                for some in (rows[block] for block in blocks(len(rows)))
            )
            with _builder(self.folder):
                segment = _write(self.folder, self.basis, self._projection, found, shards)
            self._adopt(segment)

    # ------------------------------------------------------------------ inside

    def _segment_name(self) -> str:
        return self._segment.folder.name

    def _adopt(self, segment: Segment) -> None:
        facts = segment.facts
        rows, projection = segment.rows, segment.projection
        if self.mode == "exact":
            rows, projection = replace(rows, reduced=None), None
        with self._lock:
            self._set(
                segment.models(),
                rows,
                projection,
                largest=facts["largest"],
                offset=facts["offset"],
                noise_floor=facts["noise_floor"],
            )
            self._segment = segment
            self._shards, self._removed = facts["shards"], {}

    def _changes(
        self, rows: Sequence[StoredRow], vanished: AbstractSet[str]
    ) -> tuple[list[StoredRow], list[str]]:
        """Rows that are to be added, and names that are to go without another in their place."""
        models = self._models
        there = [models[row] for row in range(models.count) if row not in models.gone]
        known = {self._key(model): model for model in there}
        found = changes(
            {key: model.created for key, model in known.items() if model.created is not None},
            rows,
            self._removed,
            homeless=[key for key, model in known.items() if model.shard in vanished],
        )
        self._removed = found.removed
        came = [row for row in found.new if self._is_selected(row)]
        gone: AbstractSet[ResultKey] = set(found.stale) - {row.key for row in came}
        other = [row for row in came if row.key not in known and models.find(row.label) is not None]
        if gone or other or len({row.label for row in came}) < len(came):
            # Which of several rows of a name counts is for all of them to say.
            came, gone = self._choose_again(known)
        return came, [known[key].name for key in gone]

    def _choose_again(
        self, known: Mapping[ResultKey, IndexedModel]
    ) -> tuple[list[StoredRow], AbstractSet[ResultKey]]:
        _, chosen = _choose(self.store, self.selection, self.basis.convention)
        wanted = {row.key: row for row in chosen}
        came = [
            row
            for key, row in wanted.items()
            if key not in known or known[key].created != row.created
        ]
        return came, known.keys() - wanted.keys()

    def _is_selected(self, row: StoredRow) -> bool:
        key, dtype = row.key, self.selection.dtype
        if key.layer is not None or key.convention != self.basis.convention:
            return False
        return dtype in (None, key.dtype)

    def _key(self, model: IndexedModel) -> ResultKey:
        return ResultKey(
            model.name,
            model.revision,
            self.selection.textset,
            self.basis.convention,
            model.dtype,
            None,
            model.scoring_version,
        )


# ------------------------------------------------------------------ building


def _build(store: Store, selection: Selection, folder: Path, mode: str) -> Segment:
    shards = store.shards(selection.textset)  # before the rows: what comes between is seen later
    convention, chosen = _choose(store, selection, selection.convention)
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
    basis = Basis.fit(sample)
    projection = None
    if mode == "certified" or (mode == "auto" and 4 * len(chosen) * n > EXACT_BYTES):
        projection = Projection.fit(basis.place(values))
    del values, sample

    def found() -> Iterator[tuple[list[IndexedModel], np.ndarray]]:
        for numbers, block in store.scan(chosen):
            yield [_indexed(chosen[number]) for number in numbers], basis.place(block)

    return _write(folder, basis, projection, found(), shards)


def _write(
    folder: Path,
    basis: Basis,
    projection: Projection | None,
    found: Iterable[tuple[Sequence[IndexedModel], np.ndarray]],
    shards: Mapping[str, int],
) -> Segment:
    """A new segment in the place of the current one; call it as the only builder."""
    token = secrets.token_hex(8)
    temporary = folder / f".{token}.tmp"
    try:
        with SegmentWriter(temporary, basis, projection) as writer:
            for models, points in found:
                writer.append(models, points)
            digest = writer.finish({"shards": dict(shards)})
        whole = folder / digest
        if whole.exists():  # damaged, or it would not be written again
            whole.rename(folder / f".{token}.old")
        temporary.rename(whole)
        with atomic_write(folder / _CURRENT) as file:
            file.write(digest.encode())
    finally:
        for other in folder.iterdir():
            if other.is_dir() and other.name != _current(folder):
                shutil.rmtree(other, ignore_errors=True)
    return Segment(whole)


@contextlib.contextmanager
def _builder(folder: Path) -> Iterator[None]:
    """One at a time, in any process; others wait. A kill ends it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find(folder: Path, mode: str) -> Segment | None:
    """The current segment, if it is whole and of use; a damaged one is warned of."""
    for _ in range(_TRIES):
        name = _current(folder)
        if name is None:
            return None
        try:
            segment = Segment(folder / name)
            len(segment.table)  # read now, so that it is found out if it is damaged
        except FileNotFoundError:
            if name == _current(folder):
                return None
            continue  # a builder has put another one in its place
        except SearchError as error:
            warnings.warn(f"an index is built again: {error}", LlfastWarning, stacklevel=5)
            return None
        return None if mode == "certified" and segment.projection is None else segment
    return None


def _current(folder: Path) -> str | None:
    try:
        name = (folder / _CURRENT).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return name if re.fullmatch(r"[0-9a-f]{32}", name) else None


def _choose(
    store: Store, selection: Selection, convention: str | None
) -> tuple[str, list[StoredRow]]:
    rows = [
        row
        for row in store.rows(selection.textset)
        if row.status == "complete" and row.key.layer is None
    ]
    duplicates = "newest" if selection.newest else "error"
    return one_row_a_model(rows, convention, selection.dtype, None, duplicates)


def _indexed(row: StoredRow) -> IndexedModel:
    return IndexedModel(
        row.label,
        row.key.revision,
        row.key.dtype,
        matrix_metadata(row),
        row.key.scoring_version,
        row.created,
        row.shard.name,
    )


def _mode(segment: Segment, mode: str) -> str:
    if mode == "auto":
        return "exact" if segment.projection is None else "certified"
    return mode

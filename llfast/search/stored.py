"""The index of a store, kept on disk and brought up to date with what the store has since.

    STORE/_index/<what is indexed>/current      the name of the folder that counts
    STORE/_index/<what is indexed>/<digest>/    a segment: models as they were when it was built
    in memory                                   models that came later, and which are gone

The store is the only truth: an index can always be built again. A segment is whole before `current`
names it, so that a kill at any moment leaves the old one or the new one; readers go on with theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np

from llfast.errors import SearchError, StoreError
from llfast.results import LogLikelihoods, ResultKey
from llfast.rows import StoredRow, changes
from llfast.store import Store

from .building import (
    Selection,
    build,
    choose,
    chooses_another,
    current,
    directions,
    facts_of,
    find,
    find_or_warn,
    folder_of,
    indexed,
    only_builder,
    relabel,
    serves,
    with_groups,
    write,
)
from .contents import Contents, blocks
from .flat import refuse_large_rows
from .index import KLIndex
from .known import Known
from .models import IndexedModel, Models
from .segment import Segment

# What a search sees, and what is known of it.
_STATE = "basis _contents _added _segment _shards _removed _known".split()
_MOST_ADDED = 1 / 8  # of a segment's rows: with more, opening an index writes a new one


class StoredIndex(KLIndex):
    """An index of a store's models. `KLIndex.build(store)` makes it.

    Attributes:
        store: what it is an index of.
        selection: which of its rows.
        folder: where it is kept.
    """

    def __init__(
        self,
        store: Store,
        selection: Selection,
        folder: Path,
        segment: Segment,
        mode: str,
        device: str,
    ) -> None:
        super().__init__(segment.basis, mode=_mode(segment, mode), device=device)
        self.store, self.selection, self.folder = store, selection, folder
        self._refreshing = Lock()
        self._shards: Mapping[str, int]
        self._removed: Mapping[ResultKey, datetime]
        self._known: Known | None
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
        device: str = "cpu",
    ) -> Self:
        """The index on disk with what the store has since; built first if there is none.

        Args:
            store: whose models.
            selection: which of them.
            mode: one of `MODES`.
            folder: where indexes are kept; None for within the store.
            refit: build it again in any case, in a basis of all models that are there now.
            device: one of `DEVICES`.

        Raises: as `KLIndex.build` says.
        """
        folder = folder_of(store, selection, folder)
        segment = None
        if not refit:
            with contextlib.suppress(SearchError):
                segment = find(folder)
            refit = segment is not None and chooses_another(store, selection, segment)
        if segment is None or refit or not serves(segment, mode):
            with only_builder(folder):
                # Another builder may have been here meanwhile.
                segment = None if refit else find_or_warn(folder)
                if segment is None or not serves(segment, mode):
                    basis = None if segment is None else segment.basis
                    segment = store.retry(partial(build, store, selection, folder, mode, basis))
        index = cls(store, selection, folder, segment, mode, device)
        index.refresh()
        is_moved = bool(segment.facts["shards"].keys() - index._shards.keys())  # by a compaction
        if len(index) and (is_moved or len(index._added) > len(segment) * _MOST_ADDED):
            with contextlib.suppress(OSError):  # it can be searched as it is, only slower
                index._merge(wait=False)
        return index

    @staticmethod
    def is_built(store: Store, selection: Selection) -> bool:
        """Whether a store has an index of these rows in its own place, whole or not."""
        with contextlib.suppress(FileNotFoundError):  # of a machine without a cache
            return current(folder_of(store, selection, None)) is not None
        return False

    @property
    def segment(self) -> Segment:
        """What is on disk of it; what came later is in memory."""
        return self._segment

    # ------------------------------------------------------------------ changing

    def add(self, result: LogLikelihoods) -> None:
        """Put a result into the store, durably, and into the index, which has no layers.

        Raises:
            OSError: if it cannot be written.
            SpaceError: if it was scored on other texts or under another convention.
            SearchError: if it is too large for fp32.
            StoreError: if the model is there with another revision or dtype, and the newest was
                not asked for.
        """
        # What does not fit is refused before the store has it.
        basis = self.basis.digest  # before the point: a merge may change it at any time
        point = self._project(result)
        self._refuse_second(result)
        shard = self.store.add(result)
        self._refresh({shard: point}, basis)

    def remove(self, model: str) -> None:
        """Remove a model, with its layers, from the store, and from the index.

        Raises:
            SpaceError: if there is no such model.
        """
        with self._lock:
            self._models.row(model)  # refuses what is not there
        self.store.remove([model])
        self.refresh()

    def refresh(self) -> int:
        """Catch up with the store; returns how many models came, changed or went.

        Only shards that are new are read.

        Raises:
            StoreError: if a model is there twice now, and the newest was not asked for.
        """
        return self._refresh({})

    def merge(self) -> None:
        """Write a new segment of all models that are there now, in the same basis, if others came.

        Directions are found again once there are twice as many models as they were found for.
        Where another process has put another segment in the place of this index's, that is used.

        Raises:
            OSError: if it cannot be written; the old one counts then.
            StoreError: as `refresh` says.
        """
        self._merge(wait=True)

    def _merge(self, *, wait: bool) -> None:
        """As `merge`; BlockingIOError if another one builds, unless it is to be waited for."""
        with self._refreshing, only_builder(self.folder, wait=wait):
            if (newer := self._newer()) is not None:
                self._take_over(newer)
            with self._lock:
                shards, models = self._shards, self._models
                rows = [number for number in range(models.count) if number not in models.gone]
            is_same = self.basis is self._segment.basis  # the texts' documents may be known since
            if is_same and len(rows) == len(self._segment) == models.count:
                if shards == self._segment.facts["shards"]:
                    return
                if current(self.folder) == self._segment.folder.name:
                    self._adopt(self._relabelled())
                    return
            if not rows:
                raise SearchError("an index must have a model, got none; build it again")
            snapshot, _ = self._snapshot([])
            projection, fitted = directions(
                self._segment, len(rows), lambda place: snapshot.point(rows[place])
            )
            found = (
                (self._at_home(models, some), np.array([snapshot.point(row) for row in some]))
                for some in (rows[block] for block in blocks(len(rows)))
            )
            facts = facts_of(shards, self._removed, fitted)
            self._adopt(write(self.folder, self.basis, projection, found, facts))

    def summary(self) -> dict[str, Any]:
        """What people are told of it; memory is without the points, which are mapped."""
        rows, projection, lists = self._segment.rows, self._contents.projection, self._segment.lists
        arrays = [] if rows.reduced is None else [rows.reduced.first, rows.reduced.rest]
        arrays += [] if projection is None else [projection.directions]
        listed = self._contents.rows.listed
        return {
            "models": len(self),
            "texts": len(self.basis),
            "mode": self.mode,
            "directions": 0 if projection is None else len(projection.directions),
            "explained": None if projection is None else projection.explained[1],
            "lists": 0 if lists is None else len(lists.centroids),
            "approximate_recall": None if lists is None else round(lists.recall, 4),
            "memory_bytes": sum(each.nbytes for each in arrays)
            + (0 if listed is None else listed.nbytes),
            "points_bytes": rows.points.nbytes,
            "folder": str(self._segment.folder),
        }

    # ------------------------------------------------------------------ inside

    def _newer(self) -> Segment | None:
        """The segment that another builder has put in the place of this one, if it is of use."""
        if current(self.folder) == self._segment.folder.name:
            return None
        with contextlib.suppress(SearchError):
            segment = find(self.folder)
            if segment is not None and serves(segment, self.mode):
                return segment
        return None

    def _relabelled(self) -> Segment:
        """The same models, which a compaction has moved to other shards."""
        models = self._models
        found = self._at_home(models, range(models.count))
        fitted = self._segment.facts["fitted"]
        facts = facts_of(self._shards, self._removed, fitted)
        return relabel(self.folder, self._segment, found, facts)

    def _at_home(self, models: Models, rows: Iterable[int]) -> list[IndexedModel]:
        """Models, each with the shard that has it now."""
        known = self._find_known()
        return [known.at_home(models[row], self._key(models[row])) for row in rows]

    def _take_over(self, segment: Segment) -> None:
        """Search in another builder's segment, and what the store has since, from one moment on."""
        other = type(self)(
            self.store, self.selection, self.folder, segment, self.mode, self._device
        )
        other.refresh()
        with self._lock:
            for name in _STATE:
                setattr(self, name, getattr(other, name))

    def _refresh(self, placed: Mapping[str, np.ndarray], basis: str = "") -> int:
        """As `refresh`; the numbers in these shards need not be read: they hold one row each.

        Args:
            placed: points by shard.
            basis: the digest of what they are coordinates in.
        """
        with self._refreshing:
            placed = placed if basis == self.basis.digest else {}
            return self.store.retry(partial(self._refresh_once, placed))

    def _refresh_once(self, placed: Mapping[str, np.ndarray]) -> int:
        shards = self.store.shards(self.selection.textset)
        new = {name for name, _ in shards.items() - self._shards.items()}
        vanished = {name for name, _ in self._shards.items() - shards.items()}
        basis = with_groups(self.basis, self.store) if shards else self.basis
        if not new and not vanished and basis is self.basis:
            return 0
        rows = self.store.read_shards(self.selection.textset, sorted(new))
        known = self._find_known()
        came, gone = self._changes(known, rows, vanished)
        points = self._points(came, placed)
        with self._lock:
            for key in gone:
                self._models.remove(key.model)
            for row, point in zip(came, points, strict=True):
                self._append(point, indexed(row))
            self.basis, self._shards = basis, shards
            known.forget(gone)
            known.learn(came)
            known.move(rows)
        return len(gone) + len(came)

    def _adopt(self, segment: Segment) -> None:
        if hasattr(self, "_segment"):  # a GPU may have no room for the new points beside the old
            with self._lock:
                rows = replace(self._contents.rows, on_gpu=None)
                self._contents = replace(self._contents, rows=rows)
        contents = self._prepared(Contents.of_segment(segment, self.mode))
        with self._lock:
            self._set(contents)
            self.basis, self._segment = segment.basis, segment
            self._shards = segment.facts["shards"]
            removed = segment.facts["removed"]
            self._removed = {ResultKey(*key): datetime.fromisoformat(when) for key, when in removed}
            self._known = None

    def _points(
        self, rows: Sequence[StoredRow], placed: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        if len(rows) == 1 and rows[0].shard.name in placed:
            return [placed[rows[0].shard.name]]
        points: dict[int, np.ndarray] = {}
        for numbers, values in self.store.scan(rows):
            found = self.basis.place(values)
            refuse_large_rows(found, [rows[number].label for number in numbers])
            points.update(zip(numbers, found, strict=True))
        return [points[number] for number in range(len(rows))]

    def _find_known(self) -> Known:
        """Made when it is first needed: 0.3 s for 100,000 models."""
        if self._known is None:
            self._known = Known(self.selection, self._segment)
        return self._known

    def _changes(
        self, known: Known, rows: Sequence[StoredRow], vanished: AbstractSet[str]
    ) -> tuple[list[StoredRow], AbstractSet[ResultKey]]:
        """Rows that are to be added, and keys that are to go without another in their place."""
        found = changes(known.created, rows, self._removed, homeless=known.within(vanished))
        self._removed = found.removed
        came = [row for row in found.new if self._is_selected(row)]
        gone: AbstractSet[ResultKey] = set(found.stale) - {row.key for row in came}
        other = any(
            row.key not in known.created and self._models.find(row.label) is not None
            for row in came
        )
        if gone or other or len({row.label for row in came}) < len(came):
            # Which of several rows of a name counts is for all of them to say.
            there = self.store.rows(self.selection.textset)
            _, chosen = choose(there, self.selection, self.basis.convention)
            came = [row for row in chosen if known.created.get(row.key) != row.created]
            gone = known.created.keys() - {row.key for row in chosen}
        return came, gone

    def _is_selected(self, row: StoredRow) -> bool:
        key, dtype = row.key, self.selection.dtype
        if key.layer is not None or key.convention != self.basis.convention:
            return False
        return dtype in (None, key.dtype)

    def _refuse_second(self, result: LogLikelihoods) -> None:
        with self._lock:
            row = self._models.find(result.key.label)
            known = None if row is None else self._key(self._models[row])
        if known in (None, result.key) or self.selection.newest:
            return
        if self.selection.dtype in (None, result.dtype):
            raise StoreError(
                f"{result.model!r} must have one row, got another revision, dtype or version; "
                "remove the one that is there, or build the index with newest=True"
            )

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


def _mode(segment: Segment, mode: str) -> str:
    if mode == "auto":
        return "exact" if segment.projection is None else "certified"
    return mode

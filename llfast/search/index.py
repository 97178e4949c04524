"""An index of models: who is nearest to a model, by KL divergence, exactly.

query ─▶ its point ─▶ rows that can be near (certified.py) ─▶ KL in fp64 ─▶ hits, by KL and name
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from operator import index
from pathlib import Path
from threading import Lock
from typing import overload

import numpy as np
from jaxtyping import Float64

from llfast.basis import Basis
from llfast.intervals import half_variances
from llfast.results import KLEstimate, LogLikelihoods
from llfast.rows import matrix_metadata
from llfast.space import ModelSpace
from llfast.store import Store

from .added import Added
from .certified import first_look, nearest, within
from .contents import Contents, choose_mode
from .flat import import_faiss, norms_of, refuse_overflow
from .hits import Hits
from .models import IndexedModel, Models
from .segment import Segment
from .snapshot import Snapshot

DEVICES = ("auto", "cpu")
MODES = ("auto", "exact", "certified", "approximate")
_ROUNDED = float(np.finfo(np.float32).eps)  # how far fp32 moves a mean, of the norm, at most
_QUERIES = 32  # whose bounds are found at once


class KLIndex:
    """Nearest models, exactly unless asked otherwise.

    Searches do not change it, `add` and `remove` do.

    Attributes:
        basis: what its points are coordinates in.
        mode: "exact" (all rows are read, by a CPU or a GPU), "certified" (lower bounds rule most
            out; the answer is the same), or "approximate" (most rows are not looked at).
    """

    def __init__(self, basis: Basis, *, mode: str, device: str) -> None:
        """Use `build`."""
        import_faiss()
        self.basis, self.mode, self._device = basis, mode, device
        self._lock = Lock()

    def _prepared(self, contents: Contents) -> Contents:
        """With points where searches read them."""
        is_copied = self.mode == "exact" and self._device == "auto"
        return contents.on_gpu() if is_copied else contents

    def _set(self, contents: Contents) -> None:
        """Search in these from now on; call it with the lock."""
        self._contents = contents
        self._added = Added(len(self.basis), contents.projection)

    @property
    def _models(self) -> Models:
        return self._contents.models

    @classmethod
    def build(
        cls,
        source: ModelSpace | Store,
        mode: str = "auto",
        *,
        textset: str | None = None,
        convention: str | None = None,
        dtype: str | None = None,
        newest: bool = False,
        folder: str | os.PathLike[str] | None = None,
        refit: bool = False,
        device: str = "auto",
    ) -> KLIndex:
        """Index all models of a space, in memory, or those of a store, on disk.

        The index of a store is read if it is there, and has what came to the store since; it is a
        `StoredIndex`. The basis is that of the models that were there when it was first built (of
        a sample, if they are more than 4,096, or than 256 MiB), and stays so until `refit`.
        Coordinates are kept in fp32. The other arguments are for stores.

        Args:
            source: coordinates of a space are referred to, not copied.
            mode: "exact", "certified", or "auto": the first for small spaces. "approximate" looks
                at the likeliest of some thousand models and more, and finds most of the nearest:
                how many was measured when it was built, see `recall`. Fewer models, radii, and
                models of which a condition holds, are searched as with "certified".
            textset: the start of a text set's digest, for a store with several.
            convention: only results under this convention.
            dtype: only models that ran in it.
            newest: of several rows of one model, take the newest.
            folder: where indexes are kept; None for within the store.
            refit: build it again, in a basis of what is there now.
            device: "auto" has mode "exact" copy points to the GPU, if there is one with room and
                faiss for it (`pip install 'llfast[gpu]'`); "cpu" does not.

        Raises:
            ValueError: if there is no such mode or device.
            MissingDependencyError: if faiss is not installed.
            SearchError: if coordinates are too large for fp32 (beyond 1e18 nats).
            StoreError: if the store does not have what is asked for, or has it twice.
            OSError: if an index cannot be written.
        """
        check_mode(mode)
        if device not in DEVICES:
            raise ValueError(f"device must be {' or '.join(DEVICES)}, got {device!r}")
        import_faiss()
        if isinstance(source, ModelSpace):
            return cls.of_space(source, mode, device=device)
        from .building import Selection
        from .stored import StoredIndex

        selection = Selection(
            textset=source.find_textset(textset),
            convention=convention,
            dtype=dtype,
            newest=newest,
        )
        where = None if folder is None else Path(folder)
        return StoredIndex.open(
            source, selection, mode=mode, folder=where, refit=refit, device=device
        )

    @classmethod
    def of_space(
        cls,
        space: ModelSpace,
        mode: str = "auto",
        *,
        device: str = "auto",
        created: Mapping[str, datetime] | None = None,
    ) -> KLIndex:
        """As `build` from a space; `created` says when a store got each model, for conditions.

        Mode and device are not checked.

        Raises: MissingDependencyError and SearchError as `build` says.
        """
        mode = choose_mode(mode, space.coordinates.nbytes // 2)
        contents = Contents.of_space(space, mode, created)
        index = KLIndex(space.basis, mode=mode, device=device)
        index._set(index._prepared(contents))
        return index

    @classmethod
    def of_segment(cls, segment: Segment, mode: str = "certified") -> KLIndex:
        """Search in a segment as it is; what is added later is kept in memory.

        Raises:
            ValueError: if there is no such mode, or bounds are asked for and it has none.
            MissingDependencyError: if faiss is not installed.
        """
        if mode not in MODES[1:]:
            raise ValueError(f"mode must be {', '.join(MODES[1:])}, got {mode!r}")
        if mode != "exact" and segment.projection is None:
            raise ValueError(f"mode must be exact for a segment without bounds, got {mode!r}")
        index = KLIndex(segment.basis, mode=mode, device="cpu")
        index._set(Contents.of_segment(segment, mode))
        return index

    def __len__(self) -> int:
        return len(self._models)

    @property
    def recall(self) -> float | None:
        """The share of the 10 nearest that an approximate search finds; None if it is exact.

        It was measured when the lists of models were made, for models held out from that.
        """
        listed = self._contents.rows.listed
        return None if listed is None else listed.lists.recall

    @property
    def names(self) -> list[str]:
        """The names of all models, sorted."""
        with self._lock:
            return [self._models.name(row) for row in self._models.there]

    def find_revision(self, revision: str) -> str | None:
        """The name of a model with these weights."""
        with self._lock:
            return self._models.find_revision(revision)

    def kl(self, a: str, b: str, unit: str = "bits_per_byte") -> KLEstimate:
        """The KL divergence between two models of the index, with its 95 % interval.

        Raises:
            ValueError: if there is no such unit.
            SpaceError: if a model is not in the index, or bytes are asked for and not known.
        """
        snapshot, rows = self._snapshot([a, b])
        one, other = (row for row in rows if row is not None)  # names have rows
        return snapshot.kl(one, other, unit)

    # ------------------------------------------------------------------ searching

    @overload
    def search(
        self,
        query: str | LogLikelihoods,
        k: int = 10,
        *,
        unit: str = "bits_per_byte",
        where: str | None = None,
    ) -> Hits: ...
    @overload
    def search(
        self,
        query: list[str] | list[LogLikelihoods],
        k: int = 10,
        *,
        unit: str = "bits_per_byte",
        where: str | None = None,
    ) -> list[Hits]: ...
    def search(
        self,
        query: str | LogLikelihoods | list[str] | list[LogLikelihoods],
        k: int = 10,
        *,
        unit: str = "bits_per_byte",
        where: str | None = None,
    ) -> Hits | list[Hits]:
        """The k nearest models, nearest first; equally near ones by name.

        Args:
            query: the name of a model in the index, which is then left out, or a result, which is
                projected (and left out if the index holds the very same under that name); or
                several of them, which share the reading of bounds.
            k: how many; all there are if there are fewer.
            unit: of the KL: "bits_per_byte" or "nats_per_text".
            where: only models of which this SQL condition holds, over model, revision, convention,
                dtype, created (if they are from a store) and the keys of their metadata:
                "family = 'llama'". DuckDB evaluates it first, so the answer is exact among them.

        Returns: hits and why they are right; for several queries, a list of them.

        Raises:
            ValueError: if k is below 1, or there is no such unit.
            TypeError: if k is not an integer, or the query neither a name nor a result.
            SpaceError: if the query is not in the index, or was scored on other texts or under
                another convention, or bytes are asked for and not known.
            SearchError: if the query is too large for fp32, or `where` is no condition.
            MissingDependencyError: if there is a condition, and no DuckDB.
        """
        k = index(k)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.basis.per_nat(unit)  # refuses a wrong unit before any work
        if not isinstance(query, (list, tuple)):
            _refuse_other_kinds([query])
            return self._search([query], k, unit, where)[0]
        _refuse_other_kinds(query)
        return self._search(query, k, unit, where)

    def range_search(
        self,
        query: str | LogLikelihoods,
        radius: float,
        *,
        unit: str = "bits_per_byte",
        where: str | None = None,
    ) -> Hits:
        """All models whose KL from the query is at most `radius`, in `unit`, nearest first.

        All of them in any mode.

        Raises: as `search` says; ValueError if `radius` is negative or NaN.
        """
        radius = float(radius)
        if not radius >= 0:
            raise ValueError(f"radius must be at least 0, got {radius}")
        factor = self.basis.per_nat(unit)
        _refuse_other_kinds([query])
        snapshot, rows = self._snapshot([query])
        # A list that is not looked at would hold most of a large radius.
        snapshot = snapshot.exactly().only(where)
        (asked,) = snapshot.ask([query], rows)
        # Widened a little over the margin: the radius has been divided by a rounded factor.
        distance = math.sqrt(radius / factor * 2 * len(self.basis) * (1 + 1e-6))
        found = within(snapshot.parts, asked.query, distance)
        inside = found.divergences * factor <= radius
        found = replace(found, rows=found.rows[inside], divergences=found.divergences[inside])
        return snapshot.hits(asked, found, unit)

    # ------------------------------------------------------------------ changing

    def add(self, result: LogLikelihoods) -> None:
        """Add a model, in the place of any of the same name; a layer is named as in a matrix.

        Raises:
            SpaceError: if it was scored on other texts or under another convention.
            SearchError: if it is too large for fp32.
        """
        metadata = matrix_metadata(result)
        model = IndexedModel(result.key.label, result.revision, result.dtype, metadata)
        point = self._project(result)
        with self._lock:
            self._append(point, model)

    def remove(self, model: str) -> None:
        """Remove a model from the index.

        Raises:
            SpaceError: if there is no such model.
        """
        with self._lock:
            self._models.row(model)  # refuses what is not there
            self._models.remove(model)

    # ------------------------------------------------------------------ inside

    def _project(self, result: LogLikelihoods) -> Float64[np.ndarray, " N"]:
        snapshot, _ = self._snapshot([])
        return snapshot.project(result)

    def _append(self, point: Float64[np.ndarray, " N"], model: IndexedModel) -> None:
        """One more row; call it with the lock."""
        norm = float(norms_of(point[None])[0])
        refuse_overflow(norm)
        self._contents = known = replace(
            self._contents,
            largest=max(self._contents.largest, norm * (1 + _ROUNDED)),
            offset=max(self._contents.offset, abs(float(point.mean())) + _ROUNDED * norm),
        )
        self._added.append(point)
        self._models.add(model)
        if same := self._models.in_another_dtype(model):
            now = self._take_snapshot()
            noise = half_variances(np.array([now.point(row) for row in same]) - point)
            floor = max(known.noise_floor, float(noise.max()))
            self._contents = replace(known, noise_floor=floor)

    def _take_snapshot(self) -> Snapshot:
        """What there is; call it with the lock."""
        return Snapshot(
            basis=self.basis,
            contents=self._contents,
            parts=[self._contents.rows] + ([self._added.rows()] if len(self._added) else []),
            allowed=self._models.allowed(),
        )

    def _snapshot(
        self, queries: Sequence[str | LogLikelihoods]
    ) -> tuple[Snapshot, list[int | None]]:
        """What a search sees, and the rows of queries that are there, perhaps, by name."""
        with self._lock:
            snapshot = self._take_snapshot()
            rows = [
                self._models.row(query)
                if isinstance(query, str)
                else self._models.find(query.key.label)
                for query in queries
            ]
        return snapshot, rows

    def _search(
        self, queries: Sequence[str | LogLikelihoods], k: int, unit: str, where: str | None
    ) -> list[Hits]:
        snapshot, rows = self._snapshot(queries)
        snapshot = snapshot.only(where)
        return [
            snapshot.hits(asked, nearest(snapshot.parts, asked.query, k), unit, k)
            for block in (slice(at, at + _QUERIES) for at in range(0, len(queries), _QUERIES))
            for asked in snapshot.ask(queries[block], rows[block], first_look(k))
        ]


def _refuse_other_kinds(queries: Iterable[object]) -> None:
    for query in queries:
        if not isinstance(query, (str, LogLikelihoods)):
            raise TypeError(f"query must be a name or a LogLikelihoods, got {type(query).__name__}")


def check_mode(mode: str) -> None:
    """Raise ValueError if there is no such mode."""
    if mode not in MODES:
        raise ValueError(f"mode must be {', '.join(MODES)}, got {mode!r}")

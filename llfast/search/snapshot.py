"""What one search sees of an index, whatever is added, removed or merged meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from llfast.basis import Basis
from llfast.mixed import warn_of_kind
from llfast.results import KLEstimate, LogLikelihoods
from llfast.where import select_rows

from .contents import Contents
from .flat import refuse_large_rows
from .gpu import MOST_ANSWERS
from .hits import Hit, Hits
from .projection import Reduced
from .searched import Found, Query, Rows, first_bounds, listed_bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A query, and what it ran in."""

    query: Query
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """Rows of one moment.

    Attributes:
        basis: of all points.
        contents: what is known of all rows; its models may be joined by more.
        parts: points of its rows, and of those that came later.
        allowed: which rows are there; None for all.
    """

    basis: Basis
    contents: Contents
    parts: Sequence[Rows]
    allowed: Bool[np.ndarray, " K"] | None

    def only(self, where: str | None) -> Snapshot:
        """Without the rows of which a SQL condition does not hold; see `KLIndex.search`."""
        if where is None:
            return self
        count = sum(map(len, self.parts))
        chosen = select_rows(self.contents.models.table(self.basis.convention), where)[:count]
        allowed = chosen if self.allowed is None else chosen & self.allowed
        # The lists of the nearest models may hold none of which the condition holds.
        return replace(self.exactly(), allowed=allowed)

    def exactly(self) -> Snapshot:
        """With all rows looked at, not those of some lists."""
        return replace(self, parts=[replace(part, listed=None) for part in self.parts])

    @property
    def recall(self) -> float | None:
        """That of its lists; None where searches are exact."""
        found = [part.listed.lists.recall for part in self.parts if part.listed is not None]
        return found[0] if found else None

    def point(self, row: int) -> Float64[np.ndarray, " N"]:
        """Where a row is."""
        part, number = self._find(row)
        point: Float64[np.ndarray, " N"] = part.take(np.array([number]))[0].astype(np.float64)
        return point

    def project(self, result: LogLikelihoods) -> Float64[np.ndarray, " N"]:
        """Where a result is, rounded as the rows are.

        Raises and warns as `Basis.project` does; SearchError if it is too large for fp32.
        """
        point = self.basis.project(result)
        refuse_large_rows(point[None], [result.model])
        known, floor = self.contents.models, self.contents.noise_floor or None
        warn_of_kind(result, self.basis.convention, known.dtypes, known.adds_bos, floor)
        rounded: Float64[np.ndarray, " N"] = point.astype(self.parts[0].points.dtype)
        return rounded.astype(np.float64)

    def ask(
        self, queries: Sequence[str | LogLikelihoods], rows: Sequence[int | None], least: int = 0
    ) -> Iterator[Asked]:
        """Points of the queries, and what bounds need.

        Args:
            queries: names, of which the rows are known, and results.
            rows: those of the same names. A result whose row has other numbers is another model.
            least: how many rows a search by lists looks at, if there are so many.
        """
        points = np.empty((len(queries), len(self.basis)))
        own_rows: list[int | None] = []
        for at, (query, row) in enumerate(zip(queries, rows, strict=True)):
            if isinstance(query, str):
                assert row is not None, "names must have rows"
                points[at] = self.point(row)
            else:
                points[at] = self.project(query)
            same = isinstance(query, str) or (row is not None and self._is_at(row, points[at]))
            own_rows.append(row if same else None)
        reduced = bounds = None
        if self.contents.projection is not None:
            reduced = self._reduce(points, own_rows)
            bounds = first_bounds(self.parts, reduced) if self.recall is None else None
        near = self._near(points, least)
        for at, (query, row) in enumerate(zip(queries, own_rows, strict=True)):
            allowed = self._allowed_but(row)
            own = None if reduced is None else reduced[at]
            chosen, own_bounds = None, None if bounds is None else bounds[at]
            if own is not None and bounds is None:
                chosen, own_bounds = listed_bounds(self.parts, own, least, allowed)
            yield Asked(
                dtype=self._dtype(query, rows[at]),
                query=Query.around(
                    points[at],
                    own,
                    largest=self.contents.largest,
                    offset=self.contents.offset,
                    allowed=allowed,
                    bounds=own_bounds,
                    rows=chosen,
                    near=None if near is None else (near[0][at], near[1][at]),
                ),
            )

    def kl(self, a: int, b: int, unit: str) -> KLEstimate:
        """The KL divergence between two rows."""
        return self._estimate(self.point(a), self.contents.models[a].dtype, b, unit)

    def hits(self, asked: Asked, found: Found, unit: str, k: int | None = None) -> Hits:
        """The k nearest of what was found; all of it for None."""
        factor = self.basis.per_nat(unit)
        divergences, rows = found.divergences.tolist(), found.rows.tolist()
        order = sorted(
            (divergence, self.contents.models.name(row), row)
            for divergence, row in zip(divergences, rows, strict=True)
        )
        hits = [
            Hit(
                name,
                divergence * factor,
                unit,
                partial(self._metadata, row),
                partial(self._estimate, asked.query.point, asked.dtype, row, unit),
            )
            for divergence, name, row in order[:k]
        ]
        certificate = replace(found.certificate, bound=found.certificate.bound * factor)
        recall = self.recall
        return Hits(hits, certificate if recall is None else None, recall)

    # ------------------------------------------------------------------ inside

    def _metadata(self, row: int) -> Mapping[str, Any]:
        return self.contents.models[row].metadata

    def _estimate(
        self, point: Float64[np.ndarray, " N"], dtype: str, row: int, unit: str
    ) -> KLEstimate:
        return self.basis.kl(
            point - self.point(row),
            (dtype, self.contents.models[row].dtype),
            unit,
            noise_floor=self.contents.noise_floor,
        )

    def _dtype(self, query: str | LogLikelihoods, row: int | None) -> str:
        if isinstance(query, LogLikelihoods):
            return query.dtype
        assert row is not None
        return self.contents.models[row].dtype

    def _near(
        self, points: Float64[np.ndarray, "Q N"], least: int
    ) -> tuple[Float32[np.ndarray, "Q G"], Int64[np.ndarray, "Q G"]] | None:
        """What a GPU finds near each query: `least` of what is allowed, but for the query."""
        rows = self.parts[0]
        if rows.on_gpu is None or not least:
            return None
        allowed = None if self.allowed is None else self.allowed[: len(rows)]
        gone = 0 if allowed is None else len(rows) - int(np.count_nonzero(allowed))
        count = min(least + gone + 1, len(rows))
        if count > MOST_ANSWERS:
            return None
        return rows.on_gpu.near(np.ascontiguousarray(points, dtype=np.float32), count)

    def _allowed_but(self, row: int | None) -> Bool[np.ndarray, " K"] | None:
        if row is None:
            return self.allowed
        count = sum(map(len, self.parts))
        allowed = np.ones(count, dtype=bool) if self.allowed is None else self.allowed.copy()
        allowed[row] = False
        return allowed

    def _reduce(
        self, points: Float64[np.ndarray, "Q N"], own_rows: Sequence[int | None]
    ) -> Reduced:
        """Lower-bound coordinates, which the index has of its own rows."""
        assert self.contents.projection is not None
        other = [at for at, row in enumerate(own_rows) if row is None]
        computed = self.contents.projection.reduce(points[other])
        rows = [
            computed[other.index(at)] if row is None else self._reduced(row)
            for at, row in enumerate(own_rows)
        ]
        return Reduced(
            np.concatenate([each.first for each in rows]),
            np.concatenate([each.rest for each in rows]),
        )

    def _reduced(self, row: int) -> Reduced:
        part, number = self._find(row)
        assert part.reduced is not None
        return part.reduced[number]

    def _is_at(self, row: int, point: Float64[np.ndarray, " N"]) -> bool:
        """Whether a row has this point: what is added may be rounded where the rest is not."""
        dtype = self._find(row)[0].points.dtype
        return np.array_equal(point.astype(dtype).astype(np.float64), self.point(row))

    def _find(self, row: int) -> tuple[Rows, int]:
        for part in self.parts:
            if row < len(part):
                return part, row
            row -= len(part)
        raise IndexError(f"row must be below {sum(map(len, self.parts))}")

"""Rows that came after an index was built: searched like the others, kept in memory."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Shaped

from .projection import Projection, Reduced
from .searched import Rows


class Added:
    """Points in memory, to which more can be added at any time; searches see whole rows only."""

    def __init__(self, dimensions: int, projection: Projection | None) -> None:
        self._projection = projection
        self._points = np.empty((0, dimensions), dtype=np.float32)
        self._first = self._rest = np.empty((0, 0), dtype=np.float32)
        if projection is not None:
            empty = projection.reduce(np.empty((0, dimensions)))
            self._first, self._rest = empty.first, empty.rest
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, point: Float64[np.ndarray, " N"]) -> None:
        """One more row, rounded to fp32."""
        self._points = _with(self._points, self._count, point)
        if self._projection is not None:
            reduced = self._projection.reduce(self._points[[self._count]].astype(np.float64))
            self._first = _with(self._first, self._count, reduced.first[0])
            self._rest = _with(self._rest, self._count, reduced.rest[0])
        self._count += 1

    def rows(self) -> Rows:
        """What is there now; it does not change with what is added later."""
        points = self._points[: self._count]
        reduced = Reduced(self._first[: self._count], self._rest[: self._count])
        return Rows(
            points=points,
            flat=points,
            reduced=None if self._projection is None else reduced,
        )


def _with(
    rows: Shaped[np.ndarray, "C D"], count: int, row: Shaped[np.ndarray, " D"]
) -> Shaped[np.ndarray, "E D"]:
    """`rows` with one more at `count`; twice as large if it was full."""
    if count == len(rows):
        larger = np.empty((max(2 * count, 16), rows.shape[1]), dtype=rows.dtype)
        larger[:count] = rows
        rows = larger
    rows[count] = row
    return rows

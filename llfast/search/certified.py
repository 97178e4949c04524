"""Exact search by lower bounds: few rows are compared in full, and no other can be nearer.

    all rows ─▶ first bound, 64 floats a row ─▶ second, 192 more ─▶ whole rows in fp32 ─▶ in fp64
              what a bound puts farther than k whole rows are goes at each arrow

Errors of rounding are bounded as well, so the answer is that of brute force in fp64, for any query.
Where bounds rule out too little, all rows are compared in full, as a search without bounds would.
An approximate search goes the same way, but from the rows of some lists instead of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from llfast.intervals import half_variances

from .flat import farthest, reach, squares_to
from .gpu import gpu_reach
from .searched import MOST_ROWS, Certificate, Found, Query, Rows, fp32

_LEAST_ROWS = 16  # compared in full at once; twice as many each time
_SCAN_SHARE = 1 / 16  # of the rows: when bounds leave more than this, all are read in order
_BOUND_ROWS = 4096  # looked at again at once: 4 MB
_FP64_ROWS = 16  # compared in fp64 at once: 1.3 MB at 10,000 texts, which stays in a core's cache


def nearest(parts: Sequence[Rows], query: Query, k: int) -> Found:
    """The k nearest rows, and those that tie with the k-th.

    Rows are numbered through all parts. `Certificate.bound` is in nats a text.
    """
    search = _Search(parts, query)
    k = min(k, search.count)
    if not k:
        return search.found(np.empty(0, dtype=np.int64))
    if (first := search.bounds) is None:
        if not search.compare_near(k):
            search.compare_all()
        return search.within(search.kth(k))
    likely = search.likely(first, min(first_look(k), search.count))
    search.compare(likely[np.argsort(search.second_bounds(likely))[: k + 6]])
    distance = search.kth(k)
    left = search.left_by_first(first, distance)
    bounds = search.second_bounds(left)
    order = np.argsort(bounds, kind="stable")
    left, bounds = left[order], bounds[order]
    for begin, step in _growing(len(left)):
        near = int(np.searchsorted(bounds, search.limit(distance), "right"))
        if near <= begin:
            break
        if search.is_scan_faster(near - begin):
            search.scan()
            return search.within(search.kth(k))
        search.compare(left[begin : min(begin + step, near)])
        distance = search.kth(k)
    return search.within(distance)


def first_look(k: int) -> int:
    """How many rows are looked at before it is known how far the k-th is."""
    return 2 * k + 14


def within(parts: Sequence[Rows], query: Query, distance: float) -> Found:
    """All rows within a Euclidean distance, and perhaps a few that are farther by rounding."""
    search = _Search(parts, query)
    if search.bounds is None:
        search.compare_all()
        return search.within(distance)
    left = search.left_by_first(search.bounds, distance)
    left = left[search.second_bounds(left) <= search.limit(distance)]
    if search.is_scan_faster(len(left)):
        search.scan()
    else:
        search.compare(left)
    return search.within(distance)


class _Search:
    """One query on its way through the stages."""

    def __init__(self, parts: Sequence[Rows], query: Query) -> None:
        self._parts, self._query = parts, query
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self._total = int(self._starts[-1])
        self._point32 = fp32(query.point[None])
        allowed, self._chosen = query.allowed, query.rows
        if allowed is not None and self._chosen is not None:
            allowed = allowed[self._chosen]
        count = self._total if self._chosen is None else len(self._chosen)
        self.count = count if allowed is None else int(np.count_nonzero(allowed))
        self.bounds = query.bounds
        if self.bounds is not None and allowed is not None:
            self.bounds = np.where(allowed, self.bounds, np.inf).astype(np.float32, copy=False)
        self._rows = np.empty(0, dtype=np.int64)  # compared in full, and their squares in fp32
        self._squares = np.empty(0, dtype=np.float32)
        self._second = 0
        self._scanned = False
        self._compared_mask = np.zeros(self._total, dtype=bool)

    # ------------------------------------------------------------------ bounds

    def likely(self, bounds: Float32[np.ndarray, " C"], count: int) -> Int64[np.ndarray, " M"]:
        """So many rows whose first bounds are least; all that are allowed, if they are so few."""
        if count < len(bounds):
            return self._numbers(np.argpartition(bounds, count - 1)[:count])
        return self._numbers(np.flatnonzero(np.isfinite(bounds)))

    def left_by_first(
        self, bounds: Float32[np.ndarray, " C"], distance: float
    ) -> Int64[np.ndarray, " M"]:
        """Rows that may be within a distance, but for those that are compared already."""
        assert self._query.reduced is not None
        dimensions = self._query.reduced.first.shape[1]
        limit = reach(distance, dimensions, self._query.norms, slack=self._query.slack)
        near = np.flatnonzero(bounds <= min(limit, float(np.finfo(np.float32).max)))
        left = self._numbers(near[~self._compared_mask[self._numbers(near)]])
        self._second += len(left)
        return left

    def second_bounds(self, rows: Int64[np.ndarray, " M"]) -> Float64[np.ndarray, " M"]:
        """Closer squares that these rows are not nearer than; `limit` says how exact they are."""
        query = self._query.reduced
        assert query is not None
        bounds = np.empty(len(rows))
        for begin in range(0, len(rows), _BOUND_ROWS):
            some = slice(begin, begin + _BOUND_ROWS)
            for part, own, numbers in self._by_part(rows[some]):
                assert part.reduced is not None
                # Without the norm of the first stage, in whose place the second has its own.
                first = part.reduced.first[numbers][:, :-1] - query.first[0][:-1]
                rest = part.reduced.rest[numbers] - query.rest[0]
                squares = np.einsum("ij,ij->i", first, first) + np.einsum("ij,ij->i", rest, rest)
                bounds[some][own] = squares
        return bounds

    def limit(self, distance: float) -> float:
        """The largest second bound of a row within a distance."""
        query = self._query
        assert query.reduced is not None
        dimensions = query.reduced.first.shape[1] + query.reduced.rest.shape[1]
        return float(reach(distance, dimensions, query.norms, slack=query.slack))

    # ------------------------------------------------------------------ whole rows

    def compare(self, rows: Int64[np.ndarray, " M"]) -> None:
        """Find out the distances of these rows, in fp32."""
        for begin in range(0, len(rows), MOST_ROWS):
            some = rows[begin : begin + MOST_ROWS]
            squares = np.empty(len(some), dtype=np.float32)
            for part, own, numbers in self._by_part(some):
                squares[own] = squares_to(self._point32, fp32(part.take(numbers)))[0]
            self._rows = np.append(self._rows, some)
            self._squares = np.append(self._squares, squares)
        self._compared_mask[rows] = True

    def compare_near(self, k: int) -> bool:
        """Find out the distances of what a GPU finds near; whether that is all that can be."""
        if self._query.near is None:
            return False
        squares, near = self._query.near
        copied, allowed = len(self._parts[0]), self._query.allowed
        rows = np.append(near, np.arange(copied, self._total))  # a GPU has none that came later
        rows = rows if allowed is None else rows[allowed[rows]]
        if len(rows) < k:
            return False
        self.compare(rows)
        query = self._query
        limit = gpu_reach(self.kth(k), len(query.point), query.norms, query.slack)
        return len(near) == copied or bool(squares[-1] > limit)

    def compare_all(self) -> None:
        """Find out the distances of all rows, one by one where few of them are allowed."""
        allowed = self._query.allowed
        if allowed is None or self.count > _SCAN_SHARE * self._total:
            self.scan()
        else:
            rows = np.flatnonzero(allowed)
            self.compare(rows[~self._compared_mask[rows]])
            self._scanned = True

    def scan(self) -> None:
        """Find out the distances of all rows, in fp32."""
        squares = np.concatenate([part.squares(self._point32) for part in self._parts])
        allowed = self._query.allowed
        self._rows = np.arange(self._total) if allowed is None else np.flatnonzero(allowed)
        self._squares = squares if allowed is None else squares[allowed]
        self._scanned = True

    def is_scan_faster(self, rows: int) -> bool:
        """Whether to compare all rows in order instead of so many here and there."""
        if self._chosen is not None:
            return False
        return len(self._rows) + rows > max(_SCAN_SHARE * self._total, MOST_ROWS)

    def kth(self, k: int) -> float:
        """At least the distance of the k-th nearest row of all."""
        square = float(np.partition(self._squares, k - 1)[k - 1])
        return farthest(square, len(self._query.point), self._query.norms)

    def within(self, distance: float) -> Found:
        """What can be within a distance, of the rows that were compared."""
        query = self._query
        limit = reach(distance, len(query.point), query.norms, slack=query.slack)
        return self.found(self._rows[self._squares <= limit], distance)

    def found(self, rows: Int64[np.ndarray, " M"], distance: float = math.inf) -> Found:
        """Rows with their KL, in fp64."""
        divergences = np.empty(len(rows))
        for begin in range(0, len(rows), _FP64_ROWS):
            some = rows[begin : begin + _FP64_ROWS]
            block = divergences[begin : begin + _FP64_ROWS]
            for part, own, numbers in self._by_part(some):
                block[own] = half_variances(part.take(numbers) - self._query.point)
        everything = len(self._rows) >= self.count
        certificate = Certificate(
            models=self.count,
            second=self._second,
            compared=len(self._rows),
            closed_by="scan" if self._scanned else "bounds",
            bound=math.inf if everything else distance**2 / (2 * len(self._query.point)),
        )
        return Found(rows=rows, divergences=divergences, certificate=certificate)

    def _numbers(self, places: Int64[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
        """The rows whose bounds are at these places."""
        if self._chosen is None:
            return places
        chosen: Int64[np.ndarray, " M"] = self._chosen[places]
        return chosen

    def _by_part(
        self, rows: Int64[np.ndarray, " M"]
    ) -> Iterator[tuple[Rows, Bool[np.ndarray, " M"] | slice, Int64[np.ndarray, " m"]]]:
        """(part, which of `rows` are in it, their numbers in it)."""
        if len(self._parts) == 1:
            yield self._parts[0], slice(None), rows
            return
        for part, start in zip(self._parts, self._starts, strict=False):
            own = (rows >= start) & (rows < start + len(part))
            if own.any():
                yield part, own, rows[own] - start


def _growing(count: int) -> Iterator[tuple[int, int]]:
    """Where blocks begin, and how large they are: more and more rows."""
    begin, step = 0, _LEAST_ROWS
    while begin < count:
        yield begin, step
        begin, step = begin + step, min(2 * step, MOST_ROWS)

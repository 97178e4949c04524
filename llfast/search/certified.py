"""Exact search by lower bounds: few rows are compared in full, and no other can be nearer.

    all rows ─▶ first bound, 64 floats a row ─▶ second, 192 more ─▶ whole rows in fp32 ─▶ in fp64
              what a bound puts farther than k whole rows are goes at each arrow

Errors of rounding are bounded as well, so the answer is that of brute force in fp64, for any query.
Where bounds rule out too little, all rows are compared in full, as a search without bounds would.
An approximate search goes the same way, but from the rows of some lists instead of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped

from llfast.intervals import half_variances

from .flat import farthest, norms_of, reach, squares_to
from .lists import ListedRows
from .projection import Reduced

_LEAST_ROWS = 16  # compared in full at once; twice as many each time
_MOST_ROWS = 256
_SCAN_SHARE = 1 / 16  # of the rows: when bounds leave more than this, all are read in order
_BOUND_ROWS = 4096  # looked at again at once: 4 MB
_FP64_ROWS = 16  # compared in fp64 at once: 1.3 MB at 10,000 texts, which stays in a core's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Why nothing nearer can have been missed.

    Attributes:
        models: how many were searched.
        second: how many the first bound left, to be looked at again.
        compared: how many were compared in full.
        closed_by: "bounds", or "scan" if all were compared in full.
        bound: every model that was not compared in full is at least this far, in the unit of the
            search; inf if all were.
    """

    models: int
    second: int
    compared: int
    closed_by: str
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Points that lie together.

    Attributes:
        points: (K, N) nats, in fp32 or fp64; maybe in a mapped file.
        flat: (K, N) the same in fp32; None if that would be a copy that is not worth its memory.
        reduced: their lower-bound coordinates; None where all are compared in full.
        listed: the same in lists, of which a search looks at some only; None where it is exact.
        check: called with row numbers before these points are read; it raises if they are damaged.
    """

    points: Shaped[np.ndarray, "K N"]
    flat: Float32[np.ndarray, "K N"] | None
    reduced: Reduced | None
    listed: ListedRows | None = None
    check: Callable[[Sequence[int] | range], None] | None = None

    def __len__(self) -> int:
        return len(self.points)

    def take(self, numbers: Int64[np.ndarray, " M"]) -> Shaped[np.ndarray, "M N"]:
        """Some of the points."""
        if self.check is not None:
            self.check(numbers.tolist())
        taken: Shaped[np.ndarray, "M N"] = self.points[numbers]
        return taken

    def squares(self, query: Float32[np.ndarray, "1 N"]) -> Float32[np.ndarray, " K"]:
        """Squared distances of all points, in fp32."""
        if self.flat is not None:
            check = self.check
            before = None if check is None else lambda begin, end: check(range(begin, end))
            squares: Float32[np.ndarray, " K"] = squares_to(query, self.flat, before_block=before)[
                0
            ]
            return squares
        found = np.empty(len(self), dtype=np.float32)
        for at in range(0, len(self), _MOST_ROWS):
            block = slice(at, at + _MOST_ROWS)
            found[block] = squares_to(query, _fp32(self.points[block]))[0]
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Query:
    """A point to search around.

    Attributes:
        point: (N,) fp64.
        reduced: its lower-bound coordinates, in one row; None where there are none.
        bounds: (K,) of `first_bounds`; None where there are none.
        rows: (C,) the only ones that are looked at, which `bounds` are of; None for all.
        norms: its norm, and the largest of the rows'.
        slack: how far the mean of a difference may be from 0, times √N: KL does not count it.
        allowed: which rows may be found; None for all.
    """

    point: Float64[np.ndarray, " N"]
    reduced: Reduced | None
    bounds: Float32[np.ndarray, " C"] | None
    rows: Int64[np.ndarray, " C"] | None
    norms: float
    slack: float
    allowed: Bool[np.ndarray, " K"] | None

    @classmethod
    def around(
        cls,
        point: Float64[np.ndarray, " N"],
        reduced: Reduced | None,
        *,
        largest: float,
        offset: float,
        allowed: Bool[np.ndarray, " K"] | None,
        bounds: Float32[np.ndarray, " C"] | None,
        rows: Int64[np.ndarray, " C"] | None = None,
    ) -> Query:
        """With `norms` and `slack` for rows of norms of at most `largest` and means of `offset`."""
        return cls(
            point=point,
            reduced=reduced,
            bounds=bounds,
            rows=rows,
            norms=float(norms_of(point[None])[0]) + largest,
            slack=math.sqrt(len(point)) * (abs(float(point.mean())) + offset),
            allowed=allowed,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """What a search left, nearest or not: (M,) rows, their KL in nats a text, and why no others."""

    rows: Int64[np.ndarray, " M"]
    divergences: Float64[np.ndarray, " M"]
    certificate: Certificate


def first_bounds(parts: Sequence[Rows], queries: Reduced) -> Float32[np.ndarray, "Q K"]:
    """Squares that rows are not nearer than, for each query."""
    reduced = [part.reduced for part in parts]
    return np.concatenate(
        [squares_to(queries.first, each.first) for each in reduced if each is not None], axis=1
    )


def listed_bounds(
    parts: Sequence[Rows], query: Reduced, least: int, allowed: Bool[np.ndarray, " K"] | None
) -> tuple[Int64[np.ndarray, " C"], Float32[np.ndarray, " C"]]:
    """Rows that may well be near, and squares that they are not nearer than.

    Args:
        parts: of those without lists, all rows may be near.
        query: in one row.
        least: how many there must be, of those that are allowed, if there are so many.
        allowed: which rows may be found; None for all.
    """
    rows, bounds, start = [], [], 0
    for part in parts:
        here = slice(start, start + len(part))
        assert part.reduced is not None
        if part.listed is None:
            own, squares = np.arange(len(part)), squares_to(query.first, part.reduced.first)[0]
        else:
            some = None if allowed is None else allowed[here]
            own, squares = part.listed.near(query.first, least, some)
        rows.append(own + start)
        bounds.append(squares)
        start = here.stop
    return np.concatenate(rows), np.concatenate(bounds)


def nearest(parts: Sequence[Rows], query: Query, k: int) -> Found:
    """The k nearest rows, and those that tie with the k-th.

    Rows are numbered through all parts. `Certificate.bound` is in nats a text.
    """
    search = _Search(parts, query)
    k = min(k, search.count)
    if not k:
        return search.found(np.empty(0, dtype=np.int64))
    if (first := search.bounds) is None:
        search.scan()
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
        search.scan()
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
        self._point32 = _fp32(query.point[None])
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
        for begin in range(0, len(rows), _MOST_ROWS):
            some = rows[begin : begin + _MOST_ROWS]
            squares = np.empty(len(some), dtype=np.float32)
            for part, own, numbers in self._by_part(some):
                squares[own] = squares_to(self._point32, _fp32(part.take(numbers)))[0]
            self._rows = np.append(self._rows, some)
            self._squares = np.append(self._squares, squares)
        self._compared_mask[rows] = True

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
        return len(self._rows) + rows > max(_SCAN_SHARE * self._total, _MOST_ROWS)

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
        begin, step = begin + step, min(2 * step, _MOST_ROWS)


def _fp32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)

"""What is searched, what is asked, and what is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped

from .flat import norms_of, squares_to
from .gpu import GpuRows
from .lists import ListedRows
from .projection import Reduced

MOST_ROWS = 256  # compared in full at once


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
        on_gpu: the same points; None where a GPU has none.
        check: called with row numbers before these points are read; it raises if they are damaged.
    """

    points: Shaped[np.ndarray, "K N"]
    flat: Float32[np.ndarray, "K N"] | None
    reduced: Reduced | None
    listed: ListedRows | None = None
    on_gpu: GpuRows | None = None
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
            return squares_to(query, self.flat, before_block=before).ravel()
        found = np.empty(len(self), dtype=np.float32)
        for at in range(0, len(self), MOST_ROWS):
            block = slice(at, at + MOST_ROWS)
            found[block] = squares_to(query, fp32(self.points[block]))[0]
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Query:
    """A point to search around.

    Attributes:
        point: (N,) fp64.
        reduced: its lower-bound coordinates, in one row; None where there are none.
        bounds: (K,) of `first_bounds`; None where there are none.
        rows: (C,) the only ones that are looked at, which `bounds` are of; None for all.
        near: the rows of the first part that a GPU finds nearest, and their squares; None for none.
        norms: its norm, and the largest of the rows'.
        slack: how far the mean of a difference may be from 0, times √N: KL does not count it.
        allowed: which rows may be found; None for all.
    """

    point: Float64[np.ndarray, " N"]
    reduced: Reduced | None
    bounds: Float32[np.ndarray, " C"] | None
    rows: Int64[np.ndarray, " C"] | None
    near: tuple[Float32[np.ndarray, " G"], Int64[np.ndarray, " G"]] | None
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
        near: tuple[Float32[np.ndarray, " G"], Int64[np.ndarray, " G"]] | None = None,
    ) -> Query:
        """With `norms` and `slack` for rows of norms of at most `largest` and means of `offset`."""
        return cls(
            point=point,
            reduced=reduced,
            bounds=bounds,
            rows=rows,
            near=near,
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


def fp32(values: np.ndarray) -> np.ndarray:
    """Values as faiss takes them."""
    return np.ascontiguousarray(values, dtype=np.float32)

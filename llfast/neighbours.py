"""The nearest rows of a matrix, all of them at once, in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int64

_BLOCK_BYTES = 64 << 20
_SPARE = 8  # candidates beyond those wanted, whose order the fast distances may have wrong


def nearest_rows(
    queries: Float64[np.ndarray, "Q N"],
    rows: Float64[np.ndarray, "K N"],
    count: int,
    *,
    others: bool = False,
) -> tuple[Int64[np.ndarray, "Q C"], Float64[np.ndarray, "Q C"]]:
    """For each query the nearest rows, and their squared Euclidean distances, nearest first.

    Candidates are found by ‖x‖² + ‖y‖² - 2xy, one matrix product for all, which is off by 1e-16 of
    ‖x‖² + ‖y‖²; what is returned is computed from differences. Ties go to the lower row, however
    many they are.

    Args:
        queries: Q points.
        rows: K points.
        count: how many are wanted; fewer if there are not so many.
        others: queries are the rows themselves, and none is its own neighbour.

    Raises: ValueError if there is nothing to choose from.
    """
    available = len(rows) - others
    if count < 1 or available < 1:
        raise ValueError(f"count must be at least 1 of other rows, got {count} of {available}")
    count = min(count, available)
    indices = np.empty((len(queries), count), dtype=np.int64)
    squared = np.empty((len(queries), count))
    # Twice what the product can be off, by N + 2 roundings of no more than both norms' squares.
    sizes = np.square(queries).sum(axis=1) + np.square(rows).sum(axis=1).max()
    errors = 2 * (rows.shape[1] + 2) * np.finfo(np.float64).eps * sizes
    for start, distances in _blocks(queries, rows):
        if others:
            own = np.arange(len(distances))
            distances[own, start + own] = np.inf
        kept = min(count + _SPARE, available)
        candidates = np.argpartition(distances, kept - 1, axis=1)[:, :kept]
        for at, (near, own) in enumerate(zip(candidates, distances, strict=True), start):
            # Of those that may tie with the last that is wanted, the lowest are among these.
            limit = np.partition(own[near], count - 1)[count - 1] + errors[at]
            chosen = np.union1d(near, np.flatnonzero(own <= limit)[:kept])
            exact = np.square(rows[chosen] - queries[at]).sum(axis=1)
            order = np.argsort(exact, kind="stable")[:count]
            indices[at], squared[at] = chosen[order], exact[order]
    return indices, squared


def _blocks(
    queries: Float64[np.ndarray, "Q N"], rows: Float64[np.ndarray, "K N"]
) -> Iterator[tuple[int, Float64[np.ndarray, "B K"]]]:
    """Squared distances of a block of queries to all rows, and the number of its first."""
    sizes = np.square(rows).sum(axis=1)
    step = max(1, _BLOCK_BYTES // (8 * len(rows)))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        yield start, sizes + np.square(block).sum(axis=1)[:, None] - 2 * block @ rows.T

"""Squared distances to many rows by faiss in fp32, and how far they can be off.

faiss checks little: wrong dimensions read out of bounds, float64 is cast, NaN rows vanish. Whatever
it is given here is checked, and it is imported nowhere else.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from llfast.errors import SearchError, needed

_FP32 = np.finfo(np.float32)
_LARGEST_NORM = 1e18  # squares of twice that are still within fp32
_BLOCK_BYTES = 1 << 20  # of rows a call of faiss that stay in a cache, for all queries and checks
_SHARES = 8  # a thread, of many rows: even ones, and few hand-overs, which take 0.05 ms each


def squares_to(
    queries: Float32[np.ndarray, "Q D"],
    rows: Float32[np.ndarray, "K D"],
    *,
    before_block: Callable[[int, int], None] | None = None,
) -> Float32[np.ndarray, "Q K"]:
    """‖query - row‖² of every row, by explicit difference; `reach` says how exact they are.

    Memory is read once for all queries. A square's bits do not depend on the other queries or rows.

    Args:
        queries: finite.
        rows: finite, contiguous; they may lie in a mapped file.
        before_block: called with (begin, end) before these rows are read, from any thread.

    Raises:
        ValueError: if shapes, dtypes or memory layout are others.
    """
    for name, array in (("queries", queries), ("rows", rows)):
        if array.dtype != np.float32 or array.ndim != 2 or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} must be a contiguous float32 matrix, got {array.dtype} {array.shape}"
            )
    dimensions = queries.shape[1]
    if rows.shape[1] != dimensions or not dimensions:
        raise ValueError(
            f"rows must have the queries' dimensions, got {rows.shape} and {queries.shape}"
        )
    found = np.empty((len(queries), len(rows)), dtype=np.float32)
    step = max(1, _BLOCK_BYTES // (4 * dimensions))
    share = max(step, -(-len(rows) // (_SHARES * _cores())))
    if len(queries) == 1 and before_block is None:
        step = share  # they are read once
    given = found, queries, rows, step, before_block
    if len(rows) <= share:
        _fill(*given, 0, len(rows))
        return found
    threads = _threads(os.getpid())
    starts = range(0, len(rows), share)
    for done in [threads.submit(_fill, *given, at, min(at + share, len(rows))) for at in starts]:
        done.result()
    return found


def reach(distance: float, dimensions: int, norms: float, *, slack: float = 0.0) -> float:
    """The largest square that `squares_to` can give for points at most `distance` apart.

    A sum of D rounded squares of rounded differences is off by at most g / (1 - g) of itself, with
    g = (D + 3) u, in any order (Higham, Accuracy and Stability of Numerical Algorithms, section
    3.1), u being half of fp32's epsilon. Points were rounded to fp32 before, which moves each by at
    most u of its norm; projecting them in fp64 moves them far less, and the u that is added for it
    holds up to 10^7 texts. The last term is for what underflows.

    Args:
        distance: between the points as they are.
        dimensions: D of the rows.
        norms: the query's norm, and the largest of the rows'.
        slack: what else may be between `distance` and the points.
    """
    share = (dimensions + 3) * float(_FP32.eps) / 2
    gamma = share / (1 - share) if share < 1 else math.inf
    moved = distance + slack + float(_FP32.eps) * norms
    square = moved * moved * (1 + gamma) * (1 + 1e-6) + dimensions * float(_FP32.tiny)
    if not square < float(_FP32.max):
        return math.inf
    return float(np.nextafter(np.float32(square), np.float32(np.inf)))


def farthest(square: float, dimensions: int, norms: float) -> float:
    """The largest distance of points of which `squares_to` gave this square; see `reach`."""
    share = (dimensions + 3) * float(_FP32.eps) / 2
    if share >= 0.5:
        return math.inf
    gamma = share / (1 - share)
    rounded = math.sqrt((square + dimensions * float(_FP32.tiny)) / (1 - gamma))
    return rounded * (1 + 1e-6) + float(_FP32.eps) * norms


def _fill(
    found: Float32[np.ndarray, "Q K"],
    queries: Float32[np.ndarray, "Q D"],
    rows: Float32[np.ndarray, "K D"],
    step: int,
    before_block: Callable[[int, int], None] | None,
    begin: int,
    end: int,
) -> None:
    """Squares of rows from `begin` to `end`, `step` at a time; for any thread."""
    faiss = import_faiss()
    for start in range(begin, end, step):
        block = slice(start, min(start + step, end))
        if before_block is not None:
            before_block(block.start, block.stop)
        some = faiss.swig_ptr(rows[block])
        count, dimensions = block.stop - block.start, queries.shape[1]
        for query, squares in zip(queries, found, strict=True):
            part = faiss.swig_ptr(squares[block])
            faiss.fvec_L2sqr_ny(part, faiss.swig_ptr(query), some, dimensions, count)


def refuse_overflow(norm: float, whose: str = "") -> None:
    """Raise SearchError for points of which fp32 cannot hold squared distances."""
    if not norm < _LARGEST_NORM:
        of = whose and f" of {whose!r}"
        raise SearchError(
            f"coordinates{of} must have norms below 1e18 nats for faiss, got {norm:.3g}"
        )


def refuse_large_rows(points: Float64[np.ndarray, "M N"], names: Sequence[str]) -> None:
    """Raise SearchError as `refuse_overflow` does, with the name of the largest row."""
    worst = int(np.abs(points).max(axis=1).argmax())  # norms themselves may overflow
    refuse_overflow(float(norms_of(points).max()), names[worst])


def norms_of(rows: Float64[np.ndarray, "M N"]) -> Float64[np.ndarray, " M"]:
    """Euclidean norm of each row."""
    norms: Float64[np.ndarray, " M"] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norms


@cache
def _threads(_process: int) -> ThreadPoolExecutor:  # of each process, for a fork has no threads
    """As many as there are cores: one of them alone does not reach the bandwidth of memory."""
    return ThreadPoolExecutor(max_workers=_cores(), thread_name_prefix="llfast-search")


@cache
def _cores() -> int:
    return len(os.sched_getaffinity(0))


@cache
def import_faiss() -> Any:
    """The module, if it is installed.

    Raises:
        MissingDependencyError: if it is not.
    """
    with (
        needed(
            "faiss",
            "searching needs faiss: pip install 'llfast[cpu]', or on a machine with an NVIDIA GPU "
            "pip install 'llfast[gpu]'; never both, they install the same package",
        ),
        warnings.catch_warnings(),
    ):
        # SWIG's types have no module name, which newer Pythons remark on.
        warnings.filterwarnings(
            "ignore", "builtin type (SwigPy|swigvar).* has no __module__", DeprecationWarning
        )
        import faiss
    return faiss

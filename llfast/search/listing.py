"""How rows are put into lists, and how many lists a search has to look at.

k-means of first coordinates ─▶ each row is in the list of its nearest centroid
models held out from k-means ─▶ half of them say how many lists hold their nearest models, half
tell what share of theirs is found in so many
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, Int64, UInt32

from .certified import nearest
from .flat import import_faiss
from .lists import Lists
from .searched import Query, Rows, first_bounds

LEAST_ROWS = 4096  # with fewer, looking at all of them takes no longer
_NEAREST = 10  # models whose recall is chosen and measured
_AIM = 0.998  # for the collection's own models; others find some percent less
_HELD_OUT = 400  # models
_MOST_SCANS = 20  # of these: where bounds rule so little out, lists of them are of no use
_ROWS_A_LIST = 64  # k-means sees so many, on average
_ITERATIONS = 10
_BLOCK = 1 << 16  # rows that are looked at once


def fit_lists(rows: Rows, *, largest: float, offset: float) -> Lists | None:
    """Lists of rows that have lower-bound coordinates; None where all may as well be looked at.

    Args:
        rows: at least some thousand.
        largest: norm of the points, at most.
        offset: mean of a point's coordinates, at most.
    """
    if rows.reduced is None or len(rows) < LEAST_ROWS:
        return None
    first = rows.reduced.first
    rng = np.random.default_rng(0)
    held_out = rng.choice(len(rows), _HELD_OUT, replace=False)
    count = round(4 * math.sqrt(len(rows)))
    most = min(len(rows), count * _ROWS_A_LIST + len(held_out))
    seen = np.setdiff1d(rng.choice(len(rows), most, replace=False), held_out)
    centroids, numbers = _cluster(first, seen, min(count, len(seen)))
    lists = Lists(centroids, numbers, len(centroids), 1.0)
    ranks, scans = [], 0
    for row in held_out.tolist():
        found, is_scan = _ranks(lists, rows, row, largest, offset)
        ranks.append(found)
        scans += is_scan
        if scans > _MOST_SCANS:
            return None
    chosen, measured = np.array(ranks[::2]), np.array(ranks[1::2])
    probes = int(np.quantile(chosen, _AIM, method="inverted_cdf")) + 1
    return Lists(centroids, numbers, probes, float((measured < probes).mean()))


def _cluster(
    first: Float32[np.ndarray, "K F"], seen: Int64[np.ndarray, " S"], count: int
) -> tuple[Float32[np.ndarray, "L F"], UInt32[np.ndarray, " K"]]:
    """Centroids of the rows that are seen, and the nearest of them to each row."""
    kmeans = import_faiss().Kmeans(
        first.shape[1],
        count,
        niter=_ITERATIONS,
        seed=0,
        min_points_per_centroid=1,  # faiss prints a warning where there are fewer
        max_points_per_centroid=_ROWS_A_LIST,
    )
    kmeans.train(np.ascontiguousarray(first[seen]))
    numbers = np.empty(len(first), dtype=np.uint32)
    for at in range(0, len(first), _BLOCK):
        _, found = kmeans.index.search(np.ascontiguousarray(first[at : at + _BLOCK]), 1)
        assert (found >= 0).all(), "coordinates are finite"
        numbers[at : at + _BLOCK] = found[:, 0]
    return kmeans.centroids, numbers


def _ranks(
    lists: Lists, rows: Rows, row: int, largest: float, offset: float
) -> tuple[Int64[np.ndarray, " M"], bool]:
    """When a search around a row would come to the lists of its nearest rows: 0 for the first.

    Returns: and whether all rows had to be read to know them.
    """
    assert rows.reduced is not None
    allowed = np.ones(len(rows), dtype=bool)
    allowed[row] = False
    point = rows.take(np.array([row]))[0].astype(np.float64)
    reduced = rows.reduced[row]
    query = Query.around(
        point,
        reduced,
        largest=largest,
        offset=offset,
        allowed=allowed,
        bounds=first_bounds([rows], reduced)[0],
    )
    found = nearest([rows], query, _NEAREST)
    order = np.argsort(found.divergences, kind="stable")[:_NEAREST]
    places = np.argsort(lists.order(reduced.first))
    ranks: Int64[np.ndarray, " M"] = places[lists.numbers[found.rows[order]]]
    return ranks, found.certificate.closed_by == "scan"

"""What else finds nearest rows: each is given llfast's own coordinates in fp32.

A peer that would take more time than it is given is left out, with the reason; those that do not
fit into memory beside the others wait for a round of their own.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from memory import status_kib

WIDTH = 64  # of the search through a graph: candidates that are kept in mind
_PIECE = 512  # rows that a graph is given at once, to see how long all of them would take


@dataclass(frozen=True, eq=False)
class Peer:
    """An index of somebody else's.

    Attributes:
        add: takes (M, N) fp32 rows, numbered on.
        search: (Q, N) and how many to rows (Q, k).
        settings: what was chosen for it.
        copies: of the vectors that it keeps.
        most_models: with more it is left out.
        piece: rows that it is given at once; None for all.
    """

    add: Callable[[np.ndarray], Any]
    search: Callable[[np.ndarray, int], np.ndarray]
    settings: str
    copies: int = 1
    most_models: int | None = None
    piece: int | None = _PIECE


def faiss_flat(shape: tuple[int, int], threads: int) -> Peer:
    """Brute force: by differences for few queries, by matrix products for 20 and more."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(shape[1])
    settings = "IndexFlatL2, which takes one thread for one question"
    return Peer(index.add, lambda points, k: index.search(points, k)[1], settings, piece=None)


def faiss_hnsw(shape: tuple[int, int], threads: int) -> Peer:
    """A graph, through which searches are greedy."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWFlat(shape[1], 32)
    index.hnsw.efSearch = WIDTH
    settings = f"IndexHNSWFlat, M 32, efConstruction {index.hnsw.efConstruction}, efSearch {WIDTH}"
    return Peer(index.add, lambda points, k: index.search(points, k)[1], settings)


def usearch(shape: tuple[int, int], threads: int) -> Peer:
    """A graph."""
    from usearch.index import Index

    index = Index(ndim=shape[1], metric="l2sq", dtype="f32", expansion_search=WIDTH)

    def add(points: np.ndarray) -> None:
        keys = np.arange(len(index), len(index) + len(points))
        index.add(keys, points, threads=threads)

    def search(points: np.ndarray, k: int) -> np.ndarray:
        keys = index.search(points, k, threads=threads).keys
        return np.asarray(keys).astype(np.int64).reshape(len(points), -1)

    settings = (
        f"connectivity {index.connectivity}, expansion_add {index.expansion_add}, "
        f"expansion_search {WIDTH}"
    )
    return Peer(add, search, settings)


def hnswlib(shape: tuple[int, int], threads: int) -> Peer:
    """A graph."""
    import hnswlib

    index = hnswlib.Index(space="l2", dim=shape[1])
    index.init_index(max_elements=shape[0], M=16, ef_construction=100)
    index.set_ef(WIDTH)
    index.set_num_threads(threads)
    return Peer(
        index.add_items,
        lambda points, k: index.knn_query(points, k)[0].astype(np.int64),
        f"M 16, ef_construction 100, ef {WIDTH}",
    )


def scikit_learn(_shape: tuple[int, int], threads: int) -> Peer:
    """Brute force, in fp64."""
    from sklearn.neighbors import NearestNeighbors

    model = NearestNeighbors(algorithm="brute", n_jobs=threads)
    return Peer(
        model.fit,
        lambda points, k: model.kneighbors(points, k, return_distance=False),
        "NearestNeighbors, brute",
        copies=0,  # it refers to the rows that it is given
        most_models=20_000,
        piece=None,
    )


PEERS: dict[str, Callable[[tuple[int, int], int], Peer]] = {
    "faiss Flat": faiss_flat,
    "faiss HNSW": faiss_hnsw,
    "usearch": usearch,
    "hnswlib": hnswlib,
    "scikit-learn": scikit_learn,
}


@dataclass
class Budget:
    """What peers may take: bytes of vectors all together, and seconds each to be built."""

    nbytes: float
    seconds: float


@dataclass
class Built:
    """Peers that are held together.

    Attributes:
        took: what building each of them took.
        left_out: those that are not measured at all, with the reason.
        waiting: those that fit into memory only when these are gone.
    """

    peers: dict[str, Peer] = field(default_factory=dict)
    took: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)


def build_peers(points: np.ndarray, threads: int, budget: Budget, names: Sequence[str]) -> Built:
    """Those of these names that fit beside one another, and what became of the others."""
    found = Built()
    free = budget.nbytes
    for name in names:
        try:
            peer = PEERS[name](points.shape, threads)
        except ModuleNotFoundError as error:
            found.left_out[name] = f"{error.name} is not installed"
            continue
        needed = peer.copies * points.nbytes
        if peer.most_models is not None and len(points) > peer.most_models:
            found.left_out[name] = f"measured with up to {peer.most_models:,} models only"
        elif needed > budget.nbytes:
            found.left_out[name] = f"its {needed / 1e9:.1f} GB of vectors do not fit into memory"
        elif needed > free:
            found.waiting.append(name)
        else:
            took = _build(peer, points, budget.seconds)
            if isinstance(took, str):
                found.left_out[name] = took
            else:
                found.peers[name] = peer
                found.took[name] = {**took, "settings": peer.settings}
                free -= needed
        del peer
    return found


def _build(peer: Peer, points: np.ndarray, most_seconds: float) -> dict[str, Any] | str:
    """How long it took and what it holds; or why it was given up."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status_kib("RssAnon")
    start = time.perf_counter()
    step = peer.piece or len(points)
    for at in range(0, len(points), step):
        peer.add(points[at : at + step])
        seconds = time.perf_counter() - start
        rows = min(at + step, len(points))
        # Later rows take longer than earlier ones, so all of them take longer than this.
        least = seconds * len(points) / rows
        if rows < len(points) and least > most_seconds:
            return (
                f"building it takes more than {least:.0f} s, the limit was {most_seconds:.0f} s "
                f"({rows:,} rows took {seconds:.1f} s)"
            )
    return {
        "seconds": round(seconds, 2),
        "resident_mib": round((status_kib("RssAnon") - before) / 1024, 1),
    }

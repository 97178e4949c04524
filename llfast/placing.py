"""Places in a plane for models, whose coordinates have as many dimensions as there are texts.

coordinates (K, N) ─▶ t-SNE: who is near whom  ┐
                   ─▶ PCA, or classical MDS    ├─▶ places (K, 2)
new models         ─▶ among places that stay   ┘
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from .errors import SpaceError, needed
from .neighbours import nearest_rows

METHODS = ("tsne", "pca", "mds")
FEWEST = {"tsne": 4, "pca": 2, "mds": 2}
_PLACED_PERPLEXITY = 5.0  # of a new model among the others, as openTSNE has it
# Of 67 real models with kin among 90, 42 have one of it nearest; 30 do on a map of perplexity 30,
# and 38 on one of 10.
_PERPLEXITY, _LEAST_PERPLEXITY, _MODELS_A_NEIGHBOUR = 30.0, 5.0, 9


def place(
    coordinates: Float64[np.ndarray, "K N"],
    method: str = "tsne",
    *,
    perplexity: float | None = None,
    seed: int = 0,
) -> Float64[np.ndarray, "K 2"]:
    """Put K points into a plane.

    t-SNE starts from the first two principal components, and takes squared Euclidean distances into
    its Gaussians, as Oyama et al. (arXiv 2502.16173) do. PCA and classical MDS of Euclidean
    distances are one plane found in two ways: places are in the coordinates' unit.

    Args:
        coordinates: of the models.
        method: "tsne", "pca" or "mds".
        perplexity: of t-SNE: about how many neighbours count; see `usable_perplexity`.
        seed: of t-SNE. On one machine, one seed gives one map.

    Raises:
        ValueError: if there is no such method, or the perplexity is below 1.
        SpaceError: if there are too few models, or they are all the same.
        MissingDependencyError: if openTSNE is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    perplexity = usable_perplexity(perplexity, len(coordinates))
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be from 0 to 2^32 - 1, got {seed}")
    if len(coordinates) < FEWEST[method]:
        raise SpaceError(
            f"a map by {method} must have {FEWEST[method]} models, got {len(coordinates)}; score "
            "more of them"
        )
    centred = coordinates - coordinates.mean(axis=0)
    if not np.ptp(coordinates, axis=0).any():
        raise SpaceError(f"models must differ to have places, got {len(centred)} that are the same")
    if method == "mds":
        return classical_mds(np.maximum(_squared_distances(centred), 0))
    first = _first_axes(centred @ centred.T)  # for points are often fewer than dimensions
    return first if method == "pca" else _tsne(centred, first, perplexity, seed)


def usable_perplexity(perplexity: float | None, models: int) -> float:
    """The perplexity of a map of so many models.

    Args:
        perplexity: what is asked for. None: 30, as the paper has it for 1,018 models, or a ninth of
            the models where they are fewer, but at least 5. A third of the other models is the most
            in any case.
        models: how many there are.

    Raises: ValueError if it is below 1.
    """
    if perplexity is None:
        perplexity = min(_PERPLEXITY, max(_LEAST_PERPLEXITY, models / _MODELS_A_NEIGHBOUR))
    if not 1 <= perplexity < math.inf:
        raise ValueError(f"perplexity must be at least 1, and finite, got {perplexity}")
    return max(1.0, min(perplexity, (models - 1) / 3))


def place_among(
    new: Float64[np.ndarray, "M N"],
    coordinates: Float64[np.ndarray, "K N"],
    places: Float64[np.ndarray, "K 2"],
    method: str = "tsne",
    *,
    perplexity: float | None = None,
) -> Float64[np.ndarray, "M 2"]:
    """Put new points among placed ones, which stay where they are.

    By t-SNE each new point goes where its own neighbours pull it; by PCA and MDS it is projected
    onto the plane of the others.

    Args:
        new: coordinates of the new models.
        coordinates: of the placed ones, in the same basis.
        places: of the placed ones.
        method: how they were placed.
        perplexity: the map's; a new model's is at most 5.
    """
    if method != "tsne":
        return _project(new, coordinates, places)
    tsne = _open_tsne()
    affinities = _affinities(coordinates, usable_perplexity(perplexity, len(coordinates)))
    centre = (places.max(axis=0) + places.min(axis=0)) / 2  # openTSNE moves the map there
    embedding = tsne.TSNEEmbedding(places - centre, affinities, random_state=0)
    own = min(_PLACED_PERPLEXITY, affinities.effective_perplexity_)
    placed = np.asarray(embedding.transform(new, perplexity=own))
    found: Float64[np.ndarray, "M 2"] = placed + centre
    return found


def classical_mds(squared_distances: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K 2"]:
    """The plane that keeps squared distances best, by classical scaling.

    Source: Torgerson (1952), Psychometrika 17: eigenvectors of the doubly centred -D/2.
    """
    gram = -0.5 * squared_distances
    gram -= gram.mean(axis=0)
    gram -= gram.mean(axis=1, keepdims=True)
    return _first_axes(gram)


def _first_axes(gram: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K 2"]:
    """The two largest eigenvectors, as long as the square roots of their values."""
    k = len(gram)
    values, vectors = _largest_eigenvectors(gram, min(2, k))
    places: Float64[np.ndarray, "K 2"] = np.zeros((k, 2))
    for axis, number in enumerate(np.argsort(values)[::-1]):
        vector = vectors[:, number]
        # Eigenvectors have no sign of their own: let the largest entry be positive.
        vector = vector * np.sign(vector[np.argmax(np.abs(vector))])
        places[:, axis] = vector * np.sqrt(max(values[number], 0.0))
    return places


def _largest_eigenvectors(gram: Float64[np.ndarray, "K K"], count: int) -> tuple[Any, Any]:
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    k = len(gram)
    if k < 1000:
        values, vectors = eigh(gram, subset_by_index=(k - count, k - 1))
    else:
        start = np.random.default_rng(0).standard_normal(k)  # or it would begin anywhere
        values, vectors = eigsh(gram, count, v0=start)
    return values, vectors


def _squared_distances(coordinates: Float64[np.ndarray, "K N"]) -> Float64[np.ndarray, "K K"]:
    gram = coordinates @ coordinates.T
    sizes = np.diag(gram)
    found: Float64[np.ndarray, "K K"] = sizes[:, None] + sizes - 2 * gram
    return found


def _project(
    new: Float64[np.ndarray, "M N"],
    coordinates: Float64[np.ndarray, "K N"],
    places: Float64[np.ndarray, "K 2"],
) -> Float64[np.ndarray, "M 2"]:
    centre = coordinates.mean(axis=0)
    middle = places.mean(axis=0)
    centred, moved = coordinates - centre, places - middle
    placed: Float64[np.ndarray, "M 2"] = np.tile(middle, (len(new), 1))
    for axis in range(2):
        # The places are the points' shares in a direction, which is the points' shares in places.
        direction = centred.T @ moved[:, axis]
        along = centred @ direction
        if size := float(along @ along):
            scale = float(along @ moved[:, axis]) / size
            placed[:, axis] += scale * ((new - centre) @ direction)
    return placed


def _tsne(
    coordinates: Float64[np.ndarray, "K N"],
    first: Float64[np.ndarray, "K 2"],
    perplexity: float,
    seed: int,
) -> Float64[np.ndarray, "K 2"]:
    tsne = _open_tsne()
    start = tsne.initialization.rescale(first)
    # Models that are the same need a way to part.
    tsne.initialization.jitter(start, inplace=True, random_state=seed)
    affinities = _affinities(coordinates, perplexity)
    fitted = tsne.TSNE(random_state=seed, n_jobs=torch.get_num_threads()).fit(
        affinities=affinities, initialization=start
    )
    return np.asarray(fitted)


def _affinities(coordinates: Float64[np.ndarray, "K N"], perplexity: float) -> Any:
    tsne = _open_tsne()
    neighbours = _Neighbours(coordinates, max(1, int(3 * perplexity)))
    return tsne.affinity.PerplexityBasedNN(
        perplexity=perplexity, knn_index=neighbours, n_jobs=torch.get_num_threads()
    )


class _Neighbours:
    """What openTSNE asks of an index: exact neighbours, and their distances."""

    def __init__(self, coordinates: Float64[np.ndarray, "K N"], k: int) -> None:
        self.data, self.n_samples, self.k = coordinates, len(coordinates), k

    def build(self) -> tuple[np.ndarray, np.ndarray]:
        """(K, k) of the points themselves."""
        indices, squared = nearest_rows(self.data, self.data, self.k, others=True)
        return indices, np.sqrt(squared)

    def query(self, query: Float64[np.ndarray, "M N"], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(M, k) of other points."""
        indices, squared = nearest_rows(query, self.data, k)
        return indices, np.sqrt(squared)


def _open_tsne() -> Any:
    with needed(
        "openTSNE",
        "a map by tsne needs openTSNE; run `pip install 'llfast[map]'`, or use method 'pca'",
    ):
        import openTSNE.initialization
    return openTSNE

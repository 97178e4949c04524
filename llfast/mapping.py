"""A map of models: their places, their neighbours, and lines between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from .errors import SpaceError
from .neighbours import nearest_rows
from .page import ModelMap
from .places import Places
from .placing import FEWEST, place, place_among, usable_perplexity
from .relations import lines_of
from .results import KLEstimate, LogLikelihoodMatrix
from .space import ModelSpace

_NEAREST = 5


def make_map(
    matrix: LogLikelihoodMatrix,
    *,
    method: str = "tsne",
    perplexity: float | None = None,
    seed: int = 0,
    kept: Places | None = None,
    space: ModelSpace | None = None,
) -> ModelMap:
    """Put models into a plane, and find each one's nearest five.

    Args:
        matrix: log-likelihoods of K models.
        method: "tsne", "pca" or "mds", see `placing.place`.
        perplexity: of t-SNE, see `placing.usable_perplexity`.
        seed: of t-SNE.
        kept: places of an earlier map; its method and perplexity count then. Models that it has
            stay where they were, and others are placed among them.
        space: of the same models; None: that of `map_space`.

    Raises:
        ValueError: for a method that there is not.
        SpaceError: if there are too few models, they are all the same, or the earlier map is of
            other texts, or has too few of them.
        MissingDependencyError: without openTSNE, for "tsne".
    Warns: as `ModelSpace.fit` does.
    """
    unit = "bits_per_byte" if matrix.text_bytes.any() else "nats_per_text"
    space = map_space(matrix, kept) if space is None else space
    # Squared distances of these are KL divergences.
    coordinates = space.coordinates * math.sqrt(space.per_nat(unit) / (2 * len(space.basis)))
    if kept is None:
        perplexity = usable_perplexity(perplexity, len(matrix.models))
        places = place(coordinates, method, perplexity=perplexity, seed=seed)
        how = f"seed {seed}"
    else:
        method, perplexity = kept.method, kept.perplexity
        old, new = _kept_rows(matrix, kept)
        places = _place_new(coordinates, old, new, kept)
        how = f"{len(new)} new among {len(old)} that stayed"
    if method == "tsne":
        name = f"t-SNE of perplexity {perplexity:.3g}, {how}"
    else:
        spread, whole = (
            np.square(each - each.mean(axis=0)).sum() for each in (places, coordinates)
        )
        name = f"{method.upper()}, which keeps {spread / whole:.0%} of the variance"
    return ModelMap(
        models=matrix.models,
        places=places,
        bits_per_byte=matrix.bits_per_byte,
        metadata=matrix.metadata,
        nearest=_nearest(space, unit),
        lines=lines_of(matrix.models, matrix.metadata),
        unit=unit,
        method=method,
        perplexity=perplexity,
        notes=(
            f"{len(matrix.models):,} models on {len(matrix.text_bytes):,} texts, by {name}.\n"
            f"KL in {unit.replace('_per_', '/')}, ± standard error, 95 % intervals in brackets."
        ),
    )


def map_space(matrix: LogLikelihoodMatrix, kept: Places | None = None) -> ModelSpace:
    """The space that a map shows: its basis is of all models, or of those that have places.

    Rows of layers are clipped and centred together with whole models.

    Raises: SpaceError if the places are of other texts, or of too few of these models.
    """
    return ModelSpace.fit(matrix, on=None if kept is None else list(_kept_rows(matrix, kept)[0]))


# ------------------------------------------------------------------ inside


def _kept_rows(
    matrix: LogLikelihoodMatrix, kept: Places
) -> tuple[dict[int, tuple[float, float]], list[int]]:
    """The rows that have a place, and which; and the rows that have none."""
    ours, theirs = ((each.textset_digest, each.convention) for each in (matrix, kept))
    if ours != theirs:
        raise SpaceError(
            f"places must be those of models on text set {ours[0][:12]} under {ours[1]!r}, got "
            f"{theirs[0][:12]} under {theirs[1]!r}; write them to another file"
        )
    keys = list(zip(matrix.models, matrix.revisions, strict=True))
    old = {row: kept.places[key] for row, key in enumerate(keys) if key in kept.places}
    if len(old) < FEWEST[kept.method]:
        raise SpaceError(
            f"places must be those of {FEWEST[kept.method]} models of the store, got "
            f"{len(old)} of them"
        )
    return old, [row for row in range(len(keys)) if row not in old]


def _place_new(
    coordinates: Float64[np.ndarray, "K N"],
    old: Mapping[int, tuple[float, float]],
    new: Sequence[int],
    kept: Places,
) -> Float64[np.ndarray, "K 2"]:
    rows = list(old)
    places = np.empty((len(coordinates), 2))
    places[rows] = list(old.values())
    if new:
        places[new] = place_among(
            coordinates[new],
            coordinates[rows],
            places[rows],
            kept.method,
            perplexity=kept.perplexity,
        )
    return places


def _nearest(space: ModelSpace, unit: str) -> list[list[tuple[int, KLEstimate]]]:
    """The nearest others of each model."""
    points, dtypes = space.coordinates, space.dtypes
    indices, _ = nearest_rows(points, points, _NEAREST, others=True)
    return [
        [
            (other, space.kl_from(points[row] - points[other], (dtypes[row], dtypes[other]), unit))
            for other in near
        ]
        for row, near in enumerate(indices.tolist())
    ]

"""KL divergence by relation: how far parents are from children, siblings from each other.

metadata ─▶ pairs by relation ─▶ KL of each ─▶ quartiles
families, or models, drawn again ─▶ the same pairs, weighted ─▶ their intervals
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from .errors import LlfastWarning, SpaceError
from .intervals import half_variances
from .relations import family_of, is_layer, related_pairs
from .results import LogLikelihoodMatrix
from .space import ModelSpace
from .store import Store

# Medians in bits/byte on 10,000 texts of the Pile, from Kishino et al., arXiv 2505.15353.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "adjacent layers": {"adjacent layers": 3.0},
    "adjacent steps": {"late": 0.011, "early": 0.067},
    "parent-child": {"fine-tune to parent": 0.40},
    "same family": {"same type": 0.95},
    "random": {"random": 2.2},
}
_SHARES = np.array([0.25, 0.5, 0.75])
_RESAMPLES = 2000
_CONFIDENCE = 0.95
_LEAST_DRAWN = 5
_BLOCK_VALUES = 1 << 17  # differences worked on at once


@dataclass(frozen=True, slots=True)
class Quartile:
    """A quartile of the KL divergences of a relation, in bits per byte.

    Attributes:
        value: of the pairs that were used.
        interval: lower and upper end of its 95 % interval; NaN where it is not known.
    """

    value: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        known = "" if math.isnan(low) else f" ({low:.3g} to {high:.3g})"
        return f"{self.value:.3g}{known}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelationKL:
    """The KL divergences of the pairs of one relation.

    Attributes:
        relation: one of `relations.RELATIONS`.
        pairs: how many there are.
        kl: (P,) of those that were used, bits per byte, in rising order.
        first_quartile: a quarter of the pairs is nearer.
        median: half of them is.
        third_quartile: three quarters are.
        drawn: what was drawn again for the intervals: "families" or "models"; None if there were
            too few.
        published: medians of the paper, bits per byte, by what it calls them.
    """

    relation: str
    pairs: int
    kl: Float64[np.ndarray, " P"]
    first_quartile: Quartile
    median: Quartile
    third_quartile: Quartile
    drawn: str | None
    published: Mapping[str, float]

    def summary(self) -> dict[str, Any]:
        """What programs are told of it."""
        return {
            "relation": self.relation,
            "pairs": self.pairs,
            "used": len(self.kl),
            "first_quartile": self.first_quartile,
            "median": self.median,
            "third_quartile": self.third_quartile,
            "drawn": self.drawn,
            "published": dict(self.published),
            "unit": "bits_per_byte",
        }


def compare_store(
    store: str | os.PathLike[str],
    *,
    textset: str | None = None,
    convention: str | None = None,
    dtype: str | None = None,
    newest: bool = False,
) -> list[RelationKL]:
    """Compare the models of a store, and the layers of those that have any there.

    Args:
        store: the folder of results, or s3://bucket/prefix.
        textset: the start of a text set's digest, for a store with several.
        convention: only results under this convention.
        dtype: only models that ran in it.
        newest: of several rows of one model, take the newest.

    Raises: as `compare_relations` and `Store.matrix` say.
    """
    duplicates = "newest" if newest else "error"
    matrix = Store(store).matrix(textset, convention, dtype, duplicates=duplicates, layers=True)
    return compare_relations(matrix)


def compare_relations(
    matrix: LogLikelihoodMatrix,
    *,
    clip_quantile: float | None = 0.02,
    seed: int = 0,
    most_pairs: int = 2000,
) -> list[RelationKL]:
    """KL divergences of models that are related in one way or another.

    Layers are compared in a basis of their own. Early ones give texts log-likelihoods far below
    those of any model: they would be below the models' clip, and the models above the layers'.

    Pairs share models, and models of a family are alike, so pairs are no independent draws. For an
    interval, as many families as the pairs are of are drawn with replacement, 2,000 times. A pair
    between two families counts as often as both were drawn, the product; a pair within one as often
    as that was. A model without a family is one of its own. With fewer than five families, models
    are drawn instead, which says nothing of families that are not there; with fewer than five
    models there is no interval. In simulated collections of 15 families or 30 models, 88 to 99 % of
    intervals hold the true median, and less than 85 % of those from drawing pairs do
    (tests/reference/test_comparison.py); with five families more of them miss it.

    Args:
        matrix: log-likelihoods of K models, whose metadata relates them; see `relations`.
        clip_quantile: see `Basis.fit`.
        seed: of all draws.
        most_pairs: of a relation with more pairs, so many are drawn.

    Returns: what was found, one a relation that has a pair; layers last.

    Raises:
        SpaceError: if there are fewer than two models, none of them are related, or the bytes of
            the texts are not known.
        ValueError: if `clip_quantile` is outside [0, 1), or `most_pairs` is below 1.
    Warns: LlfastWarning if part of the metadata relates no models, and as `ModelSpace.fit` does.
    Source: Kishino et al., arXiv 2505.15353 (the comparison); Snijders & Borgatti (1999),
        Connections 22, 161-170, and Owen (2007), Ann. Appl. Stat. 1, 386-411 (the interval).
    """
    if most_pairs < 1:
        raise ValueError(f"most_pairs must be at least 1, got {most_pairs}")
    if len(matrix) < 2:
        raise SpaceError(f"models must be at least two to be compared, got {len(matrix)}")
    layered = np.array([is_layer(each) for each in matrix.metadata])
    found: list[RelationKL] = []
    ignored: Counter[str] = Counter()
    for rows in (np.flatnonzero(~layered), np.flatnonzero(layered)):
        names = [matrix.models[row] for row in rows]
        metadata = [matrix.metadata[row] for row in rows]
        related = related_pairs(names, metadata, most_pairs=most_pairs, seed=seed)
        ignored.update(related.ignored)
        if related.pairs:
            space = ModelSpace.fit(matrix.select(rows.tolist()), clip_quantile)
            found += [
                _compare(space, name, np.array(pairs), related.totals[name], seed)
                for name, pairs in related.pairs.items()
            ]
    if not found:
        raise SpaceError(
            "metadata must relate at least two of the models, got none that are; say family, "
            "parents, run and step, or quantised_from where they are scored"
        )
    if ignored:
        listed = ", ".join(f"{reason}: {count:,}" for reason, count in ignored.items())
        warnings.warn(f"not all metadata relates models; {listed}", LlfastWarning, stacklevel=2)
    return found


def _compare(
    space: ModelSpace, relation: str, pairs: Int64[np.ndarray, "P 2"], total: int, seed: int
) -> RelationKL:
    kl = _kl(space, pairs)
    order = np.argsort(kl, kind="stable")
    kl, pairs = kl[order], pairs[order]
    drawn, units = _units(space, pairs)
    lows, highs = np.full((2, len(_SHARES)), math.nan)
    if drawn is not None:
        tail = (1 - _CONFIDENCE) / 2
        lows, highs = np.quantile(_draw(kl, units, seed), [tail, 1 - tail], axis=0)
    first, median, third = (
        Quartile(float(value), (float(low), float(high)))
        for value, low, high in zip(np.quantile(kl, _SHARES), lows, highs, strict=True)
    )
    return RelationKL(
        relation=relation,
        pairs=total,
        kl=kl,
        first_quartile=first,
        median=median,
        third_quartile=third,
        drawn=drawn,
        published=PUBLISHED.get(relation, {}),
    )


def _kl(space: ModelSpace, pairs: Int64[np.ndarray, "P 2"]) -> Float64[np.ndarray, " P"]:
    """KL of each pair in bits per byte, by explicit differences."""
    factor = space.per_nat("bits_per_byte")
    step = max(1, _BLOCK_VALUES // space.coordinates.shape[1])
    blocks = []
    for start in range(0, len(pairs), step):
        a, b = pairs[start : start + step].T
        blocks.append(half_variances(space.coordinates[a] - space.coordinates[b]))
    return np.concatenate(blocks) * factor


# ------------------------------------------------------------------ intervals


def _units(
    space: ModelSpace, pairs: Int64[np.ndarray, "P 2"]
) -> tuple[str | None, Int64[np.ndarray, "P 2"]]:
    """What is drawn again, and the numbers of what each pair is of.

    Numbers, and so draws, do not depend on the order of the models.
    """
    rows = sorted(np.unique(pairs).tolist(), key=space.models.__getitem__)
    alone = {row: row for row in rows}
    families = {row: family_of(space.metadata[row]) or row for row in rows}
    for drawn, units in (("families", families), ("models", alone)):
        numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units.values()))}
        known = drawn == "models" or units != alone
        if known and len(numbers) >= _LEAST_DRAWN:
            return drawn, np.array([[numbers[units[row]] for row in pair] for pair in pairs])
    return None, pairs


def _draw(
    kl: Float64[np.ndarray, " P"], units: Int64[np.ndarray, "P 2"], seed: int
) -> Float64[np.ndarray, "draws 3"]:
    """Quartiles of rising values under units that are drawn with replacement."""
    a, b = units.T
    count = int(units.max()) + 1
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(_RESAMPLES):
        times = rng.multinomial(count, np.full(count, 1 / count))
        ends = np.where(a == b, times[a], times[a] * times[b]).cumsum()
        if ends[-1]:  # else no pair was drawn
            found.append(_weighted_quantiles(kl, ends))
    return np.array(found)


def _weighted_quantiles(
    values: Float64[np.ndarray, " P"], ends: Int64[np.ndarray, " P"]
) -> Float64[np.ndarray, " 3"]:
    """Linear quartiles of rising values, each there as often as `ends` rises at it."""
    places = _SHARES * (ends[-1] - 1)
    low = values[np.searchsorted(ends, np.floor(places), side="right")]
    high = values[np.searchsorted(ends, np.ceil(places), side="right")]
    found: Float64[np.ndarray, " 3"] = low + (high - low) * (places - np.floor(places))
    return found

"""What a synthetic collection is like, beside what was published of real ones.

Clip, centring and divergences are llfast's own, so that what is printed is what a search will see.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from synthetic_lineage import (
    CHECKPOINT,
    CHECKPOINTS,
    DUPLICATE,
    FINE_TUNE,
    MEAN_BYTES,
    QUANTISED,
    RELATIONS,
    SEED,
    SIZE,
    Lineage,
    family_sizes,
)

from llfast import LogLikelihoodMatrix, ModelSpace

if TYPE_CHECKING:
    from synthetic import Collection

PUBLISHED = {  # medians in bits/byte, arXiv 2505.15353
    "late checkpoint step": 0.011,
    "early checkpoint step": 0.067,
    "seed": 0.12,
    "size": 0.48,
    "fine-tune to parent": 0.40,
    "same family": 0.95,
    "random pairs": 2.2,
}
PUBLISHED_DIMENSIONS = {0.9: 42}  # of 1,018 models, arXiv 2502.16173
EARLY, LATE = 0.25, 0.5  # a step is early or late by the share of the training at its beginning
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
WHOLE = 3000  # collections up to this size are described whole, larger ones by a sample
SAMPLE = 1000


def make_pairs(lineage: Lineage, most: int = 300, seed: int = 0) -> dict[str, np.ndarray]:
    """Pairs (P, 2) of models by how they are related, at most so many of each kind, drawn."""
    rng = np.random.default_rng(seed)
    found = {}
    steps = np.flatnonzero(lineage.relation == CHECKPOINT)
    steps = steps[np.lexsort((lineage.amount[steps], lineage.parent[steps]))]
    ahead = np.stack([steps[:-1], steps[1:]], axis=1)
    begins, ends = lineage.amount[ahead].T
    parents = lineage.parent[ahead]
    next_to = (parents[:, 0] == parents[:, 1]) & (ends - begins < 1.5 / (CHECKPOINTS + 1))
    ahead, begins = ahead[next_to], begins[next_to]
    found["late checkpoint step"] = ahead[begins >= LATE]
    found["early checkpoint step"] = ahead[begins < EARLY]
    found["seed"] = _from_scratch(lineage, SEED)
    found["size"] = _from_scratch(lineage, SIZE)
    for kind, relation in (
        ("fine-tune to parent", FINE_TUNE),
        ("quantised twin", QUANTISED),
        ("duplicate", DUPLICATE),
    ):
        models = np.flatnonzero(lineage.relation == relation)
        found[kind] = np.stack([models, lineage.parent[models]], axis=1)
    sizes = np.diff(lineage.starts).astype(np.float64)
    ways = sizes * (sizes - 1)
    found["same family"] = np.empty((0, 2), np.int64)
    if ways.any():
        families = rng.choice(len(sizes), 2 * most, p=ways / ways.sum())
        inside = rng.random((len(families), 2)) * sizes[families, None]
        found["same family"] = lineage.starts[families, None] + inside.astype(np.int64)
    found["random pairs"] = rng.integers(0, len(lineage), (2 * most, 2))
    return {
        kind: rng.permutation(pairs[pairs[:, 0] != pairs[:, 1]])[:most]
        for kind, pairs in found.items()
    }


def fit(collection: Collection, models: np.ndarray) -> ModelSpace:
    """The space of some models of a collection, under their names."""
    names, metadata = collection.describe(models)
    text_bytes = np.full(collection.recipe.texts, MEAN_BYTES)
    values = collection.values(models)
    return ModelSpace.fit(LogLikelihoodMatrix(names, values, text_bytes, metadata))


def dimensions(points: np.ndarray) -> dict[float, int]:
    """How many principal directions hold these shares of the variance of (K, N) points."""
    points = points - points.mean(axis=0)
    variances = np.sort(np.linalg.eigvalsh(points @ points.T))[::-1]
    held = np.cumsum(variances) / variances.sum()
    return {share: int(np.searchsorted(held, share)) + 1 for share in SHARES}


def divergences(space: ModelSpace, names: dict[int, str], pairs: np.ndarray) -> np.ndarray:
    """(P,) KL of pairs in bits/byte."""
    return np.array([space.kl(names[a], names[b]).value for a, b in pairs.tolist()])


def kurtosis(space: ModelSpace, names: dict[int, str], pairs: np.ndarray) -> np.ndarray:
    """(P,) kurtosis over texts of the difference of pairs; 3 if it were normal."""
    differences = np.array(
        [space.point(names[a]) - space.point(names[b]) for a, b in pairs.tolist()]
    )
    return (differences**4).mean(axis=1) / (differences**2).mean(axis=1) ** 2


def report(collection: Collection) -> Iterator[str]:
    """Lines of a description, as they are known."""
    recipe = collection.recipe
    sizes = family_sizes(recipe)
    yield f"{recipe.models:,} models x {recipe.texts:,} texts, seed {recipe.seed}"
    largest = " ".join(f"{size:,}" for size in sizes[:10])
    alone = int((sizes == 1).sum())
    yield f"families: {len(sizes):,}, of one model {alone:,}; largest {largest}"
    relations = np.bincount(collection.lineage.relation, minlength=len(RELATIONS))
    yield "models by relation: " + ", ".join(
        f"{name} {count:,}" for name, count in zip(RELATIONS, relations, strict=True)
    )
    if recipe.models < 2:
        return
    pairs = make_pairs(collection.lineage)
    order = collection.order()
    sample = order if len(order) <= WHOLE else order[:SAMPLE]
    related = np.concatenate(list(pairs.values())).ravel()
    models = np.concatenate([sample, np.setdiff1d(related, sample)])
    space = fit(collection, models)
    names = dict(zip(models.tolist(), space.models, strict=True))
    yield f"clip {space.clip:.0f} nats (published -1412)"
    yield f"dimensions, of {len(sample):,} models, that hold a share of the variance:"
    for share, count in dimensions(space.coordinates[: len(sample)]).items():
        known = PUBLISHED_DIMENSIONS.get(share)
        yield f"{share:8.0%}{count:6d}" + (f"   published {known}" if known else "")
    tails = np.quantile(kurtosis(space, names, pairs["random pairs"]), (0.25, 0.5, 0.75))
    yield "kurtosis of differences, random pairs: {:.1f} ({:.1f} to {:.1f})".format(
        *tails[[1, 0, 2]]
    )
    yield f"{'KL, bits/byte':24s}{'pairs':>6s}{'25 %':>11s}{'median':>11s}{'75 %':>11s}  published"
    for kind, some in pairs.items():
        if not len(some):
            yield f"{kind:24s}{0:6d}"
            continue
        low, median, high = np.quantile(divergences(space, names, some), (0.25, 0.5, 0.75))
        known = f"{PUBLISHED[kind]:11.3g}" if kind in PUBLISHED else ""
        yield f"{kind:24s}{len(some):6d}{low:11.3g}{median:11.3g}{high:11.3g}{known}"


def _from_scratch(lineage: Lineage, relation: int) -> np.ndarray:
    """(P, 2) pairs in a family that differ in seed alone, or in size."""
    found = []
    for start, end in pairwise(lineage.starts):
        count = int((lineage.parent[start:end] < 0).sum())  # they come first in a family
        a, b = np.triu_indices(count, 1)
        sizes = lineage.size[start : start + count]
        alike = sizes[a] == sizes[b]
        keep = alike if relation == SEED else ~alike
        found.append(start + np.stack([a, b], axis=1)[keep])
    return np.concatenate(found)

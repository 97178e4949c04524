"""Collections of models that do not exist, with the structure of those that do.

    python benchmarks/synthetic.py --models 1000 --families zipf [--out collection.npy]

Prints what a collection is like beside what was published of real ones; `--out` writes its
log-likelihoods as float32, and names and metadata beside them as .jsonl.

    level of each text + effects: family ─▶ size ─▶ seed ─▶ fine-tune ─▶ fine-tune ─▶ twin

An effect is drawn from a seed of its own, a part in directions that all models share (topics; a
decaying spectrum) and a part text by text, both times the text's scale, which has heavy tails. So
any model can be made by itself, from its ancestors' seeds: rows come in a random order of all
models, and nothing but small records grows with the number of models.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_lineage import (
    CHECKPOINT,
    DUPLICATE,
    FAMILIES,
    FINE_TUNE,
    MEAN_BYTES,
    MOST_SIZES,
    QUANTISED,
    Lineage,
    Recipe,
    family_sizes,
    make_lineage,
)

from llfast.files import atomic_write

__all__ = ["MEAN_BYTES", "Collection", "Recipe", "blocks", "family_sizes", "write"]

_NATS = MEAN_BYTES * math.log(2)  # nats a text in a bit a byte

LEVEL, LEVEL_SPREAD = -735.0, 0.31  # log-normal: 2 % of texts are below the published -1412
SCALE_SPREAD, SCALE_WITH_LEVEL = 0.47, 0.4  # log-normal; the kurtosis of differences is 3·e^4s²
DIRECTIONS, DECAY = 192, 1.22  # variances along them fall as j^-1.22
TOPICS, TOPIC_SHARE = 22, 0.4  # of each direction's variance between topics, as many as the Pile's

# Variance of an effect in bits/byte (two that are independent are as far apart in KL), and the
# share of it that is not in the shared directions. Where nothing is, N draws are saved.
FAMILY, FAMILY_OWN = 1.4, 0.03
FAMILY_SPREAD = 0.5  # log-normal: some families are far from all others
SIZE, SIZE_OWN = 0.36, 0.0
SEED, SEED_OWN = 0.12, 0.40
DRIFT, DRIFT_OWN = 0.05, 0.0  # of a training, for a factor e of steps
STEP, STEP_OWN = 0.0095, 0.50  # of a checkpoint at the end of its training
STEP_DECAY = -0.85  # earlier, as a power of the share of the training that was done
TUNE_OWN = 0.06
TUNE_ALIKE, TUNE_ALIKE_OWN = (
    0.4,
    0.0,
)  # of what fine-tuning does to models, the same in all first ones of a family
TWIN_OWN = 1.0  # far below the grid of coefficients, which must so stay what they are

_TILE = 256  # models that are made at once, whatever the caller's blocks are
_CACHED = 1024  # effects that several models share, at most
# Coefficients are multiples of 2^-9 and directions of 2^-8, so products are multiples of 2^-17, and
# sums of such below 128 are exact in float32: in whatever order BLAS adds, the bits are the same.
# The largest of 6 million sums was 72 on its way.
_COEFFICIENT_GRID, _DIRECTION_GRID = 2.0**9, 2.0**8
# What an effect is of, the first word of its seed.
_OF_MODEL, _OF_FAMILY, _OF_SIZE, _OF_DRIFT, _OF_TUNING, _OF_TEXTS, _OF_ORDER = range(10, 17)


class Collection:
    """Models of a recipe by number; `blocks` gives them all."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.lineage: Lineage = make_lineage(recipe)
        self._level, self._scale, self._directions = _texts(recipe)
        spectrum = np.arange(1, DIRECTIONS + 1) ** -DECAY
        self._spread = np.sqrt(spectrum / spectrum.sum())
        self._shared = lru_cache(_CACHED)(self._effect)

    def order(self) -> np.ndarray:
        """(K,) a permutation: numbers of the models in the order of their rows."""
        rng = np.random.default_rng([self.recipe.seed, _OF_ORDER])
        return rng.permutation(self.recipe.models)

    def describe(self, models: Sequence[int]) -> tuple[list[str], list[dict[str, Any]]]:
        """Names and metadata."""
        lineage = self.lineage
        numbers = [int(model) for model in models]
        metadata = [lineage.metadata(each) for each in numbers]
        return [lineage.name(each) for each in numbers], metadata

    def values(self, models: Sequence[int], pool: ThreadPoolExecutor | None = None) -> np.ndarray:
        """(len(models), N) log-likelihoods in nats, float32, all below zero."""
        found = np.empty((len(models), self.recipe.texts), np.float32)
        for start in range(0, len(models), _TILE):
            self._fill(models[start : start + _TILE], found[start : start + _TILE], pool)
        return found

    def _fill(
        self, models: Sequence[int], found: np.ndarray, pool: ThreadPoolExecutor | None
    ) -> None:
        effects = list((pool.map if pool else map)(self._sum_of_effects, models))
        coefficients = np.stack([each[:DIRECTIONS] for each in effects])
        coefficients = np.round(coefficients * _COEFFICIENT_GRID) / _COEFFICIENT_GRID
        np.matmul(coefficients, self._directions, out=found)

        def finish(row: int) -> None:
            values = found[row]
            values += effects[row][DIRECTIONS:]
            values *= self._scale
            values += self._level
            np.minimum(values, -1, out=values)  # of the easiest texts in the best models

        list((pool.map if pool else map)(finish, range(len(models))))

    def _sum_of_effects(self, model: int) -> np.ndarray:
        """(DIRECTIONS + N,) coefficients, and what is the model's own, in standard deviations."""
        lineage, number = self.lineage, int(model)
        if lineage.relation[number] == DUPLICATE:
            number = int(lineage.parent[number])
        chain = [self._effect(_OF_MODEL, number)]
        if lineage.relation[number] == CHECKPOINT:
            ahead = np.float32(-math.log(lineage.amount[number]))
            chain.append(ahead * self._shared(_OF_DRIFT, int(lineage.parent[number])))
        family = int(lineage.family[number])
        while lineage.parent[number] >= 0:
            if self._is_first_tune(number):
                alike = math.sqrt(2 * TUNE_ALIKE * lineage.amount[number])
                chain.append(np.float32(alike) * self._shared(_OF_TUNING, family))
            number = int(lineage.parent[number])
            chain.append(self._shared(_OF_MODEL, number))
        size = int(lineage.size[number])
        chain.append(self._shared(_OF_SIZE, MOST_SIZES * family + size))
        total = self._shared(_OF_FAMILY, family).copy()
        for effect in reversed(chain):  # the eldest first: what relatives share is summed alike
            total[: len(effect)] += effect
        return total

    def _effect(self, kind: int, number: int) -> np.ndarray:
        """(DIRECTIONS + N,) one effect alone, from its own seed; (DIRECTIONS,) if that is all."""
        variance, own = self._amount(kind, number)
        bits = np.random.SFC64(np.random.SeedSequence([self.recipe.seed, kind, number]))
        rng = np.random.Generator(bits)
        if kind == _OF_FAMILY:
            variance *= math.exp(FAMILY_SPREAD * rng.standard_normal())
        size = DIRECTIONS + (self.recipe.texts if own else 0)
        effect = rng.standard_normal(size, dtype=np.float32)
        effect[:DIRECTIONS] *= self._spread
        if kind == _OF_FAMILY:
            # Otherwise half of a collection may by chance lie twice as far out as intended.
            effect[:DIRECTIONS] /= np.linalg.norm(effect[:DIRECTIONS])
        effect[:DIRECTIONS] *= math.sqrt(variance * (1 - own))
        effect[DIRECTIONS:] *= np.float32(math.sqrt(variance * own))
        return effect

    def _amount(self, kind: int, number: int) -> tuple[float, float]:
        """(variance in bits/byte, share of it outside the shared directions) of an effect."""
        if kind != _OF_MODEL:
            return {
                _OF_FAMILY: (FAMILY, FAMILY_OWN),
                _OF_SIZE: (SIZE, SIZE_OWN),
                _OF_DRIFT: (DRIFT, DRIFT_OWN),
                _OF_TUNING: (1.0, TUNE_ALIKE_OWN),
            }[kind]
        if self.lineage.parent[number] < 0:
            return SEED, SEED_OWN
        amount = float(self.lineage.amount[number])
        if self.lineage.relation[number] == CHECKPOINT:
            return STEP * amount**STEP_DECAY, STEP_OWN
        # A KL is half the variance of the difference.
        if self.lineage.relation[number] == QUANTISED:
            return 2 * amount, TWIN_OWN
        new = 1 - TUNE_ALIKE if self._is_first_tune(number) else 1.0
        return 2 * amount * new, TUNE_OWN

    def _is_first_tune(self, number: int) -> bool:
        """Whether a model is a fine-tune of one that was trained from scratch."""
        lineage = self.lineage
        tuned = lineage.relation[number] == FINE_TUNE
        return bool(tuned and lineage.parent[lineage.parent[number]] < 0)


def blocks(
    recipe: Recipe, rows: int = 256
) -> Iterator[tuple[list[str], list[dict[str, Any]], np.ndarray]]:
    """All models in a random order, so many at a time.

    Memory: a block, some 100 MB at 10,000 texts, and 30 bytes a model. Values do not depend on
    `rows`, nor on threads. Parents may come after children.

    Yields: names (rows,), metadata (rows,), log-likelihoods (rows, N) in nats, float32.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    collection = Collection(recipe)
    order = collection.order()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(order), rows):
            models = order[start : start + rows]
            yield *collection.describe(models), collection.values(models, pool)


def write(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write PATH (.npy, (K, N) float32) and names and metadata as .jsonl; each whole or not there.

    Raises:
        ValueError: if PATH is not named .npy.
        OSError: if they cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"path must end in .npy, got {path}")
    head = {"descr": "<f4", "fortran_order": False, "shape": (recipe.models, recipe.texts)}
    with atomic_write(path.with_suffix(".jsonl")) as lines, atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, head)
        for names, metadata, values in blocks(recipe):
            file.write(values.astype("<f4", copy=False).data)
            for name, row in zip(names, metadata, strict=True):
                lines.write(json.dumps({"name": name, **row}).encode() + b"\n")


def _texts(recipe: Recipe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels (N,) in nats, scales (N,) in nats, and directions (DIRECTIONS, N) without unit."""
    n = recipe.texts
    rng = np.random.default_rng([recipe.seed, _OF_TEXTS])
    hardness = rng.standard_normal(n)
    level = LEVEL * np.exp(LEVEL_SPREAD * hardness)
    unlike = math.sqrt(1 - SCALE_WITH_LEVEL**2) * rng.standard_normal(n)
    scale = np.exp(SCALE_SPREAD * (SCALE_WITH_LEVEL * hardness + unlike))
    topics = rng.choice(TOPICS, n, p=_topic_shares())
    between = rng.standard_normal((DIRECTIONS, TOPICS))[:, topics]
    within = rng.standard_normal((DIRECTIONS, n))
    directions = math.sqrt(TOPIC_SHARE) * between + math.sqrt(1 - TOPIC_SHARE) * within
    # The first: weaker models lose on a text in proportion to what it costs, so means differ.
    directions[0] = level / scale
    # Texts below the clip count for nothing later: scales are set by the others.
    kept = level > np.quantile(level, 0.02)
    weighed = scale * kept
    directions[1:] -= (directions[1:] @ weighed / weighed.sum())[:, None]
    scale *= math.sqrt(_NATS / np.square(scale[kept]).mean())
    directions *= math.sqrt(_NATS) / (directions * scale)[:, kept].std(axis=1, keepdims=True)
    directions = np.round(directions * _DIRECTION_GRID) / _DIRECTION_GRID
    return level.astype(np.float32), scale.astype(np.float32), directions.astype(np.float32)


def _topic_shares() -> np.ndarray:
    shares = 1 / np.arange(1, TOPICS + 1)
    return shares / shares.sum()


def main() -> None:
    """Describe a collection, and write it if asked to."""
    from synthetic_report import report

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--families", choices=FAMILIES, default="zipf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=".npy; names and metadata go beside it as .jsonl")
    options = parser.parse_args()
    recipe = Recipe(
        models=options.models, texts=options.texts, seed=options.seed, families=options.families
    )
    for line in report(Collection(recipe)):
        print(line, flush=True)
    if options.out:
        write(recipe, options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

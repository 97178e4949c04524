"""Who descends from whom in a synthetic collection, and what each model is called.

Only small records are kept, some 30 bytes a model; vectors are made from them by `synthetic.py`.
Models are numbered family by family. Within a family come models trained from scratch (sizes, then
further seeds), checkpoints of their training, fine-tunes by depth, re-uploads, quantised twins.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

MEAN_BYTES = 972.3188  # of a text, as published (arXiv 2502.16173)

RELATIONS = ("base", "size", "seed", "checkpoint", "fine-tune", "duplicate", "quantised")
BASE, SIZE, SEED, CHECKPOINT, FINE_TUNE, DUPLICATE, QUANTISED = range(7)

FAMILIES = ("zipf", "half")
ZIPF_EXPONENT = 1.1  # the n-th largest family has a share of n^-1.1
FAMILIES_EXPONENT = 0.75  # K models have K^0.75 families: 178 of 1,000, 31,623 of 1,000,000

# Shares of what is not the first model of a size; what is left over are fine-tunes.
SHARES = {SEED: 0.05, CHECKPOINT: 0.09, DUPLICATE: 0.05, QUANTISED: 0.08}
MOST_SEEDS = 9  # further ones, of a size
CHECKPOINTS = 15  # of one training; the 16th step is the model itself
LAST_STEP = 143_000
DEPTHS = (0.70, 0.20, 0.07, 0.03)  # shares of fine-tunes by how many are between them and a base
# KL of a twin to its source in bits/byte, log-uniform: texts are a sample, so what comes out
# strays by some ten percent, and stays within 1e-5..1e-3.
TWIN_KL = (1.3e-5, 7e-4)

_LADDER = {
    "70m": 70e6,
    "160m": 160e6,
    "410m": 410e6,
    "1.4b": 1.4e9,
    "3b": 3.2e9,
    "7b": 6.7e9,
    "13b": 13e9,
    "34b": 34e9,
    "70b": 70e9,
}
_SIZES = tuple(_LADDER)
MOST_SIZES = 8
_DTYPES = ("bfloat16", "bfloat16", "float16", "float32")
_TASKS = ("instruct", "chat", "code", "math", "sft", "roleplay", "medical", "german")
_SYLLABLES = "ba co di fu ga hi jo ke lu mo ni po ra si tu ve".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a collection is made from; the same recipe gives the same numbers.

    Attributes:
        models: K.
        texts: N; scales are set by what is drawn for them, so a few will not do.
        seed: of everything that is drawn.
        families: "zipf", K^0.75 families whose n-th largest has a share of n^-1.1; or "half", half
            of the models in one family and the others as in "zipf".
    """

    models: int
    texts: int = 10_000
    seed: int = 0
    families: str = "zipf"

    def __post_init__(self) -> None:
        for name, least in (("models", 1), ("texts", 20), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.families not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"families must be one of {known}, got {self.families!r}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lineage:
    """Records of K models, one number each.

    Attributes:
        starts: (F + 1,) first model of each family, and K.
        family: (K,) number of the family.
        relation: (K,) index into `RELATIONS`.
        size: (K,) which of the family's sizes, from 0.
        parent: (K,) what it was made from, or is a checkpoint of; -1 if trained from scratch.
        amount: (K,) KL to the parent in bits/byte that is aimed at: fine-tunes and twins. For
            checkpoints the share of the training that was done, 0 to 1.
        ladder: (F, 8) indices of the sizes of each family, small to large.
    """

    starts: np.ndarray
    family: np.ndarray
    relation: np.ndarray
    size: np.ndarray
    parent: np.ndarray
    amount: np.ndarray
    ladder: np.ndarray

    def __len__(self) -> int:
        return len(self.family)

    def name(self, model: int) -> str:
        """A hub's id, unique: the model's number is in it wherever a user chose the name."""
        family, parent = int(self.family[model]), int(self.parent[model])
        relation = self.relation[model]
        if parent < 0:
            stem = _stem(family)
            name = f"{stem}-ai/{stem}-{self._size_name(model)}"
            return f"{name}-seed{model}" if relation == SEED else name
        if relation == CHECKPOINT:
            return f"{self.name(parent)}-step{self._step(model)}"
        source = self.name(parent).partition("/")[2]
        if relation == DUPLICATE:
            return f"mirror-{model}/{source}"
        if relation == QUANTISED:
            return f"{source.partition('-')[0]}-quants/{source}-{self._dtype(model)}-{model}"
        task = _TASKS[model % len(_TASKS)]
        stem = f"{_stem(family)}-{self._size_name(model)}"
        return f"user-{model % 977}/{stem}-{task}-{model}"

    def metadata(self, model: int) -> dict[str, Any]:
        """Family, parent, relation, parameters, dtype and training step of a model."""
        parent = int(self.parent[model])
        checkpoint = self.relation[model] == CHECKPOINT
        return {
            "family": _stem(int(self.family[model])),
            "parent": self.name(parent) if parent >= 0 else None,
            "relation": RELATIONS[self.relation[model]],
            "parameters": int(_LADDER[self._size_name(model)]),
            "dtype": self._dtype(model),
            "step": self._step(model) if checkpoint else None,
        }

    def _size_name(self, model: int) -> str:
        return _SIZES[self.ladder[self.family[model], self.size[model]]]

    def _step(self, model: int) -> int:
        return round(float(self.amount[model]) * LAST_STEP)

    def _dtype(self, model: int) -> str:
        if self.relation[model] == QUANTISED:
            return "int8" if self.amount[model] < 1e-4 else "int4"
        if self.relation[model] == DUPLICATE:
            return self._dtype(int(self.parent[model]))
        return _DTYPES[self.family[model] % len(_DTYPES)]


def family_sizes(recipe: Recipe) -> np.ndarray:
    """(F,) models of each family, the largest first; they sum to K."""
    if recipe.families == "zipf":
        return _zipf(recipe.models)
    others = _zipf(recipe.models - recipe.models // 2)
    return np.concatenate([[recipe.models // 2], others]) if recipe.models > 1 else others


def make_lineage(recipe: Recipe) -> Lineage:
    """Draw all records; a second or so for 100,000 models."""
    sizes = family_sizes(recipe)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    rng = np.random.default_rng([recipe.seed, 1])
    columns = {
        "family": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        "relation": np.empty(recipe.models, np.int8),
        "size": np.empty(recipe.models, np.int8),
        "parent": np.empty(recipe.models, np.int32),
        "amount": np.zeros(recipe.models, np.float32),
    }
    for start, end in pairwise(starts):
        part = {name: column[start:end] for name, column in columns.items()}
        _fill_family(rng, part)
        part["parent"][part["parent"] >= 0] += start
    ladder = np.argsort(rng.random((len(sizes), len(_SIZES))), axis=1)[:, :MOST_SIZES]
    used = np.minimum(_size_counts(sizes), MOST_SIZES)[:, None] > np.arange(MOST_SIZES)
    # The sizes that a family has go from small to large.
    ladder = np.sort(np.where(used, ladder, len(_SIZES)), axis=1).astype(np.int8)
    return Lineage(starts=starts, ladder=ladder, **columns)


def _zipf(models: int) -> np.ndarray:
    """(F,) sizes of families, each at least one, by largest remainders."""
    families = max(1, round(models**FAMILIES_EXPONENT))
    shares = np.arange(1, families + 1) ** -ZIPF_EXPONENT
    low, high = 0.0, 2.0 * models / shares.sum()
    while True:
        factor = (low + high) / 2
        sizes = np.maximum(1, np.floor(factor * shares)).astype(np.int64)
        left = models - int(sizes.sum())
        # A step of the factor that changes nothing ends it, too, with a few models left over.
        if left == 0 or factor in (low, high):
            break
        low, high = (factor, high) if left > 0 else (low, factor)
    sizes[0] += left
    return sizes


def _size_counts(sizes: np.ndarray) -> np.ndarray:
    """How many sizes families of so many models come in: one of 10 in 3, one of 200 in 8."""
    return np.clip(np.round(sizes**0.4), 1, MOST_SIZES).astype(np.int64)


def _fill_family(rng: np.random.Generator, part: dict[str, np.ndarray]) -> None:
    """Relations, sizes, parents and amounts of a family, in place; parents count from its start."""
    n = len(part["relation"])
    sizes = int(_size_counts(np.array([n]))[0])
    counts = _split(rng, n - sizes, sizes)
    order = [CHECKPOINT, FINE_TUNE, DUPLICATE, QUANTISED]
    relations = [BASE] + [SIZE] * (sizes - 1) + [SEED] * counts[SEED]
    scratch = len(relations)
    part["relation"][:scratch] = relations
    part["size"][:scratch] = np.arange(scratch) % sizes
    part["parent"][:scratch] = -1
    start, tuned_end = scratch, scratch
    for relation in order:
        here = slice(start, start + counts[relation])
        if relation == CHECKPOINT:
            parents, part["amount"][here] = _checkpoints(counts[relation])
        elif relation == FINE_TUNE:
            parents = _tree(rng, scratch, start, counts[relation])
            # Fine-tunes change a model by very different amounts: log-normal, median 0.40.
            part["amount"][here] = 0.40 * np.exp(0.6 * rng.standard_normal(len(parents)))
            tuned_end = here.stop
        else:
            sources = np.concatenate(
                [np.arange(scratch), np.arange(tuned_end - counts[FINE_TUNE], tuned_end)]
            )
            parents = sources[_popular(rng, len(sources), counts[relation])]
        if relation == QUANTISED:
            low, high = np.log(TWIN_KL)
            part["amount"][here] = np.exp(rng.uniform(low, high, len(parents)))
        part["relation"][here], part["parent"][here] = relation, parents
        start = here.stop
    for model in range(scratch, n):  # parents come first, so that theirs is known
        part["size"][model] = part["size"][part["parent"][model]]


def _split(rng: np.random.Generator, left: int, sizes: int) -> dict[int, int]:
    """How many of each relation; what a family cannot have of one kind are fine-tunes."""
    drawn = rng.multinomial(left, [*SHARES.values(), 1 - sum(SHARES.values())])
    counts = dict(zip([*SHARES, FINE_TUNE], map(int, drawn), strict=True))
    most_seeds = MOST_SEEDS * sizes
    most = {SEED: most_seeds, CHECKPOINT: CHECKPOINTS * (sizes + min(counts[SEED], most_seeds))}
    for relation, limit in most.items():
        counts[FINE_TUNE] += max(0, counts[relation] - limit)
        counts[relation] = min(counts[relation], limit)
    return counts


def _checkpoints(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(parents, shares of the training) of checkpoints: whole trainings, and a part of one more.

    Of that one the first and the last steps are there, half and half.
    """
    parents, steps = np.divmod(np.arange(count), CHECKPOINTS)
    whole = count // CHECKPOINTS
    left = count - whole * CHECKPOINTS
    steps[(parents == whole) & (steps >= -(-left // 2))] += CHECKPOINTS - left
    return parents, (steps + 1) / (CHECKPOINTS + 1)


def _tree(rng: np.random.Generator, scratch: int, start: int, count: int) -> np.ndarray:
    """(count,) parents of fine-tunes: one depth after the other, popular parents having more."""
    parents, above, first = [], (0, scratch), start
    for of_depth in map(int, rng.multinomial(count, DEPTHS)):
        parents.append(above[0] + _popular(rng, above[1] - above[0], of_depth))
        if of_depth:
            above, first = (first, first + of_depth), first + of_depth
    return np.concatenate(parents)


def _popular(rng: np.random.Generator, choices: int, count: int) -> np.ndarray:
    """(count,) draws from 0..choices - 1: the first half gets 71 % of them."""
    return np.floor(choices * rng.random(count) ** 2).astype(np.int64)


def _stem(family: int) -> str:
    """A family's name, another for each: its number in syllables."""
    digits = [family % 16]
    while family := family // 16:
        digits.append(family % 16)
    return "".join(_SYLLABLES[digit] for digit in [*digits, 0][: max(2, len(digits))])

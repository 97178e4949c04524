"""Which models are related, and how, as their metadata has it.

    family, parents, run, step, quantised_from, layer, layer_of ─▶ pairs of models by relation

A pair has the first relation of `RELATIONS` that fits. Checkpoints of one run are earlier and later
selves of one model: they are no siblings, no family and no strangers. A row of a layer is related
to other layers of its model alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int8, Int64

RELATIONS = (
    "quantised twin",  # one is `quantised_from` the other
    "adjacent layers",  # of one model (`layer_of`), one `layer` after the other
    "adjacent steps",  # of one `run`, and no `step` between theirs is there
    "parent-child",  # one is among the `parents` of the other
    "siblings",  # they have one of their `parents` in common
    "same family",  # they have one `family`
    "random",  # both have a `family`, and not the same
)
_NONE, _TWIN, _LAYERS, _STEPS, _PARENT, _SIBLINGS, _FAMILY, _RANDOM = range(len(RELATIONS) + 1)

_Rows = Int64[np.ndarray, " _"]
_Metadata = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RelatedPairs:
    """Pairs of models by relation.

    Attributes:
        pairs: numbers of two models, the smaller first; only relations that have a pair.
        totals: how many pairs there are, where `pairs` may hold a part of them.
        ignored: what in the metadata relates no models, and how often.
    """

    pairs: dict[str, list[tuple[int, int]]]
    totals: dict[str, int]
    ignored: dict[str, int]


def related_pairs(
    models: Sequence[str], metadata: _Metadata, *, most_pairs: int = 2000, seed: int = 0
) -> RelatedPairs:
    """Find the pairs of every relation.

    Args:
        models: K unique names.
        metadata: one mapping a model; any key may be missing, and hold anything.
        most_pairs: of a relation with more, so many are drawn. Which does not depend on the order
            of the models.
        seed: of that draw.
    """
    order = sorted(range(len(models)), key=models.__getitem__)
    ignored: Counter[str] = Counter()
    near = _near([models[row] for row in order], [metadata[row] for row in order], ignored)
    counts = np.zeros((len(models), len(RELATIONS) + 1), dtype=np.int64)
    for row in range(len(models)):
        counts[row] = np.bincount(_relations(near, row), minlength=len(RELATIONS) + 1)
    totals = {name: int(counts[:, code].sum()) for code, name in enumerate(RELATIONS, 1)}
    # A pair is a row, and a place among the later rows that have the relation to it.
    wanted: defaultdict[int, list[tuple[int, _Rows]]] = defaultdict(list)
    rng = np.random.default_rng(seed)
    for code, total in enumerate(totals.values(), 1):
        if total > most_pairs:  # of 20,000 models there may be 200 million, which are not listed
            numbers = np.sort(rng.choice(total, most_pairs, replace=False))
        else:
            numbers = np.arange(total)
        ends = counts[:, code].cumsum()
        rows = np.searchsorted(ends, numbers, side="right")
        places = numbers - (ends - counts[:, code])[rows]
        found, starts = np.unique(rows, return_index=True)
        for row, own in zip(found.tolist(), np.split(places, starts[1:]), strict=False):
            wanted[row].append((code, own))
    pairs: dict[str, list[tuple[int, int]]] = {name: [] for name in RELATIONS if totals[name]}
    for row, each in wanted.items():
        relations = _relations(near, row)
        for code, places in each:
            for other in (row + 1 + np.flatnonzero(relations == code)[places]).tolist():
                a, b = sorted((order[row], order[other]))
                pairs[RELATIONS[code - 1]].append((a, b))
    return RelatedPairs(
        pairs=pairs,
        totals={name: totals[name] for name in pairs},
        ignored=dict(ignored),
    )


def lines_of(models: Sequence[str], metadata: _Metadata) -> list[list[int]]:
    """Rows along each run, by step, and through each model's layers; and from parent to child."""
    ignored: Counter[str] = Counter()
    whole = {models[row]: row for row, each in enumerate(metadata) if not is_layer(each)}
    layered = [row for row, each in enumerate(metadata) if is_layer(each)]
    lines = []
    for rows, group, number in ((whole.values(), "run", "step"), (layered, "layer_of", "layer")):
        for own in _grouped((row, _text(metadata[row], group, ignored)) for row in rows).values():
            places = _grouped(
                (row, _integer(metadata[row], number, ignored)) for row in own.tolist()
            )
            line = [row for place in sorted(places) for row in places[place].tolist()]
            lines += [line] if len(line) > 1 else []
    parents = _named("parents", models, metadata, whole, ignored)
    return lines + [[parent, child] for child, parent in parents]


def is_layer(metadata: Mapping[str, Any]) -> bool:
    """Whether a row is a layer's, and not a whole model's."""
    return metadata.get("layer") is not None or metadata.get("layer_of") is not None


def family_of(metadata: Mapping[str, Any]) -> str | None:
    """The family of a model, if it says one."""
    family = metadata.get("family")
    return family if isinstance(family, str) and family else None


# ------------------------------------------------------------------ inside


def _relations(near: list[list[tuple[_Rows, int]]], row: int) -> Int8[np.ndarray, " later"]:
    """What a row is to each later one: the number of a relation, or 0."""
    relations = np.zeros(len(near), dtype=np.int8)
    for others, code in near[row]:
        relations[others] = code
    return relations[row + 1 :]


def _near(
    models: Sequence[str], metadata: _Metadata, ignored: Counter[str]
) -> list[list[tuple[_Rows, int]]]:
    """For each row, others and what it is to them; what comes later counts."""
    near: list[list[tuple[_Rows, int]]] = [[] for _ in models]

    def relate(some: _Rows, others: _Rows, code: int) -> None:
        for row in some.tolist():
            near[row].append((others, code))

    def relate_next(by_place: Mapping[int, _Rows], code: int, furthest: int | None = None) -> None:
        for place, following in pairwise(sorted(by_place)):
            if furthest is None or following - place <= furthest:
                relate(by_place[place], by_place[following], code)
                relate(by_place[following], by_place[place], code)

    whole = {models[row]: row for row, each in enumerate(metadata) if not is_layer(each)}
    families = _grouped((row, family_of(metadata[row])) for row in whole.values())
    known = np.array(sorted(row for rows in families.values() for row in rows), dtype=np.int64)
    for rows in families.values():
        relate(rows, known, _RANDOM)
        relate(rows, rows, _FAMILY)
    ignored["models without a family"] = len(whole) - len(known)

    parents = _named("parents", models, metadata, whole, ignored)
    children = _grouped((child, parent) for child, parent in parents)
    for rows in children.values():
        relate(rows, rows, _SIBLINGS)
    runs = _grouped((row, _text(metadata[row], "run", ignored)) for row in whole.values())
    for rows in runs.values():
        relate(rows, rows, _NONE)
    for parent, rows in children.items():
        relate(np.array([parent]), rows, _PARENT)
        relate(rows, np.array([parent]), _PARENT)
    for rows in runs.values():
        steps = _grouped((row, _integer(metadata[row], "step", ignored)) for row in rows.tolist())
        relate_next(steps, _STEPS)

    layered = [row for row in range(len(models)) if is_layer(metadata[row])]
    owners = _grouped((row, _text(metadata[row], "layer_of", ignored)) for row in layered)
    for rows in owners.values():
        layers = _grouped((row, _integer(metadata[row], "layer", ignored)) for row in rows.tolist())
        relate_next(layers, _LAYERS, furthest=1)

    for copy, original in _named("quantised_from", models, metadata, whole, ignored):
        relate(np.array([copy]), np.array([original]), _TWIN)
        relate(np.array([original]), np.array([copy]), _TWIN)
    for reason in [reason for reason, count in ignored.items() if not count]:
        del ignored[reason]
    return near


def _grouped(keyed: Iterable[tuple[int, Any]]) -> dict[Any, _Rows]:
    """Rows by key, those without one left out."""
    found: defaultdict[Hashable, list[int]] = defaultdict(list)
    for row, key in keyed:
        if key is not None:
            found[key].append(row)
    return {key: np.array(rows, dtype=np.int64) for key, rows in found.items()}


def _named(
    key: str,
    models: Sequence[str],
    metadata: _Metadata,
    whole: Mapping[str, int],
    ignored: Counter[str],
) -> list[tuple[int, int]]:
    """Rows, and the rows of the models that they name under a key."""
    found: dict[tuple[int, int], None] = {}
    for row in whole.values():
        value = metadata[row].get(key)
        for name in value if isinstance(value, list | tuple) else [value]:
            if name is None or name == "":
                continue
            if not isinstance(name, str):
                ignored["values of another kind"] += 1
            elif name == models[row]:
                ignored["models that name themselves"] += 1
            elif name not in whole:
                ignored["names of models that are not there"] += 1
            else:
                found[row, whole[name]] = None
    return list(found)


def _text(metadata: Mapping[str, Any], key: str, ignored: Counter[str]) -> str | None:
    value = metadata.get(key)
    if isinstance(value, str):
        return value or None
    ignored["values of another kind"] += value is not None
    return None


def _integer(metadata: Mapping[str, Any], key: str, ignored: Counter[str]) -> int | None:
    """A whole number, also where it was written as 3.0."""
    value = metadata.get(key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    ignored["values of another kind"] += value is not None
    return None

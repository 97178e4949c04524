"""Synthetic collections as indexes on disk, and what they are asked.

An index's files are written block by block as models are made, so that a collection need not fit
into memory; a folder that the same sources have written is used again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import MEAN_BYTES, Collection, Recipe, blocks
from synthetic_lineage import FINE_TUNE

from llfast.basis import Basis
from llfast.results import LogLikelihoodMatrix, LogLikelihoods
from llfast.search import listing, projection, segment, writer
from llfast.search.models import IndexedModel
from llfast.search.projection import Projection, draw_sample
from llfast.search.segment import Segment
from llfast.search.writer import SegmentWriter

TEXTSET, CONVENTION = "synthetic", "paper"
_MADE_BY = ("synthetic.py", "synthetic_lineage.py", "search_collections.py")


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Count the time in here."""
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start


def build(recipe: Recipe, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a collection's index, and how long each part of building it took."""
    whole = folder / f"{recipe.families}-{recipe.models}x{recipe.texts}"
    made_by = _digest()
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads((whole / "build.json").read_text())
        if facts.pop("made_by") == made_by:
            return whole / facts.pop("segment"), facts
    temporary = folder / f".{whole.name}.tmp"
    for old in (whole, temporary):
        shutil.rmtree(old, ignore_errors=True)
    clock = Clock()
    temporary.mkdir(parents=True)
    name = _write(recipe, temporary, clock)
    seconds = {what: round(each, 2) for what, each in clock.seconds.items()}
    generated = seconds.pop("generate")
    facts = {
        "seconds": round(sum(seconds.values()), 2),
        "parts": seconds,
        "generate_seconds": generated,  # making models up is no part of building an index
    }
    kept = {**facts, "made_by": made_by, "segment": name}
    (temporary / "build.json").write_text(json.dumps(kept))
    temporary.rename(whole)
    return whole / name, facts


def _write(recipe: Recipe, folder: Path, clock: Clock) -> str:
    """Returns: the segment's name in the folder."""
    made = _timed(blocks(recipe), clock)
    most = len(draw_sample(recipe.models, recipe.texts))
    held: list[tuple[list[str], list[dict[str, Any]], np.ndarray]] = []
    while sum(len(names) for names, _, _ in held) < most:
        held.append(next(made))
    with clock("fit"):
        # Rows come in a random order, so the first ones are a sample.
        values = np.concatenate([values for _, _, values in held])[:most].astype(np.float64)
        n = recipe.texts
        matrix = LogLikelihoodMatrix(
            [name for names, _, _ in held for name in names][:most],
            values,
            np.full(n, MEAN_BYTES),
            ids=_ids(n),
            textset_digest=TEXTSET,
            convention=CONVENTION,
        )
        basis = Basis.fit(matrix)
        directions = Projection.fit(basis.place(values))
        del matrix, values
    with SegmentWriter(folder / "new", basis, directions) as writer:
        for names, metadata, values in chain(_emptied(held), made):
            with clock("place, project and write"):
                models = [
                    IndexedModel(name, "", each["dtype"], each)
                    for name, each in zip(names, metadata, strict=True)
                ]
                writer.append(models, basis.place(values.astype(np.float64)))
        with clock("finish"):
            digest = writer.finish({"shards": {}})
            (folder / "new").rename(folder / digest)
    return digest


def _timed(made: Iterator[Any], clock: Clock) -> Iterator[Any]:
    while True:
        with clock("generate"):
            block = next(made, None)
        if block is None:
            return
        yield block


def _emptied(held: list[Any]) -> Iterator[Any]:
    while held:
        yield held.pop(0)


def _digest() -> str:
    """Of the sources that decide what is in a folder."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    paths = [here / name for name in _MADE_BY]
    paths += [Path(each.__file__) for each in (listing, projection, segment, writer)]
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------ questions


@dataclass(frozen=True, eq=False)
class Question:
    """A model whose relatives are asked for.

    Attributes:
        ask: its name, or its log-likelihoods, which llfast has yet to place.
        point: (N,) its coordinates in fp32, which the others are given.
        row: its own row, which is no answer; None if it comes from outside.
    """

    ask: str | LogLikelihoods
    point: np.ndarray
    row: int | None


@dataclass(frozen=True, eq=False)
class Questions:
    """Several that are asked at once.

    Attributes:
        asks: what llfast is asked.
        points: (Q, N) fp32, what the others are asked.
    """

    each: Sequence[Question]
    asks: list[Any] = field(init=False)
    points: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "asks", [question.ask for question in self.each])
        object.__setattr__(self, "points", np.array([question.point for question in self.each]))


def held_in(found: Segment, count: int) -> list[Question]:
    """Models of the collection, asked for by name."""
    rows = np.random.default_rng(1).choice(len(found), min(count, len(found)), replace=False)
    names = found.table["name"]
    return [
        Question(names[row].as_py(), np.array(found.rows.points[row]), row)
        for row in map(int, rows)
    ]


def outside(recipe: Recipe, basis: Basis, count: int) -> list[Question]:
    """Fine-tunes of the collection's models that it does not have, as results.

    What a fine-tune changes is taken from a larger collection of the same texts, where a model of
    another number in the same family was tuned: so nothing of it was drawn for this one.
    """
    larger = Recipe(
        models=recipe.models + recipe.models // 2,
        texts=recipe.texts,
        seed=recipe.seed,
        families=recipe.families,
    )
    other, own = Collection(larger), Collection(recipe)
    starts, family = own.lineage.starts, other.lineage.family
    known = np.flatnonzero((family < len(starts) - 1) & (other.lineage.relation == FINE_TUNE))
    begin, end = starts[family[known]], starts[family[known] + 1]
    tuned = known[(known < begin) | (known >= end)]
    rng = np.random.default_rng(2)
    tuned = rng.choice(tuned, count, replace=len(tuned) < count)
    sources = [int(rng.integers(starts[family[each]], starts[family[each] + 1])) for each in tuned]
    change = other.values(tuned).astype(np.float64) - other.values(other.lineage.parent[tuned])
    values = np.minimum(own.values(sources) + change, -1)
    _, metadata = own.describe(sources)
    found = []
    for number, (row, each) in enumerate(zip(values, metadata, strict=True)):
        result = as_result(f"new-{number}/{each['family']}", row, each["dtype"])
        found.append(Question(result, basis.project(result).astype(np.float32), None))
    return found


def as_result(name: str, values: np.ndarray, dtype: str) -> LogLikelihoods:
    """Log-likelihoods as scoring returns them."""
    n = len(values)
    return LogLikelihoods(
        model=name,
        revision="",
        textset_digest=TEXTSET,
        convention=CONVENTION,
        dtype=dtype,
        scoring_version=0,
        ids=_ids(n),
        loglikelihoods=np.ascontiguousarray(values, dtype=np.float64),
        token_counts=np.full(n, 200),
        text_bytes=np.full(n, round(MEAN_BYTES)),
        truncated=np.zeros(n, dtype=bool),
        token_budgets=np.full(n, 512, dtype=np.int32),
    )


def _ids(n: int) -> tuple[str, ...]:
    """Of the texts: other strings each time, as they are in results from elsewhere."""
    return tuple(f"text {number}" for number in range(n))

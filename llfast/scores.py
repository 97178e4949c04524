"""Benchmark scores of models, from a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import SpaceError
from .importing import parse_name, tell_apart

_MODEL_COLUMNS = ("model", "models", "name")

Scores = dict[str, dict[str, float]]


def read_scores(path: str | Path) -> Scores:
    """Scores by benchmark and model.

    A file whose first column is named model, models or name has a row a model and a column a
    benchmark; any other has a row a benchmark and a column a model. Empty cells, and those that say
    NaN, are scores that are not known. A model that is written `('family', 'org/model')` is
    `org/model`, or `org/model (family)` where several families have it.

    Raises:
        OSError: if the file cannot be read.
        SpaceError: if it is no such table.
    """
    path = Path(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            cells = ([cell.strip() for cell in row] for row in csv.reader(file))
            rows = [row for row in cells if any(row)]
        except (ValueError, csv.Error) as error:
            raise SpaceError(f"{path} must be a CSV file in UTF-8, got {error}") from None
    if len(rows) < 2 or len(rows[0]) < 2:
        raise SpaceError(f"{path} must hold models and benchmarks, got {len(rows)} lines")
    for row in rows:
        if len(row) != len(rows[0]):
            raise SpaceError(
                f"{path} must have {len(rows[0])} cells a row, got {len(row)} in that of {row[0]!r}"
            )
    if rows[0][0].lower() in _MODEL_COLUMNS:
        rows = [list(column) for column in zip(*rows, strict=True)]
    models = _model_names(path, rows[0][1:])
    benchmarks = [row[0] for row in rows[1:]]
    if not all(benchmarks):
        raise SpaceError(f"{path} must name every benchmark, got an empty name")
    if repeated := _repeated(benchmarks):
        raise SpaceError(f"{path} must name each benchmark once, got {repeated!r} again")
    return {
        row[0]: {
            model: score
            for model, cell in zip(models, row[1:], strict=True)
            if (score := _score(path, row[0], model, cell)) is not None
        }
        for row in rows[1:]
    }


def known_scores(
    scores: Mapping[str, float], models: Sequence[str]
) -> tuple[list[int], list[float]]:
    """The rows of the models whose score is known, and their scores."""
    rows = [row for row, model in enumerate(models) if model in scores]
    return rows, [scores[models[row]] for row in rows]


def _model_names(path: Path, cells: Sequence[str]) -> list[str]:
    parsed = [parse_name(cell) for cell in cells]
    names = tell_apart([name for name, _ in parsed], [family for _, family in parsed])
    if repeated := _repeated(names):
        raise SpaceError(f"{path} must name each model once, got {repeated!r} again")
    return names


def _score(path: Path, benchmark: str, model: str, cell: str) -> float | None:
    try:
        score = float(cell) if cell else math.nan
    except ValueError:
        score = math.inf
    if math.isinf(score):
        raise SpaceError(
            f"{path} must hold finite numbers, got {cell!r} for {model!r} on {benchmark!r}"
        )
    return None if math.isnan(score) else score


def _repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None

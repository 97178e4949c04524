"""Read a model x text matrix that was made elsewhere: .csv, .npz or .parquet."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from .errors import SpaceError
from .results import LogLikelihoodMatrix
from .texts import TextSet

IMPORT_UNITS = ("nats", "bits_per_byte")


def import_matrix(
    path: str | Path,
    *,
    unit: str,
    text_bytes: str | float | Path,
    convention: str = "imported",
) -> LogLikelihoodMatrix:
    """Read log-likelihoods or bits per byte of K models on N texts.

    - .csv and .parquet: a row a text, a column a model; an optional first column that is not
      numeric holds the ids. A column named like `('family', 'org/model')` gives the model a family.
    - .npz: `models` (K,) and `values` (K, N), and optionally `ids` (N,) and `families` (K,).

    Args:
        path: the file.
        unit: "nats" (log-likelihoods, which are negative) or "bits_per_byte" (positive); the latter
            become -bits_per_byte * bytes * ln 2 nats.
        text_bytes: how many bytes each text has: one number for all, or a file: a text set
            (.jsonl, whose digest the matrix then takes), or a .csv or .txt with a number a line.
        convention: the name to keep it under.

    Raises:
        OSError: if a file cannot be read.
        SpaceError: if it does not hold such a matrix.
        ValueError: for an unknown unit.
    """
    if unit not in IMPORT_UNITS:
        raise ValueError(f"unit must be one of {', '.join(IMPORT_UNITS)}, got {unit!r}")
    path = Path(path)
    readers = {".csv": _read_csv, ".npz": _read_npz, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"file must be one of {', '.join(readers)}, got {path.name}")
    models, values, ids, families = readers[path.suffix](path)
    n = values.shape[1]
    sizes, texts = _text_bytes(text_bytes, n)
    if texts is not None and ids is not None and set(ids) == set(texts.ids):
        order = {id_: column for column, id_ in enumerate(ids)}
        values = values[:, [order[id_] for id_ in texts.ids]]
    elif texts is not None and ids is not None:
        raise SpaceError(f"{path} must have the ids of the text set {text_bytes}, got others")
    ids = list(texts.ids) if texts is not None else ids or [str(column) for column in range(n)]
    if unit == "bits_per_byte":
        values = -values * sizes * math.log(2.0)
    elif values.max() > 0:
        raise SpaceError(
            f"{path} must hold log-likelihoods of at most 0 nats, got {values.max():g}; is the "
            "unit bits_per_byte?"
        )
    digest = texts.digest if texts is not None else _digest(ids, sizes)
    source = hashlib.sha256(path.read_bytes()).hexdigest()
    return LogLikelihoodMatrix(
        models,
        values,
        sizes,
        [{"family": family} if family else {} for family in families],
        ids=ids,
        groups=texts.groups if texts is not None else None,
        textset_digest=digest,
        convention=convention,
        dtypes=["unknown"] * len(models),
        revisions=[f"import:{source[:16]}"] * len(models),
    )


_Table = tuple[list[str], Float64[np.ndarray, "K N"], list[str] | None, list[str]]


def _read_csv(path: Path) -> _Table:
    with path.open(newline="", encoding="utf-8") as file:
        try:
            header, *rows = list(csv.reader(file))
        except (ValueError, UnicodeDecodeError, csv.Error) as error:
            raise SpaceError(f"{path} must be a CSV file with a header, got {error}") from None
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise SpaceError(
                f"{path} must have {len(header)} cells a row, got {len(row)} in line {number + 2}"
            )
    return _from_columns(path, header, [list(column) for column in zip(*rows, strict=True)])


def _read_parquet(path: Path) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise SpaceError(f"{path} must be a Parquet file, got {error}") from None
    return _from_columns(path, table.column_names, [column.to_pylist() for column in table.columns])


def _read_npz(path: Path) -> _Table:
    try:
        with np.load(path, allow_pickle=False) as file:
            models = [str(model) for model in file["models"]]
            values = np.asarray(file["values"], dtype=np.float64)
            ids = [str(id_) for id_ in file["ids"]] if "ids" in file else None
            families = [str(f) for f in file["families"]] if "families" in file else None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SpaceError(f"{path} must hold the arrays models and values, got {error}") from None
    if values.ndim != 2 or len(values) != len(models):
        raise SpaceError(f"{path} must hold values (models, texts), got shape {values.shape}")
    return models, values, ids, families or [""] * len(models)


def _from_columns(path: Path, names: Sequence[str], columns: Sequence[list[Any]]) -> _Table:
    if not columns or not columns[0]:
        raise SpaceError(f"{path} must hold at least one text and one model, got none")
    ids = None
    if _numbers(columns[0]) is None:
        ids, names, columns = [str(cell) for cell in columns[0]], names[1:], columns[1:]
    models, families = zip(*(_parse_name(name) for name in names), strict=True)
    values = []
    for name, column in zip(names, columns, strict=True):
        numbers = _numbers(column)
        if numbers is None:
            raise SpaceError(f"{path} must hold numbers, got other cells in column {name!r}")
        values.append(numbers)
    return list(models), np.array(values, dtype=np.float64), ids, list(families)


def _numbers(cells: Sequence[Any]) -> list[float] | None:
    try:
        return [float(cell) for cell in cells]
    except (TypeError, ValueError):
        return None


def _parse_name(name: str) -> tuple[str, str]:
    """A pandas column of two levels is written as the text of a tuple."""
    if name.startswith("("):
        try:
            parsed = ast.literal_eval(name)
        except (ValueError, SyntaxError):
            return name, ""
        if isinstance(parsed, tuple) and len(parsed) == 2:
            return str(parsed[1]), str(parsed[0])
    return name, ""


def _text_bytes(
    given: str | float | Path, n: int
) -> tuple[Float64[np.ndarray, " N"], TextSet | None]:
    texts = None
    try:
        sizes = np.full(n, float(given))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        path = Path(given)  # type: ignore[arg-type]
        if path.suffix == ".jsonl":
            texts = TextSet.load(path)
            sizes = texts.text_bytes.astype(np.float64)
        else:
            numbers = _numbers(path.read_text(encoding="utf-8").split())
            if numbers is None:
                raise SpaceError(f"{path} must hold a number a line, got other text") from None
            sizes = np.array(numbers)
    if len(sizes) != n:
        raise SpaceError(f"text_bytes must be one a text ({n}), got {len(sizes)}")
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise SpaceError("text_bytes must be finite and above 0, got other values")
    return sizes, texts


def _digest(ids: Sequence[str], sizes: Float64[np.ndarray, " N"]) -> str:
    """A stand-in for the digest of texts that are not known: of ids and byte lengths."""
    content = json.dumps(["imported", list(ids), sizes.tolist()])
    return hashlib.sha256(content.encode()).hexdigest()

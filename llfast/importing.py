"""Read a model x text matrix that was made elsewhere: .csv, .npz or .parquet."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from .errors import SpaceError
from .files import read_npz
from .results import LogLikelihoodMatrix
from .texts import TextSet

IMPORT_UNITS = ("nats", "bits_per_byte")
_ID_COLUMNS = ("", "id", "ids", "index", "unnamed: 0")  # pandas writes its index without a name


def import_matrix(
    path: str | Path,
    *,
    unit: str,
    text_bytes: str | float | Path,
    convention: str = "imported",
) -> LogLikelihoodMatrix:
    """Read log-likelihoods or bits per byte of K models on N texts.

    - .csv and .parquet: a row a text, a column a model; an optional first column holds the ids if
      none of its cells is a number, or if it is named id, ids or index, or has no name. A column
      named like `('family', 'org/model')` gives the model a family.
    - .npz: `models` (K,) and `values` (K, N), and optionally `ids` (N,) and `families` (K,).

    A model that is there under several families is named `org/model (family)` for each.

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
    models = tell_apart(models, families)
    _validate(path, models, values, ids)
    sizes, texts = _text_bytes(text_bytes, values.shape[1])
    if texts is not None and ids is not None and set(ids) == set(texts.ids):
        order = {id_: column for column, id_ in enumerate(ids)}
        values = values[:, [order[id_] for id_ in texts.ids]]
    elif texts is not None and ids is not None:
        raise SpaceError(f"{path} must have the ids of the text set {text_bytes}, got others")
    ids = list(texts.ids) if texts is not None else ids or [str(row) for row in range(len(sizes))]
    if unit == "bits_per_byte":
        if values.min() < 0:
            raise SpaceError(
                f"{path} must hold at least 0 bits per byte, got {values.min():g}; is the unit "
                "nats?"
            )
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
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        rows: list[list[str]] = []
        try:
            for row in reader:
                if rows and row and len(row) != len(rows[0]):
                    raise SpaceError(
                        f"{path} must have {len(rows[0])} cells a row, got {len(row)} in line "
                        f"{reader.line_num}"
                    )
                if row:  # an empty line is no row
                    rows.append(row)
        except (ValueError, csv.Error) as error:
            raise SpaceError(f"{path} must be a CSV file in UTF-8, got {error}") from None
    if not rows:
        raise SpaceError(f"{path} must be a CSV file with a header, got an empty one")
    names = [name.strip() for name in rows[0]]  # ids may hold anything
    return _from_columns(path, names, [list(column) for column in zip(*rows[1:], strict=True)])


def _read_parquet(path: Path) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        try:
            # Threads that hold a file of Python's, as those that read ahead do, may hang or abort
            # when Python ends: https://github.com/apache/arrow/issues/50482 and 34314.
            parquet = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
            table = parquet.read(use_threads=False)
            of_pandas = table.schema.pandas_metadata or {}
        except (OSError, ValueError, pa.ArrowException) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise SpaceError(f"{path} must be a Parquet file, got: {line}") from None
    names, columns = table.column_names, [column.to_pylist() for column in table.columns]
    index = [each for each in of_pandas.get("index_columns") or () if each in names]
    if len(index) > 1:
        raise SpaceError(
            f"{path} must have one index, got {', '.join(index)}; join them into one column of ids"
        )
    # Where pandas puts the first; under a name of its own, if the index has one.
    if names and names[-1:] in (["__index_level_0__"], index):
        names, columns = ["index", *names[:-1]], [columns[-1], *columns[:-1]]
    return _from_columns(path, names, columns)


def _read_npz(path: Path) -> _Table:
    try:
        arrays = read_npz(path)
        models = _words(arrays, "models")
        values = np.asarray(arrays["values"], dtype=np.float64)
        ids = _words(arrays, "ids") if "ids" in arrays else None
        families = _words(arrays, "families") if "families" in arrays else None
    except KeyError as error:
        raise SpaceError(f"{path} must hold an array named {error}, got none") from None
    except (ValueError, TypeError) as error:
        raise SpaceError(f"{path} must hold the arrays models and values, got: {error}") from None
    if values.ndim != 2 or len(values) != len(models):
        raise SpaceError(
            f"{path} must hold values of {len(models)} models, a row each, got shape {values.shape}"
        )
    for name, rows, n in (("ids", ids, values.shape[1]), ("families", families, len(models))):
        if rows is not None and len(rows) != n:
            raise SpaceError(f"{path} must hold {n} {name}, got {len(rows)}")
    return models, values, ids, families or [""] * len(models)


def _words(arrays: Mapping[str, np.ndarray], name: str) -> list[str]:
    """Each as text; bytes are ASCII."""
    array = arrays[name]
    if array.ndim != 1:
        raise ValueError(f"{name} of shape {array.shape}")
    return [str(each) for each in (array.astype(str) if array.dtype.kind == "S" else array)]


def _from_columns(path: Path, names: Sequence[str], columns: Sequence[list[Any]]) -> _Table:
    ids = None
    if columns and (
        names[0].strip().lower() in _ID_COLUMNS or not any(map(_is_number, columns[0]))
    ):
        ids, names, columns = [_word(cell) for cell in columns[0]], names[1:], columns[1:]
    if not columns or not columns[0]:
        raise SpaceError(f"{path} must hold at least one text and one model, got none")
    for name, column in zip(names, columns, strict=True):
        for row, cell in enumerate(column):
            if not _is_number(cell):
                hint = "" if ids or name != names[0] else "; if these are ids, name the column id"
                raise SpaceError(
                    f"{path} must hold numbers, got {cell!r} for model {name!r}, text "
                    f"{ids[row] if ids else row!r}{hint}"
                )
    models, families = zip(*(parse_name(name) for name in names), strict=True)
    values = np.array([[float(cell) for cell in column] for column in columns])
    return list(models), values, ids, list(families)


def _word(cell: Any) -> str:
    """As text, which some programs write as bytes that nothing says are UTF-8."""
    return cell.decode(errors="backslashreplace") if isinstance(cell, bytes) else str(cell)


def tell_apart(models: Sequence[str], families: Sequence[str]) -> list[str]:
    """Names of models; those that several have are followed by the family, if it is known."""
    counts = Counter(models)
    return [
        f"{model} ({family})" if counts[model] > 1 and family else model
        for model, family in zip(models, families, strict=True)
    ]


def _validate(
    path: Path, models: Sequence[str], values: Float64[np.ndarray, "K N"], ids: list[str] | None
) -> None:
    for what, names in (("model", models), ("text id", ids or [])):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise SpaceError(f"{path} must name each {what} once, got {repeated[0]!r} again")
    if not all(models):
        raise SpaceError(f"{path} must name every model, got an empty name")
    if all(map(_is_number, models)) and not all(model.isdigit() for model in models):
        raise SpaceError(
            f"{path} must name the models in its first line, got the number {models[0]}; put a "
            "line of names before the first text"
        )
    if not values.size:
        raise SpaceError(f"{path} must hold at least one text and one model, got none")
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise SpaceError(
            f"{path} must hold finite numbers, got {values[row, column]} for model "
            f"{models[row]!r}, text {ids[column] if ids else int(column)!r}"
        )


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return "_" not in str(cell)  # "12_3", which Python takes for 123, is the third part of 12


def parse_name(name: str) -> tuple[str, str]:
    """Name and family of `('family', 'org/model')`, as pandas writes a column of two levels."""
    if name.startswith("("):
        try:
            parsed = ast.literal_eval(name)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
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
            try:
                sizes = np.array([float(each) for each in path.read_text("utf-8-sig").split()])
            except ValueError as error:
                raise SpaceError(f"{path} must hold a number a line, got: {error}") from None
    if len(sizes) != n:
        raise SpaceError(f"text_bytes must be of {n} texts, got {len(sizes)} in {given}")
    wrong = sizes[~(np.isfinite(sizes) & (sizes > 0))]
    if len(wrong) and texts is None:  # a text of a text set may be empty
        raise SpaceError(f"text_bytes must be finite and above 0, got {wrong[0]:g}")
    return sizes, texts


def _digest(ids: Sequence[str], sizes: Float64[np.ndarray, " N"]) -> str:
    """A stand-in for the digest of texts that are not known: of ids and byte lengths."""
    content = json.dumps(["imported", list(ids), sizes.tolist()])
    return hashlib.sha256(content.encode()).hexdigest()

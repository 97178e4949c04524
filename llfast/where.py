"""SQL conditions over what is known of models: `family = 'llama' and parameters < 8e9`.

DuckDB evaluates them. It is given one expression, which its parser has shown to hold no queries and
none but harmless functions, in a database without files, network, extensions or settings to change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from .errors import SearchError, needed
from .files import as_utf8

_MOST_CHARACTERS = 10_000
_MOST_BRACKETS = 200  # DuckDB's parser needs seconds for thousands, one in the other
_MOST_LISTED = 30  # columns in an error, which is one line
_CONFIG = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "temp_directory": "",
    "memory_limit": "1GB",
    "threads": "1",
    "lock_configuration": "true",
}
_QUERY = "SELECT 1 FROM models WHERE "
# Without subqueries, windows, stars, lambdas, parameters and positions of columns.
_EXPRESSIONS = frozenset(
    "BETWEEN CASE CAST COLUMN_REF COMPARISON CONJUNCTION CONSTANT FUNCTION OPERATOR TYPE".split()
)
# None that makes long texts or lists: DuckDB does not count them among its memory.
_OPERATORS = frozenset("+ - * / // % ** ^ || ~~ !~~ ~~* !~~* ~~~ ^@ -> ->>".split())
_FUNCTIONS = frozenset(
    "abs ceil contains date_diff date_part date_trunc day ends_with floor greatest if "
    "json_array_length json_contains json_exists json_extract json_extract_string json_type least "
    "left len length levenshtein like_escape list_contains list_value ln log log10 log2 lower "
    "month not_like_escape now nullif position prefix regexp_extract regexp_full_match "
    "regexp_matches right round split_part sqrt starts_with strpos substr substring suffix "
    "to_days to_hours to_minutes to_months to_seconds to_weeks to_years trim trunc upper "
    "year".split()
)


def model_table(
    fixed: Mapping[str, Sequence[Any]], metadata: Sequence[Mapping[str, Any]]
) -> pa.Table:
    """What is known of K models, a row each, for `select_rows`.

    Whole numbers are BIGINT, numbers DOUBLE, truth values BOOLEAN, times TIMESTAMP in UTC, all else
    text, nested values as JSON; what a model lacks is NULL. SQL does not tell cases apart: a key
    that is one of the names before it is called `metadata.<key>`.

    Args:
        fixed: columns of K values that are there in any case.
        metadata: K mappings, each of whose keys becomes a column.
    """
    columns = {name: _column(values) for name, values in fixed.items()}
    taken = {"", *columns}
    for key in sorted({key for row in metadata for key in row}):
        name = as_utf8(key)
        while name.lower() in taken:
            name = f"metadata.{name}"
        taken.add(name.lower())
        columns[name] = _column([row.get(key) for row in metadata])
    return pa.table(columns)


def select_rows(
    columns: pa.Table | Mapping[str, Sequence[Any]], where: str
) -> Bool[np.ndarray, " K"]:
    """Which rows of a table fulfil a condition; where it is NULL, they do not.

    Args:
        columns: K rows, such as those of `model_table`.
        where: a SQL expression over the columns, as DuckDB understands it.

    Raises:
        SearchError: if it is no such expression, or fails for a row.
        MissingDependencyError: if DuckDB is not installed.
    """
    duckdb = _duckdb()
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    position = "row"
    while position.lower() in {name.lower() for name in table.column_names}:
        position += "_"
    numbered = table.append_column(position, pa.array(np.arange(len(table))))
    chosen = np.zeros(len(table), dtype=bool)
    try:
        with duckdb.connect(":memory:", config=_CONFIG) as connection:
            _check_expression(connection, where)
            found = connection.from_arrow(numbered).filter(where).project(position)
            chosen[found.fetchnumpy()[position]] = True
    except (duckdb.Error, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SearchError(
            f"where must be a SQL condition over {_listed(table.column_names)}, got "
            f"{where[:200]!r}: {reason}"
        ) from None
    return chosen


def _check_expression(connection: Any, where: str) -> None:
    """Raise ValueError unless DuckDB's own parser finds one plain expression, and nothing else."""
    if len(where) > _MOST_CHARACTERS:
        raise ValueError(f"it may have {_MOST_CHARACTERS:,} characters, got {len(where):,}")
    brackets = sum(where.count(each) for each in "([{")
    if brackets > _MOST_BRACKETS:
        raise ValueError(f"it may have {_MOST_BRACKETS} brackets, got {brackets:,}")
    found, plain = (
        json.loads(
            connection.execute("SELECT json_serialize_sql(?)", [_QUERY + text]).fetchall()[0][0]
        )
        for text in (where, "true")
    )
    if found["error"]:
        raise ValueError(found["error_message"])
    conditions = [each["node"].pop("where_clause", None) for each in found["statements"]]
    for node in _nodes(conditions):
        kind = node.get("class", "CONSTANT")
        if kind not in _EXPRESSIONS:
            raise ValueError(f"it must have no {kind.lower().replace('_', ' ')}")
        function = node["function_name"].lower() if kind == "FUNCTION" else "abs"
        if function not in _FUNCTIONS | _OPERATORS:
            functions = " ".join(sorted(_FUNCTIONS))
            raise ValueError(f"it must have no function {function}, only {functions}")
    for each in plain["statements"]:
        del each["node"]["where_clause"]
    if _without_places(found) != _without_places(plain):
        raise ValueError("it must be one expression")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _without_places(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            name: _without_places(each)
            for name, each in node.items()
            if not name.startswith("query_location")
        }
    return [_without_places(each) for each in node] if isinstance(node, list) else node


def _column(values: Sequence[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if not kinds:  # NULL can be compared with whatever it would be
        return pa.nulls(len(values))
    if kinds == {datetime}:
        naive = [each and each.astimezone(UTC).replace(tzinfo=None) for each in values]
        return pa.array(naive, pa.timestamp("us"))
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(each is None or -(2**63) <= each < 2**63 for each in values):
        return pa.array(values, pa.int64())
    if kinds <= {int, float}:
        return pa.array([None if each is None else _number(each) for each in values], pa.float64())
    return pa.array([None if each is None else _text(each) for each in values], pa.string())


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _text(value: Any) -> str:
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return as_utf8(value)


def _listed(names: Iterable[str]) -> str:
    """Names as they are written in SQL; others than plain words in quotes."""
    plain = [
        name if name.isidentifier() else json.dumps(name, ensure_ascii=False) for name in names
    ]
    more = f" and {len(plain) - _MOST_LISTED} more" if len(plain) > _MOST_LISTED else ""
    return ", ".join(plain[:_MOST_LISTED]) + more


def _duckdb() -> Any:
    with needed(
        "duckdb",
        "conditions on models need duckdb: pip install 'llfast[cpu]', or on a machine with an "
        "NVIDIA GPU pip install 'llfast[gpu]'; never both, they install the same package",
    ):
        import duckdb
    return duckdb

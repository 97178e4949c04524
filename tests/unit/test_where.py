"""Conditions on models: what they choose, by Python's own lights, and what they may not do."""

import json
import operator
import sys
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llfast.errors import MissingDependencyError, SearchError
from llfast.where import model_table, select_rows

FIXED = ["model", "revision", "convention", "dtype", "created", "layer"]


def make_row(model, /, layer=None, created=datetime(2026, 3, 1, 12, tzinfo=UTC), **metadata):
    fixed = (model, "r1", "paper", "float32", created, layer)
    return dict(zip(FIXED, fixed, strict=True)), metadata


def make_table(rows):
    fixed = {name: [row[name] for row, _ in rows] for name in FIXED}
    return model_table(fixed, [metadata for _, metadata in rows])


def chosen(rows, where):
    """Names of the models that a condition chooses."""
    found = select_rows(make_table(rows), where)
    assert found.dtype == bool
    return [row["model"] for (row, _), each in zip(rows, found, strict=True) if each]


MODELS = [
    make_row("org/llama-7b", family="llama", parameters=7_000_000_000, tuned=False),
    make_row("org/llama-70b", family="llama", parameters=70_000_000_000, tuned=True),
    make_row('it\'s "quoted"', family="O'Hara", parameters=5),
    make_row("größe 漢字 🙂", layer=3, family=None, tuned=True),
]


# ------------------------------------------------------------------------------ what is chosen


@pytest.mark.parametrize(
    "where", ["size < 8e9", "size = 'large'", "size", "lower(size) = 'a'", "created > size"]
)
def test_what_no_model_has_can_be_compared_with_anything(where):
    for rows in ([make_row("a", size=None), make_row("b", size=None)], []):
        table = make_table(rows) if rows else model_table({"size": [], "created": []}, [])
        assert not select_rows(table, where).any()
        assert select_rows(table, "size is null").tolist() == [True] * len(rows)


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ("family = 'llama' and parameters < 8e9", [0]),
        ("parameters < 8e9", [0, 2]),
        ("not (parameters < 8e9)", [1]),
        ("parameters is null", [3]),
        ("tuned", [1, 3]),
        ("not tuned", [0]),
        ("tuned is not true", [0, 2]),
        ("family in ('llama', 'gpt2')", [0, 1]),
        ("family = 'O''Hara'", [2]),
        ("model = 'it''s \"quoted\"'", [2]),
        ("model like '%漢字%'", [3]),
        ("MODEL ilike 'ORG/%' -- a remark", [0, 1]),
        ("regexp_matches(model, '-[0-9]+b$')", [0, 1]),
        ("layer = 3", [3]),
        ("layer is null and convention = 'paper' and dtype = 'float32'", [0, 1, 2]),
        ("created between '2026-03-01' and '2026-03-02 00:00:00'", [0, 1, 2, 3]),
        ("created > timestamp '2026-03-01 12:00:00'", []),
        ("model like 'org!_%' escape '!' or model like 'org_%7b' escape '!'", [0]),
        ("starts_with(upper(model), 'ORG/') and length(model) <= 12", [0]),
        ("year(created) = 2026 and created < now() + interval 3 days", [0, 1, 2, 3]),
        ("case when tuned then false else parameters % 2 = 1 end", [2]),
        ("cast(parameters as varchar) = '5'", [2]),
        ("coalesce(parameters, 0) + 1 = 1", [3]),
        ("null", []),
        ("true", [0, 1, 2, 3]),
        ("(" * 200 + "tuned" + ")" * 200, [1, 3]),
    ],
)
def test_conditions_choose_rows(where, numbers):
    assert chosen(MODELS, where) == [MODELS[number][0]["model"] for number in numbers]


def test_a_table_may_come_from_elsewhere():
    assert select_rows({"a": [1, 2, None]}, "a >= 2").tolist() == [False, True, False]
    table = pa.table({"row": [5, 6], "row_": ["x", "y"]})
    assert select_rows(table, "row = 6 and row_ = 'y'").tolist() == [False, True]
    assert select_rows(pa.table({"a": pa.array([], pa.int64())}), "a = 1").tolist() == []
    assert select_rows(make_table([]), "model = 'x' and layer = 1").tolist() == []


OPERATORS = {
    "=": operator.eq,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
VALUES = {
    "n": st.none() | st.integers(-3, 3) | st.sampled_from([-(2**63), 2**63 - 1]),
    "x": st.none() | st.floats(-2, 2) | st.sampled_from([0.1, 1e300]),
    "s": st.none() | st.text("aB'\"é ", max_size=3),
    "b": st.none() | st.booleans(),
}


def literal(value):
    if isinstance(value, str):
        return "'{}'".format(value.replace("'", "''"))
    if isinstance(value, float):
        return f"cast('{value!r}' as double)"
    return str(value)


COMPARISONS = st.one_of(
    st.tuples(
        st.just(name), st.sampled_from(sorted(OPERATORS)), values.filter(lambda v: v is not None)
    )
    for name, values in VALUES.items()
)
CONDITIONS = st.recursive(
    COMPARISONS | st.tuples(st.just("null"), st.sampled_from(sorted(VALUES))),
    lambda each: (
        st.tuples(st.sampled_from(["and", "or"]), each, each) | st.tuples(st.just("not"), each)
    ),
    max_leaves=6,
)


def as_sql(condition):
    match condition:
        case ("and" | "or") as word, left, right:
            return f"({as_sql(left)} {word} {as_sql(right)})"
        case "not", each:
            return f"(not {as_sql(each)})"
        case "null", name:
            return f"{name} is null"
        case name, sign, value:
            return f"{name} {sign} {literal(value)}"


def truth(condition, row):
    """SQL's three values: True, False and None."""
    match condition:
        case "and", left, right:
            both = truth(left, row), truth(right, row)
            return False if False in both else None if None in both else True
        case "or", left, right:
            both = truth(left, row), truth(right, row)
            return True if True in both else None if None in both else False
        case "not", each:
            found = truth(each, row)
            return None if found is None else not found
        case "null", name:
            return row[name] is None
        case name, sign, value:
            return None if row[name] is None else OPERATORS[sign](row[name], value)


@given(rows=st.lists(st.fixed_dictionaries(VALUES), min_size=1, max_size=6), condition=CONDITIONS)
@settings(max_examples=60, deadline=None)
def test_conditions_mean_what_sql_says(rows, condition):
    table = pa.table(
        {
            "n": pa.array([row["n"] for row in rows], pa.int64()),
            "x": pa.array([row["x"] for row in rows], pa.float64()),
            "s": pa.array([row["s"] for row in rows], pa.string()),
            "b": pa.array([row["b"] for row in rows], pa.bool_()),
        }
    )
    expected = [truth(condition, row) is True for row in rows]
    assert select_rows(table, as_sql(condition)).tolist() == expected


# ------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    ("values", "kind", "stored"),
    [
        ([1, 2, None], "int64", [1, 2, None]),
        ([1, 2.5], "double", [1.0, 2.5]),
        ([2**63, 1], "double", [2.0**63, 1.0]),
        ([10**400, -(10**400)], "double", [np.inf, -np.inf]),
        ([True, None], "bool", [True, None]),
        ([True, 1], "string", ["true", "1"]),
        (["a", 1, 2.5, None], "string", ["a", "1", "2.5", None]),
        ([["a", {"b": "ü"}], {"c": 1}], "string", ['["a", {"b": "ü"}]', '{"c": 1}']),
        (["\ud800"], "string", ["\\ud800"]),
    ],
)
def test_metadata_keep_their_type_if_all_are_of_one(values, kind, stored):
    rows = [make_row(f"m{each}", value=value) for each, value in enumerate(values)]
    table = make_table(rows)
    assert table.column_names == [*FIXED, "value"]
    assert str(table.schema.field("value").type) == kind
    assert table["value"].to_pylist() == stored


def test_nested_values_are_json(tmp_path):
    rows = [make_row("a", config={"layers": 12, "name": "x"}), make_row("b", config=[1])]
    assert [json.loads(each) for each in make_table(rows)["config"].to_pylist()] == [
        {"layers": 12, "name": "x"},
        [1],
    ]
    assert chosen(rows, "config->>'$.name' = 'x'") == ["a"]


def test_keys_that_are_columns_already_are_told_apart():
    rows = [make_row("a", **{"model": 7, "Dtype": "x", "family": 1, "Family": 2, "": 3})]
    assert make_table(rows).column_names == [
        *FIXED,
        "metadata.",
        "metadata.Dtype",
        "Family",
        "metadata.family",
        "metadata.model",
    ]
    where = """ "metadata.model" = 7 and "metadata.Dtype" = 'x' and dtype = 'float32' """
    assert chosen(rows, f'{where} and family = 2 and "metadata.family" = 1') == ["a"]


@pytest.mark.parametrize(
    "key", ["a b", "select", "it's", 'q"q', "größe", "🙂", "\\", "a\nb", "a.b"]
)
def test_keys_may_have_any_name(key):
    quoted = '"{}"'.format(key.replace('"', '""'))
    assert chosen([make_row("a", **{key: 1}), make_row("b", **{key: 2})], f"{quoted} = 2") == ["b"]


def test_times_are_utc_wherever_it_runs(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    rows = [make_row("a"), make_row("b", created=datetime.fromisoformat("2026-03-01T12:30+01:00"))]
    assert chosen(rows, "created = '2026-03-01 12:00:00'") == ["a"]
    assert chosen(rows, "created = '2026-03-01 11:30:00'") == ["b"]


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("famly = 'llama'", 'Referenced column "famly" not found'),
        ('family = "llama"', 'Referenced column "llama" not found'),
        ("family = 'llama", "unterminated string"),
        ("family =", "syntax error"),
        ("", "syntax error"),
        ("  -- nothing", "syntax error"),
        ("true /*", "unterminated"),
        ("model", "Could not convert"),
        ("nosuch(model)", "must have no function nosuch, only abs "),
        ("repeat(model, 1000000000) = 'x'", "must have no function repeat"),
        ("model in ['a', lower(range(9000000000)::text)]", "must have no function range"),
        ("error('a') = 'x'", "must have no function error"),
        ("count(*) > 1", "must have no function count_star"),
        ("getenv('HOME') = 'x'", "must have no function getenv"),
        ("abs(family) = 1", "No function matches"),
        ("cast(family || chr as integer) = 1", 'column "chr" not found'),
        ("cast(model as integer) = 1", "Could not convert"),
        ("true; drop table models", "Only SELECT"),
        ("true; select 1 from models where true", "must be one expression"),
        ("true) or (true", "syntax error"),
        ("true order by model", "must be one expression"),
        ("true limit 1", "must be one expression"),
        ("true group by model", "must be one expression"),
        ("true qualify true", "must be one expression"),
        ("true using sample 1", "must be one expression"),
        ("true union select true", "must be one expression"),
        ("model in (select 'org/llama-7b')", "must have no subquery"),
        ("exists (from duckdb_settings())", "must have no subquery"),
        ("row_number() over () = 1", "must have no window"),
        ("columns('mod.*') = 'a'", "must have no star"),
        ("len(x -> x > 0) = 1", "must have no lambda"),
        ("model = ?", "must have no parameter"),
        ("#1 = 'a'", "must have no positional reference"),
        ("(" * 201 + "true" + ")" * 201, "may have 200 brackets, got 201"),
        ("not " * 2400 + "true", "expression depth"),
        ("true and " * 1200 + "true", "may have 10,000 characters, got 10,804"),
        ("model = '\ud800'", ""),
    ],
)
def test_what_is_no_condition_is_refused_in_a_line_that_names_the_columns(where, reason):
    with pytest.raises(SearchError) as caught:
        select_rows(make_table(MODELS), where)
    message = str(caught.value)
    known = ", ".join([*FIXED, "family", "parameters", "tuned"])
    assert message.startswith(f"where must be a SQL condition over {known}, got ")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 1200


def test_of_many_columns_the_first_are_named():
    table = pa.table({"a b": [1], **{f"c{each:02}": [1] for each in range(40)}})
    with pytest.raises(SearchError, match='over "a b", c00, .*, c28 and 11 more, got'):
        select_rows(table, "nosuch = 1")


def test_a_condition_reaches_no_file_no_setting_and_no_variable(tmp_path, monkeypatch):
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.chdir(tmp_path)
    table = {"a": [1]}
    for where in (
        f"exists (from '{secret}')",
        f"(select count(*) from read_csv('{secret}')) > 0",
        f"a in (select content from read_text('{secret}'))",
        f"true; copy models to '{tmp_path / 'out.csv'}'",
        f"true; attach '{tmp_path / 'new.db'}'",
        "true; set threads = 8",
        "true; install httpfs",
        "true; load httpfs",
        "(from 'https://localhost/x.csv')",
        "getenv('SECRET') = 'x'",
        "read_text('secret.csv') = 'x'",
        "sniff_csv('secret.csv') = 'x'",
        "glob('*') = ['secret.csv']",
        "pragma_database_list() = 1",
    ):
        with pytest.raises(SearchError):
            select_rows(table, where)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.csv"]


def test_the_database_itself_opens_no_file_and_keeps_its_settings(tmp_path):
    import duckdb

    from llfast.where import _CONFIG

    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with duckdb.connect(":memory:", config=_CONFIG) as connection:
        for query in (
            f"from '{tmp_path / 'a.csv'}'",
            f"from read_text('{tmp_path / 'a.csv'}')",
            f"copy (select 1) to '{tmp_path / 'b.csv'}'",
            f"attach '{tmp_path / 'c.db'}'",
            "install httpfs",
            "set enable_external_access = true",
            "set memory_limit = '64GB'",
            "set threads = 8",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(query)
        limits = connection.execute(
            "select current_setting('threads'), current_setting('memory_limit')"
        ).fetchall()
    assert limits == [(1, "953.6 MiB")]
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_missing_duckdb_is_said_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(MissingDependencyError, match=r"need duckdb: pip install 'llfast\[cpu\]'"):
        select_rows({"a": [1]}, "a = 1")

"""Files of benchmark scores: both ways round, with holes, and what is refused."""

from __future__ import annotations

import pytest

from llfast import SpaceError, read_scores


def write(tmp_path, text):
    path = tmp_path / "scores.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_models_may_be_rows_or_columns(tmp_path):
    expected = {"arc": {"a": 1.0, "b": 2.5}, "piqa": {"a": -3.0, "b": 4.0}}
    assert read_scores(write(tmp_path, "benchmark,a,b\narc,1,2.5\npiqa,-3,4\n")) == expected
    assert read_scores(write(tmp_path, "Model,arc, piqa\na,1,-3\n\nb ,2.5,4\n,,\n")) == expected


def test_scores_that_are_not_known_are_left_out(tmp_path):
    path = write(tmp_path, "model,arc,piqa\na,,nan\nb, 2 ,NaN\n")
    assert read_scores(path) == {"arc": {"b": 2.0}, "piqa": {}}


def test_names_of_two_levels_are_those_that_an_import_gives(tmp_path):
    header = "benchmark,\"('one', 'x/a')\",\"('two', 'x/a')\",\"('one', 'x/b')\",(plain"
    path = write(tmp_path, f"{header}\narc,1,2,3,4\n")
    assert read_scores(path) == {
        "arc": {"x/a (one)": 1.0, "x/a (two)": 2.0, "x/b": 3.0, "(plain": 4.0}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold models and benchmarks"),
        ("benchmark,a,b\n", "must hold models and benchmarks"),
        ("benchmark\narc\n", "must hold models and benchmarks"),
        ("benchmark,a,b\narc,1\n", "must have 3 cells a row, got 2 in that of 'arc'"),
        ("benchmark,a,b\narc,1,x\n", "must hold finite numbers, got 'x' for 'b' on 'arc'"),
        ("benchmark,a,b\narc,1,inf\n", "must hold finite numbers, got 'inf'"),
        ("benchmark,a,a\narc,1,2\n", "must name each model once, got 'a' again"),
        ("benchmark,a,b\narc,1,2\narc,1,2\n", "must name each benchmark once, got 'arc' again"),
        ("model,arc,arc\na,1,2\n", "must name each benchmark once, got 'arc' again"),
        ("model,arc,\na,1,\n", "must name every benchmark, got an empty name"),
        ("model,arc,,\na,1,,\n", "must name every benchmark, got an empty name"),
        ("benchmark,a,b\n,1,2\n", "must name every benchmark, got an empty name"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(SpaceError) as refused:
        read_scores(write(tmp_path, text))
    assert message in str(refused.value)
    assert "scores.csv" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_bytes(b"model,arc\n\xff\xfe,1\n")
    with pytest.raises(SpaceError, match="must be a CSV file in UTF-8"):
        read_scores(path)
    with pytest.raises(OSError, match="none"):
        read_scores(tmp_path / "none.csv")

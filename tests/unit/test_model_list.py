"""Lists of models: what a line may say, and what it may not."""

import pytest

from llfast.model_list import ModelRequest, read_model_list


@pytest.fixture
def written(tmp_path):
    def write(*lines, name="list.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def test_what_a_row_may_carry(written):
    path = written(
        '{"model": "org/m", "revision": "main", "dtype": "float32", "weights": "paged",'
        ' "memory_budget": "8GiB", "trust_remote_code": true, "family": "f"}',
        "",
        '{"model": "a", "metadata": {"run": "é"}}',
    )
    assert read_model_list(path) == [
        ModelRequest(
            model="org/m",
            revision="main",
            dtype="float32",
            weights="paged",
            memory_budget="8GiB",
            trust_remote_code=True,
            metadata={"family": "f"},
        ),
        ModelRequest(model="a", metadata={"run": "é"}),
    ]
    empty = '"revision": "", "tokenizer": "", "adapter_base": "", "weights": "", "name": ""'
    (request,) = read_model_list(written(f'{{"model": "a", {empty}, "family": ""}}'))
    assert request == ModelRequest(model="a", metadata={"family": ""}), "as tables write none"
    assert read_model_list(written("a", "# no", "b ", name="list.txt")) == [
        ModelRequest(model="a"),
        ModelRequest(model="b"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 must be a JSON object"),
        ('{"name": "a"}', 'must be an object with a string "model"'),
        ('{"model": " "}', 'line 2 must be an object with a string "model"'),
        ('{"model": "a", "weights": 3}', "line 2: weights must be a string, got 3"),
        ('{"model": "a", "trust_remote_code": "no"}', "trust_remote_code must be true or false"),
        ('{"model": "a", "name": "\\ud800"}', "line 2: name must be text, got .ud800"),
    ],
)
def test_rows_that_cannot_be_used_are_told_by_their_line(written, row, message):
    with pytest.raises(ValueError, match=message):
        read_model_list(written('{"model": "a"}', row))


@pytest.mark.parametrize("name", ["list.txt", "list.jsonl"])
def test_a_list_without_a_model_is_refused(written, name):
    with pytest.raises(ValueError, match=rf"{name} must name a model a line, got none"):
        read_model_list(written("", "# nothing", name=name))


def test_objects_in_a_list_of_names_are_refused(written):
    with pytest.raises(ValueError, match=r"list.json, line 1 must be a name .*its name in .jsonl"):
        read_model_list(written('{"model": "a"}', name="list.json"))

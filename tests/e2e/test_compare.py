"""`llfast compare` on stores of every kind."""

import numpy as np
import pytest

from llfast import Store
from tests.stores import add_together, make_result

ODD = ["$m$", 'it\'s "quoted"', "<img src=x onerror=alert(1)>", "🦙", "a\nb"]


@pytest.fixture
def made(tmp_path):
    """A store of two families with a parent each, a twin, a run, and layers."""
    store = Store(tmp_path / "made")
    for family, names in (("<b>f</b>", ODD), ("$g$", ["g0", "g1", "g2"])):
        for name in names:
            parents = [] if name == names[0] else [names[0]]
            store.add(make_result(name, metadata={"family": family, "parents": parents}))
    store.add(make_result("int8", metadata={"quantised_from": "g0", "parents": ["gone", 3]}))
    for step in (0, 10, 500):
        store.add(make_result(f"run-{step}", metadata={"run": "r", "step": step}))
    for layer in range(3):
        result = make_result(f"g0 {layer}")
        fields = {"metadata": {"family": "$g$"}, "layer": layer, "n": len(result)}
        store.add(make_result("g0", **fields, loglikelihoods=result.loglikelihoods))
    return store


PAIRS = {
    "quantised twin": 1,
    "adjacent steps": 2,
    "parent-child": 6,
    "siblings": 7,
    "random": 15,
    "adjacent layers": 2,
}


def test_relations_are_found_and_told(command, made, tmp_path):
    run = command("compare", "--store", made.folder, "--json")
    assert run.code == 0
    assert run.err == (
        "llfast: warning: not all metadata relates models; models without a family: 4, names of "
        "models that are not there: 1, values of another kind: 1\n"
    )
    assert {each["relation"]: each["pairs"] for each in run.json} == PAIRS
    random = next(each for each in run.json if each["relation"] == "random")
    assert random["published"] == {"random": 2.2}
    assert random["drawn"] == "models"
    low, high = random["median"]["interval"]
    assert low < random["median"]["value"] < high
    steps = next(each for each in run.json if each["relation"] == "adjacent steps")
    assert steps["median"]["interval"] == [None, None]
    run = command("compare", "--store", made.folder, "--plot", tmp_path / "a.png")
    assert run.code == 0
    for words in ("adjacent layers", "0.011 (late), 0.067 (early)", "95 % intervals", "a.png"):
        assert words in run.out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_kl_is_that_of_the_command_for_two(command, made):
    expected = command("kl", "int8", "g0", "--store", made.folder, "--json").json["kl"]["value"]
    (twin,) = (
        each
        for each in command("compare", "--store", made.folder, "--json").json
        if each["relation"] == "quantised twin"
    )
    assert twin["median"]["value"] == pytest.approx(expected, rel=1e-12)


def test_of_several_rows_of_a_model_one_must_be_chosen(command, made):
    made.add(make_result("g0", revision="r2", metadata={"family": "$g$"}))
    run = command("compare", "--store", made.folder)
    assert "matrix must have one row a model, got g0@" in run.error
    assert command("compare", "--store", made.folder, "--newest").code == 0
    run = command("compare", "--store", made.folder, "--dtype", "float16")
    assert "got none" in run.error


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (0, "must hold results, got no such folder"),
        (1, "models must be at least two to be compared, got 1"),
        (2, "metadata must relate at least two of the models, got none"),
    ],
)
def test_what_cannot_be_compared_is_one_line(command, tmp_path, models, message):
    if models:
        add_together(Store(tmp_path / "s"), [f"m{row}" for row in range(models)])
    run = command("compare", "--store", tmp_path / "s", "--plot", tmp_path / "a.png")
    assert message in run.error
    run = command("compare", "--store", tmp_path / "s", "--plot", tmp_path / "a.gif")
    assert "must end in .png, .svg or .pdf" in run.error
    assert not list(tmp_path.glob("a.*"))
    run = command("compare", "--store", tmp_path / "s", "--plot", tmp_path / "none" / "a.png")
    assert "There is no such folder" in run.error, "it is said before the work"


def test_models_that_are_all_the_same(command, tmp_path):
    store = Store(tmp_path / "s")
    same = np.linspace(-900, -500, 8)
    for row in range(6):
        fields = {"metadata": {"family": "f"}, "loglikelihoods": same}
        store.add(make_result(f"m{row}", **fields))
    (found,) = command("compare", "--store", store.folder, "--json").json
    assert (found["pairs"], found["median"]["value"], found["median"]["interval"]) == (
        15,
        0,
        [0, 0],
    )
    assert command("compare", "--store", store.folder, "--plot", tmp_path / "a.svg").code == 0

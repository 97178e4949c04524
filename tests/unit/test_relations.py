"""Pairs by relation, against the definitions tried on every pair, one after the other."""

import math
import tracemalloc
from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest

from llfast.relations import RELATIONS, family_of, is_layer, related_pairs


def named(models, found):
    """Pairs by relation, as sets of names."""
    return {
        relation: {frozenset((models[a], models[b])) for a, b in pairs}
        for relation, pairs in found.pairs.items()
    }


def find(**metadata):
    """Relations of models that are given by name."""
    models = list(metadata)
    return named(models, related_pairs(models, list(metadata.values())))


def pair(*names):
    return frozenset(names)


def test_a_pair_of_every_kind():
    found = find(
        base={"family": "f"},
        child={"family": "f", "parents": ["base"]},
        sister={"family": "g", "parents": "base"},
        int4={"quantised_from": "child"},
        cousin={"family": "g"},
        early={"run": "r", "step": 10},
        late={"run": "r", "step": 1000},
        middle={"run": "r", "step": 50},
        deep1={"layer": 1, "layer_of": "base"},
        deep2={"layer": 2, "layer_of": "base"},
    )
    assert found == {
        "quantised twin": {pair("int4", "child")},
        "adjacent layers": {pair("deep1", "deep2")},
        "adjacent steps": {pair("early", "middle"), pair("middle", "late")},
        "parent-child": {pair("base", "child"), pair("base", "sister")},
        "siblings": {pair("child", "sister")},
        "same family": {pair("sister", "cousin")},
        "random": {pair("base", "cousin"), pair("child", "cousin")},
    }
    assert set(found) == set(RELATIONS)


def test_the_first_relation_that_fits_is_that_of_a_pair():
    same = {"family": "f", "run": "r", "parents": ["p"]}
    assert find(
        p={"family": "f"},
        a={**same, "step": 1},
        b={**same, "step": 2, "parents": ["p", "a"], "quantised_from": "a"},
        c={**same, "step": 3, "parents": ["p", "b", "a"]},
    ) == {
        "quantised twin": {pair("a", "b")},
        "adjacent steps": {pair("b", "c")},
        "parent-child": {pair("p", "a"), pair("p", "b"), pair("p", "c"), pair("a", "c")},
    }


def test_checkpoints_of_one_run_are_no_siblings_family_or_strangers():
    run = {"run": "r", "family": "f", "parents": ["p"]}
    found = find(p={}, a={**run, "step": 1}, b={**run, "step": 2}, c={**run, "step": 9}, d={**run})
    assert found == {
        "adjacent steps": {pair("a", "b"), pair("b", "c")},
        "parent-child": {pair("p", each) for each in "abcd"},
    }


def test_a_layer_is_related_to_the_next_of_its_model_alone():
    family = {"family": "f", "parents": ["m"], "run": "r", "step": 1, "quantised_from": "m"}
    found = find(
        m={"family": "f"},
        a={**family, "layer": 0, "layer_of": "m"},
        b={**family, "layer": 1, "layer_of": "m"},
        c={**family, "layer": 3, "layer_of": "m"},
        d={**family, "layer": 2, "layer_of": "other"},
        e={**family, "layer_of": "m"},
        f={**family, "layer": 2},
        n={"family": "f", "parents": ["a"]},
    )
    assert found == {"adjacent layers": {pair("a", "b")}, "same family": {pair("m", "n")}}


# ------------------------------------------------------------------ the definitions


def integer(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if number and math.isfinite(value) and value % 1 == 0 else None


def text(value):
    return value if isinstance(value, str) and value else None


def parents_of(model, everyone):
    value = everyone[model].get("parents")
    named = value if isinstance(value, list) else [value]
    whole = {each for each in everyone if not is_layer(everyone[each])}
    return {each for each in named if isinstance(each, str)} & whole - {model}


def relation_of(a, b, everyone):
    """The relation of two models, by its definition; None if there is none."""
    x, y = everyone[a], everyone[b]
    if is_layer(x) or is_layer(y):
        layers = integer(x.get("layer")), integer(y.get("layer"))
        of_one = text(x.get("layer_of")) and x["layer_of"] == y.get("layer_of")
        adjacent = of_one and None not in layers and abs(layers[0] - layers[1]) == 1
        return "adjacent layers" if adjacent else None
    if x.get("quantised_from") == b or y.get("quantised_from") == a:
        return "quantised twin"
    one_run = bool(text(x.get("run"))) and x["run"] == y.get("run")
    steps = integer(x.get("step")), integer(y.get("step"))
    if one_run and None not in steps and steps[0] != steps[1]:
        others = [
            integer(each.get("step"))
            for each in everyone.values()
            if each.get("run") == x["run"] and not is_layer(each)
        ]
        if not any(min(steps) < each < max(steps) for each in others if each is not None):
            return "adjacent steps"
    parents = parents_of(a, everyone), parents_of(b, everyone)
    if b in parents[0] or a in parents[1]:
        return "parent-child"
    if one_run:
        return None
    if parents[0] & parents[1]:
        return "siblings"
    families = text(x.get("family")), text(y.get("family"))
    if None in families:
        return None
    return "same family" if families[0] == families[1] else "random"


def collection(seed, count=25):
    """Models of which half say each thing, and some of them nonsense."""
    rng = np.random.default_rng(seed)
    names = [f"m{number}" for number in range(count)]

    def choose(values):
        return values[rng.integers(len(values))]

    kinds = {
        "family": ["f", "g", "", None, 7, ["f"]],
        "parents": [[choose(names)], choose(names), ["gone", choose(names)], None, 3, [None, 4]],
        "run": ["r", "s", None, 1.5],
        "step": [1, 2, 3.0, 2.5, True, "4", float("nan"), float("inf"), 10**30, None],
        "quantised_from": [choose(names), "gone", {"a": 1}, *[None] * 6],
        "layer": [0, 1, 2, "1", *[None] * 12],
        "layer_of": ["m0", "m1", *[None] * 20],
    }
    everyone = {}
    for name in names:
        own = {key: choose(values) for key, values in kinds.items() if rng.random() < 0.6}
        if rng.random() < 0.2:
            own |= {"layer": int(rng.integers(4)), "layer_of": choose(["m0", "m1"])}
        everyone[name] = own
    return everyone


@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_those_of_the_definitions(seed):
    everyone = collection(seed)
    expected = {}
    for a, b in combinations(everyone, 2):
        relation = relation_of(a, b, everyone)
        if relation is not None:
            expected.setdefault(relation, set()).add(pair(a, b))
    assert find(**everyone) == expected
    found = related_pairs(list(everyone), list(everyone.values()))
    assert found.totals == {relation: len(pairs) for relation, pairs in expected.items()}


def test_the_definitions_are_all_tried():
    everywhere = Counter(
        relation_of(a, b, everyone)
        for everyone in map(collection, range(20))
        for a, b in combinations(everyone, 2)
    )
    assert set(everywhere) == {*RELATIONS, None}
    assert min(everywhere.values()) > 5


# ------------------------------------------------------------------ nonsense, and many models


def test_what_relates_no_models_is_counted():
    models = ["a", "b", "c", "d", "e"]
    metadata = [
        {"family": 3, "parents": ["a", "gone", None, 7]},
        {"family": "", "parents": {"a": 1}, "run": 4, "step": "9"},
        {"family": "f", "quantised_from": "c", "run": "r", "step": True},
        {"parents": "also gone", "layer_of": "x", "layer": 1.5},
        {"parents": [], "run": "", "step": None, "unknown": object()},
    ]
    found = related_pairs(models, metadata)
    assert found.pairs == found.totals == {}
    assert found.ignored == {
        "models without a family": 3,
        "values of another kind": 5,  # 7, {"a": 1}, 4, True, 1.5; a step without a run is not read
        "models that name themselves": 2,
        "names of models that are not there": 1,
    }
    assert related_pairs(["a", "b"], [{"family": "f"}] * 2).ignored == {}


def test_none_and_one_have_no_pairs():
    for count in (0, 1):
        found = related_pairs(["a"][:count], [{"family": "f", "parents": ["a"]}][:count])
        assert found.pairs == found.totals == {}


def test_of_many_pairs_some_are_drawn_and_all_are_counted():
    count = 3000
    models = [f"m{number}" for number in range(count)]
    metadata = [{"family": f"f{number % 3}", "parents": ["m0"]} for number in range(count)]
    metadata[0] = {"family": "f0"}
    for number in range(1, 1000):
        metadata[number] = {"family": f"f{number % 3}"}
    found = related_pairs(models, metadata)
    siblings = comb(2000, 2)
    kin = 3 * comb(1000, 2) - 666 - (2 * comb(667, 2) + comb(666, 2))
    assert found.totals == {
        "parent-child": 2000,
        "siblings": siblings,
        "same family": kin,
        "random": comb(count, 2) - siblings - 2000 - kin,
    }
    for relation, pairs in found.pairs.items():
        assert len(set(pairs)) == len(pairs) == 2000, relation
        assert all(a < b for a, b in pairs)
    everyone = dict(zip(models, metadata, strict=True))
    for relation, pairs in found.pairs.items():
        for a, b in pairs[::50]:
            assert relation_of(models[a], models[b], everyone) == relation


def test_pairs_that_are_not_drawn_are_not_listed_either():
    """Of 4,000 models there are 8 million, which would take 64 MB as numbers."""
    models = [f"m{number}" for number in range(4000)]
    metadata = [{"family": model} for model in models]
    tracemalloc.start()
    try:
        found = related_pairs(models, metadata)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.totals == {"random": comb(4000, 2)}
    assert most < 20e6


def test_every_pair_is_drawn_as_often_as_every_other():
    models, metadata = list("abcdefgh"), [{"family": each} for each in "ffffghij"]
    times = Counter()
    for seed in range(600):
        found = related_pairs(models, metadata, most_pairs=5, seed=seed)
        assert len(found.pairs["random"]) == 5
        times.update(found.pairs["random"])
    pairs = 28 - comb(4, 2)
    assert len(times) == pairs
    share = 5 / pairs
    for drawn in times.values():
        assert abs(drawn - 600 * share) < 4.5 * np.sqrt(600 * share * (1 - share))


def test_what_is_drawn_does_not_depend_on_the_order_of_models():
    everyone = collection(3, count=60)
    models = list(everyone)
    again = [models[row] for row in np.random.default_rng(0).permutation(60)]
    found = [
        named(each, related_pairs(each, [everyone[name] for name in each], most_pairs=7))
        for each in (models, again)
    ]
    assert found[0] == found[1]
    other = related_pairs(models, list(everyone.values()), most_pairs=7, seed=1)
    assert named(models, other) != found[0]


def test_families_and_layers_are_read_from_metadata():
    assert family_of({"family": "f"}) == "f"
    assert [family_of(each) for each in ({}, {"family": ""}, {"family": 3})] == [None] * 3
    assert is_layer({"layer": 0})
    assert is_layer({"layer_of": "m"})
    assert not is_layer({"layer": None})

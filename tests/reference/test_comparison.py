"""KL by relation against constructed divergences, numpy's quantiles and simulated collections."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import chi2

from llfast import LlfastWarning, ModelSpace, SpaceError, compare_relations, comparison
from llfast.comparison import PUBLISHED, Quartile, _draw, _units, _weighted_quantiles
from llfast.relations import RELATIONS
from tests.spaces import make_matrix

N = 60
QUARTILES = ("first_quartile", "median", "third_quartile")


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    monkeypatch.setattr(comparison, "_RESAMPLES", 300)


def directions(count):
    """Orthonormal directions (count, N) that have no mean over texts."""
    random = np.random.default_rng(0).standard_normal((N, count + 1))
    random[:, 0] = 1
    return np.linalg.qr(random)[0].T[1:]


def bits(squared_distance, text_bytes=500.0):
    """KL in bits per byte of models so far apart, by its definition."""
    return squared_distance / (2 * N) / (text_bytes * np.log(2))


def by_name(found):
    return {each.relation: each for each in found}


def make_family(size, *, metadata=None):
    """A parent, and children so far from it that each distance is known: 1, 2, 3, ..."""
    base = -700 + 50 * np.random.default_rng(1).standard_normal(N)
    steps = np.arange(1.0, size + 1)
    values = np.vstack([base, base + steps[:, None] * directions(size)])
    kin = metadata or [{}, *({"parents": ["model 0"]} for _ in steps)]
    return make_matrix(values, metadata=kin), steps


def test_divergences_are_those_that_the_collection_was_made_with():
    matrix, steps = make_family(9)
    with pytest.warns(LlfastWarning, match="models; models without a family: 10$"):
        found = by_name(compare_relations(matrix, clip_quantile=None))
    assert set(found) == {"parent-child", "siblings"}
    own = bits(steps**2)
    between = bits(np.array([a**2 + b**2 for a, b in itertools.combinations(steps, 2)]))
    for relation, kl in (("parent-child", own), ("siblings", between)):
        each = found[relation]
        assert each.pairs == len(each.kl) == len(kl)
        np.testing.assert_allclose(each.kl, np.sort(kl), rtol=1e-9)
        values = [getattr(each, name).value for name in QUARTILES]
        np.testing.assert_allclose(values, np.quantile(kl, [0.25, 0.5, 0.75]), rtol=1e-9)
        for name in QUARTILES:
            low, high = getattr(each, name).interval
            assert kl.min() * 0.999 <= low <= getattr(each, name).value <= high <= kl.max() * 1.001


def test_they_are_those_of_the_space():
    rng = np.random.default_rng(2)
    values = -700 + 100 * rng.standard_normal((12, N)) ** 3
    matrix = make_matrix(values, metadata=[{"family": f"f{row % 4}"} for row in range(12)])
    space = ModelSpace.fit(matrix)
    assert (values < space.clip).any()
    found = by_name(compare_relations(matrix))
    for relation, kin in (("same family", True), ("random", False)):
        expected = sorted(
            float(space.kl(f"model {a}", f"model {b}"))
            for a, b in itertools.combinations(range(12), 2)
            if (a % 4 == b % 4) == kin
        )
        np.testing.assert_allclose(found[relation].kl, expected, rtol=1e-12)
        assert found[relation].published == PUBLISHED[relation]
    assert found["random"].median.value == pytest.approx(np.median(found["random"].kl))


def test_layers_have_a_basis_of_their_own():
    rng = np.random.default_rng(3)
    values = -700 + 100 * rng.standard_normal((6, N))
    family = [{"family": "f"} for _ in range(6)]
    (alone,) = compare_relations(make_matrix(values, metadata=family))
    layers = np.linspace(-9000, -700, 8)[:, None] + 100 * rng.standard_normal((8, N))
    metadata = [
        *family,
        *({"family": "f", "layer": row, "layer_of": "model 0"} for row in range(8)),
    ]
    models = [f"model {row}" for row in range(6)] + [f"model 0@layer={row}" for row in range(8)]
    both = make_matrix(np.vstack([values, layers]), metadata=metadata, models=models)
    kin, adjacent = compare_relations(both)
    assert (kin.relation, adjacent.relation) == ("same family", "adjacent layers")
    np.testing.assert_array_equal(kin.kl, alone.kl)
    assert kin.median == alone.median
    clipped = np.maximum(layers, np.quantile(layers, 0.02))
    variances = np.diff(clipped, axis=0).var(axis=1)
    np.testing.assert_allclose(adjacent.kl, np.sort(bits(variances * N)), rtol=1e-9)


def test_of_many_pairs_a_part_is_used():
    rng = np.random.default_rng(4)
    values = -700 + 100 * rng.standard_normal((40, N))
    matrix = make_matrix(values, metadata=[{"family": str(row)} for row in range(40)])
    (whole,) = compare_relations(matrix)
    (part,) = compare_relations(matrix, most_pairs=100)
    (again,) = compare_relations(matrix, most_pairs=100, seed=1)
    assert (whole.pairs, part.pairs, len(part.kl)) == (780, 780, 100)
    assert set(part.kl) < set(whole.kl)
    assert set(part.kl) != set(again.kl)
    assert whole.median.interval[0] < part.median.value < whole.median.interval[1]


def test_the_order_of_models_plays_no_part():
    rng = np.random.default_rng(5)
    values = -700 + 100 * rng.standard_normal((30, N))
    metadata = [{"family": f"f{row % 7}", "parents": [f"model {row // 2}"]} for row in range(30)]
    metadata[0] = {"family": "f0"}
    order = rng.permutation(30)
    matrices = [
        make_matrix(
            values[rows],
            models=[f"model {row}" for row in rows],
            metadata=[metadata[row] for row in rows],
        )
        for rows in (range(30), order)
    ]
    found = [compare_relations(each, most_pairs=50) for each in matrices]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.kl, other.kl, rtol=1e-9)
        np.testing.assert_allclose(one.median.interval, other.median.interval, rtol=1e-9)


# ------------------------------------------------------------------ intervals


def test_weights_count_values_as_often_as_they_say():
    rng = np.random.default_rng(6)
    for size in (1, 2, 5, 40):
        values = np.sort(rng.lognormal(size=size))
        for _ in range(50):
            weights = rng.integers(0, 4, size)
            if weights.any():
                expected = np.quantile(np.repeat(values, weights), [0.25, 0.5, 0.75])
                found = _weighted_quantiles(values, weights.cumsum())
                np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_families_are_drawn_where_there_are_some_else_models_else_none():
    def units_of(metadata, pairs):
        return _units(ModelSpace.fit(make_matrix(np.zeros((10, N)), metadata=metadata)), pairs)

    pairs = np.arange(10).reshape(5, 2)
    five = [{"family": f"f{row // 2}"} for row in range(10)]
    drawn, units = units_of(five, pairs)
    assert drawn == "families"
    np.testing.assert_array_equal(units, [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]])
    drawn, units = units_of([*five[:8], {"family": 3}, {"family": 3}], pairs)
    assert drawn == "families"
    np.testing.assert_array_equal(units[4], [4, 5])
    for few in (five[:8] + five[:2], [{}] * 10):
        drawn, units = units_of(few, pairs)
        assert drawn == "models"
        assert len(np.unique(units)) == 10
    assert units_of(five, pairs[:2])[0] is None
    assert units_of(five, np.array([[0, 1], [2, 3], [4, 0]]))[0] == "models"


def test_intervals_are_those_of_families_that_are_repeated():
    """Parents and their children, which are as far away as is their family's own."""
    steps, children = np.array([3.0, 7, 1, 6, 2, 5, 4]), np.array([1, 6, 2, 5, 3, 1, 4])
    lines = directions(14)
    values, metadata = [], []
    for family, (step, count) in enumerate(zip(steps, children, strict=True)):
        parent = 50 * lines[family] - 700
        values += [parent, *(parent + step * lines[7 : 7 + count])]
        kin = {"family": f"f{family}"}
        metadata += [kin, *[kin | {"parents": [f"{family}.0"]}] * count]
    models = [f"{family}.{row}" for family in range(7) for row in range(children[family] + 1)]
    matrix = make_matrix(np.array(values), metadata=metadata, models=models)
    found = by_name(compare_relations(matrix, clip_quantile=None))["parent-child"]
    draws, rng = [], np.random.default_rng(0)
    for _ in range(300):
        times = rng.multinomial(7, np.full(7, 1 / 7))
        draws.append(np.quantile(np.repeat(bits(steps**2), children * times), [0.25, 0.5, 0.75]))
    for name, each in zip(QUARTILES, np.array(draws).T, strict=True):
        expected = np.quantile(each, [0.025, 0.975])
        np.testing.assert_allclose(getattr(found, name).interval, expected, rtol=1e-9)


def coverage(simulate, truth, seeds):
    """How often an interval of the median holds the true one: ours, and that of pairs drawn."""
    inside = np.zeros(2)
    for seed in range(seeds):
        kl, units = simulate(np.random.default_rng(seed))
        order = np.argsort(kl)
        alone = np.repeat(np.arange(len(kl))[:, None], 2, axis=1)
        for which, each in enumerate((units[order], alone)):
            low, high = np.quantile(_draw(kl[order], each, seed)[:, 1], [0.025, 0.975])
            inside[which] += low <= truth <= high
    return inside / seeds


def test_intervals_cover_what_families_share():
    """Families of eight pairs, whose KL is as much the family's as the pair's."""

    def simulate(rng):
        family = np.repeat(np.arange(15), 8)
        logs = rng.standard_normal(15)[family] + rng.standard_normal(len(family))
        return np.exp(logs), np.column_stack([family, family])

    ours, of_pairs = coverage(simulate, 1.0, 100)
    assert 0.88 < ours < 0.99
    assert of_pairs < 0.75


def test_intervals_cover_pairs_that_share_models():
    """All pairs of 30 random points: the true median is that of a chi-squared distribution."""

    def simulate(rng):
        points = rng.standard_normal((30, 3))
        pairs = np.array(list(itertools.combinations(range(30), 2)))
        return np.square(points[pairs[:, 0]] - points[pairs[:, 1]]).sum(axis=1), pairs

    ours, of_pairs = coverage(simulate, 2 * chi2(3).median(), 100)
    assert ours > 0.88
    assert of_pairs < 0.85


def test_a_collection_that_is_there_several_times_tells_no_more():
    rng = np.random.default_rng(7)
    kl = np.sort(rng.lognormal(size=12))
    once = np.column_stack([np.arange(12), np.arange(12)])
    times = np.repeat(np.arange(12), 9)
    few, many = _draw(kl, once, 0), _draw(kl[times], once[times], 0)
    spans = [np.ptp(np.quantile(each[:, 1], [0.025, 0.975])) for each in (few, many)]
    assert spans[1] > 0.8 * spans[0]


# ------------------------------------------------------------------ odd collections


def test_models_that_are_all_the_same_differ_by_nothing():
    matrix = make_matrix(np.full((8, N), -700.0), metadata=[{"family": "f"}] * 8)
    (found,) = compare_relations(matrix)
    assert found.pairs == 28
    assert not found.kl.any()
    for name in QUARTILES:
        assert getattr(found, name) == Quartile(0.0, (0.0, 0.0))


def test_two_models_have_a_divergence_and_no_interval():
    rng = np.random.default_rng(8)
    matrix = make_matrix(-700 + rng.standard_normal((2, N)), metadata=[{"family": "f"}] * 2)
    (found,) = compare_relations(matrix)
    kl = float(ModelSpace.fit(matrix).kl("model 0", "model 1"))
    assert found.median.value == pytest.approx(kl)
    assert found.drawn is None
    assert np.isnan(found.median.interval).all()
    assert str(found.median) == f"{kl:.3g}"


def test_what_cannot_be_compared_is_refused_in_one_line():
    values = np.random.default_rng(9).standard_normal((3, N)) - 700
    with pytest.raises(SpaceError, match="models must be at least two to be compared, got 1"):
        compare_relations(make_matrix(values[:1]))
    for metadata in ([{}] * 3, [{"family": "f"}, {}, {"parents": ["gone"]}]):
        with pytest.raises(SpaceError, match="must relate at least two of the models, got none"):
            compare_relations(make_matrix(values, metadata=metadata))
    kin = [{"family": "f"}] * 3
    with pytest.raises(SpaceError, match="text_bytes must be known for bits_per_byte"):
        compare_relations(make_matrix(values, metadata=kin, text_bytes=np.zeros(N)))
    with pytest.raises(ValueError, match="most_pairs must be at least 1, got 0"):
        compare_relations(make_matrix(values, metadata=kin), most_pairs=0)
    with pytest.raises(ValueError, match=r"clip_quantile must be in \[0, 1\), got 1"):
        compare_relations(make_matrix(values, metadata=kin), clip_quantile=1.0)


def test_what_is_published_is_of_relations_that_there_are():
    assert set(PUBLISHED) < set(RELATIONS)

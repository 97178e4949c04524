"""Lower bounds: never above the truth, close enough to rule most models out, and why they hold."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np
import pytest

from llfast import KLIndex, SpaceError
from llfast.search.flat import farthest, reach, squares_to
from llfast.search.projection import Projection
from tests.reference.test_search import assert_exact, brute_force, make_result, make_space

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")

N = 600


def lineage(rng, k, n, *, share=0.0):
    """Families with heavy-tailed texts, a share of all models in the first; light fine-tunes."""
    weights = rng.lognormal(0, 1, n)
    families = 60 * weights * rng.standard_normal((max(k // 20, 2), n))
    chosen = np.where(rng.random(k) < share, 0, rng.integers(0, len(families), k))
    directions = rng.standard_normal((40, n))
    steps = (6 * rng.standard_normal((k, 40))) @ directions
    return -900 + families[chosen] + steps + 3 * weights * rng.standard_normal((k, n))


def queries(space, rng):
    """Of the space, beside it, far away, constant, and with one text changed."""
    k, n = space.coordinates.shape
    values = space.coordinates[rng.integers(k)] + space.reference
    changed = values.copy()
    changed[rng.integers(n)] -= 5000
    return {
        "near": values + rng.standard_normal(n),
        "far": 1e5 * rng.standard_normal(n),
        "very far": 1e12 * rng.standard_normal(n),
        "constant": np.full(n, -1000.0),
        "one text": changed,
        "the reference": space.reference.copy(),
        "the same": values,
    }


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_any_query_gets_what_brute_force_gets(share):
    rng = np.random.default_rng(int(10 * share))
    space = make_space(lineage(rng, 1500, N, share=share))
    index = KLIndex.build(space, "certified")
    for row in rng.integers(0, 1500, 4):
        name = space.models[row]
        for k in (1, 10, 100):
            assert_exact(space, index, name, space.coordinates[row], name, k)
    for name, values in queries(space, rng).items():
        result = make_result(values)
        truth = [each for _, each in brute_force(space, space.project(result))]
        for k in (1, 10, 100):
            assert [hit.model for hit in index.search(result, k)] == truth[:k]
            if name != "very far":  # where fp64 itself cannot tell many of them apart
                assert_exact(space, index, result, space.project(result), None, k)


@pytest.mark.parametrize("radius", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_any_radius_gets_what_brute_force_gets(radius):
    rng = np.random.default_rng(3)
    space = make_space(lineage(rng, 600, N, share=0.5) * rng.choice([0.1, 1, 3], (600, 1)))
    index = KLIndex.build(space, "certified")
    for row in (0, 100, 599):
        truth = brute_force(space, space.coordinates[row], space.models[row])
        inside = [name for kl, name in truth if kl <= radius]
        assert [hit.model for hit in index.range_search(space.models[row], radius)] == inside


def test_few_models_are_compared_in_full():
    rng = np.random.default_rng(4)
    for share, most in ((0.0, 60), (0.5, 200)):
        space = make_space(lineage(rng, 4000, N, share=share))
        index = KLIndex.build(space, "certified")
        compared = []
        for row in rng.integers(0, 4000, 15):
            found = index.search(space.models[row]).certificate
            assert found.models == 3999
            assert found.closed_by == "bounds"
            assert found.compared <= found.second + 16
            compared.append(found.compared)
        assert np.median(compared) < most


def test_a_certificate_says_what_was_left_out():
    rng = np.random.default_rng(5)
    space = make_space(lineage(rng, 2000, N))
    hits = KLIndex.build(space, "certified").search("m0007")
    truth = brute_force(space, space.coordinates[7], "m0007")
    assert hits[-1].kl <= hits.certificate.bound < hits[-1].kl * 1.01
    beyond = [kl for kl, _ in truth[hits.certificate.compared :]]
    assert min(beyond) >= hits.certificate.bound or hits.certificate.compared > 10
    everything = KLIndex.build(space, "exact").search("m0007")
    assert everything == hits
    assert everything.certificate.closed_by == "scan"
    assert everything.certificate.bound == math.inf
    assert everything.certificate.compared == 1999


def test_where_bounds_rule_nothing_out_all_are_compared():
    # Far away in a direction that no model has: all are about as far, by what bounds can tell.
    rng = np.random.default_rng(6)
    space = make_space(lineage(rng, 3000, N))
    index = KLIndex.build(space, "certified")
    result = make_result(1e6 * rng.standard_normal(N))
    assert index.search(result).certificate.closed_by == "scan"
    assert_exact(space, index, result, space.project(result), None, 10)


def test_only_what_a_condition_allows_is_read_where_that_is_little():
    pytest.importorskip("duckdb", reason="duckdb is an extra: pip install 'llfast[cpu]'")
    rng = np.random.default_rng(6)
    space = make_space(lineage(rng, 3000, N))
    exact, certified = KLIndex.build(space, "exact"), KLIndex.build(space, "certified")
    reads = []
    rows = replace(exact._contents.rows, check=reads.extend)
    exact._contents = replace(exact._contents, rows=rows)
    hits = exact.search("m0007", 5, where="model like '%11'")
    assert hits == certified.search("m0007", 5, where="model like '%11'")
    assert hits.certificate.compared == hits.certificate.models == 30
    assert hits.certificate.closed_by == "scan"
    assert {row % 100 for row in reads} <= {7, 11}
    assert exact.range_search("m0007", 9.0, where="model like '%11'") == (
        certified.range_search("m0007", 9.0, where="model like '%11'")
    )


def test_more_duplicates_than_a_first_look_takes():
    rng = np.random.default_rng(7)
    values = lineage(rng, 40, N)[np.r_[np.zeros(300, dtype=int), np.arange(40)]]
    names = [f"m{number:03d}" for number in rng.permutation(340)]
    space = make_space(values, names)
    index = KLIndex.build(space, "certified")
    assert_exact(space, index, names[0], space.coordinates[0], names[0], 10)
    assert_exact(space, index, names[339], space.coordinates[339], names[339], 320)


def test_several_queries_at_once_are_the_same_bits():
    rng = np.random.default_rng(8)
    space = make_space(lineage(rng, 900, N))
    for mode in ("exact", "certified"):
        index = KLIndex.build(space, mode)
        names = [space.models[row] for row in rng.integers(0, 900, 70)]
        assert index.search(names, 5) == [index.search(name, 5) for name in names]
    assert index.search([]) == []


def test_twins_are_told_apart():
    rng = np.random.default_rng(9)
    n, mean_bytes = 10_000, 972.3188
    values = lineage(rng, 30, n)
    # Half the variance of the difference is 1e-5 bits a byte.
    nats = 1e-5 * mean_bytes * math.log(2)
    noise = rng.standard_normal(n)
    noise = (noise - noise.mean()) / noise.std() * math.sqrt(2 * nats)
    space = make_space(np.vstack([values, values[:1] + noise]), text_bytes=mean_bytes)
    for mode in ("exact", "certified"):
        (hit,) = KLIndex.build(space, mode).search("m0030", 1)
        assert hit.model == "m0000"
        assert hit.kl == pytest.approx(1e-5, rel=1e-6)


# ------------------------------------------------------------------ the bounds themselves


@pytest.mark.parametrize("n", [1, 3, 64, 1000, 10_000])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_fp32_squares_are_within_their_reach(n, offset):
    rng = np.random.default_rng(n)
    for spread in (1e-22, 1e-6, 1e-3, 1.0, 1e6):
        rows = offset * rng.standard_normal(n) + spread * rng.standard_normal((40, n))
        query = rows[0] + spread * rng.standard_normal(n)
        squares = squares_to(query.astype(np.float32)[None], rows.astype(np.float32))[0]
        truth = np.sqrt(np.square(rows - query).sum(axis=1))
        norms = np.linalg.norm(query) + np.linalg.norm(rows, axis=1)
        for square, distance, size in zip(squares, truth, norms, strict=True):
            assert float(square) <= reach(distance, n, size)
            assert distance <= farthest(float(square), n, size)


def test_a_reach_is_not_much_more_than_the_square():
    # A reach of infinity would make everything right, and everything slow.
    assert reach(1.0, 64, 0.0) < 1 + 1e-4
    assert reach(1.0, 10_000, 0.0) < 1 + 2e-3
    assert reach(0.0, 64, 1000.0) < 1e-6
    assert farthest(1.0, 64, 0.0) < 1 + 1e-4


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize(("k", "n"), [(3, 2), (10, 300), (400, 300), (400, 20)])
def test_reduced_distances_are_never_larger(k, n, scale):
    rng = np.random.default_rng([k, n])
    points = scale * lineage(rng, k, n)
    projection = Projection.fit(points)
    assert projection.directions.shape[0] == min(k, n, 254)
    np.testing.assert_allclose(
        projection.directions @ projection.directions.T,
        np.eye(len(projection.directions)),
        atol=1e-13,
    )
    reduced = projection.reduce(points)
    for row in range(0, k, max(1, k // 10)):
        truth = np.sqrt(np.square(points - points[row]).sum(axis=1))
        norms = np.linalg.norm(points[row]) + np.linalg.norm(points, axis=1)
        squares = squares_to(reduced.first[[row]], reduced.first)[0]
        limits = [
            reach(*each) for each in zip(truth, [reduced.first.shape[1]] * k, norms, strict=True)
        ]
        assert (squares <= limits).all()


def test_directions_hold_what_points_have_in_common():
    rng = np.random.default_rng(11)
    points = rng.standard_normal((500, 30)) @ rng.standard_normal((30, 400))
    points += 1e-3 * rng.standard_normal((500, 400))
    first, second = Projection.fit(points).explained
    assert first > 0.9999
    assert 1 >= second > first
    again = Projection.fit(points)
    np.testing.assert_array_equal(again.directions, Projection.fit(points).directions)


# ------------------------------------------------------------------ rows that come and go


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_added_models_are_found_at_once(mode):
    rng = np.random.default_rng(12)
    values = lineage(rng, 340, N)
    space = make_space(values[:300])
    index = KLIndex.build(space, mode)
    for number in range(300, 340):
        index.add(make_result(values[number], f"m{number:04d}"))
    assert len(index) == 340
    # As if all had been there from the start, in the basis of the first.
    later = [space.project(make_result(each)) for each in values[300:]]
    points = np.vstack([space.coordinates, later])
    for row in (0, 299, 300, 339):
        distances = np.square(points - points[row]).sum(axis=1)
        truth = [f"m{other:04d}" for other in np.argsort(distances) if other != row]
        hits = index.search(f"m{row:04d}", 20)
        assert [hit.model for hit in hits] == truth[:20]
        expected = distances[[int(hit.model[1:]) for hit in hits]] / (2 * N)
        kls = [hit.kl * 500 * math.log(2) for hit in hits]
        np.testing.assert_allclose(kls, expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_removed_models_are_gone_at_once(mode):
    rng = np.random.default_rng(13)
    space = make_space(lineage(rng, 200, N))
    index = KLIndex.build(space, mode)
    for _ in range(10):
        nearest = index.search("m0005", 1)[0].model
        index.remove(nearest)
        assert nearest not in {hit.model for hit in index.search("m0005", 300)}
        assert nearest not in {hit.model for hit in index.range_search("m0005", math.inf)}
        with pytest.raises(SpaceError, match=nearest):
            index.search(nearest)
        with pytest.raises(SpaceError, match=nearest):
            index.remove(nearest)
    assert len(index) == 190


def test_a_model_that_comes_again_takes_its_own_place():
    rng = np.random.default_rng(14)
    values = lineage(rng, 50, N)
    index = KLIndex.build(make_space(values), "certified")
    index.add(make_result(values[20] + 0.01 * rng.standard_normal(N), "m0003"))
    assert len(index) == 50
    assert index.search("m0020", 1)[0].model == "m0003"
    assert [hit.model for hit in index.search("m0020", 99)].count("m0003") == 1


def test_an_index_of_which_all_is_gone_finds_nothing():
    index = KLIndex.build(make_space(lineage(np.random.default_rng(15), 3, N)), "certified")
    for name in ("m0000", "m0001"):
        index.remove(name)
    assert index.search("m0002") == []
    assert index.range_search("m0002", 10.0) == []


def test_searches_go_on_while_models_come_and_go():
    rng = np.random.default_rng(16)
    values = lineage(rng, 400, N)
    index = KLIndex.build(make_space(values[:200]), "certified")
    problems = []
    done = threading.Event()

    def search():
        while not done.is_set():
            names = [hit.model for hit in index.search("m0000", 30)]
            if len(set(names)) != 30 or "m0000" in names:
                problems.append(names)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(200, 400):
            index.add(make_result(values[number], f"m{number:04d}"))
            index.remove(f"m{number - 100:04d}")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not problems

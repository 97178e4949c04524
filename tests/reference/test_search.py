"""Search against brute force in fp64, where fp32 is right, wrong, and tied."""

from __future__ import annotations

import json
import math
import pickle
import sys

import numpy as np
import pytest

from llfast import (
    KLIndex,
    LogLikelihoodMatrix,
    LogLikelihoods,
    MissingDependencyError,
    ModelSpace,
    SearchError,
    SpaceError,
)
from llfast.search.flat import import_faiss, squares_to

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


def make_space(values, names=None, text_bytes=500.0, **options):
    k, n = np.shape(values)
    names = names or [f"m{row:04d}" for row in range(k)]
    matrix = LogLikelihoodMatrix(
        names,
        np.asarray(values),
        np.full(n, text_bytes),
        ids=[f"t{row}" for row in range(n)],
        textset_digest="texts",
        convention="paper",
        **options,
    )
    return ModelSpace.fit(matrix, clip_quantile=None)


def make_result(values, model="outsider"):
    n = len(values)
    return LogLikelihoods(
        model=model,
        revision="",
        textset_digest="texts",
        convention="paper",
        dtype="",
        scoring_version=1,
        ids=tuple(f"t{row}" for row in range(n)),
        loglikelihoods=np.asarray(values, dtype=np.float64),
        token_counts=np.ones(n, dtype=np.int64),
        text_bytes=np.full(n, 500),
        truncated=np.zeros(n, dtype=bool),
        token_budgets=np.ones(n, dtype=np.int32),
    )


def brute_force(space, point, leave_out=None):
    """(bits a byte, name) of all models, nearest first, ties by name."""
    centred = space.coordinates - point
    centred = centred - centred.mean(axis=1, keepdims=True)
    nats = np.square(centred).sum(axis=1) / (2 * len(point))
    bits = nats / (float(space.text_bytes.mean()) * math.log(2))
    return sorted(
        (value, name)
        for value, name in zip(bits.tolist(), space.models, strict=True)
        if name != leave_out
    )


def assert_exact(space, index, query, point, leave_out, k):
    truth = brute_force(space, point, leave_out)
    hits = index.search(query, k)
    assert [hit.model for hit in hits] == [name for _, name in truth[:k]]
    np.testing.assert_allclose([hit.kl for hit in hits], [kl for kl, _ in truth[:k]], rtol=1e-9)
    if not truth:
        return
    # Every hit's own value is a radius that holds it; a hair less does not.
    for rank in {0, min(k, len(truth)) - 1}:
        radius = hits[rank].kl
        inside = index.range_search(query, radius)
        assert [hit.model for hit in inside] == [
            name for value, name in truth if value <= radius * (1 + 1e-12)
        ]
        assert hits[rank].model in {hit.model for hit in inside}
        if radius > 0:
            fewer = index.range_search(query, np.nextafter(radius, 0.0).item())
            assert hits[rank].model not in {hit.model for hit in fewer}


def scatter(rng, k, n):
    return -700 + 150 * rng.standard_normal((k, n))


def clusters(rng, k, n):
    families = 40 * rng.standard_normal((5, n))
    return -700 + families[rng.integers(0, 5, k)] + 0.5 * rng.standard_normal((k, n))


def near_duplicates(rng, k, n):
    """KL of about 1e-9 bits a byte within a family, and half of all in one family."""
    return families_of(rng, k, n, 8e-4)


def families_of(rng, k, n, spread):
    families = 150 * rng.standard_normal((3, n))
    return (
        -700 + families[rng.choice(3, k, p=[0.5, 0.3, 0.2])] + spread * rng.standard_normal((k, n))
    )


def duplicates(rng, k, n):
    return scatter(rng, max(k // 4, 1), n)[rng.integers(0, max(k // 4, 1), k)]


@pytest.mark.parametrize("mode", ["exact", "certified"])
@pytest.mark.parametrize("data", [scatter, clusters, near_duplicates, duplicates])
@pytest.mark.parametrize(
    ("k", "n"), [(1, 1), (1, 50), (2, 3), (30, 1), (40, 2), (200, 64), (60, 3000), (700, 300)]
)
def test_finds_what_brute_force_finds(data, k, n, mode):
    rng = np.random.default_rng([k, n])
    # Names in another order than rows, so that ties by name are not ties by row.
    names = [f"m{number}" for number in rng.permutation(k)]
    values = data(rng, k, n)
    space = make_space(values, names)
    index = KLIndex.build(space, mode)
    assert len(index) == k
    assert index.mode == mode
    for row in rng.choice(k, min(k, 5), replace=False):
        name = names[row]
        for wanted in (1, 3, k + 10):
            assert_exact(space, index, name, space.coordinates[row], name, wanted)
    outsiders = [scatter(rng, 1, n)[0], values[0] + 1e-3 * rng.standard_normal(n), values[0]]
    for outsider in outsiders:
        result = make_result(outsider)
        assert_exact(space, index, result, space.project(result), None, 7)


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_fp32_alone_would_get_these_wrong(mode):
    # What the margins are for: faiss' own order, where models differ by less than fp32 can tell.
    space = make_space(families_of(np.random.default_rng(0), 300, 64, 3e-5))
    index = KLIndex.build(space, mode)
    points = space.coordinates.astype(np.float32)
    squares = squares_to(points[:30], points)
    wrong = 0
    for row in range(30):
        order = np.argsort(squares[row], kind="stable")
        proposed = [space.models[other] for other in order if other != row][:10]
        truth = [name for _, name in brute_force(space, space.coordinates[row], space.models[row])]
        wrong += proposed != truth[:10]
        assert [hit.model for hit in index.search(space.models[row])] == truth[:10]
    assert wrong > 10


def test_hits_carry_the_estimate_of_the_space():
    rng = np.random.default_rng(2)
    space = make_space(
        clusters(rng, 20, 100),
        metadata=[{"family": row % 5} for row in range(20)],
        groups=[f"d{row // 5}" for row in range(100)],
    )
    for unit in ("bits_per_byte", "nats_per_text"):
        for hit in KLIndex.build(space).search("m0003", k=4, unit=unit):
            assert hit.estimate == space.kl("m0003", hit.model, unit)
            assert hit.estimate.unit == unit
            assert hit.kl == hit.estimate.value
            assert hit.interval == hit.estimate.interval
            assert hit.interval[0] < hit.kl < hit.interval[1]
            assert hit.standard_error == hit.estimate.standard_error
            assert hit.metadata == {"family": int(hit.model[1:]) % 5}


def test_a_summary_is_plain_json_even_of_an_unknown_error():
    # Two texts: leaving one out leaves nothing, so the interval has no upper end.
    space = make_space(np.array([[-1.0, -2.0], [-3.0, -7.0]]), metadata=[{"family": "a"}, {}])
    (hit,) = KLIndex.build(space).search("m0001")
    assert hit.interval == (0.0, math.inf)
    again = json.loads(json.dumps(hit.summary(), allow_nan=False))
    assert again == {
        "model": "m0000",
        "kl": pytest.approx((4 - 1) ** 2 / 8 / (500 * math.log(2))),
        "standard_error": None,
        "interval": [0.0, None],
        "below_noise_floor": False,
        "unit": "bits_per_byte",
        "confidence": 0.95,
        "metadata": {"family": "a"},
    }


def test_a_result_that_the_space_holds_leaves_itself_out():
    values = scatter(np.random.default_rng(3), 6, 40)
    index = KLIndex.build(make_space(values))
    by_name = index.search("m0002")
    assert index.search(make_result(values[2], model="m0002")) == by_name
    # Of another name, or with other numbers, it is another model.
    assert index.search(make_result(values[2], model="copy"))[0].model == "m0002"
    changed = index.search(make_result(values[2] + np.arange(40), model="m0002"))
    assert len(changed) == 6


def test_a_radius_holds_its_boundary_in_each_unit():
    values = scatter(np.random.default_rng(4), 50, 30)
    index = KLIndex.build(make_space(values))
    for unit in ("bits_per_byte", "nats_per_text"):
        hits = index.search("m0000", k=49, unit=unit)
        for rank, hit in enumerate(hits, start=1):
            assert index.range_search("m0000", hit.kl, unit=unit) == hits[:rank]
        assert index.range_search("m0000", math.inf, unit=unit) == hits
    assert index.range_search("m0000", 0.0) == []


def test_a_radius_of_zero_finds_the_identical():
    values = scatter(np.random.default_rng(5), 6, 30)
    index = KLIndex.build(make_space(values[[0, 1, 0, 2, 0]]))
    assert [hit.model for hit in index.range_search("m0002", 0.0)] == ["m0000", "m0004"]
    assert [hit.kl for hit in index.search("m0002", 2)] == [0.0, 0.0]


def test_where_bytes_are_unknown_nats_are_asked_for():
    index = KLIndex.build(make_space(scatter(np.random.default_rng(6), 4, 9), text_bytes=0.0))
    with pytest.raises(SpaceError, match="nats_per_text"):
        index.search("m0000")
    with pytest.raises(SpaceError, match="nats_per_text"):
        index.range_search("m0000", 1.0)
    assert len(index.search("m0000", unit="nats_per_text")) == 3


def test_very_large_and_very_small_numbers_are_found_or_refused():
    rng = np.random.default_rng(7)
    for scale in (1e-30, 1e-18, 1e15):
        space = make_space(scale * rng.standard_normal((40, 12)))
        index = KLIndex.build(space)
        assert_exact(space, index, "m0005", space.coordinates[5], "m0005", 10)
    with pytest.raises(SearchError, match="1e18"):
        KLIndex.build(make_space(1e20 * rng.standard_normal((4, 12))))
    with pytest.raises(SearchError, match="1e18"):
        index.search(make_result(1e25 * rng.standard_normal(12)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda index: index.search("m0000", 0), ValueError, "k must be at least 1, got 0"),
        (lambda index: index.search("m0000", -3), ValueError, "got -3"),
        (lambda index: index.search("m0000", unit="bits"), ValueError, "unit"),
        (lambda index: index.search("nobody"), SpaceError, "'nobody'"),
        (lambda index: index.search(make_result([-1.0])), SpaceError, "ids"),
        (lambda index: index.range_search("m0000", -0.1), ValueError, "radius"),
        (lambda index: index.range_search("m0000", math.nan), ValueError, "radius"),
        (lambda index: index.range_search("m0000", 1.0, unit="bits"), ValueError, "unit"),
    ],
)
def test_refuses_what_it_cannot_answer(call, error, message):
    index = KLIndex.build(make_space(scatter(np.random.default_rng(8), 4, 9)))
    with pytest.raises(error, match=message):
        call(index)


def test_without_faiss_the_pip_command_is_given(monkeypatch):
    space = make_space(scatter(np.random.default_rng(9), 4, 9))
    import_faiss.cache_clear()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llfast\[cpu\]'.*llfast\[gpu\]"):
        KLIndex.build(space)


def test_hits_go_to_other_processes():
    rng = np.random.default_rng(0)
    space = make_space(rng.normal(-900, 50, (30, 40)))
    found = KLIndex.build(space, "certified").search("m0003", 5)
    copied = pickle.loads(pickle.dumps(found))
    assert copied == found
    assert copied.certificate == found.certificate
    assert [hit.summary() for hit in copied] == [hit.summary() for hit in found]

"""Whatever the points, bounds lose nothing: an index finds what sorting all KL finds."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llfast import KLIndex, ModelSpace, Store
from llfast.intervals import half_variances
from llfast.search import certified, searched
from llfast.search.flat import farthest, reach, squares_to
from llfast.search.projection import Projection
from tests.spaces import make_matrix, make_result

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


@pytest.fixture(scope="module", autouse=True)
def untyped():
    """Checks of types would take most of the time; other tests have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


seeds = st.integers(0, 2**32 - 1)
# Of norms that fp32 cannot square, of those that it can hardly, and of all between.
scales = st.sampled_from([1e-44, 1e-38, 1e-30, 1e-22, 1e-19, 1e-6, 1.0, 1e3, 1e9, 1e15])
SHAPES = ["normal", "few values", "low rank", "one family", "near ties", "one text", "constant"]


def draw_points(data, k, n):
    """(K, N) points of which many are equal, nearly equal, nearly 0, or far larger than others."""
    rng = np.random.default_rng(data.draw(seeds))
    shape = data.draw(st.sampled_from(SHAPES))
    points = rng.standard_normal((k, n))
    if shape == "few values":
        points = rng.integers(-1, 2, (k, n)).astype(float)
    elif shape == "low rank":
        points = points[:, :1] @ rng.standard_normal((1, n))
    elif shape == "one family":
        points = rng.standard_normal(n) + 10.0 ** -data.draw(st.integers(1, 12)) * points
    elif shape == "near ties":  # all about as far from the first
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        points *= 1 + 10.0 ** -data.draw(st.integers(5, 16)) * rng.standard_normal((k, 1))
        points[0] = 0
    elif shape == "one text":
        points *= 10.0 ** -data.draw(st.integers(1, 9))
        points[np.arange(k), rng.integers(0, n, k)] += rng.standard_normal(k)
    elif shape == "constant":
        points = np.repeat(points[:, :1], n, axis=1) + 1e-9 * points
    points *= data.draw(scales)
    if data.draw(st.booleans()):  # some rows are far larger
        points[rng.random(k) < 0.2] *= 10.0 ** data.draw(st.integers(-15, 2))
    if data.draw(st.booleans()):
        points = points[rng.integers(0, k, k)]
    if data.draw(st.booleans()):
        points[rng.random(k) < 0.3] = 0
    return points


def small_steps(data):
    """Few directions and few rows at once, so that small collections go through every stage."""
    first = data.draw(st.integers(0, 5))
    stages = (first, first + data.draw(st.integers(0, 20)))
    fit = Projection.fit.__func__
    stack = ExitStack()
    stack.enter_context(
        patch.object(Projection, "fit", classmethod(lambda cls, sample: fit(cls, sample, stages)))
    )
    stack.enter_context(patch.object(certified, "_LEAST_ROWS", data.draw(st.integers(1, 16))))
    most = data.draw(st.integers(1, 16))
    for module in (certified, searched):
        stack.enter_context(patch.object(module, "MOST_ROWS", most))
    stack.enter_context(patch.object(certified, "_SCAN_SHARE", data.draw(st.sampled_from([0, 2]))))
    return stack


def sorted_truth(points, query, factor, leave_out=None):
    """(KL, name) of all points by name, nearest first."""
    found = (
        (float(half_variances(point[None].astype(np.float64) - query)[0]) * factor, name)
        for name, point in points.items()
        if name != leave_out
    )
    return sorted(found)


def assert_finds(index, query, truth, data):
    k = data.draw(st.integers(1, len(truth) + 3))
    hits = index.search(query, k, unit="nats_per_text")
    assert [(hit.kl, hit.model) for hit in hits] == truth[:k]
    left_out = truth[hits.certificate.compared :]
    assert hits.certificate.compared == hits.certificate.models or left_out
    radius = data.draw(st.sampled_from([0.0, math.inf, *(kl for kl, _ in truth)]))
    inside = index.range_search(query, radius, unit="nats_per_text")
    assert [(hit.kl, hit.model) for hit in inside] == [each for each in truth if each[0] <= radius]


def draw_values(data, points, rng):
    """Log-likelihoods of an outsider: beside a point, much nearer, or far away from all."""
    name = data.draw(st.sampled_from(sorted(points)))
    step = rng.standard_normal(len(points[name]))
    size = data.draw(st.sampled_from([0.0, 1e-40, 1e-20, 1e-7, 1e-3, 1.0, 1e6, 1e14]))
    return points[name].astype(np.float64) + size * step


def check_index(index, points, data, rounded):
    """Searches by name, by result and of several at once."""
    rng = np.random.default_rng(data.draw(seeds))
    names = sorted(points)
    name = data.draw(st.sampled_from(names))
    of_name = sorted_truth(points, points[name].astype(np.float64), 1.0, name)
    assert_finds(index, name, of_name, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # much of it may be below the clip
        result = make_result(draw_values(data, points, rng), model="an outsider")
        query = index.basis.place(result.loglikelihoods[None])[0]
        query = query.astype(rounded).astype(np.float64)
        assert_finds(index, result, sorted_truth(points, query, 1.0), data)
        several = [*data.draw(st.lists(st.sampled_from(names), max_size=5)), result]
        alone = [index.search(each, 7) for each in several]
        assert index.search(several, 7) == alone


def search_in_memory(data, k, n):
    values = draw_points(data, k, n)
    names = [f"m{number:03d}" for number in np.random.default_rng(k).permutation(k)]
    fields = {"ids": tuple(f"text {row}" for row in range(n)), "groups": None}
    space = ModelSpace(
        models=tuple(names),
        coordinates=values,  # not even centred
        clip=None,
        reference=np.zeros(n),
        text_bytes=np.full(n, 500.0),
        metadata=({},) * k,
        textset_digest="texts",
        convention="paper",
        dtypes=("",) * k,
        revisions=("",) * k,
        **fields,
    )
    with small_steps(data):
        index = KLIndex.build(space, data.draw(st.sampled_from(["exact", "certified"])))
        points = dict(zip(names, values, strict=True))
        check_index(index, points, data, np.float64)
        change(index, points, data, np.float64)
        check_index(index, points, data, np.float64)


def change(index, points, data, rounded):
    """Some models go, some come, some come again with other numbers."""
    rng = np.random.default_rng(data.draw(seeds))
    for name in data.draw(st.lists(st.sampled_from(sorted(points)), max_size=8, unique=True)):
        if len(points) > 1:
            index.remove(name)
            del points[name]
    for number in data.draw(st.lists(st.integers(0, 310), max_size=8)):
        result = make_result(
            draw_values(data, points, rng), model=f"m{number:03d}", scoring_version=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            index.add(result)
        point = index.basis.place(result.loglikelihoods[None])[0]
        points[result.model] = point.astype(rounded).astype(np.float32)


def search_a_store(data, k, n):
    values = draw_points(data, k, n)
    names = [f"m{number:03d}" for number in np.random.default_rng(k).permutation(k)]
    with TemporaryDirectory() as folder, small_steps(data):
        store = Store(Path(folder) / "store")
        store.add_matrix(make_matrix(values, models=names))
        mode = data.draw(st.sampled_from(["exact", "certified"]))
        index = KLIndex.build(store, mode)
        placed = index.basis.place(values).astype(np.float32)
        points = dict(zip(names, placed, strict=True))
        check_index(index, points, data, np.float32)
        change(index, points, data, np.float32)
        check_index(index, points, data, np.float32)
        if data.draw(st.booleans()):
            index.merge()
            check_index(index, points, data, np.float32)
        check_index(KLIndex.build(store, mode), points, data, np.float32)


in_memory = given(data=st.data(), k=st.integers(1, 300), n=st.integers(1, 80))
in_a_store = given(data=st.data(), k=st.integers(1, 60), n=st.integers(1, 40))


@settings(deadline=None, max_examples=30)
@in_memory
def test_an_index_in_memory_loses_nothing(data, k, n):
    search_in_memory(data, k, n)


@settings(deadline=None, max_examples=12)
@in_a_store
def test_an_index_of_a_store_loses_nothing(data, k, n):
    search_a_store(data, k, n)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@in_memory
def test_many_indexes_in_memory_lose_nothing(data, k, n):
    search_in_memory(data, k, n)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@in_a_store
def test_many_indexes_of_stores_lose_nothing(data, k, n):
    search_a_store(data, k, n)


# ------------------------------------------------------------------ the bounds themselves


@settings(deadline=None, max_examples=100)
@given(data=st.data(), k=st.integers(2, 12), n=st.integers(1, 60))
def test_squares_are_within_their_reach(data, k, n):
    points = draw_points(data, k, n)
    query, rows = points[0], points[1:]
    squares = squares_to(query.astype(np.float32)[None], rows.astype(np.float32))[0]
    for row, square in zip(rows, squares.tolist(), strict=True):
        distance, norms = math.dist(query, row), math.hypot(*query) + math.hypot(*row)
        assert square <= reach(distance, n, norms)
        assert distance <= farthest(square, n, norms)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), k=st.integers(2, 40), n=st.integers(1, 60))
def test_reduced_rows_are_never_farther_than_the_points(data, k, n):
    points = draw_points(data, k, n)
    first = data.draw(st.integers(0, 6))
    projection = Projection.fit(points, (first, first + data.draw(st.integers(0, 30))))
    assert np.isfinite(projection.directions).all()
    other = draw_points(data, 5, n)  # of which the directions know nothing
    ours, theirs = projection.reduce(points), projection.reduce(other)
    for row, point in enumerate(other):
        first_squares = squares_to(theirs.first[[row]], ours.first)[0]
        steps = ours.first[:, :-1] - theirs.first[row, :-1], ours.rest - theirs.rest[row]
        second = np.square(np.hstack(steps).astype(np.float64)).sum(axis=1)
        for number, each in enumerate(points):
            distance, norms = math.dist(point, each), math.hypot(*point) + math.hypot(*each)
            width = ours.first.shape[1]
            assert first_squares[number] <= reach(distance, width, norms)
            assert second[number] <= reach(distance, width + ours.rest.shape[1], norms)

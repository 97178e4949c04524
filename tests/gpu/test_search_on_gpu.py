"""Searches whose vectors are on a GPU: what brute force in fp64 finds."""

from __future__ import annotations

import numpy as np
import pytest

from llfast import KLIndex
from llfast.search import gpu
from tests.reference.test_certified import lineage, queries
from tests.reference.test_search import assert_exact, make_result, make_space

faiss = pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[gpu]'")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not hasattr(faiss, "StandardGpuResources"),
        reason="faiss is without GPUs; it runs with pip install 'llfast[gpu]'",
    ),
]
K, N = 9000, 2000


@pytest.fixture(scope="module")
def space():
    return make_space(lineage(np.random.default_rng(0), K, N, share=0.3))


@pytest.fixture(scope="module")
def index(space):
    index = KLIndex.build(space, "exact")
    assert index._contents.rows.on_gpu is not None
    return index


@pytest.mark.parametrize("k", [1, 10, 100, 2000])
def test_any_query_gets_what_brute_force_gets(space, index, k):
    rng = np.random.default_rng(k)
    for row in rng.integers(0, K, 3):
        name = space.models[row]
        assert_exact(space, index, name, space.coordinates[row], name, k)
    certified = KLIndex.build(space, "certified")
    for name, values in queries(space, rng).items():
        result = make_result(values, name)
        assert index.search(result, k) == certified.search(result, k)


def test_few_are_compared_on_the_cpu(space, index):
    found = [each.certificate for each in index.search(list(space.models[:50]))]
    assert {each.closed_by for each in found} == {"bounds"}
    assert np.median([each.compared for each in found]) < 100


def test_distances_are_as_exact_as_fp32_allows(space, index):
    points = np.ascontiguousarray(space.coordinates[:16], dtype=np.float32)
    squares, rows = index._contents.rows.on_gpu.near(points, 50)
    for point, found, near in zip(points, squares, rows, strict=True):
        some = space.coordinates[near].astype(np.float32).astype(np.float64)
        truth = np.square(some - point).sum(axis=1)
        norms = np.linalg.norm(point) + np.linalg.norm(some, axis=1)
        limits = np.array([gpu.gpu_reach(0.0, N, each, 0.0) for each in norms.tolist()])
        assert (np.abs(found - truth) <= limits).all()

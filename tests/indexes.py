"""Stores to index, and what brute force over a store finds."""

import numpy as np

from llfast import Store
from llfast.intervals import half_variances
from tests.spaces import make_matrix, make_result

N = 40


def model_values(number):
    """The log-likelihoods (N,) of a model: one of five families, and its own."""
    families = np.random.default_rng(1000 + number % 5).standard_normal(N)
    return -700 + 100 * families + 10 * np.random.default_rng(number).standard_normal(N)


def name(number):
    return f"model {number:03d}"


def index_result(number, **options):
    """A result for `make_store`'s stores."""
    given = {"model": name(number), "scoring_version": 0} | options
    return make_result(given.pop("values", model_values(number)), **given)


def make_store(folder, count=24):
    """A store of models 0, 1, ... in one shard."""
    store = Store(folder)
    rows = range(count)
    store.add_matrix(
        make_matrix(
            np.array([model_values(number) for number in rows]),
            models=[name(number) for number in rows],
            metadata=[{"number": number} for number in rows],
        )
    )
    return store


def sorted_kl(index, store, query, **selection):
    """(KL, name) of all models of the store but the query, in the index's basis and precision."""
    matrix = store.matrix(**selection)
    points = index.basis.place(matrix.values).astype(np.float32).astype(np.float64)
    factor = index.basis.per_nat("bits_per_byte")
    kls = half_variances(points - points[matrix.models.index(query)]) * factor
    found = zip(kls.tolist(), matrix.models, strict=True)
    return sorted(each for each in found if each[1] != query)


def assert_right(index, store, **selection):
    """Every model of the store is found, no other, and in the order of brute force."""
    models = store.matrix(**selection).models
    assert len(index) == len(models)
    for query in {models[0], models[len(models) // 2], models[-1]}:
        truth = sorted_kl(index, store, query, **selection)
        assert [(hit.kl, hit.model) for hit in index.search(query, len(models))] == truth
        inside = index.range_search(query, truth[len(truth) // 2][0])
        assert [(hit.kl, hit.model) for hit in inside] == truth[: len(inside)]
        assert len(inside) > len(truth) // 2

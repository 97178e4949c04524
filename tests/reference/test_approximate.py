"""Approximate searches: how much they find, that they say so, and when they are exact after all."""

from __future__ import annotations

import numpy as np
import pytest

from llfast import KLIndex
from llfast.search import listing
from llfast.search.contents import Contents
from llfast.search.lists import ListedRows, Lists
from llfast.search.segment import Segment
from tests.indexes import assert_right, index_result, make_store, name
from tests.reference.test_certified import lineage
from tests.reference.test_search import make_result, make_space

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")

K, N = 5000, 100


@pytest.fixture(scope="module")
def space():
    return make_space(lineage(np.random.default_rng(0), K, N))


@pytest.fixture(scope="module")
def index(space):
    return KLIndex.build(space, "approximate")


def share_found(found, truth):
    names = [[{hit.model for hit in hits} for hits in each] for each in (found, truth)]
    return np.mean([len(a & b) for a, b in zip(*names, strict=True)])


def test_its_recall_is_what_was_measured_when_it_was_built(space, index):
    exact = KLIndex.build(space, "exact")
    names = [space.models[row] for row in np.random.default_rng(5).choice(K, 400, replace=False)]
    recall = share_found(index.search(names), exact.search(names)) / 10
    assert 0.98 < index.recall <= 1
    assert recall == pytest.approx(index.recall, abs=0.01)


def test_what_it_finds_has_the_kl_of_an_exact_search_in_the_same_order(space, index):
    exact = KLIndex.build(space, "exact")
    for row in (0, 777, K - 1):
        truth = {hit.model: hit for hit in exact.search(space.models[row], K)}
        hits = index.search(space.models[row], 30)
        assert hits == [truth[hit.model] for hit in hits]
        assert len(hits) == 30
        kls = [(hit.kl, hit.model) for hit in hits]
        assert kls == sorted(kls)


def test_it_looks_at_few_models_and_gives_no_certificate(space, index):
    looked_at = []
    for row in range(0, K, 500):
        reduced = index._contents.projection.reduce(space.coordinates[[row]])
        looked_at.append(len(index._contents.rows.listed.near(reduced.first, 34, None)[0]))
    assert np.median(looked_at) < K / 4
    hits = index.search(space.models[0])
    assert hits.certificate is None
    assert hits.recall == index.recall
    line = f"approximate: about {index.recall:.1%} of the 10 nearest are found"
    assert hits.certificate_line("bits/byte") == line


def test_a_model_that_was_added_is_found_and_one_that_was_removed_is_not(space):
    index = KLIndex.build(space, "approximate")
    values = space.coordinates[7] + space.reference
    index.add(make_result(values + 1e-3 * np.random.default_rng(0).standard_normal(N), "twin"))
    hits = index.search("m0007", 3)
    assert hits[0].model == "twin"
    index.remove("twin")
    assert [hit.model for hit in index.search("m0007", 2)] == [hit.model for hit in hits[1:]]


def test_more_are_looked_at_until_there_are_enough(space, index):
    assert len(index.search(space.models[3], K)) == K - 1
    removed = KLIndex.build(space, "approximate")
    for hit in index.search(space.models[3], 1000):
        removed.remove(hit.model)
    assert len(removed.search(space.models[3], 10)) == 10


def test_a_radius_is_searched_exactly(space, index):
    exact = KLIndex.build(space, "exact")
    for radius in (exact.search(space.models[3], 10)[-1].kl, 1.0, 100.0):
        hits = index.range_search(space.models[3], radius)
        assert hits == exact.range_search(space.models[3], radius)
        assert hits.certificate is not None


def test_several_at_once_are_the_same(space, index):
    names = list(space.models[:40])
    assert index.search(names) == [index.search(each) for each in names]


def test_few_models_and_those_of_a_condition_are_searched_exactly(space, index):
    pytest.importorskip("duckdb", reason="duckdb is an extra: pip install 'llfast[cpu]'")
    few = KLIndex.build(make_space(space.coordinates[:300]), "approximate")
    assert few.recall is None
    assert few.search("m0000").certificate.closed_by == "bounds"
    hits = index.search("m0000", where="model like '%99'")
    assert hits.certificate.models == 50
    assert hits == KLIndex.build(space, "exact").search("m0000", where="model like '%99'")


def test_recall_is_told_by_models_that_nothing_was_chosen_with(space, monkeypatch):
    """Ranks of the chosen say how many lists; what is told is the share of the others' below it."""
    given = iter([(np.full(10, rank), False) for rank in (3, 0, 5, 9)])
    monkeypatch.setattr(listing, "_HELD_OUT", 4)
    monkeypatch.setattr(listing, "_ranks", lambda *_: next(given))
    contents = Contents.of_space(space, "certified")
    lists = listing.fit_lists(contents.rows, largest=contents.largest, offset=contents.offset)
    assert lists.probes == 6
    assert lists.recall == 0.5


def test_where_bounds_are_of_no_use_there_are_no_lists(monkeypatch):
    monkeypatch.setattr(listing, "LEAST_ROWS", 100)
    monkeypatch.setattr(listing, "_HELD_OUT", 40)
    space = make_space(np.random.default_rng(0).standard_normal((700, 400)))
    index = KLIndex.build(space, "approximate")
    assert index.recall is None
    assert index.search("m0000").certificate.closed_by == "scan"


def test_models_that_are_all_the_same_are_put_into_lists(monkeypatch):
    monkeypatch.setattr(listing, "LEAST_ROWS", 100)
    monkeypatch.setattr(listing, "_HELD_OUT", 40)
    values = np.tile(-700 + 100 * np.random.default_rng(0).standard_normal(50), (300, 1))
    index = KLIndex.build(make_space(values), "approximate")
    hits = index.search("m0100", 20)
    assert [hit.kl for hit in hits] == [0.0] * 20


def test_lists_are_looked_at_nearest_first():
    first = np.array([[0.0], [10.0], [1.0], [11.0], [20.0]], dtype=np.float32)
    centroids = np.array([[0.5], [99.0], [10.5], [20.0]], dtype=np.float32)
    numbers = np.array([0, 2, 0, 2, 3], dtype=np.uint32)
    rows = ListedRows(Lists(centroids, numbers, 1, 1.0), first)
    query = np.array([[9.0]], dtype=np.float32)
    found, squares = rows.near(query, 0, None)
    assert found.tolist() == [1, 3]
    assert squares.tolist() == [1.0, 4.0]
    assert rows.near(query, 3, None)[0].tolist() == [1, 3, 0, 2]
    allowed = np.array([True, False, True, False, True])
    assert rows.near(query, 3, allowed)[0].tolist() == [1, 3, 0, 2, 4]
    assert rows.near(query, 99, None)[0].tolist() == [1, 3, 0, 2, 4]


# ------------------------------------------------------------------ on disk


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Of 200 models, which are enough for lists here."""
    monkeypatch.setattr(listing, "LEAST_ROWS", 100)
    monkeypatch.setattr(listing, "_HELD_OUT", 40)
    return make_store(tmp_path / "store", 200)


def test_lists_of_a_store_are_kept_with_its_index(store):
    built = KLIndex.build(store, "certified")
    assert built.recall is None
    index = KLIndex.build(store, "approximate")
    assert index.segment.folder.name == built.segment.folder.name
    assert 0.5 < index.recall <= 1
    assert index.summary()["approximate_recall"] == round(index.recall, 4)
    lists = Segment(index.segment.folder).lists
    assert len(lists.centroids) == round(4 * 200**0.5)
    exact = KLIndex.build(store, "exact")
    names = [name(number) for number in range(200)]
    recall = share_found(index.search(names), exact.search(names)) / 10
    assert recall > 0.9
    assert_right(exact, store)
    assert_right(built, store)


def test_an_approximate_index_follows_its_store(store):
    index = KLIndex.build(store, "approximate")
    index.add(index_result(200))
    near = index.search(index_result(200, model="the same"), 5)
    assert near[0].model == name(200)
    gone = near[1].model
    store.remove([gone])
    index.refresh()
    assert gone not in {hit.model for hit in index.search(name(200), 5)}
    index.merge()
    assert len(index.search(name(0), 201)) == 199
    assert index.recall is not None
    assert gone not in {hit.model for hit in index.search(name(200), 5)}


def test_bounds_asked_for_later_are_found_in_the_basis_that_is_there(store):
    first = KLIndex.build(store, "exact")
    store.add(index_result(200))
    for mode in ("approximate", "certified"):
        index = KLIndex.build(store, mode)
        assert index.mode == mode
        assert index.basis.digest == first.basis.digest
    assert_right(index, store)

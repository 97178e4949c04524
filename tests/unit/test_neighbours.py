"""Nearest rows against a sort of all distances."""

import numpy as np
import pytest

from llfast import neighbours
from llfast.neighbours import nearest_rows


def sorted_distances(queries, rows):
    squared = ((queries[:, None] - rows) ** 2).sum(axis=2)
    order = np.argsort(squared, axis=1, kind="stable")
    return order, np.take_along_axis(squared, order, axis=1)


def test_they_are_what_a_sort_of_all_distances_finds(monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", 8 * 40 * 7)  # seven queries at once
    rng = np.random.default_rng(0)
    rows, queries = rng.standard_normal((40, 6)), rng.standard_normal((23, 6))
    order, squared = sorted_distances(queries, rows)
    for count in (1, 5, 40, 99):
        found, distances = nearest_rows(queries, rows, count)
        np.testing.assert_array_equal(found, order[:, :count])
        np.testing.assert_allclose(distances, squared[:, :count], rtol=1e-12)
    order, squared = sorted_distances(rows, rows)
    found, distances = nearest_rows(rows, rows, 5, others=True)
    np.testing.assert_array_equal(found, order[:, 1:6])
    np.testing.assert_allclose(distances, squared[:, 1:6], rtol=1e-12)


def test_twins_that_differ_by_less_than_a_product_of_rows_can_tell_are_in_order():
    far = 1e4 * np.ones(50)
    rows = np.array([far + offset * np.eye(50)[0] for offset in (0, 3e-5, 1e-5, 2e-5, 5.0)])
    found, squared = nearest_rows(rows[:1], rows, 4)
    assert found.tolist() == [[0, 2, 3, 1]]
    np.testing.assert_allclose(squared[0, 1:], [1e-10, 4e-10, 9e-10], rtol=1e-6)


def test_those_that_are_the_same_come_by_their_number():
    found, squared = nearest_rows(np.zeros((30, 3)), np.zeros((30, 3)), 3, others=True)
    assert found[0].tolist() == [1, 2, 3]
    assert found[1].tolist() == [0, 2, 3]
    assert not squared.any()


def test_of_many_that_are_the_same_the_lowest_are_the_nearest():
    """Among others, a product of rows finds them at distances that differ by their rounding."""
    rng = np.random.default_rng(0)
    rows = 60 * rng.standard_normal((500, 300))
    same = np.sort(rng.choice(500, 100, replace=False))
    rows[same] = rows[same[0]]
    found, squared = nearest_rows(rows, rows, 5, others=True)
    for row in same:
        assert found[row].tolist() == [other for other in same[:6] if other != row][:5]
    assert not squared[same].any()
    order, _ = sorted_distances(rows[:7], rows)
    others = [[row for row in near if row != own][:5] for own, near in enumerate(order.tolist())]
    assert found[:7].tolist() == others


@pytest.mark.parametrize(("count", "rows"), [(0, 5), (1, 1)])
def test_nothing_to_choose_from_is_refused(count, rows):
    with pytest.raises(ValueError, match="count must be at least 1 of other rows"):
        nearest_rows(np.zeros((rows, 2)), np.zeros((rows, 2)), count, others=True)

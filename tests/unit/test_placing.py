"""Places in a plane against known ones, scikit-learn, and each other."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from llfast import SpaceError
from llfast.placing import _affinities, classical_mds, place, place_among


def squared(places):
    return ((places[:, None] - places) ** 2).sum(axis=2)


def clusters(seed=0, each=20, count=5, dimensions=40):
    rng = np.random.default_rng(seed)
    centres = 6 * rng.standard_normal((count, dimensions))
    labels = np.repeat(np.arange(count), each)
    return centres[labels] + rng.standard_normal((count * each, dimensions)), labels


def test_a_plane_is_found_again_up_to_turning():
    places = np.random.default_rng(0).standard_normal((9, 2)) * [3, 1]
    np.testing.assert_allclose(squared(classical_mds(squared(places))), squared(places), atol=1e-9)


def test_of_more_dimensions_the_widest_two_are_kept():
    places = np.random.default_rng(1).standard_normal((200, 5)) * [9, 5, 0.1, 0.1, 0.1]
    found = classical_mds(squared(places))
    assert np.ptp(found[:, 0]) > np.ptp(found[:, 1])
    np.testing.assert_allclose(squared(found), squared(places[:, :2]), atol=4)


@pytest.mark.parametrize("k", [30, 1100], ids=["few", "many"])
def test_principal_components_are_those_of_scikit_learn_and_classical_mds(k):
    points = np.random.default_rng(2).standard_normal((k, 12)) * np.r_[9, 5, np.ones(10)] + 3
    expected = PCA(2, svd_solver="full").fit_transform(points)
    for method in ("pca", "mds"):
        found = place(points, method)
        np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-6)
        assert (found[np.argmax(np.abs(found), axis=0), [0, 1]] > 0).all()


def test_neighbours_stay_neighbours_on_a_map_by_tsne():
    points, labels = clusters()
    found = place(points, perplexity=10.0, seed=3)
    assert trustworthiness(points, found, n_neighbors=5) > 0.85
    distances = squared(found)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).all()
    np.testing.assert_array_equal(place(points, perplexity=10.0, seed=3), found)
    assert not np.array_equal(place(points, perplexity=10.0, seed=4), found)


def test_affinities_are_gaussians_of_squared_distances():
    points, _ = clusters(each=10, count=3)
    found = _affinities(points, 5.0).P.toarray()
    distances = squared(points)
    np.fill_diagonal(distances, np.inf)
    expected = np.zeros_like(distances)
    for row, own in enumerate(distances):
        near = np.argsort(own)[:15]
        low, high = 0.0, 1e3
        for _ in range(100):  # the width that has this perplexity
            beta = (low + high) / 2
            share = np.exp(-beta * (own[near] - own[near].min()))
            share /= share.sum()
            entropy = -(share * np.log(np.maximum(share, 1e-300))).sum()
            low, high = (beta, high) if entropy > np.log(5) else (low, beta)
        expected[row, near] = share
    expected = (expected + expected.T) / (2 * len(points))
    np.testing.assert_allclose(found, expected, atol=5e-5)  # its search stops earlier


@pytest.mark.parametrize("method", ["tsne", "pca", "mds"])
def test_a_held_out_model_is_put_among_its_own(method):
    points, labels = clusters(seed=5)
    held = np.arange(len(points)) % 7 == 0
    places = place(points[~held], method, perplexity=10.0)
    placed = place_among(points[held], points[~held], places, method, perplexity=10.0)
    nearest = labels[~held][((placed[:, None] - places) ** 2).sum(axis=2).argmin(axis=1)]
    assert (nearest == labels[held]).mean() == 1.0


@pytest.mark.parametrize("method", ["pca", "mds"])
def test_projections_are_those_of_scikit_learn(method):
    points, _ = clusters(seed=6)
    old, new = points[::2], points[1::2]
    model = PCA(2, svd_solver="full").fit(old)
    middle = np.array([3.0, -8.0])  # a saved map may have it anywhere
    found = place_among(new, old, place(old, method) + middle, method) - middle
    np.testing.assert_allclose(np.abs(found), np.abs(model.transform(new)), atol=1e-8)


def test_a_model_that_is_placed_again_comes_to_where_it_was():
    points, _ = clusters(seed=7)
    places = place(points, perplexity=10.0) + 100.0
    again = place_among(points[:5], points, places, perplexity=10.0)
    spread = np.ptp(places, axis=0).max()
    assert np.abs(again - places[:5]).max() < 0.05 * spread


def test_the_fewest_models_have_places():
    rng = np.random.default_rng(8)
    assert np.isfinite(place(rng.standard_normal((4, 9)))).all()
    two = place(rng.standard_normal((2, 9)), "pca")
    assert two[0, 0] == pytest.approx(-two[1, 0])
    np.testing.assert_allclose(two[:, 1], 0, atol=1e-12)
    some_alike = np.repeat(rng.standard_normal((2, 9)), 5, axis=0)
    found = place(some_alike)
    assert np.isfinite(found).all()
    assert squared(found)[:5, 5:].min() > squared(found)[:5, :5].max()


@pytest.mark.parametrize(
    ("points", "method", "message"),
    [
        (np.zeros((1, 3)), "pca", "a map by pca must have 2 models, got 1; score more of them"),
        (np.eye(3), "tsne", "a map by tsne must have 4 models, got 3; score more of them"),
        (np.ones((6, 3)), "tsne", "models must differ to have places, got 6 that are the same"),
        (np.ones((6, 3)), "mds", "models must differ to have places, got 6 that are the same"),
    ],
)
def test_too_few_or_too_similar_models_are_refused(points, method, message):
    with pytest.raises(SpaceError, match=f"^{message}$"):
        place(points, method)


def test_wrong_methods_and_perplexities_are_refused():
    with pytest.raises(ValueError, match="method must be one of tsne, pca, mds, got 'umap'"):
        place(np.eye(6), "umap")
    for wrong in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="perplexity must be at least 1"):
            place(np.eye(6), perplexity=wrong)
    for wrong in (-1, 1 << 32):
        with pytest.raises(ValueError, match="seed must be from 0 to"):
            place(np.eye(6), seed=wrong)

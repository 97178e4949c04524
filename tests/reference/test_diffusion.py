"""Diffusion exponents of walks whose exponents are known, and each fit against scipy's."""

import numpy as np
import pytest
from scipy import stats

from llfast import SpaceError
from llfast.diffusion import diffusion

K, DIMENSIONS = 60, 4000


def squared(points):
    norms = np.square(points).sum(axis=1)
    return np.maximum(norms[:, None] + norms - 2 * points @ points.T, 0) * (1 - np.eye(len(points)))


def uneven_steps(seed=0):
    return np.cumsum(np.random.default_rng(seed).integers(1, 40, K))


def brownian(steps, hurst, seed=1):
    """Fractional Brownian motion in every dimension: E|x(s) - x(t)|² ∝ |s - t|^2H."""
    times = steps - steps[0] + 1.0
    power = times ** (2 * hurst)
    lags = np.abs(times[:, None] - times) ** (2 * hurst)
    root = np.linalg.cholesky((power[:, None] + power - lags) / 2 + 1e-12 * np.eye(len(times)))
    return root @ np.random.default_rng(seed).standard_normal((len(times), DIMENSIONS))


def test_a_walk_of_independent_steps_has_exponent_1():
    steps = uneven_steps()
    noise = np.random.default_rng(2).standard_normal((K, DIMENSIONS))
    walk = np.cumsum(noise * np.sqrt(np.diff(steps, prepend=0))[:, None], axis=0)
    found = diffusion(squared(walk), steps)
    assert found.median == pytest.approx(1, abs=0.02)
    assert found.quartiles[0] > 0.95
    assert found.quartiles[1] < 1.05
    assert found.median_r_squared > 0.99
    assert len(found.starts) == K - 3


def test_a_straight_line_has_exponent_2():
    steps = uneven_steps()
    line = steps[:, None] * np.random.default_rng(3).standard_normal(50)
    found = diffusion(squared(line), steps)
    np.testing.assert_allclose(found.exponents, 2, rtol=1e-6)
    np.testing.assert_allclose(found.r_squared, 1, rtol=1e-9)


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.5])
def test_what_is_held_back_has_a_smaller_one_and_what_keeps_its_way_a_larger(exponent):
    steps = uneven_steps()
    found = diffusion(squared(brownian(steps, exponent / 2)), steps)
    assert found.median == pytest.approx(exponent, abs=0.02)
    assert found.median_r_squared > 0.9


@pytest.mark.parametrize("window", [3, 7, 100])
def test_each_fit_is_that_of_scipy(window):
    steps = uneven_steps(4)
    distances = squared(brownian(steps, 0.3))
    found = diffusion(distances, steps, window)
    np.testing.assert_array_equal(found.starts, steps[: K - 3])
    for start in range(K - 3):
        window_ = slice(start + 1, start + 1 + window)
        fit = stats.linregress(
            np.log(steps[window_] - steps[start]), np.log(distances[start, window_])
        )
        assert found.exponents[start] == pytest.approx(fit.slope, rel=1e-9)
        assert found.r_squared[start] == pytest.approx(fit.rvalue**2, rel=1e-9)
    assert found.median == pytest.approx(np.percentile(found.exponents, 50))
    np.testing.assert_allclose(found.quartiles, np.percentile(found.exponents, [25, 75]))
    assert found.median_r_squared == pytest.approx(np.median(found.r_squared))
    assert found.summary()["exponents"] == found.exponents.tolist()


def test_distances_of_0_are_left_out_and_counted():
    steps = np.array([0, 1, 2, 4, 8, 16])
    points = np.array([0.0, 0, 2, 4, 8, 16])[:, None]  # the first two are the same
    found = diffusion(squared(points), steps)
    assert found.zero_distances == 1
    assert "1 distances of 0 left out" in str(found)
    np.testing.assert_array_equal(found.starts, [0, 1, 2])
    assert found.exponents[0] == pytest.approx(2)
    fit = stats.linregress(np.log([1, 3, 7, 15]), 2 * np.log([2, 4, 8, 16]))
    assert found.exponents[1] == pytest.approx(fit.slope)


def test_a_distance_that_does_not_grow_has_exponent_0():
    found = diffusion(3.7 * (1 - np.eye(5)), np.arange(5))
    np.testing.assert_allclose(found.exponents, 0, atol=1e-15)
    np.testing.assert_array_equal(found.r_squared, 1)


def test_only_distances_within_the_window_are_looked_at():
    steps = np.arange(8)
    distances = squared(brownian(steps, 0.5))
    found = diffusion(distances, steps, 4)
    for row in range(8):
        distances[row, : row + 1] = np.nan
        distances[row, row + 5 :] = np.nan
    np.testing.assert_array_equal(diffusion(distances, steps, 4).exponents, found.exponents)
    distances[2, 4] = np.nan
    with pytest.raises(SpaceError, match="finite and at least 0, got nan from step 2"):
        diffusion(distances, steps, 4)


def test_an_exponent_is_of_the_unit_of_neither_time_nor_distance():
    steps = uneven_steps()
    distances = squared(brownian(steps, 0.25))
    found = diffusion(distances, steps)
    np.testing.assert_allclose(diffusion(7 * distances, 3 * steps).exponents, found.exponents)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("distances", "steps", "window", "message"),
    [
        (np.ones((3, 3)), [0, 1, 2], 10, "to 3 after it, got 3 points$"),
        (np.ones((0, 0)), [], 10, "to 3 after it, got 0 points$"),
        (np.zeros((6, 6)), range(6), 10, "got 6 points, 15 distances of 0 among them"),
        (np.ones((6, 6)), [0, 1, 2, 2, 3, 4], 10, "steps must rise, got"),
        (np.ones((6, 5)), range(6), 10, r"must have shape \(6, 6\), got \(6, 5\)"),
        (-np.ones((6, 6)), range(6), 10, "finite and at least 0, got -1.0 from step 0"),
        (np.full((6, 6), np.inf), range(6), 10, "finite and at least 0, got inf from step 0"),
        (np.ones((6, 6)), range(6), 2, "window must be at least 3, got 2"),
    ],
)
def test_what_has_no_exponent_is_refused_in_one_line(distances, steps, window, message):
    with pytest.raises((SpaceError, ValueError), match=message) as caught:
        diffusion(distances, np.array(steps, dtype=np.int64), window)
    assert "\n" not in str(caught.value)

"""Predicted scores against closed forms and scipy; nothing leaks from what is predicted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from llfast import LlfastWarning, LogLikelihoodMatrix, SpaceError, predict_scores, prediction
from llfast.prediction import _PENALTIES, Prediction, _correlation, _pearson, _ridge, _spearman

pytest.importorskip("sklearn", reason="scikit-learn is an extra: pip install 'llfast[predict]'")

K, N, FAMILIES = 60, 200, 12


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    monkeypatch.setattr(prediction, "_RESAMPLES", 200)


def make(seed=0, *, values=None):
    """Models of some families, whose log-likelihoods are a few common parts and their own."""
    rng = np.random.default_rng(seed)
    if values is None:
        parts = (
            rng.standard_normal((K, 5))
            + rng.standard_normal((FAMILIES, 5))[np.arange(K) % FAMILIES]
        )
        values = -700 + 40 * parts @ rng.standard_normal((5, N)) + rng.standard_normal((K, N))
    return LogLikelihoodMatrix(
        [f"m{row}" for row in range(len(values))],
        values,
        np.full(N, 1000.0),
        metadata=[{"family": f"f{row % FAMILIES}"} for row in range(len(values))],
    )


def as_scores(values, benchmark="arc"):
    return {benchmark: {f"m{row}": float(value) for row, value in enumerate(values)}}


def by_closed_form(train, scores, test, penalty):
    """Ridge with an intercept: normal equations of centred points, in their dual form."""
    centre = train.mean(axis=0)
    points, others = train - centre, test - centre
    gram = points @ points.T + penalty * np.eye(len(points))
    return scores.mean() + others @ points.T @ np.linalg.solve(gram, scores - scores.mean())


def test_a_ridge_is_that_of_the_closed_form_and_its_penalty_the_best_of_all():
    rng = np.random.default_rng(1)
    points = rng.standard_normal((40, 300))
    scores = points[:, :3].sum(axis=1) + 0.5 * rng.standard_normal(40)
    groups = np.arange(32) // 4
    train, test = points[:32], points[32:]
    predicted, penalty = _ridge(train, scores[:32], groups, test, 4)
    scale = np.square(train).sum() / 32
    np.testing.assert_allclose(
        predicted, by_closed_form(train, scores[:32], test, penalty * scale), rtol=1e-9, atol=1e-9
    )
    # Eight groups of four in four folds, each two groups of the same size, whichever they are.
    from sklearn.model_selection import GroupKFold

    losses = []
    for each in _PENALTIES:
        errors = []
        for own, other in GroupKFold(4).split(train, groups=groups):
            fitted = by_closed_form(train[own], scores[own], train[other], each * scale)
            errors.append(np.square(fitted - scores[other]).mean())
        losses.append(np.mean(errors))
    assert penalty == pytest.approx(_PENALTIES[int(np.argmin(losses))])


def test_what_coordinates_say_is_found_and_what_they_do_not_is_not():
    matrix = make()
    rng = np.random.default_rng(2)
    centred = matrix.values - matrix.values.mean(axis=1, keepdims=True)
    signal = centred @ rng.standard_normal(N)
    (found,) = predict_scores(matrix, as_scores(signal))
    assert found.pearson.value > 0.95
    assert found.pearson.interval[0] > 0.9
    assert found.spearman.value > 0.9
    assert abs(found.baseline_pearson.value) < 0.8
    chance = [predict_scores(matrix, as_scores(rng.standard_normal(K)))[0] for _ in range(4)]
    assert abs(np.mean([each.pearson.value for each in chance])) < 0.2
    assert all(each.pearson.interval[0] < 0.15 for each in chance)


def test_a_baseline_is_a_line_over_the_mean_log_likelihood():
    matrix = make()
    means = matrix.values.mean(axis=1)
    (found,) = predict_scores(matrix, as_scores(3 * means + 2), clip_quantile=None)
    np.testing.assert_allclose(found.baseline, 3 * means + 2, rtol=1e-9)
    assert found.baseline_pearson.value == pytest.approx(1.0)


def test_nothing_of_a_family_has_a_part_in_its_prediction():
    matrix = make()
    rng = np.random.default_rng(3)
    scores = rng.standard_normal(K)
    (found,) = predict_scores(matrix, as_scores(scores))
    family = np.arange(K) % FAMILIES == 4
    other_scores = np.where(family, 1e6, scores)
    (again,) = predict_scores(matrix, as_scores(other_scores))
    np.testing.assert_array_equal(again.predicted[family], found.predicted[family])
    np.testing.assert_array_equal(again.baseline[family], found.baseline[family])
    assert not np.array_equal(again.predicted[~family], found.predicted[~family])
    # Other numbers of one model change what its siblings are said to score not at all.
    values = matrix.values.copy()
    one = int(np.flatnonzero(family)[0])
    values[one] = -5000 + 300 * rng.standard_normal(N)
    (again,) = predict_scores(make(values=values), as_scores(scores))
    siblings = family.copy()
    siblings[one] = False
    np.testing.assert_array_equal(again.predicted[siblings], found.predicted[siblings])
    assert again.predicted[one] != found.predicted[one]


def test_logarithms_are_predicted_where_they_are_asked_for():
    matrix = make()
    rng = np.random.default_rng(10)
    scores = as_scores(rng.standard_normal(K))
    large = {"arc": {model: float(np.exp(score)) for model, score in scores["arc"].items()}}
    (found,), (logs,) = predict_scores(matrix, scores), predict_scores(matrix, large, log=["arc"])
    np.testing.assert_allclose(logs.predicted, found.predicted, rtol=1e-9)
    np.testing.assert_allclose(logs.scores, found.scores, rtol=1e-12)
    large["arc"]["m7"] = 0.0
    with pytest.raises(SpaceError, match="'arc' must be above 0 .*, got 0 for 'm7'"):
        predict_scores(matrix, large, log=["arc"])
    with pytest.raises(ValueError, match=r"log must name benchmarks \(arc\), got 'piqa'"):
        predict_scores(matrix, large, log=["piqa"])


def test_the_order_of_models_plays_no_part():
    matrix = make()
    rng = np.random.default_rng(11)
    scores = as_scores(rng.standard_normal(K))
    order = rng.permutation(K)
    other = LogLikelihoodMatrix(
        [matrix.models[row] for row in order],
        matrix.values[order],
        matrix.text_bytes,
        [matrix.metadata[row] for row in order],
    )
    (found,), (again,) = predict_scores(matrix, scores), predict_scores(other, scores)
    assert again.models == tuple(found.models[row] for row in order)
    np.testing.assert_allclose(again.predicted, found.predicted[order], rtol=1e-6)


def test_without_families_models_are_alone():
    matrix = make()
    scores = as_scores(np.random.default_rng(4).standard_normal(K))
    (by_family,) = predict_scores(matrix, scores)
    (alone,) = predict_scores(matrix, scores, group=None)
    with pytest.raises(SpaceError, match=r"metadata \(family\), got 'familiy'"):
        predict_scores(matrix, scores, group="familiy")
    half = [{} if row % 2 else {"family": "f"} for row in range(K)]
    some = LogLikelihoodMatrix(matrix.models, matrix.values, matrix.text_bytes, half)
    with pytest.warns(LlfastWarning, match="30 of 60 models have no family"):
        predict_scores(some, scores)
    assert not np.array_equal(alone.predicted, by_family.predicted)


def test_a_family_that_is_null_is_one_that_is_not_there():
    matrix = make()
    scores = as_scores(np.random.default_rng(4).standard_normal(K))

    def of(metadata):
        return LogLikelihoodMatrix(matrix.models, matrix.values, matrix.text_bytes, metadata)

    for lacking in (None, ""):
        with pytest.raises(SpaceError, match=r"metadata \(size\), got 'family'; without groups"):
            predict_scores(of([{"family": lacking, "size": 1}] * K), scores)
    found = []
    for other in ({}, {"family": None}, {"family": math.nan}, {"family": ""}):
        half = of([other if row % 2 else {"family": f"f{row % FAMILIES}"} for row in range(K)])
        with pytest.warns(LlfastWarning, match="30 of 60 models have no family"):
            found += predict_scores(half, scores)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].predicted, other.predicted)


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(5)
    a = rng.standard_normal(50).round(1)  # with ties
    b = a + rng.standard_normal(50).round(1)
    assert _pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, rel=1e-12)
    assert _spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-12)


def test_an_interval_is_as_wide_as_fishers_for_models_that_are_alone(monkeypatch):
    monkeypatch.setattr(prediction, "_RESAMPLES", 2000)
    rng = np.random.default_rng(6)
    a = rng.standard_normal(300)
    b = a + rng.standard_normal(300)
    found = _correlation(_pearson, a, b, np.arange(300))
    expected = stats.pearsonr(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(found.interval, expected, atol=0.02)
    # Families of ten copies say no more than one model each.
    copies = np.repeat(np.arange(30), 10)
    wide = _correlation(_pearson, a[copies], b[copies], copies)
    few = stats.pearsonr(a[:30], b[:30]).confidence_interval(0.95)
    assert np.ptp(wide.interval) > 0.7 * np.ptp(few)


@pytest.mark.parametrize("scale", [1e-300, 1e-90, 1.0, 1e90, 1e300])
def test_a_correlation_does_not_depend_on_the_size_of_scores(scale):
    rng = np.random.default_rng(10)
    for _ in range(50):
        a = rng.standard_normal(rng.integers(2, 9))
        b = rng.standard_normal(len(a))
        assert _pearson(scale * a, scale * b) == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-12)
        assert _pearson(a, scale * a) <= 1.0
        assert _pearson(a, -3 * scale * a) >= -1.0


def test_scores_that_do_not_vary_have_no_correlation():
    (found,) = predict_scores(make(), as_scores(np.full(K, 0.1)))
    assert np.isnan(found.pearson.value)
    assert np.isnan(found.pearson.interval).all()
    np.testing.assert_allclose(found.predicted, 0.1)


def test_whole_numbers_and_yes_or_no_are_scores():
    passed = np.arange(K) % 2 == 0
    (expected,) = predict_scores(make(), as_scores(passed))
    for kind in (bool, int):
        scores = {"arc": {f"m{row}": kind(each) for row, each in enumerate(passed)}}
        (found,) = predict_scores(make(), scores)
        assert found.scores.dtype == np.float64
        assert found.predicted.tolist() == expected.predicted.tolist()
        assert found.pearson == expected.pearson


def test_models_without_scores_and_scores_without_models_are_left_out():
    matrix = make()
    rng = np.random.default_rng(7)
    scores = as_scores(rng.standard_normal(K))
    del scores["arc"]["m3"]
    scores["piqa"] = {f"m{row}": float(row) for row in range(0, K, 2)}
    scores["piqa"]["elsewhere"] = 1.0
    with pytest.warns(LlfastWarning, match="1 models that are not there .* 'elsewhere' among"):
        arc, piqa = predict_scores(matrix, scores)
    assert isinstance(arc, Prediction)
    assert len(arc.models) == K - 1
    assert "m3" not in arc.models
    assert piqa.models == tuple(f"m{row}" for row in range(0, K, 2))


@pytest.mark.parametrize(
    ("count", "families", "message"),
    [(9, 9, "got 9 models of 9"), (30, 3, "got 30 models of 3"), (0, 0, "got 0 models of 0")],
)
def test_too_few_are_refused_in_one_line(count, families, message):
    values = np.random.default_rng(8).standard_normal((30, N)) - 700
    matrix = LogLikelihoodMatrix(
        [f"m{row}" for row in range(30)],
        values,
        np.full(N, 1000.0),
        metadata=[{"family": str(row % max(families, 1))} for row in range(30)],
    )
    with pytest.raises(SpaceError, match=f"scores of 'arc' must be of 10 models.*{message}"):
        predict_scores(matrix, as_scores(np.arange(count)))
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        predict_scores(matrix, as_scores(np.arange(30)), folds=1)


def test_models_that_are_all_the_same_are_predicted_by_their_mean():
    values = np.tile(np.random.default_rng(9).standard_normal(N) - 700, (20, 1))
    matrix = LogLikelihoodMatrix([f"m{row}" for row in range(20)], values, np.full(N, 1000.0))
    (found,) = predict_scores(matrix, as_scores(np.arange(20)), group=None)
    assert np.isfinite(found.predicted).all()
    for value in (*found.predicted, *found.baseline):
        assert 5 < value < 15


def test_a_family_that_is_alone_in_a_training_set_is_split():
    matrix = make()
    metadata = [{"family": "large" if row < 57 else str(row)} for row in range(K)]
    few = LogLikelihoodMatrix(matrix.models, matrix.values, matrix.text_bytes, metadata)
    (found,) = predict_scores(few, as_scores(np.arange(K)), folds=2)
    assert np.isfinite(found.predicted).all()
    with pytest.raises(SpaceError, match="'arc' must be finite, got nan for 'm0'"):
        predict_scores(few, {"arc": dict.fromkeys(few.models, np.nan)})

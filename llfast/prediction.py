"""Benchmark scores predicted from where models are, by ridge regression.

    families ─▶ folds: basis, penalty and weights of all other families ─▶ scores of this one
    scores and predictions ─▶ correlations, and their intervals from drawing families again

Nothing of a model that is predicted has a part in its prediction: the clip and the reference of its
coordinates are those of the others, and so is the penalty, which an inner cross-validation chooses.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from .basis import Basis
from .errors import LlfastWarning, SpaceError, needed
from .results import LogLikelihoodMatrix
from .scores import Scores, known_scores, read_scores
from .store import Store

_PENALTIES = 10.0 ** np.arange(-9, 3.5, 0.5)  # times the mean squared norm of the coordinates
_LEAST_MODELS = 10
_RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Correlation:
    """A correlation of predictions and scores.

    Attributes:
        value: between -1 and 1; NaN where one of the two does not vary.
        interval: lower and upper end of its 95 % interval; NaN where it is not known.
    """

    value: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} ({low:.2f} to {high:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """What was predicted for one benchmark.

    Attributes:
        benchmark: its name.
        models: (K,) the models whose score is known.
        scores: (K,) what they scored, or its logarithm where that was predicted.
        predicted: (K,) what their coordinates say they score.
        baseline: (K,) what their mean log-likelihood alone says.
        penalties: of each fold, in units of the mean squared norm of the coordinates.
        pearson: of predicted and scores.
        spearman: of their ranks.
        baseline_pearson: of baseline and scores.
        baseline_spearman: of their ranks.
    """

    benchmark: str
    models: tuple[str, ...]
    scores: Float64[np.ndarray, " K"]
    predicted: Float64[np.ndarray, " K"]
    baseline: Float64[np.ndarray, " K"]
    penalties: tuple[float, ...]
    pearson: Correlation
    spearman: Correlation
    baseline_pearson: Correlation
    baseline_spearman: Correlation


def predict_from_store(
    store: str | os.PathLike[str],
    scores: str | os.PathLike[str],
    *,
    textset: str | None = None,
    convention: str | None = None,
    dtype: str | None = None,
    newest: bool = False,
    group: str | None = "family",
    folds: int = 5,
    log: Collection[str] = (),
) -> list[Prediction]:
    """Predict the scores of a file from the models of a store.

    Args:
        store: the folder of results, or s3://bucket/prefix.
        scores: a CSV file, see `read_scores`.
        textset: the start of a text set's digest, for a store with several.
        convention: only results under this convention.
        dtype: only models that ran in it.
        newest: of several rows of one model, take the newest.
        group: as for `predict_scores`.
        folds: as for `predict_scores`.
        log: as for `predict_scores`.

    Raises: as `predict_scores`, `read_scores` and `Store.matrix` say.
    """
    duplicates = "newest" if newest else "error"
    known = read_scores(os.fspath(scores))
    matrix = Store(store).matrix(textset, convention, dtype, duplicates=duplicates)
    return predict_scores(matrix, known, group=group, folds=folds, log=log)


def predict_scores(
    matrix: LogLikelihoodMatrix,
    scores: Scores,
    *,
    group: str | None = "family",
    folds: int = 5,
    clip_quantile: float | None = 0.02,
    log: Collection[str] = (),
) -> list[Prediction]:
    """Predict each model's scores from those of the models of other families.

    Args:
        matrix: log-likelihoods of K models.
        scores: by benchmark and model; models that are not in the matrix are left out.
        group: the key of the metadata that says which models belong together, and so into one
            fold; a model without it, or with null or "" there, is alone. None: all are.
        folds: how many, at most.
        clip_quantile: see `Basis.fit`.
        log: benchmarks of which the logarithm is predicted: perplexities, say, of which a few are
            thousands of times as large as most.

    Returns: a prediction a benchmark, in the order of `scores`.

    Raises:
        ValueError: if there are fewer than two folds, or there is no benchmark of a name in `log`.
        SpaceError: if a benchmark has scores of fewer than ten models, they are of fewer than four
            groups, are not finite, or have no logarithm and are to have one; or if no model has
            `group`.
        MissingDependencyError: if scikit-learn is not installed.
    Warns: LlfastWarning if scores are of models that the matrix does not have, or only some models
        have `group`.
    Source: Oyama et al., arXiv 2502.16173 (ridge regression, five folds by family).
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    if other := set(log) - set(scores):
        raise ValueError(f"log must name benchmarks ({', '.join(scores)}), got {min(other)!r}")
    _sklearn()
    scores = {name: _logs(name, each) if name in log else each for name, each in scores.items()}
    unknown = {model for each in scores.values() for model in each} - set(matrix.models)
    if unknown:
        warnings.warn(
            f"scores of {len(unknown)} models that are not there are left out, of "
            f"{min(unknown)!r} among them",
            LlfastWarning,
            stacklevel=2,
        )
    groups = _groups(matrix, group)
    return [
        _predict(name, matrix, groups, each, folds, clip_quantile) for name, each in scores.items()
    ]


def _logs(benchmark: str, scores: Mapping[str, float]) -> dict[str, float]:
    if wrong := [model for model, score in scores.items() if score <= 0]:
        raise SpaceError(
            f"scores of {benchmark!r} must be above 0 to have logarithms, got "
            f"{scores[wrong[0]]:g} for {wrong[0]!r}"
        )
    return {model: math.log(score) for model, score in scores.items()}


def _groups(matrix: LogLikelihoodMatrix, key: str | None) -> Int64[np.ndarray, " K"]:
    """Which models have the same value of a key of their metadata; those without it are alone.

    So are those that have null or "" there, as tables write what is missing.
    Numbers, and so folds, do not depend on the order of the models.
    """
    missing = (None, "")
    lacking = 0 if key is None else sum(each.get(key) in missing for each in matrix.metadata)
    if key is not None and lacking == len(matrix.models):
        known = sorted({k for each in matrix.metadata for k, v in each.items() if v not in missing})
        raise SpaceError(
            f"group must be a key of the models' metadata ({', '.join(known) or 'there is none'}), "
            f"got {key!r}; without groups, relatives predict each other"
        )
    if lacking:
        warnings.warn(
            f"{lacking} of {len(matrix.models)} models have no {key}, and count as families of "
            "their own",
            LlfastWarning,
            stacklevel=3,
        )
    found = []
    for model, metadata in zip(matrix.models, matrix.metadata, strict=True):
        value = None if key is None else metadata.get(key)
        found.append(("alone", model) if value in missing else ("group", str(value)))
    numbers = {group: number for number, group in enumerate(sorted(set(found)))}
    return np.array([numbers[group] for group in found], dtype=np.int64)


def _predict(
    benchmark: str,
    matrix: LogLikelihoodMatrix,
    groups: Int64[np.ndarray, " K"],
    scores: Mapping[str, float],
    folds: int,
    clip_quantile: float | None,
) -> Prediction:
    rows, known = known_scores(scores, matrix.models)
    if wrong := [rows[at] for at, score in enumerate(known) if not math.isfinite(score)]:
        model = matrix.models[wrong[0]]
        raise SpaceError(
            f"scores of {benchmark!r} must be finite, got {scores[model]} for {model!r}"
        )
    y, groups = np.array(known, dtype=np.float64), groups[rows]
    if len(rows) < _LEAST_MODELS or len(set(groups.tolist())) < 4:
        raise SpaceError(
            f"scores of {benchmark!r} must be of {_LEAST_MODELS} models and 4 groups, got "
            f"{len(rows)} models of {len(set(groups.tolist()))}"
        )
    values = matrix.values[rows]
    predicted, baseline = np.empty(len(rows)), np.empty(len(rows))
    penalties = []
    for others, own in _splits(groups, folds):
        basis = _basis(values[others], matrix.text_bytes, clip_quantile)
        train, test = basis.place(values[others]), basis.place(values[own])
        predicted[own], penalty = _ridge(train, y[others], groups[others], test, folds)
        penalties.append(penalty)
        baseline[own] = _line(values[others], y[others], values[own], basis.clip)
    return Prediction(
        benchmark=benchmark,
        models=tuple(matrix.models[row] for row in rows),
        scores=y,
        predicted=predicted,
        baseline=baseline,
        penalties=tuple(penalties),
        pearson=_correlation(_pearson, predicted, y, groups),
        spearman=_correlation(_spearman, predicted, y, groups),
        baseline_pearson=_correlation(_pearson, baseline, y, groups),
        baseline_spearman=_correlation(_spearman, baseline, y, groups),
    )


def _splits(
    groups: Int64[np.ndarray, " K"], folds: int
) -> list[tuple[Int64[np.ndarray, " A"], Int64[np.ndarray, " B"]]]:
    if len(set(groups.tolist())) < 2:  # a family that is alone in a training set
        groups = np.arange(len(groups))
    count = min(folds, len(set(groups.tolist())))
    splitter = _sklearn().model_selection.GroupKFold(count)
    return list(splitter.split(groups, groups=groups))


def _basis(
    values: Float64[np.ndarray, "K N"],
    text_bytes: Float64[np.ndarray, " N"],
    clip_quantile: float | None,
) -> Basis:
    models = [str(row) for row in range(len(values))]
    return Basis.fit(LogLikelihoodMatrix(models, values, text_bytes), clip_quantile)


def _ridge(
    train: Float64[np.ndarray, "A N"],
    scores: Float64[np.ndarray, " A"],
    groups: Int64[np.ndarray, " A"],
    test: Float64[np.ndarray, "B N"],
    folds: int,
) -> tuple[Float64[np.ndarray, " B"], float]:
    """Predictions of the test models, and the penalty that predicts held-out groups best.

    Coordinates are first turned onto the training models' own axes, which changes no prediction: a
    ridge solution is a combination of the points that it was fitted to.
    """
    sklearn = _sklearn()
    left, sizes, axes = np.linalg.svd(train, full_matrices=False)
    turned = left * sizes
    scale = float(np.square(sizes).sum()) / len(train) or 1.0
    search = sklearn.model_selection.GridSearchCV(
        sklearn.linear_model.Ridge(),
        {"alpha": _PENALTIES * scale},
        scoring="neg_mean_squared_error",
        cv=_splits(groups, folds),
    )
    search.fit(turned, scores)
    predicted: Float64[np.ndarray, " B"] = search.predict(test @ axes.T)
    return predicted, float(search.best_params_["alpha"]) / scale


def _line(
    train: Float64[np.ndarray, "A N"],
    scores: Float64[np.ndarray, " A"],
    test: Float64[np.ndarray, "B N"],
    clip: float | None,
) -> Float64[np.ndarray, " B"]:
    """Predictions by a straight line over the mean clipped log-likelihood."""
    means = [
        (each if clip is None else np.maximum(each, clip)).mean(axis=1) for each in (train, test)
    ]
    centre = float(means[0].mean())
    spread = float(np.square(means[0] - centre).sum())
    level = float(scores.mean())
    slope = float((means[0] - centre) @ (scores - level)) / spread if spread else 0.0
    found: Float64[np.ndarray, " B"] = level + slope * (means[1] - centre)
    return found


# ------------------------------------------------------------------ correlations


def _pearson(a: Float64[np.ndarray, " K"], b: Float64[np.ndarray, " K"]) -> float:
    if not np.ptp(a) or not np.ptp(b):
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()  # whose squares are numbers, and not all 0
    return float(np.clip(a @ b / math.sqrt(float(a @ a) * float(b @ b)), -1, 1))


def _spearman(a: Float64[np.ndarray, " K"], b: Float64[np.ndarray, " K"]) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(a), rankdata(b))


def _correlation(
    measure: Callable[[np.ndarray, np.ndarray], float],
    predicted: Float64[np.ndarray, " K"],
    scores: Float64[np.ndarray, " K"],
    groups: Int64[np.ndarray, " K"],
) -> Correlation:
    """With an interval by the bootstrap over groups: percentiles of 2,000 draws of all of them."""
    names = np.unique(groups)
    members = [np.flatnonzero(groups == name) for name in names]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([members[each] for each in rng.integers(len(names), size=len(names))])
        drawn.append(measure(predicted[rows], scores[rows]))
    usable = [each for each in drawn if np.isfinite(each)]
    tail = (1 - _CONFIDENCE) / 2
    ends = np.quantile(usable, [tail, 1 - tail]).tolist() if usable else [float("nan")] * 2
    return Correlation(measure(predicted, scores), (ends[0], ends[1]))


def _sklearn() -> Any:
    with needed(
        "sklearn", "predicting scores needs scikit-learn; run `pip install 'llfast[predict]'`"
    ):
        import sklearn.linear_model
        import sklearn.model_selection
    return sklearn

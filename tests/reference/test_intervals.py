"""The interval on KL: its formulas against brute force and SciPy, its coverage by simulation."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from scipy import stats

from llfast.intervals import group_codes, half_variances, kl_estimate, student_t_quantile

# ------------------------------------------------------------------------------ closed forms


def brute_force(
    difference: np.ndarray, groups: np.ndarray | None, confidence: float = 0.95
) -> tuple[float, float, float, float]:
    """Value, error and interval from G refits, SciPy's t and a numerical inverse of Hall's g."""
    labels = np.arange(len(difference)) if groups is None else groups
    names = np.unique(labels)
    count = len(names)
    value = np.var(difference) / 2
    pseudo = np.array(
        [
            count * np.log(value) - (count - 1) * np.log(np.var(difference[labels != name]) / 2)
            for name in names
        ]
    )
    error = pseudo.std(ddof=1) / math.sqrt(count)
    freedom = min(count - 1, 2 * count / (stats.kurtosis(pseudo, fisher=False) - 1))
    quantile = stats.t.ppf((1 + confidence) / 2, freedom)
    a = stats.skew(pseudo) / math.sqrt(count)
    ends = []
    for x in (quantile, -quantile):
        t = np.roots([a**2 / 27, a / 3, 1, a / 6 - x])
        ends.append(pseudo.mean() - error * float(t[np.abs(t.imag).argmin()].real))
    return value, value * error, math.exp(ends[0]), math.exp(ends[1])


@pytest.mark.parametrize("texts", [6, 31, 265])
@pytest.mark.parametrize("layout", ["texts", "equal documents", "unequal documents"])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_matches_brute_force_leaving_one_document_out(texts, layout, confidence):
    rng = np.random.default_rng(texts)
    difference = 40 + 9 * rng.standard_t(5, texts)
    groups = {
        "texts": None,
        "equal documents": np.arange(texts) // 2,
        "unequal documents": rng.integers(0, texts // 3 + 1, texts) * 7,  # with unused numbers
    }[layout]
    found = kl_estimate(difference, groups, confidence=confidence)
    value, error, low, high = brute_force(difference, groups, confidence)
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.standard_error == pytest.approx(error, rel=1e-9)
    # The interval always holds the estimate, which a bare formula need not.
    assert found.interval[0] == pytest.approx(min(low, value), rel=1e-7)
    assert found.interval[1] == pytest.approx(max(high, value), rel=1e-7)
    assert found.unit == "nats_per_text"
    assert found.confidence == confidence


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("freedom", [1.0, 1.3, 2.0, 2.7, 4.4, 9.0, 52.0, 264.0, 9999.0, 1e6])
def test_student_quantile_matches_scipy(confidence, freedom):
    expected = stats.t.ppf((1 + confidence) / 2, freedom)
    assert student_t_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-7)


def test_value_is_the_population_variance_halved():
    difference = np.array([1.0, 3.0, 5.0, 11.0])
    assert half_variances(difference[None]).tolist() == [np.var(difference) / 2]
    assert kl_estimate(difference).value == np.var(difference) / 2


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 127, 128, 129, 1000, 10_001])
def test_a_row_has_the_same_bits_alone_and_in_a_block(n):
    rows = 1e3 * np.random.default_rng(n).standard_normal((13, n))
    together = half_variances(rows)
    assert [half_variances(row[None])[0] for row in rows] == together.tolist()
    assert half_variances(-rows).tolist() == together.tolist()


# ------------------------------------------------------------------------------ invariances


def test_scaling_differences_scales_everything_by_the_square():
    difference = np.random.default_rng(0).standard_t(5, 200)
    plain, scaled = kl_estimate(difference), kl_estimate(1e-7 * difference + 0.25)
    for a, b in (
        (plain.value, scaled.value),
        (plain.standard_error, scaled.standard_error),
        *zip(plain.interval, scaled.interval, strict=True),
    ):
        assert b == pytest.approx(1e-14 * a, rel=1e-6)


def test_the_order_of_texts_and_the_names_of_documents_do_not_matter():
    rng = np.random.default_rng(1)
    difference, groups = rng.standard_t(5, 200), rng.integers(0, 40, 200)
    order, names = rng.permutation(200), rng.permutation(40)
    a, b = kl_estimate(difference, groups), kl_estimate(difference[order], names[groups[order]])
    assert b.value == pytest.approx(a.value, rel=1e-12)
    assert b.interval == pytest.approx(a.interval, rel=1e-9)


def test_documents_of_one_text_each_are_texts():
    difference = np.random.default_rng(2).standard_t(5, 50)
    alone, named = kl_estimate(difference), kl_estimate(difference, np.arange(50)[::-1].copy())
    assert named.interval == pytest.approx(alone.interval, rel=1e-9)


def test_shared_documents_widen_the_interval():
    rng = np.random.default_rng(3)
    difference = np.repeat(rng.standard_normal(100), 5)
    apart, together = kl_estimate(difference), kl_estimate(difference, np.arange(500) // 5)
    assert together.standard_error == pytest.approx(math.sqrt(5) * apart.standard_error, rel=0.05)


def test_group_codes_number_documents_in_order():
    assert group_codes(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


# ------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("constant", [0.0, 5.0, 0.1])  # seven times 0.1 is not 0.7
@pytest.mark.parametrize("groups", [None, np.array([0, 0, 1, 1, 1, 2, 2])])
def test_identical_models_have_no_divergence_and_no_error(constant, groups):
    found = kl_estimate(np.full(7, constant), groups)
    assert (found.value, found.standard_error, found.interval) == (0.0, 0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("difference", "groups"),
    [
        ([1.0, 2.0], None),  # leaving one out leaves nothing to vary
        ([1.0, 2.0, 4.0], [0, 0, 0]),  # one document
        ([0.0] * 50 + [1e-3], None),  # one text makes all of the difference
        ([0.0, 0.0, 0.3, 0.7], [0, 1, 2, 2]),  # or one document
    ],
)
def test_one_document_says_nothing_of_its_error(difference, groups):
    found = kl_estimate(np.array(difference), None if groups is None else np.array(groups))
    assert found.value == pytest.approx(np.var(difference) / 2)
    assert (found.standard_error, found.interval) == (math.inf, (0.0, math.inf))


def test_one_text_alone_says_nothing():
    estimate = kl_estimate(np.array([3.0]))
    assert (estimate.value, estimate.standard_error) == (0.0, math.inf)
    assert estimate.interval == (0.0, math.inf)


def test_equally_spread_documents_have_no_error():
    found = kl_estimate(np.tile([1.0, -1.0], 10), np.arange(20) // 2)
    assert found.value == 0.5
    assert found.standard_error == pytest.approx(0, abs=1e-12)
    assert found.interval == pytest.approx((0.5, 0.5), rel=0.1)


def test_one_dominant_text_gives_a_finite_and_wide_interval():
    difference = np.append(np.random.default_rng(4).standard_normal(263), 1e4)
    low, high = kl_estimate(difference).interval
    value = np.var(difference) / 2
    assert 0 < low < value < high
    assert high > 10 * value


@pytest.mark.parametrize(
    ("difference", "options", "message"),
    [
        ([1.0, np.nan], {}, "finite"),
        ([], {}, "non-empty"),
        ([[1.0, 2.0]], {}, "vector"),
        ([1.0, 2.0], {"groups": np.array([0])}, "one a text"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence"),
        ([1.0, 2.0], {"confidence": 0.0}, "confidence"),
    ],
)
def test_refuses_what_it_cannot_use(difference, options, message):
    unchecked = inspect.unwrap(kl_estimate)  # shapes are also in the annotations, checked in tests
    with pytest.raises(ValueError, match=message):
        unchecked(np.array(difference), **options)


def test_quantile_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="freedom"):
        student_t_quantile(0.95, 0.5)


# ------------------------------------------------------------------------------ coverage


def _contaminated(rng, shape):
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 0.05, 3.0, 1.0) / 1.4**0.5


HEAVY_TAILED = {
    "student t, 5 df": lambda rng, shape: rng.standard_t(5, shape) / (5 / 3) ** 0.5,
    "laplace": lambda rng, shape: rng.laplace(size=shape) / 2**0.5,
    "exponential": lambda rng, shape: rng.standard_exponential(shape) - 1,
    "5 % at 3 sd": _contaminated,
}


@pytest.mark.parametrize("chunks", [1, 5], ids=["independent", "five a document"])
@pytest.mark.parametrize(("texts", "repetitions"), [(265, 1500), (10_000, 800)])
@pytest.mark.parametrize("name", HEAVY_TAILED)
def test_nominal_95_percent_covers_93_to_97(name, texts, repetitions, chunks):
    # Seeds are fixed, so this cannot fail by chance; the allowance is three Monte-Carlo standard
    # errors, for the figure of `benchmarks/bench_intervals.py` is what is claimed.
    rng = np.random.default_rng([texts, chunks])
    draw, documents = HEAVY_TAILED[name], texts // chunks
    groups = None if chunks == 1 else np.arange(texts) // chunks
    held = 0
    for _ in range(repetitions):
        difference = draw(rng, (documents, chunks))
        if chunks > 1:
            difference = (difference + draw(rng, (documents, 1))) / 2**0.5
        low, high = kl_estimate(difference.reshape(-1), groups).interval
        held += low <= 0.5 <= high
    allowance = 3 * math.sqrt(0.95 * 0.05 / repetitions)
    assert 0.93 - allowance <= held / repetitions <= 0.97 + allowance


def test_a_plain_normal_interval_would_not_cover():
    # The same simulation tells methods apart: it fails what it ought to fail.
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        shared, own = (HEAVY_TAILED["student t, 5 df"](rng, (53, m)) for m in (1, 5))
        halves = np.square((shared + own).reshape(-1) / 2**0.5) / 2
        held += abs(halves.mean() - 0.5) <= 1.96 * halves.std() / math.sqrt(265)
    assert held / 500 < 0.85

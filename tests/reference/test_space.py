"""The space against formulas written out, and real and synthetic families."""

from __future__ import annotations

import ast
import csv
import math
from fractions import Fraction

import numpy as np
import pytest

from llfast import LogLikelihoodMatrix, ModelSpace, SpaceError
from llfast.intervals import kl_estimate
from tests.spaces import make_matrix, make_result

# ------------------------------------------------------------------------------ the basis


@pytest.mark.parametrize("quantile", [0.02, 0.3, 0.0, None])
def test_coordinates_are_clipped_and_double_centred(values, quantile):
    space = ModelSpace.fit(make_matrix(values), clip_quantile=quantile)
    raised = values
    if quantile:
        ranked = np.sort(values, axis=None)  # numpy's "linear" quantile, written out
        at = quantile * (ranked.size - 1)
        clip = ranked[int(at)] + (at - int(at)) * (ranked[int(at) + 1] - ranked[int(at)])
        assert space.clip == pytest.approx(clip, rel=1e-14)
        raised = np.maximum(values, clip)
    else:
        assert space.clip is None
    rows = raised - raised.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(space.reference, rows.mean(axis=0), atol=1e-10)
    np.testing.assert_allclose(space.coordinates, rows - rows.mean(axis=0), atol=1e-10)
    assert space.coordinates.shape == (7, 60)
    assert len(space) == 7


def test_fitting_changes_nothing_of_the_matrix(values):
    before = values.copy()
    matrix = make_matrix(values)
    ModelSpace.fit(matrix)
    assert (matrix.values == before).all()
    assert matrix.text_bytes.flags.writeable
    assert matrix.values.flags.writeable


@pytest.mark.parametrize("quantile", [-0.1, 1.0, 5.0, float("nan")])
def test_refuses_a_share_that_is_none(values, quantile):
    with pytest.raises(ValueError, match="clip_quantile"):
        ModelSpace.fit(make_matrix(values), clip_quantile=quantile)


@pytest.mark.parametrize("quantile", [0.02, None])
def test_a_member_is_projected_onto_itself_to_the_bit(values, quantile):
    space = ModelSpace.fit(make_matrix(values), clip_quantile=quantile)
    for row, model in enumerate(space.models):
        projected = space.project(make_result(values[row]))
        assert (projected == space.coordinates[row]).all(), model
        assert space.kl(model, make_result(values[row])).value == 0.0


def test_the_basis_stays_when_models_join(values):
    space = ModelSpace.fit(make_matrix(values[:4]))
    late = space.project(make_result(values[6]))
    raised = np.maximum(values[6], space.clip)
    np.testing.assert_allclose(late, raised - raised.mean() - space.reference, atol=1e-10)


def test_digest_names_the_basis_and_nothing_else(values):
    plain = ModelSpace.fit(make_matrix(values)).digest
    assert len(plain) == 64
    renamed = make_matrix(values, models=list("abcdefg"), text_bytes=np.full(60, 7.0))
    assert ModelSpace.fit(renamed).digest == plain
    others = [
        ModelSpace.fit(make_matrix(values), clip_quantile=0.03),
        ModelSpace.fit(make_matrix(values), clip_quantile=None),
        ModelSpace.fit(make_matrix(values[:6])),
        ModelSpace.fit(make_matrix(values, textset_digest="other")),
        ModelSpace.fit(make_matrix(values, convention="lm-eval")),
        ModelSpace.fit(make_matrix(values, textset_digest="textspap", convention="er")),
    ]
    assert len({plain, *(other.digest for other in others)}) == 7


# ------------------------------------------------------------------------------ distances


def test_kl_is_half_the_variance_of_the_clipped_difference(values, space):
    raised = np.maximum(values, space.clip)
    for a in range(7):
        for b in range(7):
            nats = np.var(raised[a] - raised[b]) / 2
            found = space.kl(f"model {a}", f"model {b}", unit="nats_per_text")
            assert found.value == pytest.approx(nats, rel=1e-12, abs=0)
            bits = space.kl(f"model {a}", f"model {b}")
            assert bits.value == pytest.approx(nats / (500 * math.log(2)), rel=1e-12, abs=0)
            assert bits.unit == "bits_per_byte"
            assert float(bits) == bits.value


def test_kl_carries_the_interval_of_the_clipped_difference(values, space):
    raised = np.maximum(values, space.clip)
    expected = kl_estimate(raised[0] - raised[1])
    found = space.kl("model 0", "model 1", unit="nats_per_text")
    assert found.interval == pytest.approx(expected.interval, rel=1e-9)
    bits = space.kl("model 0", "model 1")
    assert bits.interval[1] == pytest.approx(expected.interval[1] / 500 / math.log(2), rel=1e-9)


def test_documents_of_the_matrix_widen_the_interval():
    rng = np.random.default_rng(1)
    values = -500 + 9 * np.repeat(rng.standard_normal((2, 40)), 5, axis=1)
    groups = [f"document {row // 5}" for row in range(200)]
    alone = ModelSpace.fit(make_matrix(values), None)
    grouped = ModelSpace.fit(make_matrix(values, groups=groups), None)
    a, b = (each.kl("model 0", "model 1") for each in (alone, grouped))
    assert b.value == a.value
    assert b.standard_error > 2 * a.standard_error


def test_kl_matrix_and_squared_distances_agree_with_kl(space):
    for unit in ("bits_per_byte", "nats_per_text"):
        matrix = space.kl_matrix(unit)
        assert (matrix == matrix.T).all()
        assert (matrix.diagonal() == 0).all()
        for a in range(7):
            for b in range(7):
                assert matrix[a, b] == space.kl(f"model {a}", f"model {b}", unit).value
    explicit = np.square(space.coordinates[:, None] - space.coordinates).sum(axis=-1)
    np.testing.assert_allclose(space.squared_distances(), explicit, rtol=1e-12)


def test_near_identical_models_do_not_cancel():
    # KL of 1e-9 bits a byte beside log-likelihoods of 700 nats; the truth in exact arithmetic.
    rng = np.random.default_rng(2)
    base = -700 + 120 * rng.standard_normal(200)
    scale = math.sqrt(2 * 1e-9 * 500 * math.log(2))
    values = np.stack([base, base + scale * rng.standard_normal(200), base + 99])
    space = ModelSpace.fit(make_matrix(values), clip_quantile=None)
    exact = [Fraction(a) - Fraction(b) for a, b in zip(values[0], values[1], strict=True)]
    mean = sum(exact) / 200
    truth = float(sum((each - mean) ** 2 for each in exact))
    assert space.squared_distances()[0, 1] == pytest.approx(truth, rel=1e-6)
    assert space.kl("model 0", "model 1").value == pytest.approx(1e-9, rel=0.3)
    # A constant is the model's mean, and so no difference but for its rounding.
    assert space.kl("model 0", "model 2", "nats_per_text").value < 1e-24


def test_blocks_do_not_change_a_distance(monkeypatch, values):
    space = ModelSpace.fit(make_matrix(values))
    whole = space.squared_distances()
    for size in (1, 100, 200):
        monkeypatch.setattr("llfast.space._BLOCK_VALUES", size)
        assert (space.squared_distances() == whole).all()


def test_identical_models_have_no_divergence(values):
    space = ModelSpace.fit(make_matrix(np.stack([values[0], values[1], values[0]])))
    found = space.kl("model 0", "model 2")
    assert (found.value, found.standard_error, found.interval) == (0.0, 0.0, (0.0, 0.0))
    assert space.squared_distances()[0, 2] == 0.0


def test_one_model_and_one_text_make_a_space():
    space = ModelSpace.fit(make_matrix(np.array([[-3.0]])))
    assert space.coordinates.tolist() == [[0.0]]
    assert space.kl_matrix().tolist() == [[0.0]]
    assert space.kl("model 0", "model 0").interval == (0.0, math.inf)  # one text says nothing


def test_bytes_that_are_not_known_are_not_made_up(values):
    space = ModelSpace.fit(make_matrix(values, text_bytes=np.zeros(60)))
    with pytest.raises(SpaceError, match="nats_per_text"):
        space.kl("model 0", "model 1")
    with pytest.raises(SpaceError, match="nats_per_text"):
        space.kl_matrix()
    assert space.kl("model 0", "model 1", unit="nats_per_text").value > 0
    with pytest.raises(ValueError, match="unit"):
        space.kl_matrix("bits")


# ------------------------------------------------------------------------------ families


def nearest(space):
    distances = space.squared_distances()
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(axis=1)


def test_real_models_are_nearest_to_their_families(shared_data):
    with (shared_data / "bpb_90x263" / "bits_per_byte.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    columns = [ast.literal_eval(name) for name in rows[0][1:]]
    bits = np.array([[float(cell) for cell in row[1:]] for row in rows[1:]]).T
    matrix = LogLikelihoodMatrix(
        [str(column) for column in columns], -bits * 972 * math.log(2), np.full(263, 972.0)
    )
    space = ModelSpace.fit(matrix)
    families = np.array([family for family, _ in columns])
    neighbours = nearest(space)
    with_kin = [row for row, family in enumerate(families) if (families == family).sum() > 1]
    assert len(with_kin) == 67
    assert sum(families[row] == families[neighbours[row]] for row in with_kin) == 42
    names = [name.partition("/")[2] for _, name in columns]
    for name in ("typhoon-7b", "Mistral_Pro_8B_v0.1"):
        assert names[neighbours[names.index(name)]] == "Mistral-7B-v0.1"
    # Without clip and centring the same data say much less.
    raw = np.square(matrix.values[:, None] - matrix.values).sum(axis=-1)
    np.fill_diagonal(raw, np.inf)
    assert sum(families[row] == families[raw[row].argmin()] for row in with_kin) == 11


def test_synthetic_models_are_nearest_to_their_families():
    # 10 families of 4. A member is its family's profile, a small change of its own, an ability that
    # shifts all texts (which centring takes out) and a rare breakdown (which the clip bounds).
    rng = np.random.default_rng(4)
    families = np.repeat(np.arange(10), 4)
    profiles = -700 + 100 * rng.standard_normal(300) + 40 * rng.standard_normal((10, 300))
    values = profiles[families] + 15 * rng.standard_normal((40, 300))
    values += 150 * rng.standard_normal((40, 1))
    values -= 5000.0 * (rng.random((40, 300)) < 0.005)
    space = ModelSpace.fit(make_matrix(values))
    assert (families[nearest(space)] == families).all()
    raw = np.square(values[:, None] - values).sum(axis=-1)
    np.fill_diagonal(raw, np.inf)
    assert (families[raw.argmin(axis=1)] == families).mean() < 0.7
    unclipped = nearest(ModelSpace.fit(make_matrix(values), clip_quantile=None))
    assert (families[unclipped] == families).mean() < 0.9

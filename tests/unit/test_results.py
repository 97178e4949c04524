import json
import math

import numpy as np
import pytest

from llfast import (
    KLEstimate,
    LogLikelihoodMatrix,
    LogLikelihoods,
    SpaceError,
    Store,
    TextSet,
)
from llfast.results import RaggedArray, ResultKey
from tests.comparisons import counting
from tests.spaces import make_matrix

pytestmark = pytest.mark.usefixtures("untyped")  # our own checks are to answer


# ------------------------------------------------------------------------------ RaggedArray


@pytest.fixture
def ragged():
    return RaggedArray(
        np.array([1, 2, 3, 4, 5], dtype=np.float32), np.array([0, 2, 2, 5], dtype=np.int64)
    )


def test_ragged_rows_are_the_parts_between_offsets(ragged):
    assert len(ragged) == 3
    assert [row.tolist() for row in ragged] == [[1, 2], [], [3, 4, 5]]
    assert ragged[-1].tolist() == [3, 4, 5]
    assert ragged[-3].tolist() == [1, 2]
    assert ragged[np.int64(2)].dtype == np.float32


@pytest.mark.parametrize("row", [3, -4])
def test_ragged_rows_that_are_not_there_are_refused(ragged, row):
    with pytest.raises(IndexError, match=rf"row must be in \[0, 3\), got {row}"):
        ragged[row]


def test_a_ragged_row_can_be_written_through(ragged):
    ragged[2][:] = -1
    assert ragged.values.tolist() == [1, 2, -1, -1, -1]


# ------------------------------------------------------------------------------ LogLikelihoods

KEY = ResultKey("org/model", "abc", "d" * 64, "paper", "float32", None, 1)


def make_result(**changes):
    fields = KEY._asdict() | {
        "ids": ("a", "b", "c"),
        "loglikelihoods": np.array([-10.0, -3.5, 0.0]),
        "token_counts": np.array([4, 2, 0]),
        "text_bytes": np.array([8, 5, 0]),
        "truncated": np.array([False, True, False]),
        "token_budgets": np.array([512, 512, 0], dtype=np.int32),
    }
    return LogLikelihoods(**fields | changes)


def test_bits_per_byte_are_nats_over_bytes_and_ln_2():
    result = make_result()
    assert result.bits_per_byte[0] == pytest.approx(10 / (8 * math.log(2)), rel=1e-15)
    assert result.bits_per_byte[1] == pytest.approx(3.5 / (5 * math.log(2)), rel=1e-15)
    assert math.isnan(result.bits_per_byte[2]), "a text of no bytes has no bits per byte"
    # Of all texts: bits over bytes, not the mean of the texts' ratios.
    assert result.mean_bits_per_byte == pytest.approx(13.5 / (13 * math.log(2)), rel=1e-15)


def test_without_bytes_there_are_no_bits_per_byte():
    result = make_result(text_bytes=np.zeros(3, dtype=np.int64))
    assert np.isnan(result.bits_per_byte).all()
    assert math.isnan(result.mean_bits_per_byte)


def test_bits_per_byte_of_texts_without_scored_tokens_have_no_sign():
    result = make_result(loglikelihoods=np.zeros(3), token_counts=np.zeros(3, np.int64))
    assert math.copysign(1, result.bits_per_byte[0]) == 1
    assert math.copysign(1, result.mean_bits_per_byte) == 1


def test_texts_that_were_cut_or_not_scored_are_named():
    result = make_result()
    assert result.truncated_ids == ("b",)
    assert result.unscored_ids == ("c",)


def test_the_key_is_what_tells_results_apart():
    assert make_result().key == KEY
    for name, other in zip(
        KEY._fields, ("m", "r", "e" * 64, "lm-eval", "bfloat16", 3, 2), strict=True
    ):
        assert make_result(**{name: other}).key == KEY._replace(**{name: other}) != KEY
    assert make_result(metadata={"family": "x"}, groups=("g", "g", "h")).key == KEY


def test_values_is_another_name_for_the_loglikelihoods():
    result = make_result()
    assert result.values is result.loglikelihoods
    assert len(result) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loglikelihoods": np.zeros(2)}, r"loglikelihoods must have shape \(3,\), got \(2,\)"),
        ({"loglikelihoods": np.zeros((3, 1))}, r"loglikelihoods must have shape .* \(3, 1\)"),
        ({"token_counts": np.zeros(4, int)}, r"token_counts must have shape \(3,\), got \(4,\)"),
        ({"text_bytes": np.array(5)}, r"text_bytes must have shape \(3,\), got \(\)"),
        ({"truncated": np.zeros(0, bool)}, r"truncated must have shape"),
        ({"token_budgets": np.zeros(1, np.int32)}, r"token_budgets must have shape"),
        ({"groups": ("g", "h")}, r"groups must be one a text \(3\), got 2"),
        (
            {"logprobs": RaggedArray(np.zeros(4, np.float32), np.array([0, 2, 4]))},
            r"logprobs must be one a text \(3\), got 2",
        ),
    ],
)
def test_arrays_that_do_not_fit_the_texts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_result(**changes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_text(value):
    with pytest.raises(ValueError, match="must be finite, got a NaN or inf for text 'b'"):
        make_result(loglikelihoods=np.array([-1.0, value, value]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loglikelihoods": [-1.0, -2.0, -3.0]}, r"loglikelihoods must be .*, got \[-1.0, -2.0"),
        ({"loglikelihoods": np.array(["x", "y", "z"])}, "loglikelihoods must be .*, got array"),
        ({"loglikelihoods": np.array([None] * 3)}, "loglikelihoods must be .*, got array"),
        ({"token_counts": None}, "token_counts must be an array of numbers, got None"),
        ({"text_bytes": (1, 2, 3)}, r"text_bytes must be .*, got \(1, 2, 3\)"),
        ({"truncated": [False] * 3}, "truncated must be"),
        ({"token_budgets": 512}, "token_budgets must be .*, got 512"),
        ({"ids": ["a", "b", "c"]}, r"ids must be a tuple, got \['a', 'b', 'c'\]"),
        ({"ids": None}, "ids must be a tuple, got None"),
    ],
)
def test_what_is_no_array_is_refused_by_name(changes, message):
    with pytest.raises(TypeError, match=message):
        make_result(**changes)


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="convetnion"):
        make_result(convetnion="paper")


# ------------------------------------------------------------------------------ the matrix


def test_the_matrix_holds_what_it_is_given():
    matrix = LogLikelihoodMatrix(
        ["a", "b"],
        [[-1, -2, -3], [-4, -5, -6]],
        [10, 20, 30],
        [{"family": "f"}, {}],
        ids=["x", "y", "z"],
        groups=["g", "g", "h"],
        textset_digest="d",
        convention="paper",
        dtypes=["float32", "bfloat16"],
        revisions=["1", "2"],
    )
    assert len(matrix) == 2
    assert matrix.models == ("a", "b")
    assert matrix.values.dtype == matrix.text_bytes.dtype == np.float64
    assert matrix.row("b").tolist() == [-4, -5, -6]
    assert matrix.metadata == ({"family": "f"}, {})
    assert (matrix.ids, matrix.groups) == (("x", "y", "z"), ("g", "g", "h"))
    assert (matrix.dtypes, matrix.revisions) == (("float32", "bfloat16"), ("1", "2"))
    with pytest.raises(KeyError, match="c"):
        matrix.row("c")


@pytest.mark.parametrize(
    ("ids", "groups"), [(np.arange(3), np.arange(3) // 2), ([0, 1, 2], [0, 0, 1])]
)
def test_ids_and_groups_that_are_numbers_are_those_that_a_text_set_has(tmp_path, ids, groups):
    texts = TextSet.from_texts(["a", "bb", "ccc"], groups=["0", "0", "1"])
    given = {"ids": ids, "groups": groups, "textset_digest": texts.digest, "convention": "paper"}
    matrix = LogLikelihoodMatrix(["a"], np.zeros((1, 3)), texts.text_bytes, **given)
    assert (matrix.ids, matrix.groups) == (texts.ids, texts.groups)
    store = Store(tmp_path / "store")
    store.add_matrix(matrix)
    store.add(
        make_result(
            model="b",
            ids=texts.ids,
            text_bytes=texts.text_bytes,
            textset_digest=texts.digest,
            convention="paper",
        )
    )
    assert store.matrix().models == ("a", "b")


def test_numbers_of_numpy_in_metadata_are_plain_ones():
    rows = [{"step": np.int64(3), "size": np.float32(0.5), "ok": np.True_, "f": "x"}, {"step": 4}]
    matrix = LogLikelihoodMatrix(["a", "b"], np.zeros((2, 1)), [1], rows)
    assert json.dumps(matrix.metadata) == (
        '[{"step": 3, "size": 0.5, "ok": true, "f": "x"}, {"step": 4}]'
    )
    assert type(rows[0]["step"]) is np.int64, "the caller's own stay as they are"


def test_what_is_not_known_of_a_matrix_is_empty():
    matrix = LogLikelihoodMatrix(["a", "b"], np.zeros((2, 1)), [1])
    assert matrix.metadata == ({}, {})
    assert matrix.dtypes == matrix.revisions == ("", "")
    assert matrix.ids is None
    assert matrix.groups is None


ROWS = np.arange(-6.0, 0.0).reshape(2, 3)


def broken(value):
    rows = ROWS.copy()
    rows[1, 2] = value
    return rows


@pytest.mark.parametrize(
    ("models", "values", "text_bytes", "more", "message"),
    [
        (["a", "a"], ROWS, [1, 1, 1], {}, "models must be unique, got a more than once"),
        (["a"], ROWS, [1, 1, 1], {}, r"\(models, texts\) = \(1, 3\), got \(2, 3\)"),
        (["a", "b"], ROWS, [1, 1], {}, r"\(models, texts\) = \(2, 2\), got \(2, 3\)"),
        (["a", "b"], ROWS.T, [1, 1, 1], {}, r"\(models, texts\) = \(2, 3\), got \(3, 2\)"),
        (["a", "b"], ROWS[0], [1, 1, 1], {}, r"\(models, texts\) = \(2, 3\), got \(3,\)"),
        ([], np.zeros((0, 3)), [1, 1, 1], {}, r"\(models, texts\) = \(0, 3\)"),
        (["a", "b"], np.zeros((2, 0)), [], {}, r"\(models, texts\) = \(2, 0\)"),
        (["a", "b"], ROWS, 972, {}, r"text_bytes must be one number a text, got shape \(\)"),
        (["a", "b"], ROWS, np.ones((3, 1)), {}, r"text_bytes must .* got shape \(3, 1\)"),
        (["a", "b"], ROWS, [1, math.nan, 1], {}, "text_bytes must be finite and at least 0"),
        (["a", "b"], ROWS, [1, -1, 1], {}, "text_bytes must be finite and at least 0"),
        (["a", "b"], broken(math.nan), [1] * 3, {}, "finite, got nan for model 'b', text 2"),
        (["a", "b"], broken(-math.inf), [1] * 3, {}, "finite, got -inf for model 'b', text 2"),
        (["a", "b"], ROWS, [1] * 3, {"metadata": [{}]}, r"metadata must be one a model \(2\)"),
        (["a", "b"], ROWS, [1] * 3, {"dtypes": ["x"] * 3}, r"dtypes must be one a model \(2\)"),
        (["a", "b"], ROWS, [1] * 3, {"revisions": ["x"]}, r"revisions must be one a model \(2\)"),
        (["a", "b"], ROWS, [1] * 3, {"ids": ["x"]}, r"ids must be one a text \(3\), got 1"),
        (["a", "b"], ROWS, [1] * 3, {"groups": ["x"] * 4}, r"groups must be one a text \(3\)"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(models, values, text_bytes, more, message):
    with pytest.raises(SpaceError, match=message) as caught:
        LogLikelihoodMatrix(models, values, text_bytes, **more)
    assert "\n" not in str(caught.value)


def test_names_that_repeat_are_found_at_once_among_many():
    name, compared = counting(str)
    models = [name(number // 2) for number in range(2000)]
    with pytest.raises(SpaceError, match="models must be unique, got 0, 1, 10, 100, "):
        LogLikelihoodMatrix(models, np.zeros((2000, 1)), [1])
    assert len(compared) < 100_000


# ------------------------------------------------------------------------------ KLEstimate


def test_an_estimate_prints_with_its_unit_and_interval():
    kl = KLEstimate(value=0.123456, standard_error=0.0123, interval=(0.1, 0.15))
    assert str(kl) == "0.1235 ± 0.012 bits/byte [0.1, 0.15]"
    assert float(kl) == 0.123456
    assert kl.confidence == 0.95


def test_an_estimate_scales_with_all_its_parts():
    kl = KLEstimate(
        value=2.0, standard_error=0.5, interval=(1.0, 4.0), unit="nats_per_text", confidence=0.9
    )
    scaled = kl.scaled(0.25, "bits_per_byte")
    assert (scaled.value, scaled.standard_error, scaled.interval) == (0.5, 0.125, (0.25, 1.0))
    assert (scaled.unit, scaled.confidence) == ("bits_per_byte", 0.9)
    assert kl.value == 2.0


def test_an_estimate_in_another_unit_is_refused():
    with pytest.raises(ValueError, match="bits_per_byte, nats_per_text, got 'nats'"):
        KLEstimate(value=1.0, standard_error=0.1, interval=(0.5, 2.0), unit="nats")


def test_some_models_and_texts_of_a_matrix_keep_what_is_known_of_them():
    values = np.arange(12.0).reshape(3, 4)
    matrix = make_matrix(
        values,
        groups=["a", "b", "c", "d"],
        metadata=[{"n": row} for row in range(3)],
        dtypes=["x", "y", "z"],
        revisions=["r", "s", "t"],
        text_bytes=np.array([1.0, 2.0, 3.0, 4.0]),
    )
    part = matrix.select([2, 0], [3, 1])
    np.testing.assert_array_equal(part.values, values[[2, 0]][:, [3, 1]])
    assert part.models == ("model 2", "model 0")
    assert part.metadata == ({"n": 2}, {"n": 0})
    assert (part.dtypes, part.revisions) == (("z", "x"), ("t", "r"))
    assert (part.ids, part.groups) == (("text 3", "text 1"), ("d", "b"))
    assert part.text_bytes.tolist() == [4, 2]
    assert (part.textset_digest, part.convention) == ("", "paper")
    assert matrix.select([1]).textset_digest == "texts"
    assert matrix.select().models == matrix.models
    bare = make_matrix(values, ids=None, groups=None)
    assert bare.select(texts=[0]).ids is None


def test_bits_per_byte_are_of_texts_whose_bytes_are_known():
    values = np.array([-100.0, -200.0, -400.0]) * np.log(2)
    result = make_result(loglikelihoods=values, text_bytes=np.array([50, 0, 100]))
    assert result.mean_bits_per_byte == pytest.approx(500 / 150)
    matrix = make_matrix(values[None], text_bytes=[50, 0, 100])
    np.testing.assert_allclose(matrix.bits_per_byte, 500 / 150)
    assert np.isnan(make_matrix(values[None], text_bytes=np.zeros(3)).bits_per_byte).all()

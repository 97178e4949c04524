"""Statistics of the softmax, whole and in slices, against fp64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from llfast.kernels import PartialLogprobs, dispatch, token_logprobs, token_statistics
from tests.heads import (
    STATISTICS,
    check_statistics,
    fp64_statistics,
    make_case,
    same_bytes,
)

SHAPES = ((1, 1, 1), (3, 127, 15), (7, 1025, 33), (98, 2051, 31), (5, 3000, 800), (2, 300, 1601))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_statistic_is_as_near_to_fp64_as_torch(shape, dtype, any_kernels):
    hidden, lm_head, targets = make_case(shape, dtype)
    logits = hidden.double() @ lm_head.double().T
    rounded = hidden.float() @ lm_head.float().T
    found = token_statistics(hidden, lm_head, targets)
    check_statistics(found, logits, rounded, targets)
    assert torch.equal(found.logprobs, token_logprobs(hidden, lm_head, targets))


def test_bias_scale_and_softcap(any_kernels):
    hidden, lm_head, targets = make_case((9, 1300, 40), torch.float32)
    bias = torch.randn(1300, generator=torch.Generator().manual_seed(3))
    bias[100:1100] = -math.inf
    targets[:] = 1200
    logits = 5.0 * torch.tanh((hidden.double() @ lm_head.double().T + bias) * 0.5 / 5.0)
    logits[:, 100:1100] = -5.0  # a softcap makes a number of -inf
    truth = fp64_statistics(logits, targets)
    found = token_statistics(hidden, lm_head, targets, bias=bias, scale=0.5, softcap=5.0)
    for name in STATISTICS[:-1]:
        torch.testing.assert_close(
            getattr(found, name).double(), truth[name], rtol=1e-6, atol=4e-6, msg=name
        )


def test_flat_and_certain_rows(any_kernels):
    hidden, lm_head, targets = torch.zeros(2, 8), torch.randn(1500, 8), torch.tensor([3, 1400])
    flat = token_statistics(hidden, lm_head, targets)
    log = torch.full((2,), math.log(1500))
    torch.testing.assert_close(flat.entropy, log, rtol=2e-7, atol=0)
    torch.testing.assert_close(flat.lse, log, rtol=2e-7, atol=0)
    assert flat.argmax.tolist() == [0, 0]
    bias = torch.full((1500,), -math.inf)
    bias[1400] = 0.0
    certain = token_statistics(hidden, lm_head, targets, bias=bias)
    assert certain.logprobs.tolist() == [-math.inf, 0.0]
    assert certain.target_logits.tolist() == [-math.inf, 0.0]
    assert certain.entropy.tolist() == [0.0, 0.0]
    assert certain.argmax.tolist() == [1400, 1400]


@pytest.mark.parametrize(
    "places", [(5, 6), (0, 127), (127, 128), (40, 72), (1, 1024), (1023, 2040)]
)
def test_the_first_of_the_largest_is_the_arg_max(places, any_kernels):
    lm_head = torch.zeros(2047, 4)
    lm_head[list(places)] = 1.0
    found = token_statistics(torch.ones(1, 4), lm_head, torch.tensor([0]))
    assert found.argmax.tolist() == [places[0]]


def test_a_nan_stays_in_its_row(dtype, any_kernels):
    hidden, lm_head, targets = make_case((20, 2100, 37), dtype)
    good = token_statistics(hidden, lm_head, targets)
    hidden[7, 3] = math.nan
    found = token_statistics(hidden, lm_head, targets)
    others = torch.arange(20) != 7
    for name in STATISTICS[:-1]:
        assert getattr(found, name)[7].isnan(), name
    for name in STATISTICS:
        assert torch.equal(getattr(found, name)[others], getattr(good, name)[others])


# ------------------------------------------------------------------------------------- in slices


def slices(hidden, lm_head, targets, cuts, **options):
    """The partial log-probabilities of the head cut at the given words."""
    bounds = [0, *cuts, len(lm_head)]
    return [
        one_slice(hidden, lm_head, targets, *pair, **options) for pair in itertools.pairwise(bounds)
    ]


def one_slice(hidden, lm_head, targets, begin, end, *, bias=None, **options):
    return PartialLogprobs.of_slice(
        hidden,
        lm_head[begin:end],
        targets,
        first_word=begin,
        bias=None if bias is None else bias[begin:end],
        **options,
    )


def merged(parts, order):
    """Neighbours merged two by two: `order` says which pair comes next."""
    parts = list(parts)
    for pair in order:
        parts[pair : pair + 2] = [parts[pair].merge(parts[pair + 1])]
    (whole,) = parts
    return whole


def orders(count):
    """Every order in which `count` slices can be merged."""
    return itertools.product(*(range(left) for left in range(count - 1, 0, -1)))


def test_every_cut_and_every_order_gives_the_bytes_of_one_call(dtype, any_kernels):
    hidden, lm_head, targets = make_case((13, 4500, 70), dtype)
    bias = torch.linspace(-2, 2, 4500)
    bias[1024:2048] = -math.inf
    hidden[5, 0] = math.nan
    options = {"bias": bias, "scale": 0.9}
    expected = token_statistics(hidden, lm_head, targets, **options)
    cuts = (1024, 2048, 3072, 4096)
    computed = {
        pair: one_slice(hidden, lm_head, targets, *pair, **options)
        for pair in itertools.combinations((0, *cuts, 4500), 2)
    }
    for count in range(5):
        for chosen in itertools.combinations(cuts, count):
            parts = [computed[pair] for pair in itertools.pairwise((0, *chosen, 4500))]
            for order in orders(len(parts)):
                found = merged(parts, order).statistics()
                assert same_bytes(found, expected), (chosen, order)


def test_a_slice_alone_is_a_softmax_over_its_words(any_kernels):
    hidden, lm_head, targets = make_case((6, 3000, 20), torch.float32)
    targets[:] = torch.tensor([0, 1023, 1024, 2047, 2048, 2999])
    _, middle, _ = slices(hidden, lm_head, targets, (1024, 2048))
    logits = hidden.double() @ lm_head[1024:2048].double().T
    truth = fp64_statistics(logits, targets.sub(1024).clamp(0, 1023))
    found = middle.statistics()
    inside = torch.tensor([False, False, True, True, False, False])
    torch.testing.assert_close(found.lse.double(), truth["lse"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), truth["entropy"], rtol=1e-6, atol=2e-6)
    assert torch.equal(found.argmax, truth["argmax"] + 1024)
    assert torch.isneginf(found.logprobs[~inside]).all()
    torch.testing.assert_close(
        middle.logprobs()[inside].double(), truth["logprobs"][inside], rtol=1e-6, atol=2e-6
    )
    sums = middle.folded()
    assert sums.shape == (1, 6)
    assert torch.isneginf(sums.target_logits[0, ~inside]).all()
    torch.testing.assert_close(sums.max[0].double(), logits.max(-1).values, rtol=1e-6, atol=1e-6)


def test_no_tokens(any_kernels):
    hidden, lm_head, targets = make_case((2, 1500, 8), torch.float32)
    none = token_statistics(hidden[:0], lm_head, targets[:0])
    assert [getattr(none, name).shape for name in STATISTICS] == [(0,)] * 5
    first, second = slices(hidden[:0], lm_head, targets[:0], (1024,))
    assert second.merge(first).logprobs().shape == (0,)


@pytest.mark.usefixtures("untyped")
def test_sums_that_no_kernel_made(any_kernels):
    hidden, lm_head, targets = make_case((3, 3000, 8), torch.float32)
    first, second = slices(hidden, lm_head, targets, (1024,))
    for name, value in {
        "argmax": second.sums.argmax.long(),
        "sum": second.sums.sum.double(),
        "weighted_sum": second.sums.weighted_sum[:, :2],
        "target_logits": second.sums.target_logits.to("meta"),
        "max": second.sums.max.T.contiguous().T,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be torch"):
            replace(second.sums, **{name: value})
    with pytest.raises(ValueError, match="1 parts for the words"):
        replace(first, sums=second.sums)
    with pytest.raises(ValueError, match="2 parts for the words"):
        replace(second, sums=first.sums)


def test_sums_are_folded_by_what_computed_them(monkeypatch):
    hidden, lm_head, targets = make_case((3, 3000, 8), torch.float32)
    monkeypatch.setenv("LLFAST_ISA", "portable")
    first, second = slices(hidden, lm_head, targets, (1024,))
    monkeypatch.setattr(dispatch.cpu, "native", lambda: None)
    with pytest.raises(ValueError, match="computed them, portable, got torch"):
        first.merge(second)
    with pytest.raises(ValueError, match="computed them, portable, got torch"):
        second.statistics()


def test_what_cannot_be_merged(monkeypatch):
    hidden, lm_head, targets = make_case((3, 3000, 8), torch.float32)
    first, second, third = slices(hidden, lm_head, targets, (1024, 2048))
    with pytest.raises(ValueError, match=r"neighbours, .* \[0, 1024\) and \[2048, 3000\)"):
        third.merge(first)
    with pytest.raises(ValueError, match="neighbours"):
        first.merge(first)
    after_the_end = PartialLogprobs.of_slice(hidden, lm_head[:9], targets, first_word=3072)
    with pytest.raises(ValueError, match="neighbours"):
        third.merge(after_the_end)
    fewer = PartialLogprobs.of_slice(hidden[:2], lm_head[1024:2048], targets[:2], first_word=1024)
    with pytest.raises(ValueError, match="same tokens, got 3 and 2"):
        first.merge(fewer)
    monkeypatch.setattr(dispatch.cpu, "native", lambda: None)
    by_torch = PartialLogprobs.of_slice(hidden, lm_head[1024:2048], targets, first_word=1024)
    with pytest.raises(ValueError, match="computed alike, got .* and torch on cpu"):
        first.merge(by_torch)
    assert by_torch.kernel == "torch" != second.kernel


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("first_word", [-1024, 1, 1000, 2**31])
def test_where_a_slice_may_begin(first_word):
    hidden, lm_head, targets = make_case((3, 30, 8), torch.float32)
    with pytest.raises(ValueError, match="first_word must be a multiple of 1024"):
        PartialLogprobs.of_slice(hidden, lm_head, targets, first_word=first_word)
    for no_number in (None, 1024.0):
        with pytest.raises(TypeError, match="integer"):
            PartialLogprobs.of_slice(hidden, lm_head, targets, first_word=no_number)
    with pytest.raises(ValueError, match="targets must lie in"):
        PartialLogprobs.of_slice(hidden, lm_head, targets - 100, first_word=1024)

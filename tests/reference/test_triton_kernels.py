"""What is Triton's own, in its interpreter: schedules, slices of T, refused targets, layouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llfast.kernels import (
    PartialLogprobs,
    cuda,
    dispatch,
    reference,
    token_logprobs,
    token_statistics,
    triton_head,
    tuning,
)
from llfast.kernels.inputs import LAST_WORD, HeadInputs
from tests.heads import INTERPRETED, force, make_case, same_bytes

if not INTERPRETED:
    pytest.skip("runs where LLFAST_REQUIRE_GPU is not set", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaNs
HALF = torch.float16  # the interpreter cannot multiply in bf16


@pytest.fixture(params=INTERPRETED)
def interpreted(request, monkeypatch):
    force(request.param, monkeypatch)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """(name, grid, options) of all kernels launched."""
    found = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                found.append((self.name, grid, options))
                return getattr(triton_head, self.name)[grid](*arguments, **options)

            return launch

    class Kernels:
        TensorDescriptor = triton_head.TensorDescriptor

        def __getattr__(self, name):
            return Kernel(name)

    monkeypatch.setattr(cuda, "_kernels", Kernels)
    return found


def head_launches(launches, option):
    return [options[option] for name, _, options in launches if name == "head_partials_kernel"]


def uses_tma(launches):
    return head_launches(launches, "HAS_TMA")


def test_rows_have_the_same_bits_in_every_schedule(interpreted, launches):
    """At 64 tokens sm_90 goes from one schedule to the other."""
    hidden, lm_head, targets = make_case((150, 2500, 72), HALF)
    bias = torch.linspace(-1, 1, 2500)
    expected = token_statistics(hidden, lm_head, targets, bias=bias, softcap=20.0)
    for rows in (slice(0, 1), slice(3, 67), slice(2, 67), slice(149, 150), slice(20, 149)):
        found = token_statistics(hidden[rows], lm_head, targets[rows], bias=bias, softcap=20.0)
        part = type(found)(**{name: getattr(expected, name)[rows] for name in found.__slots__})
        assert same_bytes(found, part), rows
    tiles = {
        (options["BLOCK_T"], options["BLOCK_V"])
        for name, _, options in launches
        if name == "head_partials_kernel"
    }
    assert tiles == ({(64, 256), (128, 256)} if "90" in interpreted else {(128, 128)})
    assert set(uses_tma(launches)) == {"90" in interpreted}


def test_log_probabilities_alone_have_the_bits_of_all_statistics(interpreted, launches):
    """Flat and peaked rows, a NaN, an infinity, and chunks in which every word is ruled out."""
    hidden, lm_head, targets = make_case((70, 1300, 24), HALF)
    hidden[1], hidden[2] = 0, hidden[2] * 60
    hidden[3, 0], hidden[4, 0] = torch.nan, torch.inf
    bias = torch.zeros(1300)
    bias[:300] = -torch.inf
    for options in ({}, {"bias": bias}, {"softcap": 5.0}):
        alone = token_logprobs(hidden, lm_head, targets, **options)
        assert head_launches(launches, "ONLY_LOGPROBS") == [True]
        launches.clear()
        found = token_statistics(hidden, lm_head, targets, **options)
        assert head_launches(launches, "ONLY_LOGPROBS") == [False]
        launches.clear()
        assert torch.equal(alone.view(torch.int32), found.logprobs.view(torch.int32))
        assert not found.logprobs.isnan().all()


@pytest.mark.parametrize("multiprocessors", [1, 4, 1000])
def test_programs_share_the_tiles_and_panels_change_no_bit(
    multiprocessors, interpreted, launches, monkeypatch
):
    """Panels of at most three of the five tiles, the last of which is not full."""
    hidden, lm_head, targets = make_case((530, 1300, 24), HALF)
    expected = token_logprobs(hidden, lm_head, targets)
    chip = replace(INTERPRETED[interpreted], multiprocessors=multiprocessors)
    monkeypatch.setattr(cuda, "chip_of", lambda _: chip)
    rows = {
        key: replace(row, many=replace(row.many, panel=3)) for key, row in tuning.SCHEDULES.items()
    }
    monkeypatch.setattr(tuning, "SCHEDULES", rows)
    launches.clear()
    assert torch.equal(token_logprobs(hidden, lm_head, targets), expected)
    (_, grid, options) = launches[0]
    tiles = -(-530 // options["BLOCK_T"]) * -(-1300 // options["BLOCK_V"])
    assert grid == (min(multiprocessors, tiles),)


def test_panels_are_evenly_full():
    assert [cuda._panel_tiles(tiles, 16) for tiles in (1, 16, 17, 36, 64)] == [1, 16, 9, 12, 16]


def test_slices_of_t_change_no_bit(interpreted, launches, monkeypatch):
    hidden, lm_head, targets = make_case((300, 1100, 16), HALF)
    expected = token_statistics(hidden, lm_head, targets)
    monkeypatch.setattr(cuda, "_WORKSPACE_BYTES", 1)
    launches.clear()
    assert same_bytes(token_statistics(hidden, lm_head, targets), expected)
    assert [name for name, _, _ in launches].count("head_partials_kernel") == 3  # of 128 rows


@pytest.mark.parametrize("vocabulary", [1, 50257, 128256, 256000])
def test_partial_sums_stay_below_64_mib(vocabulary, interpreted):
    for dtype in (torch.float32, HALF):
        inputs = HeadInputs(
            hidden=torch.zeros(1, 8, dtype=dtype),
            lm_head=torch.zeros(1, 8, dtype=dtype).expand(vocabulary, -1),
            targets=torch.zeros(1, dtype=torch.int64),
            bias=None,
            scale=1.0,
            softcap=None,
        )
        block_v = tuning.schedules_of(INTERPRETED[interpreted].capability, dtype).many.block_v
        parts = -(-vocabulary // block_v) + -(-vocabulary // 1024)
        for tokens in (1, 1000, 32_768):
            many = replace(
                inputs,
                hidden=inputs.hidden.expand(tokens, -1),
                targets=inputs.targets.expand(tokens),
            )
            rows = cuda.rows_of_a_slice(many)
            assert rows % 128 == 0
            assert rows * parts * 20 <= 60 << 20
            slices = -(-tokens // rows)
            assert slices == 1 or rows * slices - tokens < 128 * slices  # evenly many
            assert slices == 1 or (rows + 128) * slices * parts * 20 > 40 << 20


LAYOUTS = {
    "rows apart": (lambda matrix: torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]], True),
    "rows apart by 36 bytes": (
        lambda matrix: torch.nn.functional.pad(matrix, (0, 2))[:, : matrix.shape[1]],
        False,
    ),
    "an address between": (
        lambda matrix: torch.nn.functional.pad(matrix, (1, 7))[:, 1 : matrix.shape[1] + 1],
        False,
    ),
    "columns first": (lambda matrix: matrix.T.contiguous().T, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_descriptors_where_the_layout_allows(name, interpreted, launches):
    hidden, lm_head, targets = make_case((70, 300, 16), HALF)
    expected = token_logprobs(hidden, lm_head, targets)
    change, allowed = LAYOUTS[name]
    assert torch.equal(token_logprobs(hidden, change(lm_head), targets), expected)
    assert torch.equal(token_logprobs(change(hidden), lm_head, targets), expected)
    tma = "90" in interpreted
    assert uses_tma(launches) == [tma, tma and allowed, tma and allowed]


@pytest.mark.parametrize("kernels", ["interpreted", "twin"])
@pytest.mark.parametrize("bad", [-1, -(2**40), 1100, 2**31 + 5, 2**40])
def test_targets_that_do_not_exist_are_nan(kernels, bad, interpreted):
    """On CUDA they are not looked at before the call; here that check is passed by."""
    hidden, lm_head, targets = make_case((5, 1100, 16), torch.float32)
    good = token_statistics(hidden, lm_head, targets)
    targets[3] = bad
    inputs = HeadInputs(
        hidden=hidden, lm_head=lm_head, targets=targets, bias=None, scale=1.0, softcap=None
    )
    chosen = {"interpreted": cuda, "twin": reference}[kernels]
    found = dispatch.statistics(chosen, dispatch.folded_sums(chosen, inputs))
    assert found.logprobs[3].isnan()
    assert found.target_logits[3].isnan()
    others = torch.arange(5) != 3
    torch.testing.assert_close(found.logprobs[others], good.logprobs[others])
    torch.testing.assert_close(found.lse, good.lse)


def test_a_slice_takes_targets_of_others_but_no_negative_ones(interpreted):
    hidden, lm_head, targets = make_case((4, 2100, 16), torch.float32)
    targets[:] = torch.tensor([5, 1500, -3, LAST_WORD])
    parts = []
    for first in (0, 1024, 2048):
        inputs = HeadInputs(
            hidden=hidden,
            lm_head=lm_head[first : first + 1024],
            targets=targets,
            bias=None,
            scale=1.0,
            softcap=None,
            first_word=first,
        )
        sums = cuda.partial_sums(inputs, slice(0, 4))
        end = first + len(inputs.lm_head)
        parts.append(PartialLogprobs(first_word=first, end_word=end, kernel=interpreted, sums=sums))
    logprobs = parts[0].merge(parts[1]).merge(parts[2]).logprobs()
    logits = hidden.double() @ lm_head.double().T
    truth = logits.log_softmax(-1)[[0, 1], [5, 1500]]
    torch.testing.assert_close(logprobs[:2].double(), truth, rtol=0, atol=4e-6)
    assert logprobs[2].isnan()
    assert logprobs[3] == -torch.inf


def test_sums_on_another_device():
    hidden, lm_head, targets = make_case((4, 2100, 16), torch.float32)
    part = PartialLogprobs.of_slice(hidden, lm_head, targets, first_word=0)
    moved = part.to("meta")
    assert moved.sums.max.device.type == "meta"
    assert moved.end_word == part.end_word


def test_tanh_is_within_4_ulp():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, triton_head.tanh(tl.load(x_ptr + offs)))

    count = 1 << 16
    x = torch.cat([torch.linspace(-12, 12, count // 2), torch.logspace(-30, 1, count // 2)])
    y = torch.empty_like(x)
    kernel[(1,)](x, y, BLOCK=count)
    truth = np.tanh(x.double().numpy())
    error = np.abs(y.double().numpy() - truth) / np.spacing(np.abs(truth).astype(np.float32))
    assert error.max() <= 4

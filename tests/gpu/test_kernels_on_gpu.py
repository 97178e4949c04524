"""The compiled Triton kernels against fp64, on a GPU."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings

import pytest
import torch

from llfast.bench.truth import gpu_roundings
from llfast.kernels import (
    PartialLogprobs,
    cuda,
    instruction_set,
    token_logprobs,
    token_statistics,
)
from llfast.kernels.tuning import schedules_of
from tests.heads import (
    DTYPES,
    STATISTICS,
    check_logprobs,
    check_statistics,
    fp32_products,
    fp64_logits,
    make_case,
    same_bytes,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = (  # (T, V, D): around each block of the kernel, and wide
    (1, 1, 1),
    (1, 5, 3),
    (6, 4, 16),
    (3, 127, 15),
    (63, 255, 64),
    (64, 256, 64),
    (65, 257, 65),
    (129, 1025, 72),
    (97, 2051, 31),
    (300, 3000, 768),
    (13, 50257, 768),
    (200, 5003, 4096),
)
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.0625},
    "negative scale": {"scale": -1.5},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "scale": 0.3, "softcap": 30.0},
}


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def options_of(name, vocabulary):
    options = dict(OPTIONS[name])
    if options.pop("bias", False):
        random = torch.Generator().manual_seed(5)
        options["bias"] = (torch.randn(vocabulary, generator=random) * 2).to(DEVICE)
    return options


def part_of(statistics, rows):
    return type(statistics)(**{name: getattr(statistics, name)[rows] for name in STATISTICS})


def test_triton_runs():
    """Or all that follows would say something of the twin."""
    assert cuda.why_unusable(torch.device(DEVICE)) is None
    assert instruction_set(DEVICE).startswith("triton sm_")


# ----------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_as_near_to_fp64_as_torch(shape, dtype):
    case = make_case(shape, dtype, device=DEVICE)
    check_logprobs(token_logprobs, *case)
    hidden, lm_head, targets = case
    logits = hidden.double() @ lm_head.double().T
    rounded = fp32_products(hidden, lm_head)
    roundings = gpu_roundings(hidden.device, dtype, shape[2])
    check_statistics(token_statistics(*case), logits, rounded, targets, roundings)


@pytest.mark.parametrize("shape", [(7, 129, 33), (150, 1100, 64), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_bias_scale_and_softcap(shape, name, dtype):
    case = make_case(shape, dtype, device=DEVICE)
    check_logprobs(token_logprobs, *case, **options_of(name, shape[1]))


def test_peaked_and_flat_rows(dtype):
    hidden, lm_head, _ = make_case((6, 1500, 24), dtype, spread=60.0, device=DEVICE)
    best = (hidden.double() @ lm_head.double().T).argmax(1)
    check_logprobs(token_logprobs, hidden, lm_head, best)
    assert (token_logprobs(hidden, lm_head, best) <= 0).all()
    check_logprobs(token_logprobs, hidden, lm_head, torch.full_like(best, 1499))
    flat = token_statistics(torch.zeros_like(hidden), lm_head, best)
    expected = torch.full((6,), math.log(1500), device=DEVICE)
    torch.testing.assert_close(flat.entropy, expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(-flat.logprobs, expected, rtol=2e-7, atol=0)
    check_logprobs(token_logprobs, -hidden.abs(), lm_head.abs(), best)


@pytest.mark.parametrize("ruled_out", [(0, 1), (0, 256), (0, 1024), (100, 1300), (1, 1400)])
def test_words_ruled_out_by_the_bias(ruled_out):
    hidden, lm_head, targets = make_case((8, 1400, 20), torch.float32, device=DEVICE)
    targets[0], targets[1] = 0, 1399
    bias = torch.zeros(1400, device=DEVICE)
    bias[slice(*ruled_out)] = -math.inf
    check_logprobs(token_logprobs, hidden, lm_head, targets, bias=bias)
    targets[:] = ruled_out[0]
    assert (token_logprobs(hidden, lm_head, targets, bias=bias) == -math.inf).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_nan_and_harms_no_other(value, dtype):
    hidden, lm_head, targets = make_case((100, 2100, 72), dtype, device=DEVICE)
    good = token_statistics(hidden, lm_head, targets)
    hidden[7, 3] = value
    found = token_statistics(hidden, lm_head, targets)
    assert found.logprobs[7].isnan()
    others = torch.arange(100, device=DEVICE) != 7
    assert same_bytes(part_of(found, others), part_of(good, others))


@pytest.mark.parametrize("shape", [(65, 257, 8), (150, 2100, 72), (300, 5003, 4096)], ids=str)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_specialised_warps_change_no_bit(shape, name, monkeypatch):
    case, options = make_case(shape, torch.bfloat16, device=DEVICE), options_of(name, shape[1])
    capability = torch.cuda.get_device_capability()
    # Other chips have one kernel for many tokens, and nothing to compare it with.
    if schedules_of(capability, torch.bfloat16).specialised is None:
        pytest.skip(f"runs on sm_90, this is {capability}")
    assert cuda._specialised_kernels() is not None
    found = token_statistics(*case, **options)
    monkeypatch.setattr(cuda, "_specialised_kernels", lambda: None)
    assert same_bytes(token_statistics(*case, **options), found)


@pytest.mark.parametrize("tokens", [50, 300])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_log_probabilities_alone_have_the_bits_of_all_statistics(tokens, name):
    hidden, lm_head, targets = make_case((tokens, 2100, 72), torch.bfloat16, device=DEVICE)
    hidden[1], hidden[2] = 0, hidden[2] * 60
    hidden[3, 0], hidden[4, 0] = math.nan, math.inf
    options = options_of(name, 2100)
    alone = token_logprobs(hidden, lm_head, targets, **options)
    found = token_statistics(hidden, lm_head, targets, **options).logprobs
    assert torch.equal(alone.view(torch.int32), found.view(torch.int32))


@pytest.mark.parametrize("bad", [-1, 1100, 2**31 + 5])
def test_targets_that_do_not_exist_are_nan(bad):
    hidden, lm_head, targets = make_case((5, 1100, 16), torch.float32, device=DEVICE)
    good = token_logprobs(hidden, lm_head, targets)
    targets[3] = bad
    found = token_logprobs(hidden, lm_head, targets)
    assert found[3].isnan()
    others = torch.arange(5, device=DEVICE) != 3
    assert torch.equal(found[others], good[others])


# ------------------------------------------------------------------------- same bits every time


@pytest.mark.parametrize("width", [64, 72, 37, 4096])
def test_rows_have_the_same_bits_whatever_is_beside_them(width, dtype):
    tokens, vocabulary = 700, 5003
    hidden, lm_head, targets = make_case((tokens, vocabulary, width), dtype, device=DEVICE)
    options = {"bias": torch.linspace(-1, 1, vocabulary, device=DEVICE), "softcap": 20.0}
    expected = token_statistics(hidden, lm_head, targets, **options)
    for _ in range(3):
        assert same_bytes(token_statistics(hidden, lm_head, targets, **options), expected)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    shuffled = token_statistics(hidden[order], lm_head, targets[order], **options)
    assert same_bytes(shuffled, part_of(expected, order))
    for begin, end in ((0, 1), (3, 67), (2, 67), (699, 700), (20, 148), (7, 600)):
        rows = slice(begin, end)
        found = token_statistics(hidden[rows], lm_head, targets[rows], **options)
        assert same_bytes(found, part_of(expected, rows)), (begin, end)


def test_descriptors_and_pointers_give_the_same_bits(dtype):
    hidden, lm_head, targets = make_case((200, 3001, 264), dtype, device=DEVICE)
    expected = token_statistics(hidden, lm_head, targets)
    padded = torch.nn.functional.pad(lm_head, (1, 2))[:, 1:-2]
    assert same_bytes(token_statistics(hidden, padded, targets), expected)
    columns_first = lm_head.T.contiguous().T
    assert same_bytes(token_statistics(hidden, columns_first, targets), expected)
    assert same_bytes(token_statistics(hidden.T.contiguous().T, lm_head, targets), expected)


def test_slices_of_t_change_no_bit(monkeypatch, dtype):
    hidden, lm_head, targets = make_case((1000, 3000, 64), dtype, device=DEVICE)
    expected = token_statistics(hidden, lm_head, targets)
    monkeypatch.setattr(cuda, "_WORKSPACE_BYTES", 1)
    assert same_bytes(token_statistics(hidden, lm_head, targets), expected)


def test_every_cut_gives_the_bytes_of_one_call(dtype):
    hidden, lm_head, targets = make_case((100, 4500, 72), dtype, device=DEVICE)
    expected = token_statistics(hidden, lm_head, targets)
    for count in range(5):
        for cuts in itertools.combinations((1024, 2048, 3072, 4096), count):
            parts = [
                PartialLogprobs.of_slice(hidden, lm_head[begin:end], targets, first_word=begin)
                for begin, end in itertools.pairwise((0, *cuts, 4500))
            ]
            while len(parts) > 1:  # from the right, so that groups are kept apart
                parts[-2:] = [parts[-2].merge(parts[-1])]
            assert same_bytes(parts[0].statistics(), expected), cuts


# ------------------------------------------------------------------------------ as it is called


def test_heads_of_more_than_2_to_the_31_numbers():
    width, vocabulary = 8192, 2**31 // 8192 + 300
    random = torch.Generator(DEVICE).manual_seed(0)
    lm_head = torch.zeros(vocabulary, width, dtype=torch.bfloat16, device=DEVICE)
    lm_head[-5:] = torch.randn(5, width, generator=random, device=DEVICE).bfloat16() / 90
    hidden = torch.randn(3, width, generator=random, device=DEVICE).bfloat16()
    targets = torch.tensor([vocabulary - 1, vocabulary - 3, 0], device=DEVICE)
    last = fp64_logits(hidden.double() @ lm_head[-5:].double().T)
    logits = torch.cat([torch.zeros(3, 1, dtype=torch.float64, device=DEVICE), last], 1)
    weights = torch.tensor([vocabulary - 5] + [1] * 5, dtype=torch.float64, device=DEVICE)
    lse = (logits.exp() * weights).sum(1).log()
    truth = torch.stack([last[0, 4], last[1, 2], last.new_zeros(())]) - lse
    for head in (lm_head, torch.nn.functional.pad(lm_head, (0, 1))[:, :-1]):
        found = token_logprobs(hidden, head, targets)
        # 512 sums that are cut off, of logits of about 1: 1e-5 is what that is expected to come to.
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)
        del head


def test_memory_does_not_grow_with_the_logits():
    """They would take 16 GiB."""
    hidden, lm_head, targets = make_case((32_768, 128_256, 64), torch.bfloat16, device=DEVICE)
    token_logprobs(hidden[:200], lm_head, targets[:200])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logprobs(hidden, lm_head, targets)
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20


def test_no_tokens_no_gradient_and_inference_mode():
    hidden, lm_head, targets = make_case((70, 1500, 64), torch.bfloat16, device=DEVICE)
    expected = token_statistics(hidden, lm_head, targets)
    assert token_logprobs(hidden[:0], lm_head, targets[:0]).shape == (0,)
    parameter = torch.nn.Parameter(lm_head)
    found = token_statistics(hidden.requires_grad_(), parameter, targets.int())
    assert same_bytes(found, expected)
    assert not found.logprobs.requires_grad
    with torch.inference_mode():
        assert same_bytes(token_statistics(hidden, lm_head, targets), expected)


def test_the_current_stream_is_used():
    """A long wait there keeps the input from being there for any other stream."""
    hidden, lm_head, targets = make_case((70, 1500, 64), torch.bfloat16, device=DEVICE)
    expected = token_logprobs(hidden, lm_head, targets)
    late = torch.zeros_like(hidden)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(hidden)
        found = token_logprobs(late, lm_head, targets)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_nothing_waits_for_the_device():
    hidden, lm_head, targets = make_case((300, 1500, 64), torch.bfloat16, device=DEVICE)
    bias = torch.zeros(1500, device=DEVICE)
    token_statistics(hidden, lm_head, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            token_statistics(hidden, lm_head, targets, bias=bias)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs():
    hidden, lm_head, targets = make_case((70, 1500, 64), torch.bfloat16, device=DEVICE)
    expected = token_logprobs(hidden, lm_head, targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = token_logprobs(hidden, lm_head, targets)
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)


COMPILED = """
import torch
from llfast.kernels import token_logprobs

def function(*case):
    return token_logprobs(*case) * 2

case = [
    torch.randn(70, 64, device="cuda"), torch.randn(1500, 64, device="cuda"),
    torch.arange(70, device="cuda"),
]
assert torch.equal(torch.compile(function, fullgraph=True)(*case), function(*case))
"""


def test_torch_compile():
    """Without the run-time types of tests, which torch cannot trace."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=120)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; runs where there are two")
    case = make_case((70, 1500, 64), torch.bfloat16, device="cuda:1")
    here = [each.to("cuda:0") for each in case]
    assert torch.equal(token_logprobs(*case).cpu(), token_logprobs(*here).cpu())
    parts = [
        PartialLogprobs.of_slice(*place, first_word=first)
        for place, first in (
            ((here[0], here[1][:1024], here[2]), 0),
            ((case[0], case[1][1024:], case[2]), 1024),
        )
    ]
    merged = parts[0].merge(parts[1].to("cuda:0"))
    assert torch.equal(merged.logprobs(), token_logprobs(*here))

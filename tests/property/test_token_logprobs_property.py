"""The fused output head over drawn shapes, strides and options."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llfast import _native
from llfast.kernels import cpu, token_logprobs

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 1023, 1024, 1025, 1153]))


@st.composite
def strided(draw, rows, width, dtype, random):
    """Small exact numbers in a matrix that is a slice of a wider one, in one of two orders."""
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    step = draw(st.integers(1, 2))
    whole = torch.randint(-8, 9, (rows * step, before + width + after), generator=random)
    matrix = (whole.to(dtype) / 8)[::step, before : before + width]
    return matrix.T.contiguous().T if draw(st.booleans()) else matrix


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, vocabulary, width = draw(st.integers(1, 60)), draw(SIZES), draw(SIZES)
    hidden = draw(strided(tokens, width, dtype, random))
    lm_head = draw(strided(vocabulary, width, dtype, random))
    targets = torch.randint(vocabulary, (tokens,), generator=random)
    bias = torch.randn(vocabulary, generator=random) if draw(st.booleans()) else None
    scale = draw(st.sampled_from([1.0, -0.5, 0.125]))
    softcap = draw(st.sampled_from([None, 3.0]))
    return hidden, lm_head, targets, {"bias": bias, "scale": scale, "softcap": softcap}


@settings(max_examples=80, deadline=None)
@given(case=cases(), name=st.sampled_from(_native.available_instruction_sets()), data=st.data())
def test_right_and_the_same_for_any_rows_and_threads(case, name, data):
    hidden, lm_head, targets, options = case
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(targets) - 1), min_size=1)))
    threads = torch.get_num_threads()
    chosen = cpu.os.environ.get("LLFAST_ISA")
    cpu.os.environ["LLFAST_ISA"] = name
    try:
        found = token_logprobs(hidden, lm_head, targets, **options)
        torch.set_num_threads(data.draw(st.integers(1, 8)))
        again = token_logprobs(hidden[rows], lm_head.contiguous(), targets[rows], **options)
    finally:
        torch.set_num_threads(threads)
        cpu.os.environ.pop("LLFAST_ISA")
        if chosen is not None:
            cpu.os.environ["LLFAST_ISA"] = chosen
    assert torch.equal(again, found[rows])

    # The products are exact in fp32 (multiples of 1/64 below 2**11), so torch adds no error here.
    logits = hidden.double() @ lm_head.double().T
    logits = (logits if options["bias"] is None else logits + options["bias"]) * options["scale"]
    if options["softcap"] is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    truth = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    limit = 4 * 2**-23 * max(1.0, logits.abs().max().item())
    assert (found - truth).abs().max() <= limit

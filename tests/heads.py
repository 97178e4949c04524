"""Output heads to try kernels on, the truth about them, and a way to choose the kernels."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import fields

import numpy as np
import torch

from llfast.bench.truth import gpu_roundings
from llfast.kernels import TokenStatistics, cuda, dispatch, instruction_set

try:
    from llfast import _native
except ImportError:  # a GPU machine may run tests/gpu without the C++ module
    SETS = []
else:
    SETS = _native.available_instruction_sets()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATISTICS = [field.name for field in fields(TokenStatistics)]
# By the way hidden states and heads are loaded; three programs share the tiles.
INTERPRETED = {
    "triton sm_80": cuda.Chip(capability=(8, 0), multiprocessors=3),
    "triton sm_90": cuda.Chip(capability=(9, 0), multiprocessors=3),
}
if "TRITON_INTERPRET" not in os.environ:  # conftest.py says when
    INTERPRETED = {}
# Added to twice the error of same-dtype torch: so many fp32 roundings (2**-24, relative) of the
# largest logit or result, which no fp32 arithmetic avoids; on a GPU those of `gpu_roundings`, too.
FLOOR_ROUNDINGS = {"plain": 2, "softcap": 4, "statistics": 4}


def force(name, monkeypatch):
    """Let tensors on the CPU be served by an instruction set, the twin, or interpreted Triton."""
    if name in SETS:
        monkeypatch.setenv("LLFAST_ISA", name)
    else:
        monkeypatch.setattr(dispatch.cpu, "native", lambda: None)
    if name in INTERPRETED:
        mend_interpreter(monkeypatch)
        monkeypatch.setattr(dispatch, "reference", cuda)
        monkeypatch.setattr(cuda, "chip_of", lambda _: INTERPRETED[name])
        monkeypatch.setattr(cuda, "on_device", lambda _: contextlib.nullcontext())
    assert instruction_set() == name


def mend_interpreter(monkeypatch):
    """One order of products, and integers that numpy 2.4 lets Triton 3.6 have."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        # Triton 3.6 takes int() of an array of one number, which has an axis.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _multiply)


def _multiply(_, a, b, added, *__):
    """The interpreter's product, row by row and in one layout, on which bits of numpy's depend."""
    from triton.runtime.interpreter import TensorHandle

    kind = added.data.dtype
    rows, right = (each.data.astype(kind, order="C") for each in (a, b))
    products = np.matmul(rows[:, None], right)[:, 0]
    return TensorHandle(products + added.data, added.dtype.scalar)


def make_case(shape, dtype, seed=0, spread=3.0, device="cpu"):
    """Hidden states, head and targets whose logits have a standard deviation of `spread`."""
    tokens, vocabulary, width = shape
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=random) * spread
    lm_head = torch.randn(vocabulary, width, generator=random) / math.sqrt(width)
    targets = torch.randint(vocabulary, (tokens,), generator=random)
    return hidden.to(dtype).to(device), lm_head.to(dtype).to(device), targets.to(device)


def fp32_products(hidden, lm_head):
    """torch's product with sums and results in fp32, by tensor cores where it would use them."""
    if hidden.device.type == "cuda" and hidden.dtype != torch.float32:
        return torch.mm(hidden, lm_head.T, out_dtype=torch.float32)
    return hidden.float() @ lm_head.float().T


def fp64_logits(products, bias=None, scale=1.0, softcap=None):
    logits = products.double()
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def fp64_statistics(logits, targets):
    """By torch, from logits in fp64."""
    logprobs = logits.log_softmax(-1)
    columns = targets.long()[:, None]
    return {
        "logprobs": logprobs.gather(1, columns)[:, 0],
        "lse": logits.logsumexp(-1),
        "target_logits": logits.gather(1, columns)[:, 0],
        "entropy": -(logprobs.exp() * logprobs.clamp(min=-1e300)).sum(-1),
        "argmax": logits.argmax(-1),
    }


def same_bytes(found, expected):
    """If two TokenStatistics are the same, NaNs included."""
    pairs = [(getattr(found, name), getattr(expected, name)) for name in STATISTICS]
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def check_logprobs(function, hidden, lm_head, targets, **options):
    """`function` errs at most twice as much as torch's product in fp32 and fp64 from there on."""
    logits = fp64_logits(hidden.double() @ lm_head.double().T, **options)
    rounded = fp64_logits(fp32_products(hidden, lm_head), **options)
    columns = targets.long()[:, None]
    truth = logits.log_softmax(-1).gather(1, columns)[:, 0]
    oracle = rounded.log_softmax(-1).gather(1, columns)[:, 0]
    found = function(hidden, lm_head, targets, **options)
    assert found.dtype == torch.float32
    assert found.shape == targets.shape
    finite = truth.isfinite()
    assert torch.equal(found[~finite].nan_to_num(), truth[~finite].float().nan_to_num())
    assert torch.equal(found.isnan(), truth.isnan())
    numbers = torch.cat([logits.flatten(), truth]).abs()
    largest = numbers[numbers.isfinite()].amax().item()
    roundings = FLOOR_ROUNDINGS["softcap" if options.get("softcap") else "plain"]
    roundings += gpu_roundings(hidden.device, hidden.dtype, hidden.shape[1])
    floor = roundings * largest * 2**-24
    error = (found - truth)[finite].abs()
    limit = 2 * (oracle - truth)[finite].abs().max() + floor if finite.any() else 0
    assert (error <= limit).all(), f"off by {error.max():.2e}, limit {limit:.2e}"


def check_statistics(found, logits, rounded, targets, roundings=0):
    """Every statistic errs at most twice as much as that of `rounded`, torch's logits in fp32.

    And so many roundings, besides those of all arithmetic; see `gpu_roundings`.
    """
    truth = fp64_statistics(logits, targets)
    oracle = fp64_statistics(rounded.double(), targets)
    roundings += FLOOR_ROUNDINGS["statistics"]
    floor = roundings * max(logits.abs().max().item(), math.log(logits.shape[1]), 1e-6) * 2**-24
    for name in STATISTICS[:-1]:
        error = (getattr(found, name) - truth[name]).abs().max().item()
        limit = 2 * (oracle[name] - truth[name]).abs().max().item() + floor
        assert error <= limit, (name, error, limit)
    # What fp32 cannot tell apart may win.
    best = logits.max(-1).values - logits.gather(1, found.argmax[:, None])[:, 0]
    assert best.max() <= floor

"""Fused output heads: log-probabilities from hidden states, without the (T, V) logits.

`cpu` runs C++ from `csrc/`; tensors on other devices take `reference`, the plain-torch twin.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from . import cpu, reference
from .cpu import instruction_set

__all__ = ["instruction_set", "token_logprobs"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FP32 = torch.finfo(torch.float32)


def token_logprobs(
    hidden: Float[Tensor, "T D"],
    lm_head: Float[Tensor, "V D"],
    targets: Int[Tensor, " T"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float32[Tensor, " T"]:
    """Log-probability of each target token, without the (T, V) logits.

    A logit is `z = scale * (hidden @ lm_head.T + bias)`, then `softcap * tanh(z / softcap)`. Equals
    the log-softmax of the logits over V, gathered at `targets`; products and sums are fp32, and no
    logit is rounded below it. There is no gradient.

    Args:
        hidden: fp32, bf16 or fp16. Rows may have any stride; so may those of `lm_head`.
        lm_head: of the same dtype as `hidden`.
        targets: int64 or int32.
        bias: in any floating dtype; `-inf` takes a word out of the softmax.
        scale: a factor on the logits, finite in fp32.
        softcap: positive and finite in fp32; None for no cap.

    Returns: nats, in fp32. On a CPU the bits of a row depend on that row, the head, the dtype and
        `instruction_set()`, but neither on the other rows nor on the number of threads. A row with
        a NaN is NaN and harms no other.

    Raises:
        TypeError: if a dtype is not one of those above.
        ValueError: if shapes or devices disagree, a target is outside [0, V), the head is empty,
            or `scale` or `softcap` is out of range.

    Source: online softmax (Milakov & Gimelshein, arXiv 1805.02867).
    """
    _check_dtypes(hidden, lm_head, targets, bias)
    _check_shapes(hidden, lm_head, targets, bias)
    # C++ takes both in fp32, where a softcap of 0 stands for none.
    if not abs(scale) <= _FP32.max:
        raise ValueError(
            f"scale must be finite in fp32, got {scale}; 1.0 leaves the logits as they are"
        )
    if softcap is not None and not (_FP32.tiny <= softcap <= _FP32.max):
        raise ValueError(
            f"softcap must be positive and finite in fp32, got {softcap}; use None for no cap"
        )
    if len(targets) == 0:
        return torch.empty(0, dtype=torch.float32, device=hidden.device)
    lowest, highest = (int(bound) for bound in targets.aminmax())
    if lowest < 0 or highest >= len(lm_head):
        raise ValueError(
            f"targets must lie in [0, V) with V = {len(lm_head)}, got values from {lowest} to "
            f"{highest}; leave out padding and check that the tokenizer belongs to the model"
        )
    on_cpu = hidden.device.type == "cpu"
    run = cpu.token_logprobs if on_cpu else reference.token_logprobs
    return run(hidden, lm_head, targets, bias=bias, scale=scale, softcap=softcap)


def _check_dtypes(hidden: Tensor, lm_head: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.dtype not in _DTYPES:
        raise TypeError(
            f"hidden must be float32, bfloat16 or float16, got {hidden.dtype}; convert it"
        )
    if lm_head.dtype != hidden.dtype:
        raise TypeError(
            f"lm_head must have the dtype of hidden, {hidden.dtype}, got {lm_head.dtype}; "
            "convert one of them"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {targets.dtype}; convert them")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias must be of a floating dtype, got {bias.dtype}; convert it")


def _check_shapes(hidden: Tensor, lm_head: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden must be of shape (T, D), got {tuple(hidden.shape)}; flatten batch and length"
        )
    if lm_head.ndim != 2 or lm_head.shape[1] != hidden.shape[1] or lm_head.numel() == 0:
        raise ValueError(
            f"lm_head must be of shape (V, D) with V > 0 and D = {hidden.shape[1]} > 0, got "
            f"{tuple(lm_head.shape)}; give one row of weights for each word"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be of shape (T,) with T = {len(hidden)}, got {tuple(targets.shape)}; "
            "give one for each row of hidden"
        )
    if bias is not None and bias.shape != lm_head.shape[:1]:
        raise ValueError(
            f"bias must be of shape (V,) with V = {len(lm_head)}, got {tuple(bias.shape)}; "
            "give one for each row of lm_head"
        )
    for name, tensor in {"lm_head": lm_head, "targets": targets, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}; "
                "move one of them"
            )

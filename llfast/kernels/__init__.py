"""Fused output heads: log-probabilities from hidden states, without the (T, V) logits.

`cpu` runs C++ from `csrc/`, `cuda` the Triton kernels of `triton_head` and `gluon_head`; tensors on
other devices take `reference`, the plain-torch twin.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from .dispatch import kernels_of
from .partial_logprobs import PartialLogprobs
from .sums import TokenStatistics
from .torch_op import as_statistics

__all__ = [
    "PartialLogprobs",
    "TokenStatistics",
    "instruction_set",
    "token_logprobs",
    "token_statistics",
]


def instruction_set(device: torch.device | str = "cpu") -> str:
    """What computes on a device.

    On a CPU "amx_bf16", "avx512_bf16", "avx512", "avx2", "portable", or "torch", which stands for a
    package without its C++ module; the environment variable `LLFAST_ISA` forces a slower set than
    the processor has. On CUDA "triton sm_90" and the like, or "torch" where Triton cannot run.

    Raises: ValueError if `LLFAST_ISA` names none of this processor's.
    """
    device = torch.device(device)
    return kernels_of(device).name(device)


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
        bias: in any floating dtype; `-inf` takes a word out of the softmax, if `scale` is positive
            and there is no softcap.
        scale: a factor on the logits, finite in fp32.
        softcap: positive and finite in fp32; None for no cap.

    Returns: nats, in fp32. The bits of a row depend on that row, the head, the dtype and
        `instruction_set()` of the device, but neither on the other rows nor on the number of
        threads (the plain-torch twin promises no bits). A row with a NaN or an infinity is NaN and
        harms no other. "avx512_bf16" and "amx_bf16" take subnormal bf16 numbers for zeros. On CUDA,
        where a look at the targets would wait for the device, one outside [0, V) gives NaN.

    Raises:
        TypeError: if a dtype is not one of those above.
        ValueError: if shapes or devices disagree, a target is outside [0, V) (but see above), the
            head is empty, or `scale` or `softcap` is out of range.

    Source: online softmax (Milakov & Gimelshein, arXiv 1805.02867).
    """
    found: Tensor = torch.ops.llfast.token_logprobs(
        *_arguments(hidden, lm_head, targets, bias, scale, softcap)
    )
    return found


def token_statistics(
    hidden: Float[Tensor, "T D"],
    lm_head: Float[Tensor, "V D"],
    targets: Int[Tensor, " T"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStatistics:
    """Log-probability, log-sum-exp, target logit, entropy and arg max of each token, in one pass.

    Arguments, bits and errors are those of `token_logprobs`, and so is every log-probability.
    The entropy is `log S - U / S` for `S = sum e^(z - m)` and `U = sum e^(z - m) (z - m)`.
    """
    return as_statistics(
        torch.ops.llfast.token_statistics(
            *_arguments(hidden, lm_head, targets, bias, scale, softcap)
        )
    )


def _arguments(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Any, ...]:
    bias = None if bias is None else bias.detach()
    return hidden.detach(), lm_head.detach(), targets, bias, float(scale), softcap

"""Log-probabilities from logits that lie in memory, which one Triton kernel reads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int
from torch import Tensor

# Below every logit that means anything, and finite: -inf - (-inf) would be NaN.
_LOWEST = tl.constexpr(-1e38)
_BLOCK_V = 4096
_WARPS = 8


@triton.jit
def _logits_of(products, bias, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    logits = (products.to(tl.float32) + bias) * scale
    if HAS_SOFTCAP:
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (logits / softcap)) + 1.0))
    return logits


@triton.jit
def logprobs_kernel(
    products_ptr,  # (T, V), rows of contiguous numbers
    bias_ptr,  # (V,); not read without HAS_BIAS
    targets_ptr,  # (T,)
    logprobs_ptr,  # (T,)
    vocabulary,
    stride_t,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row a program: a maximum and a sum in every lane, which are put together at the end."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = products_ptr + row * stride_t
    offs_v = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK_V,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK_V):
        mask_v = first + offs_v < vocabulary
        products = tl.load(row_ptr + first + offs_v, mask=mask_v, other=0.0)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + first + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        logits = _logits_of(products, bias, scale, softcap, HAS_SOFTCAP)
        logits = tl.where(mask_v, logits, float("-inf"))
        before = largest
        largest = tl.maximum(before, logits)
        total = total * tl.exp(before - largest) + tl.exp(logits - largest)
    row_largest = tl.max(largest, axis=0)
    row_total = tl.sum(total * tl.exp(largest - row_largest), axis=0)

    target = tl.load(targets_ptr + row)
    product = tl.load(row_ptr + target)
    target_bias = 0.0
    if HAS_BIAS:
        target_bias = tl.load(bias_ptr + target).to(tl.float32)
    target_logit = _logits_of(product, target_bias, scale, softcap, HAS_SOFTCAP)
    tl.store(logprobs_ptr + row, (target_logit - row_largest) - tl.log(row_total))


def logprobs_of_products(
    products: Float[Tensor, "T V"],
    targets: Int[Tensor, " T"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float32[Tensor, " T"]:
    """As `llfast.kernels.token_logprobs`, from products `hidden @ lm_head.T` of any dtype."""
    assert products.stride(1) == 1
    found = torch.empty(len(products), dtype=torch.float32, device=products.device)
    logprobs_kernel[(len(products),)](
        products,
        bias,
        targets,
        found,
        products.shape[1],
        products.stride(0),
        scale,
        softcap or 1.0,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_V=_BLOCK_V,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )
    return found

"""The plain-torch twin of the kernels: right on every device, fast on none."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

# Of one chunk of logits, of its log-softmax, and of one converted slice of the head: under 64 MiB
# together, so long as a single row of logits fits in.
_CHUNK_BYTES = 16 << 20


@torch.no_grad()
def token_logprobs(
    hidden: Float[Tensor, "T D"],
    lm_head: Float[Tensor, "V D"],
    targets: Int[Tensor, " T"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float32[Tensor, " T"]:
    """Log-probability of each target token, in chunks of T instead of all (T, V) logits.

    Half-precision products are computed in fp32, so no logit is rounded below it. The arguments are
    those of `llfast.kernels.token_logprobs`, and are not checked here.

    Returns: nats, in fp32.
    """
    logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    rows = max(1, _CHUNK_BYTES // (4 * lm_head.shape[0]))
    for begin in range(0, hidden.shape[0], rows):
        logits = _logits(hidden[begin : begin + rows], lm_head, bias, scale, softcap)
        columns = targets[begin : begin + rows].long()[:, None]
        logprobs[begin : begin + rows] = logits.log_softmax(-1).gather(1, columns)[:, 0]
        del logits  # or it would live beside the next
    return logprobs


def _logits(
    hidden: Float[Tensor, "t D"],
    lm_head: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    scale: float,
    softcap: float | None,
) -> Float32[Tensor, "t V"]:
    logits = _products(hidden, lm_head)
    if bias is not None:
        logits += bias.float()
    logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _products(
    hidden: Float[Tensor, "t D"], lm_head: Float[Tensor, "V D"]
) -> Float32[Tensor, "t V"]:
    """`hidden @ lm_head.T` in fp32."""
    if hidden.dtype == torch.float32:
        return hidden @ lm_head.T
    if hidden.device.type == "cuda":
        return torch.mm(hidden, lm_head.T, out_dtype=torch.float32)
    products = hidden.new_empty((hidden.shape[0], lm_head.shape[0]), dtype=torch.float32)
    rows = max(1, _CHUNK_BYTES // (4 * lm_head.shape[1]))
    for begin in range(0, lm_head.shape[0], rows):
        part = lm_head[begin : begin + rows].float()
        torch.mm(hidden.float(), part.T, out=products[:, begin : begin + rows])
    return products

"""The plain-torch twin of the kernels: right on every device, fast on none."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from .inputs import GROUP, LAST_WORD, HeadInputs
from .sums import PARTIAL_BYTES, PartialSums, TokenStatistics

# Of one chunk of logits, of their exponentials, and of one converted slice of the head: under
# 64 MiB together, so long as a single row of logits fits in.
_CHUNK_BYTES = 16 << 20
_PARTIALS_BYTES = 8 << 20
_LOWEST_EXPONENT = -104.0  # e^-104 rounds to 0 in fp32


def name(_: torch.device) -> str:
    """What computes."""
    return "torch"


def rows_of_a_slice(inputs: HeadInputs) -> int:
    """Tokens whose partial sums take about 8 MiB."""
    groups = -(-len(inputs.lm_head) // GROUP)
    return max(_PARTIALS_BYTES // (PARTIAL_BYTES * groups), 1)


@torch.no_grad()
def partial_sums(inputs: HeadInputs, rows: slice) -> PartialSums:
    """The groups' partial sums of some rows, (groups, rows), in chunks of (rows, V) logits.

    Half-precision products are computed in fp32, so no logit is rounded below it.
    """
    begin, end, _ = rows.indices(len(inputs.hidden))
    step = max(1, _CHUNK_BYTES // (4 * len(inputs.lm_head)))
    starts = range(begin, end, step) or [begin]
    chunks = [_sums_of_chunk(inputs, slice(row, min(row + step, end))) for row in starts]
    return PartialSums.joined(*chunks, dim=1)


def fold(parts: PartialSums, total: PartialSums | None = None) -> PartialSums:
    """The parts folded left to right, (1, T), onto what lies to their left, if given."""
    if total is None:
        total = PartialSums.neutral(parts.shape[1], parts.max.device)
    for part in range(parts.shape[0]):
        total = _merge(total, _row(parts, part))
    return total


def write_statistics(total: PartialSums, found: TokenStatistics) -> None:
    """Fill `found` (T,) with the statistics of sums (1, T)."""
    largest, target = total.max[0].double(), total.target_logits[0].double()
    log_sum = total.sum[0].double().log()
    # (z - max) first: z and log-sum-exp are both large, their difference need not be.
    found.logprobs.copy_(target - largest - log_sum)
    found.lse.copy_(largest + log_sum)
    found.target_logits.copy_(total.target_logits[0])
    found.entropy.copy_(log_sum - total.weighted_sum[0].double() / total.sum[0].double())
    found.argmax.copy_(total.argmax[0])


def _sums_of_chunk(inputs: HeadInputs, rows: slice) -> PartialSums:
    logits = _logits(inputs, rows)
    first = inputs.first_word or 0
    last = len(inputs.lm_head) - 1 if inputs.first_word is None else LAST_WORD
    column = inputs.targets[rows].long()[:, None] - first
    inside = (column >= 0) & (column < len(inputs.lm_head))
    found = logits.gather(1, column.clamp(0, len(inputs.lm_head) - 1))
    parts = logits.view(len(logits), logits.shape[1] // GROUP, GROUP)
    group = torch.arange(parts.shape[1], device=logits.device)
    here = inside & (column // GROUP == group)
    target_logits = torch.where(here, found, -torch.inf)
    # Refused before the call, except on CUDA, where nobody looks; the first part tells.
    target_logits[:, :1].masked_fill_((column + first < 0) | (column + first > last), torch.nan)
    largest, place = parts.max(-1)
    # -inf - (-inf) would be NaN where every word of a group is ruled out.
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    parts -= shift[..., None]
    exponentials = parts.clamp_(min=_LOWEST_EXPONENT).exp()
    total = exponentials.sum(-1)
    weighted = exponentials.mul_(parts).sum(-1)
    return PartialSums(
        max=largest.T.contiguous(),
        sum=total.T.contiguous(),
        weighted_sum=weighted.T.contiguous(),
        target_logits=target_logits.T.contiguous(),
        argmax=(place + first + GROUP * group).to(torch.int32).T.contiguous(),
    )


def _logits(inputs: HeadInputs, rows: slice) -> Float32[Tensor, "t padded"]:
    """The logits of some rows, with -inf up to whole groups."""
    hidden, lm_head = inputs.hidden[rows], inputs.lm_head
    vocabulary = len(lm_head)
    padded = hidden.new_empty((len(hidden), -(-vocabulary // GROUP) * GROUP), dtype=torch.float32)
    padded[:, vocabulary:] = -torch.inf
    logits = padded[:, :vocabulary]
    _multiply(hidden, lm_head, logits)
    if inputs.bias is not None:
        logits += inputs.bias.float()
    logits *= inputs.scale
    if inputs.softcap is not None:
        logits.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    return padded


def _multiply(
    hidden: Float[Tensor, "t D"], lm_head: Float[Tensor, "V D"], products: Float32[Tensor, "t V"]
) -> None:
    """Write `hidden @ lm_head.T` in fp32."""
    if hidden.dtype == torch.float32:
        torch.mm(hidden, lm_head.T, out=products)
    elif hidden.device.type == "cuda":
        products.copy_(torch.mm(hidden, lm_head.T, out_dtype=torch.float32))
    else:
        rows = max(1, _CHUNK_BYTES // (4 * lm_head.shape[1]))
        for begin in range(0, len(lm_head), rows):
            part = lm_head[begin : begin + rows].float()
            torch.mm(hidden.float(), part.T, out=products[:, begin : begin + rows])


def _row(parts: PartialSums, part: int) -> PartialSums:
    return PartialSums(
        max=parts.max[part, None],
        sum=parts.sum[part, None],
        weighted_sum=parts.weighted_sum[part, None],
        target_logits=parts.target_logits[part, None],
        argmax=parts.argmax[part, None],
    )


def _merge(left: PartialSums, right: PartialSums) -> PartialSums:
    largest = torch.maximum(left.max, right.max)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    x = (left.max - shift).clamp(min=_LOWEST_EXPONENT)
    y = (right.max - shift).clamp(min=_LOWEST_EXPONENT)
    return PartialSums(
        max=largest,
        sum=left.sum * x.exp() + right.sum * y.exp(),
        weighted_sum=(left.weighted_sum + left.sum * x) * x.exp()
        + (right.weighted_sum + right.sum * y) * y.exp(),
        # A NaN stays; at most one side holds the target, the other has -inf.
        target_logits=torch.maximum(left.target_logits, right.target_logits),
        argmax=torch.where(right.max > left.max, right.argmax, left.argmax),
    )

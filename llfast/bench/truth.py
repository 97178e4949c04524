"""How far a way to log-probabilities is off, against fp64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from .problems import Problem

LARGEST_ERROR_RATIO = 4.0  # of llfast's to that of a product in fp32
# Of the largest number, 2**-24 each: no arithmetic in fp32 avoids them.
FLOOR_ROUNDINGS = 2
IN_FP32 = "product in fp32"
_PIECE = 4096  # rows of lm_head that are converted at once


@dataclass(frozen=True, slots=True)
class Truth:
    """Log-probabilities in fp64 of some rows of a problem.

    "product in fp32" is what llfast's error is held against: torch's product of the same numbers
    with sums and result in fp32 (on CUDA by tensor cores in half precision, which do not round
    sums to nearest), and all that follows in fp64.
    """

    rows: Int64[Tensor, " n"]
    logprobs: Float64[Tensor, " n"]
    in_fp32: Float64[Tensor, " n"]
    largest: float  # magnitude of a logit or log-probability

    @staticmethod
    def of(problem: Problem, most_rows: int) -> Truth:
        """Of rows spread over all of the problem's."""
        last = len(problem.hidden) - 1
        spread = torch.linspace(0, last, most_rows, dtype=torch.float64, device=problem.device)
        rows = spread.round().long().unique()  # type: ignore[no-untyped-call]
        logprobs, largest = _logprobs(problem, rows, torch.float64)
        in_fp32, _ = _logprobs(problem, rows, torch.float32)
        return Truth(rows, logprobs, in_fp32, max(largest, float(logprobs.abs().max())))

    @property
    def fp32_error(self) -> float:
        """Of the product in fp32, at most, in nats."""
        return float((self.in_fp32 - self.logprobs).abs().max())

    def errors_of(self, logprobs: Tensor) -> dict[str, float]:
        """Largest and mean error of the log-probabilities of all of the problem's rows, in nats."""
        return _spread((logprobs[self.rows].to(torch.float64) - self.logprobs).abs())

    def errors_in_fp32(self) -> dict[str, float]:
        """Those of the product in fp32."""
        return _spread((self.in_fp32 - self.logprobs).abs())

    def why_wrong(self, error: float) -> str | None:
        """What is wrong with an error of llfast's, given as the largest; None if nothing is."""
        floor = FLOOR_ROUNDINGS * self.largest * 2.0**-24
        limit = LARGEST_ERROR_RATIO * self.fp32_error + floor
        if error <= limit:  # NaN is not
            return None
        return (
            f"llfast's error must be at most {limit:.3g} nats, {LARGEST_ERROR_RATIO:.0f} times "
            f"that of a product in fp32 and {FLOOR_ROUNDINGS} roundings, got {error:.3g}"
        )


def error_ratio(errors: Mapping[str, Mapping[str, float]]) -> float:
    """The ratio of llfast's largest error to that of a product in fp32."""
    return float(f"{errors['llfast']['max'] / max(errors[IN_FP32]['max'], 1e-30):.3g}")


def _logprobs(
    problem: Problem, rows: Int64[Tensor, " n"], product_dtype: torch.dtype
) -> tuple[Float64[Tensor, " n"], float]:
    """In fp64, from a product in `product_dtype`; and the largest logit's magnitude."""
    hidden, targets = problem.hidden[rows], problem.targets[rows]
    lse = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=problem.device)
    target_logits = torch.empty_like(lse)
    largest = torch.zeros((), dtype=torch.float64, device=problem.device)
    for start in range(0, len(problem.lm_head), _PIECE):
        words = slice(start, start + _PIECE)
        logits = _product(hidden, problem.lm_head[words], product_dtype).to(torch.float64)
        if problem.bias is not None:
            logits += problem.bias[words].to(torch.float64)
        logits *= problem.scale
        if problem.softcap is not None:
            logits = problem.softcap * torch.tanh(logits / problem.softcap)
        lse = torch.logaddexp(lse, logits.logsumexp(-1))
        largest = torch.maximum(largest, logits.abs().max())
        here = (targets >= start) & (targets < start + logits.shape[1])
        target_logits[here] = logits[here, targets[here] - start]
    return target_logits - lse, float(largest)


def _product(hidden: Tensor, lm_head: Tensor, dtype: torch.dtype) -> Tensor:
    is_half = hidden.dtype in (torch.bfloat16, torch.float16)
    if hidden.device.type == "cuda" and is_half and dtype == torch.float32:
        return torch.mm(hidden, lm_head.T, out_dtype=dtype)
    return hidden.to(dtype) @ lm_head.to(dtype).T


def _spread(errors: Float64[Tensor, " n"]) -> dict[str, float]:
    largest, mean = float(errors.max()), float(errors.mean())
    return {"max": float(f"{largest:.3g}"), "mean": float(f"{mean:.3g}")}

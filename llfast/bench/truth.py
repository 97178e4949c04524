"""How far a way to log-probabilities is off, against fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from .problems import Problem

LARGEST_ERROR_RATIO = 4.0  # of llfast's to that of a product in fp32
# Of the largest number, 2**-24 each: no arithmetic in fp32 avoids them. See `gpu_roundings`, too.
FLOOR_ROUNDINGS = 2
IN_FP32 = "product in fp32"
# Rows of lm_head that are multiplied at once. On CUDA so many that tiles of the product keep every
# multiprocessor busy: with fewer, torch may cut the width into parts, whose sums are chains as much
# shorter, and as much more exact, than any kernel of one pass can have.
_PIECES = {"cpu": 4096, "cuda": 1 << 16}


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
    roundings: float  # of it, 2**-24 each, that are allowed for

    @staticmethod
    def of(problem: Problem, most_rows: int) -> Truth:
        """Of rows spread over all of the problem's."""
        last = len(problem.hidden) - 1
        spread = torch.linspace(0, last, most_rows, dtype=torch.float64, device=problem.device)
        rows = spread.round().long().unique()  # type: ignore[no-untyped-call]
        logprobs, largest = _logprobs(problem, rows, torch.float64)
        in_fp32, _ = _logprobs(problem, rows, torch.float32)
        largest = max(largest, float(logprobs.abs().max()))
        more = gpu_roundings(problem.device, problem.hidden.dtype, problem.shape[2])
        return Truth(rows, logprobs, in_fp32, largest, FLOOR_ROUNDINGS + more)

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
        floor = self.roundings * self.largest * 2.0**-24
        limit = LARGEST_ERROR_RATIO * self.fp32_error + floor
        if error <= limit:  # NaN is not
            return None
        return (
            f"llfast's error must be at most {limit:.3g} nats, {LARGEST_ERROR_RATIO:.0f} times "
            f"that of a product in fp32 and {self.roundings:.0f} roundings, got {error:.3g}"
        )


def gpu_roundings(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Those of a kernel on a GPU that torch's product need not make; 0 on a CPU.

    It may cut the width into parts, or sum in another order. Exponentials and quotients are off by
    two each. Of 16 products in half precision, tensor cores cut off what they add up to, always
    toward zero (Khattak and Mikaitis, arXiv 2512.07004), so that errors add up; a chain of sums in
    fp32 is rounded to nearest, and errors add up as their squares do.
    """
    if device.type != "cuda":
        return 0.0
    return 4 + (math.sqrt(width) if dtype == torch.float32 else width / 16)


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
    step = _PIECES[problem.device.type]
    for start in range(0, len(problem.lm_head), step):
        words = slice(start, start + step)
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

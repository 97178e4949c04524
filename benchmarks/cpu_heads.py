"""The ways to a log-probability that bench_cpu_kernel.py compares, and how far each is off."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llfast.kernels import token_logprobs

CHECKED_ROWS = 64
PIECE = 4096  # rows of lm_head that are converted at once
LOGIT_SD = 4.0  # logits then reach about 20
# Nats. Rounding logits to bf16 costs up to 0.1; what is off by more computes something else.
LARGEST_ERROR = 0.5
LARGEST_ERROR_RATIO = 4.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Hidden states (T, D), an output head (V, D), and targets (T,)."""

    hidden: Tensor
    lm_head: Tensor
    targets: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, V, D."""
        return len(self.hidden), len(self.lm_head), self.hidden.shape[1]

    @property
    def gflop(self) -> float:
        """2 FLOP a multiply-add of the product (T, D) x (D, V); exponentials are not counted."""
        tokens, words, width = self.shape
        return 2 * tokens * words * width / 1e9

    @property
    def lm_head_gb(self) -> float:
        """What a call has to read at least."""
        return self.lm_head.numel() * self.lm_head.element_size() / 1e9

    def first(self, tokens: int) -> Problem:
        """The same with fewer tokens."""
        return Problem(self.hidden[:tokens], self.lm_head, self.targets[:tokens])


def make_problem(shape: tuple[int, int, int], dtype: torch.dtype) -> Problem:
    """Normal hidden states and weights, so that logits are normal."""
    tokens, words, width = shape
    random = torch.Generator().manual_seed(0)
    lm_head = torch.empty(words, width, dtype=dtype)
    for piece in lm_head.split(PIECE):
        piece.copy_(torch.randn(piece.shape, generator=random) * (LOGIT_SD / width**0.5))
    return Problem(
        torch.randn(tokens, width, generator=random).to(dtype),
        lm_head,
        torch.randint(words, (tokens,), generator=random),
    )


# ------------------------------------------------------------------------------------- providers


def run_llfast(problem: Problem) -> Tensor:
    """The fused kernel."""
    return token_logprobs(problem.hidden, problem.lm_head, problem.targets)


def run_matmul(problem: Problem) -> Tensor:
    """The logits alone."""
    return problem.hidden @ problem.lm_head.T


def run_log_softmax(problem: Problem) -> Tensor:
    """What most code does; the softmax is in the logits' dtype."""
    logprobs = torch.log_softmax(run_matmul(problem), dim=-1)
    return logprobs.gather(-1, problem.targets[:, None])[:, 0]


def run_cross_entropy(problem: Problem) -> Tensor:
    """The loss of each token, negated."""
    return -functional.cross_entropy(run_matmul(problem), problem.targets, reduction="none")


def run_linear_cross_entropy(problem: Problem) -> Tensor:
    """As torch does it unless told otherwise: with all logits at once."""
    return -functional.linear_cross_entropy(
        problem.hidden, problem.lm_head, problem.targets, reduction="none"
    )


def run_linear_cross_entropy_chunked(problem: Problem) -> Tensor:
    """With the chunks of tokens that torch itself chooses."""
    return -functional.linear_cross_entropy(
        problem.hidden,
        problem.lm_head,
        problem.targets,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )


MATMUL_INTO = "matmul into a tensor that is there"
PROVIDERS: dict[str, Callable[[Problem], Tensor]] = {
    "llfast": run_llfast,
    "matmul": run_matmul,
    "matmul + log_softmax + gather": run_log_softmax,
    "cross_entropy": run_cross_entropy,
    "linear_cross_entropy": run_linear_cross_entropy,
    "linear_cross_entropy, chunked": run_linear_cross_entropy_chunked,
}


def skipped_providers() -> dict[str, str]:
    """The providers that this torch does not have, and why."""
    if hasattr(functional, "linear_cross_entropy"):
        return {}
    reason = f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has"
    return {name: reason for name in PROVIDERS if name.startswith("linear_cross_entropy")}


def providers_for(problem: Problem) -> dict[str, Callable[[Problem], Tensor]]:
    """What to time: the providers of this torch, and the product without its memory."""
    skipped = skipped_providers()
    found = {name: run for name, run in PROVIDERS.items() if name not in skipped}
    tokens, words, _ = problem.shape
    # The pages of new logits cost time, that is part of what a caller of matmul waits for. Here is
    # the product without them.
    out = torch.zeros(tokens, words, dtype=problem.hidden.dtype)
    found[MATMUL_INTO] = lambda each: torch.matmul(each.hidden, each.lm_head.T, out=out)
    return found


# ----------------------------------------------------------------------------------- correctness


def logprobs_in_fp64(problem: Problem, rows: Tensor, product_dtype: torch.dtype) -> Tensor:
    """Log-probabilities in fp64 of logits whose product is in `product_dtype`."""
    hidden, targets = problem.hidden[rows].to(product_dtype), problem.targets[rows]
    lse = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
    target_logit = torch.empty(len(rows), dtype=torch.float64)
    for start in range(0, len(problem.lm_head), PIECE):
        piece = problem.lm_head[start : start + PIECE].to(product_dtype)
        logits = (hidden @ piece.T).to(torch.float64)
        lse = torch.logaddexp(lse, logits.logsumexp(-1))
        here = (targets >= start) & (targets < start + len(piece))
        target_logit[here] = logits[here, targets[here] - start]
    return target_logit - lse


def check(problem: Problem) -> dict[str, float]:
    """How far each provider is off at most, in nats, against fp64 on some of the rows.

    "product in fp32" is what the aim on llfast's error is a multiple of: the product of the same
    numbers with sums and result in fp32, and all that follows in fp64.

    Raises: SystemExit if a provider computes something else.
    """
    rows = torch.linspace(0, len(problem.hidden) - 1, CHECKED_ROWS).round().long().unique()
    truth = logprobs_in_fp64(problem, rows, torch.float64)
    in_fp32 = logprobs_in_fp64(problem, rows, torch.float32)
    errors = {"product in fp32": float((in_fp32 - truth).abs().max())}
    skipped = skipped_providers()
    for name, run in PROVIDERS.items():
        if name in skipped or name == "matmul":
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where it ignores an option
            found = run(problem)[rows].to(torch.float64)
        errors[name] = float((found - truth).abs().max())
        if not errors[name] <= LARGEST_ERROR:
            raise SystemExit(f"{name} must be within {LARGEST_ERROR} nats, got {errors[name]:.3g}")
    ratio = errors["llfast"] / errors["product in fp32"]
    if not ratio <= LARGEST_ERROR_RATIO:
        raise SystemExit(
            f"llfast's error must be at most {LARGEST_ERROR_RATIO} times that of the product in "
            f"fp32, got {ratio:.2f} for {problem.shape} in {problem.hidden.dtype}"
        )
    return {name: float(f"{error:.3g}") for name, error in errors.items()}

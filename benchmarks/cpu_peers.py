"""What bench_cpu_kernel.py compares llfast with, and how far each is off."""

from __future__ import annotations

import warnings

import torch

from llfast.bench.heads import MATMUL, TORCH_PROVIDERS, Provider, why_skipped
from llfast.bench.problems import Problem, make_problem
from llfast.bench.truth import IN_FP32, LARGEST_ERROR_RATIO, Truth

CHECKED_ROWS = 64
# Nats. Rounding logits to bf16 costs up to 0.1; what is off by more computes something else.
LARGEST_ERROR = 0.5
MATMUL_INTO = "matmul into a tensor that is there"


def skipped_providers() -> dict[str, str]:
    """The providers that this torch does not have, and why."""
    reasons = why_skipped(make_problem((1, 1, 1), torch.float32))
    return {name: reason for name, reason in reasons.items() if name in TORCH_PROVIDERS}


def providers_for(problem: Problem) -> dict[str, Provider]:
    """What to time: the providers of this torch, and the product without its memory."""
    skipped = skipped_providers()
    found = {name: run for name, run in TORCH_PROVIDERS.items() if name not in skipped}
    tokens, words, _ = problem.shape
    # The pages of new logits cost time, that is part of what a caller of matmul waits for. Here is
    # the product without them.
    out = torch.zeros(tokens, words, dtype=problem.hidden.dtype)
    found[MATMUL_INTO] = lambda each: torch.matmul(each.hidden, each.lm_head.T, out=out)
    return found


def check(problem: Problem) -> dict[str, float]:
    """How far each provider is off at most, in nats, against fp64 on some of the rows.

    "product in fp32" is what the aim on llfast's error is a multiple of.

    Raises: SystemExit if a provider computes something else.
    """
    truth = Truth.of(problem, CHECKED_ROWS)
    errors = {IN_FP32: truth.errors_in_fp32()["max"]}
    skipped = skipped_providers()
    for name, run in TORCH_PROVIDERS.items():
        if name in skipped or name == MATMUL:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where it ignores an option
            errors[name] = truth.errors_of(run(problem))["max"]
        if not errors[name] <= LARGEST_ERROR:
            raise SystemExit(f"{name} must be within {LARGEST_ERROR} nats, got {errors[name]:.3g}")
    ratio = errors["llfast"] / errors[IN_FP32]
    if not ratio <= LARGEST_ERROR_RATIO:
        raise SystemExit(
            f"llfast's error must be at most {LARGEST_ERROR_RATIO} times that of the product in "
            f"fp32, got {ratio:.2f} for {problem.shape} in {problem.hidden.dtype}"
        )
    return errors

"""The ways to a log-probability that the benchmarks of the output head compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from llfast.kernels import token_logprobs

from .peers import (
    run_cut_cross_entropy,
    run_liger,
    why_no_cut_cross_entropy,
    why_no_liger,
)
from .problems import Problem

Provider = Callable[[Problem], Tensor]

LLFAST, MATMUL = "llfast", "matmul"
FUSED_READ = "matmul + one fused read of the logits"


def run_llfast(problem: Problem) -> Float[Tensor, " T"]:
    """The fused kernel."""
    return token_logprobs(
        problem.hidden,
        problem.lm_head,
        problem.targets,
        bias=problem.bias,
        scale=problem.scale,
        softcap=problem.softcap,
    )


def run_matmul(problem: Problem) -> Float[Tensor, "T V"]:
    """The product alone, which all others have to compute as well."""
    return torch.mm(problem.hidden, problem.lm_head.T)


def run_log_softmax(problem: Problem) -> Float[Tensor, " T"]:
    """What most code does; the softmax is in the logits' dtype."""
    logprobs = torch.log_softmax(_logits(problem), dim=-1)
    return logprobs.gather(-1, problem.targets[:, None])[:, 0]


def run_cross_entropy(problem: Problem) -> Float[Tensor, " T"]:
    """The loss of each token, negated."""
    return -functional.cross_entropy(_logits(problem), problem.targets, reduction="none")


def run_linear_cross_entropy(problem: Problem) -> Float[Tensor, " T"]:
    """As torch does it unless told otherwise: with all logits at once."""
    return -_linear_cross_entropy(problem)


def run_linear_cross_entropy_chunked(problem: Problem) -> Float[Tensor, " T"]:
    """With the chunks of tokens that torch itself chooses."""
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined, unused-ignore]
    return -_linear_cross_entropy(problem, options=options)


def run_fused_read(problem: Problem) -> Float[Tensor, " T"]:
    """The best that can be done with logits in memory: written once and read once."""
    from .softmax_triton import logprobs_of_products

    return logprobs_of_products(
        run_matmul(problem),
        problem.targets,
        bias=problem.bias,
        scale=problem.scale,
        softcap=problem.softcap,
    )


TORCH_PROVIDERS: dict[str, Provider] = {
    LLFAST: run_llfast,
    MATMUL: run_matmul,
    "matmul + log_softmax + gather": run_log_softmax,
    "cross_entropy": run_cross_entropy,
    "linear_cross_entropy": run_linear_cross_entropy,
    "linear_cross_entropy, chunked": run_linear_cross_entropy_chunked,
}
PROVIDERS: dict[str, Provider] = {
    **TORCH_PROVIDERS,
    FUSED_READ: run_fused_read,
    "Liger-Kernel": run_liger,
    "cut-cross-entropy": run_cut_cross_entropy,
}

# How many times the logits are in memory at once, where a provider builds all of them.
_LOGITS_HELD = {
    MATMUL: 1,
    "matmul + log_softmax + gather": 2,
    "cross_entropy": 2,
    "linear_cross_entropy": 2,
    FUSED_READ: 1,
}


def why_skipped(problem: Problem, *, most_logits_bytes: int | None = None) -> dict[str, str]:
    """The providers that cannot run on a problem, or would need more memory, and why."""
    reasons = {
        "linear_cross_entropy": _why_no_linear_cross_entropy(problem),
        "linear_cross_entropy, chunked": _why_no_linear_cross_entropy(problem),
        FUSED_READ: _why_no_fused_read(problem),
        "Liger-Kernel": why_no_liger(problem),
        "cut-cross-entropy": why_no_cut_cross_entropy(problem),
    }
    found = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, count in _LOGITS_HELD.items():
        needed = count * problem.logits_bytes
        if most_logits_bytes is not None and needed > most_logits_bytes and name not in found:
            found[name] = (
                f"its logits would take {needed / 2**30:.1f} GiB of the "
                f"{most_logits_bytes / 2**30:.0f} allowed"
            )
    return found


def _logits(problem: Problem) -> Float[Tensor, "T V"]:
    """In the dtype of the inputs; what follows the product is done in place, which costs least."""
    logits = run_matmul(problem)
    if problem.bias is not None:
        logits += problem.bias
    if problem.scale != 1.0:
        logits *= problem.scale
    if problem.softcap is not None:
        logits.div_(problem.softcap).tanh_().mul_(problem.softcap)
    return logits


def _linear_cross_entropy(problem: Problem, **options: object) -> Float[Tensor, " T"]:
    run: Callable[..., Tensor] = functional.linear_cross_entropy
    bias = problem.bias
    return run(
        problem.hidden,
        problem.lm_head,
        problem.targets,
        linear_bias=None if bias is None else bias.to(problem.hidden.dtype),
        reduction="none",
        **options,
    )


def _why_no_linear_cross_entropy(problem: Problem) -> str | None:
    if not hasattr(functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has"
    if problem.scale != 1.0 or problem.softcap is not None:
        return "it has neither scale nor softcap"
    return None


def _why_no_fused_read(problem: Problem) -> str | None:
    return None if problem.device.type == "cuda" else "it is a Triton kernel, for CUDA"

"""Fused output heads of other packages, where they are installed; forward passes only."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .problems import Problem


def run_liger(problem: Problem) -> Float[Tensor, " T"]:
    """Liger-Kernel 0.8.5: logits of some tokens at a time, in the dtype of the inputs."""
    bias = problem.bias
    run = _loaded("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    losses: Tensor = run(
        problem.hidden,
        problem.lm_head,
        problem.targets,
        bias=None if bias is None else bias.to(problem.hidden.dtype),
        reduction="none",
        softcap=problem.softcap,
    )
    return -losses


def run_cut_cross_entropy(problem: Problem) -> Float[Tensor, " T"]:
    """cut-cross-entropy 25.1.1: no logits in memory, sums joined under locks."""
    losses: Tensor = _loaded("cut_cross_entropy").linear_cross_entropy(
        problem.hidden,
        problem.lm_head,
        problem.targets,
        softcap=problem.softcap,
        reduction="none",
        impl="cce",
    )
    return -losses


def why_no_liger(problem: Problem) -> str | None:
    """What keeps Liger-Kernel from computing a problem; None if nothing does."""
    if problem.device.type != "cuda":
        return "its kernels are Triton's, for CUDA"
    if problem.scale != 1.0:
        return "it has no factor on the logits"
    return _why_not_loaded("liger_kernel.transformers.functional", "liger-kernel")


def why_no_cut_cross_entropy(problem: Problem) -> str | None:
    """What keeps cut-cross-entropy from computing a problem; None if nothing does."""
    if problem.device.type != "cuda":
        return "its kernels are Triton's, for CUDA"
    if problem.scale != 1.0 or problem.bias is not None:
        return "it has neither bias nor a factor on the logits"
    return _why_not_loaded("cut_cross_entropy", "cut-cross-entropy")


@functools.cache
def _loaded(module: str) -> Any:
    return importlib.import_module(module)


@functools.cache
def _why_not_loaded(module: str, package: str) -> str | None:
    try:
        _loaded(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return f"it is not installed; pip install {package}"
        return f"it does not load: {error}"
    except Exception as error:  # whatever a package does when it is imported
        return f"it does not load: {type(error).__name__}: {error}"
    return None

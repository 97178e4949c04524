"""The C++ kernels: the only file that imports them."""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from llfast.errors import LlfastWarning

from . import reference


@functools.cache
def _native() -> ModuleType | None:
    """The C++ module, or None with a warning, once, where it was not built."""
    try:
        from llfast import _native
    except ImportError as error:
        warnings.warn(
            f"llfast's C++ kernels are not usable ({error}), so a slow torch version runs in their "
            "place; install llfast with a C++17 compiler at hand to build them",
            LlfastWarning,
            stacklevel=2,
        )
        return None
    return _native


def instruction_set() -> str:
    """What the CPU path computes with: "avx512", "avx2", "portable", or "torch" without C++.

    The environment variable `LLFAST_ISA` forces a slower one than the processor has.

    Raises: ValueError if `LLFAST_ISA` names none of this processor's.
    """
    native = _native()
    if native is None:
        return "torch"
    name: str = native.choose_instruction_set(os.environ.get("LLFAST_ISA", ""))
    return name


def token_logprobs(
    hidden: Float[Tensor, "T D"],
    lm_head: Float[Tensor, "V D"],
    targets: Int[Tensor, " T"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float32[Tensor, " T"]:
    """Log-probability of each target token, by C++ on `torch.get_num_threads()` threads.

    The arguments are those of `llfast.kernels.token_logprobs`, which has checked them. A matrix is
    copied only if its last dimension is not contiguous.

    Returns: nats, in fp32. A row's bits depend on that row, on the head and on the instruction set,
        but neither on the other rows nor on the number of threads.
    """
    native = _native()
    if native is None:
        return reference.token_logprobs(
            hidden, lm_head, targets, bias=bias, scale=scale, softcap=softcap
        )
    # These names keep alive what the addresses below point to.
    hidden, lm_head = _row_major(hidden), _row_major(lm_head)
    targets = targets.to(torch.int64).contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    logprobs = torch.empty(len(hidden), dtype=torch.float32)
    native.token_logprobs(
        hidden=hidden.data_ptr(),
        hidden_stride=hidden.stride(0),
        lm_head=lm_head.data_ptr(),
        lm_head_stride=lm_head.stride(0),
        bias=0 if bias is None else bias.data_ptr(),
        targets=targets.data_ptr(),
        logprobs=logprobs.data_ptr(),
        tokens=len(hidden),
        vocabulary=len(lm_head),
        width=hidden.shape[1],
        dtype=str(hidden.dtype).removeprefix("torch."),
        scale=scale,
        softcap=softcap,
        threads=torch.get_num_threads(),
        instruction_set=instruction_set(),
    )
    return logprobs


def _row_major(matrix: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()

"""The C++ kernels: the only file that imports them."""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from llfast.errors import LlfastWarning

from .inputs import GROUP, HeadInputs
from .sums import PARTIAL_BYTES, PartialSums, TokenStatistics

_PARTIALS_PER_THREAD_BYTES = 1 << 20


@functools.cache
def native() -> ModuleType | None:
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
    assert _native.GROUP == GROUP
    return _native


def name(_: torch.device) -> str:
    """The instruction set in use."""
    chosen: str = _module().choose_instruction_set(os.environ.get("LLFAST_ISA", ""))
    return chosen


def rows_of_a_slice(inputs: HeadInputs) -> int:
    """Tokens whose partial sums take about 1 MiB a thread."""
    groups = -(-len(inputs.lm_head) // GROUP)
    room = torch.get_num_threads() * _PARTIALS_PER_THREAD_BYTES
    return max(room // (PARTIAL_BYTES * groups), 1)


def partial_sums(inputs: HeadInputs, rows: slice) -> PartialSums:
    """The groups' partial sums of some rows, on `torch.get_num_threads()` threads.

    A matrix is copied only if its last dimension is not contiguous.

    Returns: (groups, rows) sums, whose bits depend on each row, on the head and on the instruction
        set, but neither on the other rows nor on the number of threads.
    """
    # These names keep alive what the addresses below point to.
    hidden, lm_head = _row_major(inputs.hidden[rows]), _row_major(inputs.lm_head)
    targets = inputs.targets[rows].to(torch.int64).contiguous()
    bias = None if inputs.bias is None else inputs.bias.detach().to(torch.float32).contiguous()
    parts = PartialSums.empty(-(-len(lm_head) // GROUP), len(hidden), hidden.device)
    _module().head_partials(
        hidden=hidden.data_ptr(),
        hidden_stride=hidden.stride(0),
        lm_head=lm_head.data_ptr(),
        lm_head_stride=lm_head.stride(0),
        bias=0 if bias is None else bias.data_ptr(),
        targets=targets.data_ptr(),
        parts=_addresses(parts),
        first_word=inputs.first_word or 0,
        tokens=len(hidden),
        vocabulary=len(lm_head),
        width=hidden.shape[1],
        dtype=str(hidden.dtype).removeprefix("torch."),
        scale=inputs.scale,
        softcap=inputs.softcap,
        threads=torch.get_num_threads(),
        instruction_set=name(hidden.device),
    )
    return parts


def fold(parts: PartialSums, total: PartialSums | None = None) -> PartialSums:
    """The parts folded left to right, (1, T), into a copy of what lies to their left, if given."""
    count, tokens = parts.shape
    folded = (
        PartialSums.neutral(tokens, parts.max.device)
        if total is None
        else PartialSums.joined(total)
    )
    _module().fold_partials(
        parts=_addresses(parts),
        count=count,
        tokens=tokens,
        total=_addresses(folded),
        instruction_set=name(parts.max.device),
    )
    return folded


def write_statistics(total: PartialSums, found: TokenStatistics) -> None:
    """Fill `found` (T,) with the statistics of sums (1, T)."""
    _module().statistics(
        total=_addresses(total),
        tokens=total.shape[1],
        logprobs=found.logprobs.data_ptr(),
        lse=found.lse.data_ptr(),
        target_logits=found.target_logits.data_ptr(),
        entropy=found.entropy.data_ptr(),
        argmax=found.argmax.data_ptr(),
    )


def _module() -> ModuleType:
    module = native()
    assert module is not None, "dispatch.py asks first"
    return module


def _addresses(sums: PartialSums) -> tuple[int, int, int, int, int]:
    return (
        sums.max.data_ptr(),
        sums.sum.data_ptr(),
        sums.weighted_sum.data_ptr(),
        sums.target_logits.data_ptr(),
        sums.argmax.data_ptr(),
    )


def _row_major(matrix: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()

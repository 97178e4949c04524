"""Launches the Triton kernels on CUDA tensors."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .inputs import GROUP, LAST_WORD, HeadInputs
from .sums import PARTIAL_BYTES, PartialSums, TokenStatistics
from .tuning import Schedules, schedules_of

_WORKSPACE_BYTES = 56 << 20
ROWS = 128  # slices of T are multiples of it
FOLD_ROWS = 32
_TMA_BYTES = 16  # to which descriptors want addresses and strides aligned


@functools.cache
def why_unusable(device: torch.device) -> str | None:
    """What keeps the Triton kernels from running on a device; None if nothing does."""
    if device.type != "cuda":
        return "no kernels are written for it"
    if torch.version.hip is not None:
        return "no kernels are written for AMD"
    if chip_of(device).capability < (8, 0):
        return "Triton needs compute capability 8.0"
    try:
        _kernels()
    except ImportError as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What of a device decides how the kernels run on it."""

    capability: tuple[int, int]
    multiprocessors: int


def chip_of(device: torch.device) -> Chip:
    """Ask the driver, once a device."""
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _chip(index: int) -> Chip:
    return Chip(
        capability=torch.cuda.get_device_capability(index),
        multiprocessors=torch.cuda.get_device_properties(index).multi_processor_count,
    )


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Launch there, on its current stream."""
    return torch.cuda.device(device)


def name(device: torch.device) -> str:
    """The compute capability that code is compiled for."""
    major, minor = chip_of(device).capability
    return f"triton sm_{major}{minor}"


def rows_of_a_slice(inputs: HeadInputs) -> int:
    """Tokens whose sums of chunks and of groups take about 56 MiB; whole tiles, evenly many."""
    vocabulary = len(inputs.lm_head)
    parts = -(-vocabulary // _schedules(inputs).many.block_v) - (-vocabulary // GROUP)
    most = max(_WORKSPACE_BYTES // (PARTIAL_BYTES * parts) // ROWS, 1) * ROWS
    slices = max(-(-len(inputs.hidden) // most), 1)
    return max(-(-len(inputs.hidden) // slices // ROWS), 1) * ROWS


def partial_sums(inputs: HeadInputs, rows: slice) -> PartialSums:
    """The groups' partial sums of some rows, (groups, rows), on the current stream.

    Nothing is copied, whatever the strides, and nothing waits for the device. The bits of a row
    depend on that row, the head, the dtype and the device, but not on the other rows. A target that
    is negative, or beyond a whole head, gets a target logit of NaN.
    """
    hidden, lm_head = inputs.hidden[rows].detach(), inputs.lm_head.detach()
    targets = inputs.targets[rows].contiguous()
    bias = inputs.bias
    tokens, width = hidden.shape
    vocabulary = len(lm_head)
    schedules = _schedules(inputs)
    tile = schedules.few if tokens <= schedules.few.block_t else schedules.many
    chunks = PartialSums.empty(-(-vocabulary // tile.block_v), tokens, hidden.device)
    if tokens == 0:
        return _folded(chunks, run=GROUP // tile.block_v)
    has_tma = schedules.tma and _takes_tma(hidden) and _takes_tma(lm_head)
    tiles = -(-tokens // tile.block_t) * chunks.shape[0]
    programs = min(tiles, chip_of(hidden.device).multiprocessors * tile.programs)
    with on_device(hidden.device):
        _kernels().head_partials_kernel[(programs,)](
            _blocks(hidden, tile.block_t, tile.block_d) if has_tma else hidden,
            _blocks(lm_head, tile.block_v, tile.block_d) if has_tma else lm_head,
            None if bias is None else bias.detach().to(torch.float32).contiguous(),
            targets,
            *_pointers(chunks),
            tokens,
            vocabulary,
            width,
            *hidden.stride(),
            *lm_head.stride(),
            inputs.first_word or 0,
            vocabulary - 1 if inputs.first_word is None else LAST_WORD,
            _panel_tiles(-(-tokens // tile.block_t), tile.panel),
            inputs.scale,
            inputs.softcap or 1.0,
            1.0 / (inputs.softcap or 1.0),
            HAS_TMA=has_tma,
            HAS_BIAS=bias is not None,
            HAS_SCALE=inputs.scale != 1.0,
            HAS_SOFTCAP=inputs.softcap is not None,
            ONLY_LOGPROBS=inputs.only_logprobs,
            EVEN_D=width % tile.block_d == 0,
            BLOCK_T=tile.block_t,
            BLOCK_V=tile.block_v,
            BLOCK_D=tile.block_d,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return _folded(chunks, run=GROUP // tile.block_v)


def fold(parts: PartialSums, total: PartialSums | None = None) -> PartialSums:
    """The parts folded left to right, (1, T), into a copy of what lies to their left, if given."""
    return _folded(parts, run=parts.shape[0], total=total)


def write_statistics(total: PartialSums, found: TokenStatistics) -> None:
    """Fill `found` (T,) with the statistics of sums (1, T)."""
    tokens = total.shape[1]
    if tokens == 0:
        return
    with on_device(total.max.device):
        _kernels().statistics_kernel[(-(-tokens // ROWS),)](
            *_pointers(total),
            found.logprobs,
            found.lse,
            found.target_logits,
            found.entropy,
            found.argmax,
            tokens,
            BLOCK_T=ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _folded(parts: PartialSums, *, run: int, total: PartialSums | None = None) -> PartialSums:
    """Each run of parts as one, (runs, T)."""
    count, tokens = parts.shape
    runs = -(-count // run)
    folded = (
        PartialSums.empty(runs, tokens, parts.max.device)
        if total is None
        else PartialSums.joined(total)  # a copy
    )
    if tokens == 0:
        return folded
    with on_device(parts.max.device):
        _kernels().fold_kernel[(-(-tokens // FOLD_ROWS) * runs,)](
            *_pointers(parts),
            *_pointers(folded),
            count,
            tokens,
            run,
            HAS_TOTAL=total is not None,
            BLOCK_T=FOLD_ROWS,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return folded


def _kernels() -> ModuleType:
    from . import triton_head

    return triton_head


def _schedules(inputs: HeadInputs) -> Schedules:
    return schedules_of(chip_of(inputs.hidden.device).capability, inputs.hidden.dtype)


def _panel_tiles(tiles: int, most: int) -> int:
    """So many that all panels are about equally full."""
    return -(-tiles // -(-tiles // most))


def _takes_tma(matrix: Tensor) -> bool:
    """If a tensor memory descriptor can describe the matrix."""
    row, column = matrix.stride()
    return (
        column == 1
        and row >= matrix.shape[1]
        and row * matrix.element_size() % _TMA_BYTES == 0
        and matrix.data_ptr() % _TMA_BYTES == 0
    )


def _blocks(matrix: Tensor, rows: int, columns: int) -> Any:
    return _kernels().TensorDescriptor.from_tensor(matrix, [rows, columns])


def _pointers(sums: PartialSums) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return sums.max, sums.sum, sums.weighted_sum, sums.target_logits, sums.argmax

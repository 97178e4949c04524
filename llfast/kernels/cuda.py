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
from .tuning import Schedules, Tile, schedules_of

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
    tokens, vocabulary = len(hidden), len(lm_head)
    tile, has_tma = _tile(_schedules(inputs), hidden, lm_head)
    chunks = PartialSums.empty(-(-vocabulary // tile.block_v), tokens, hidden.device)
    if tokens == 0:
        return _folded(chunks, run=GROUP // tile.block_v)
    t_tiles = -(-tokens // tile.block_t)
    most = chip_of(hidden.device).multiprocessors * tile.programs
    grid = (min(t_tiles * chunks.shape[0], most),)
    bias, softcap = inputs.bias, inputs.softcap
    arguments = {
        "bias_ptr": None if bias is None else bias.detach().to(torch.float32).contiguous(),
        "targets_ptr": inputs.targets[rows].contiguous(),
        **_pointers(chunks),
        "tokens": tokens,
        "vocabulary": vocabulary,
        "width": hidden.shape[1],
        "first_word": inputs.first_word or 0,
        "last_target": vocabulary - 1 if inputs.first_word is None else LAST_WORD,
        "panel_tiles": _panel_tiles(t_tiles, tile.panel),
        "scale": inputs.scale,
        "softcap": softcap or 1.0,
        "inverse_softcap": 1.0 / (softcap or 1.0),
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": inputs.scale != 1.0,
        "HAS_SOFTCAP": softcap is not None,
        "ONLY_LOGPROBS": inputs.only_logprobs,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "num_warps": tile.warps,
        "enable_fp_fusion": True,
    }
    with on_device(hidden.device):
        if tile.specialised:
            _launch_specialised(grid, tile, hidden, lm_head, arguments)
        else:
            _launch(grid, tile, hidden, lm_head, arguments, has_tma=has_tma)
    return _folded(chunks, run=GROUP // tile.block_v)


def _tile(schedules: Schedules, hidden: Tensor, lm_head: Tensor) -> tuple[Tile, bool]:
    """The one for so many tokens, and whether descriptors can load it."""
    has_tma = schedules.tma and _takes_tma(hidden) and _takes_tma(lm_head)
    if len(hidden) <= schedules.few.block_t:
        return schedules.few, has_tma
    if has_tma and schedules.specialised is not None and _specialised_kernels() is not None:
        return schedules.specialised, has_tma
    return schedules.many, has_tma


def _launch(
    grid: tuple[int],
    tile: Tile,
    hidden: Tensor,
    lm_head: Tensor,
    arguments: dict[str, Any],
    *,
    has_tma: bool,
) -> None:
    kernels = _kernels()
    matrices = {}
    for which, matrix, rows in (
        ("hidden", hidden, tile.block_t),
        ("lm_head", lm_head, tile.block_v),
    ):
        block = [rows, tile.block_d]
        matrices[which] = kernels.TensorDescriptor.from_tensor(matrix, block) if has_tma else matrix
    kernels.head_partials_kernel[grid](
        **matrices,
        **arguments,
        hidden_stride_t=hidden.stride(0),
        hidden_stride_d=hidden.stride(1),
        lm_head_stride_v=lm_head.stride(0),
        lm_head_stride_d=lm_head.stride(1),
        HAS_TMA=has_tma,
        EVEN_D=hidden.shape[1] % tile.block_d == 0,
        BLOCK_T=tile.block_t,
        num_stages=tile.stages,
    )


def _launch_specialised(
    grid: tuple[int], tile: Tile, hidden: Tensor, lm_head: Tensor, arguments: dict[str, Any]
) -> None:
    kernels = _specialised_kernels()
    assert kernels is not None
    assert tile.block_t == kernels.GROUPS * kernels.ROWS
    kernels.head_partials_kernel[grid](
        hidden=kernels.boxes(hidden, kernels.ROWS, tile.block_d),
        lm_head=kernels.boxes(lm_head, tile.block_v, tile.block_d),
        **arguments,
        STAGES=tile.stages,
        maxnreg=kernels.REGISTERS_AT_START,
    )


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
            *_pointers(total).values(),
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
            *_pointers(parts).values(),
            *_pointers(folded).values(),
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


@functools.cache
def _specialised_kernels() -> ModuleType | None:
    try:
        from . import gluon_head
    except (ImportError, AttributeError):  # the latter of an experimental module that has changed
        return None
    return gluon_head


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


def _pointers(sums: PartialSums) -> dict[str, Tensor]:
    """By the name and in the order of the kernels' parameters."""
    return {
        "max_ptr": sums.max,
        "sum_ptr": sums.sum,
        "weighted_sum_ptr": sums.weighted_sum,
        "target_logits_ptr": sums.target_logits,
        "argmax_ptr": sums.argmax,
    }

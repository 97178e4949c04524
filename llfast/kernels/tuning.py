"""Which tiles the Triton kernel computes, by architecture and dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One way to run the kernel of `triton_head.py`, or of `gluon_head.py` if `specialised`."""

    block_t: int
    block_v: int  # a chunk of the vocabulary
    block_d: int
    warps: int
    stages: int
    panel: int = 16  # tiles of tokens that pass over the head together
    programs: int = 1  # a multiprocessor
    specialised: bool = False  # one warp loads, and groups of `warps` multiply


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedules:
    """A tile for many tokens, and one for at most `few.block_t` of them.

    All must give a row the same bits, so they share `block_v` and, as compiled, the instruction
    that multiplies and the threads that reduce a row; a test looks at the compiled code.
    """

    many: Tile
    few: Tile
    tma: bool = False  # loads through tensor memory descriptors, where the layout allows
    specialised: Tile | None = None  # for many tokens, where it does and this Triton can


def _one(tile: Tile, *, tma: bool = False) -> Schedules:
    return Schedules(many=tile, few=tile, tma=tma)


# Chosen by what the compiler makes of them (registers, shared memory); none is measured yet.
_AMPERE = Tile(block_t=128, block_v=128, block_d=32, warps=8, stages=4)
_HOPPER = Schedules(
    many=Tile(block_t=128, block_v=256, block_d=64, warps=8, stages=4),
    # Half the arithmetic on rows that are not there, and as much of the head in flight.
    few=Tile(block_t=64, block_v=256, block_d=64, warps=4, stages=5),
    tma=True,
    specialised=Tile(block_t=128, block_v=256, block_d=64, warps=4, stages=4, specialised=True),
)
_BLACKWELL = Tile(block_t=128, block_v=128, block_d=64, warps=8, stages=4)
# fp32 runs without tensor cores, which would round to tf32.
_FP32 = Tile(block_t=64, block_v=128, block_d=16, warps=8, stages=3, programs=2)

SCHEDULES = {
    (80, torch.bfloat16): _one(_AMPERE),
    (80, torch.float16): _one(_AMPERE),
    (80, torch.float32): _one(_FP32),
    (90, torch.bfloat16): _HOPPER,
    (90, torch.float16): _HOPPER,
    (90, torch.float32): _one(_FP32),
    (100, torch.bfloat16): _one(_BLACKWELL, tma=True),
    (100, torch.float16): _one(_BLACKWELL, tma=True),
    (100, torch.float32): _one(_FP32),
}
# By the major number of a compute capability. Those left out have no more shared memory than
# sm_86, for which the tiles of sm_80 are small enough.
_ARCHITECTURES = {9: 90, 10: 100, 11: 100}


def schedules_of(capability: tuple[int, int], dtype: torch.dtype) -> Schedules:
    """The table's row for a device of some compute capability, (8, 0) or newer."""
    return SCHEDULES[_ARCHITECTURES.get(capability[0], 80), dtype]

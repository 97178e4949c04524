"""The first kernel of `triton_head.py` once more, for Hopper and many tokens: specialised warps.

    one warp                 loads boxes of both matrices into a ring in shared memory
    GROUPS of four warps     multiply 64 rows each, and reduce them, each at its own pace

The first group starts ahead of the second, by half the ring, so that they do not reduce their tiles
at once: the tensor cores work for the other one meanwhile. Products and sums are those of
`triton_head.py`, and so are the bits.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import triton_head

# Gluon is experimental; these are the versions whose code tests/ptx has run.
if ".".join(triton.__version__.split(".")[:2]) not in ("3.6", "3.7", "3.8", "3.9"):
    raise ImportError(f"Gluon must be that of Triton 3.6 to 3.9, got {triton.__version__}")
if triton.knobs.runtime.interpret:
    raise ImportError("Triton does not interpret Gluon")

__all__ = ["GROUPS", "REGISTERS_AT_START", "ROWS", "boxes", "head_partials_kernel"]

GROUPS = 2
ROWS = 64  # of a group
# A thread's: what twelve warps have when they start is what two groups and four warps, of which
# one loads, divide among themselves.
REGISTERS_AT_START = 168
_GROUP_REGISTERS = gl.constexpr(240)
_LOADER_REGISTERS = gl.constexpr(24)
_GROUPS, _ROWS = gl.constexpr(GROUPS), gl.constexpr(ROWS)
_reduce_tile = gluon.jit(triton_head.reduce_tile.fn)
_tile_place = gluon.jit(triton_head.tile_place.fn)
# Triton 3.9 has given it another name.
_load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


def boxes(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of a half-precision matrix whose rows are contiguous."""
    dtype = gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


@gluon.jit
def _load(
    hidden,
    lm_head,
    ring,
    sizes,
    STAGES: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
):
    """Fill each place of the ring as soon as all groups have left it."""
    hidden_ring, lm_head_ring, full, empty, _ = ring
    tokens, vocabulary, width, panel_tiles = sizes
    BYTES: gl.constexpr = _GROUPS * hidden.block_type.nbytes + lm_head.block_type.nbytes
    t_tiles = gl.cdiv(tokens, _GROUPS * _ROWS)
    chunks = gl.cdiv(vocabulary, BLOCK_V)
    stage = 0
    phase = 1  # all places are empty
    for tile in range(gl.program_id(0), t_tiles * chunks, gl.num_programs(0)):
        t_tile, chunk = _tile_place(tile, t_tiles, chunks, panel_tiles)
        for d in range(0, width, BLOCK_D):
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            mbarrier.expect(arrived, BYTES)
            _load_box(lm_head, [chunk * BLOCK_V, d], arrived, lm_head_ring.index(stage))
            for group in gl.static_range(_GROUPS):
                first_row = (t_tile * _GROUPS + group) * _ROWS
                place = hidden_ring.index(stage * _GROUPS + group)
                _load_box(hidden, [first_row, d], arrived, place)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _multiply(
    GROUP: gl.constexpr,
    ring,
    sizes,
    targets_ptr,
    sums,
    options,
    first_word,
    last_target,
    HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    ONLY_LOGPROBS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
):
    """A group's rows of each tile."""
    hidden_ring, lm_head_ring, full, empty, ahead = ring
    tokens, vocabulary, width, panel_tiles = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_V, 16]
    )
    offs_t = gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    offs_v = gl.arange(0, BLOCK_V, gl.SliceLayout(0, layout))
    t_tiles = gl.cdiv(tokens, _GROUPS * _ROWS)
    chunks = gl.cdiv(vocabulary, BLOCK_V)
    stage = 0
    phase = 0
    before = 0  # the stage of the product before
    steps = 0
    if GROUP == 1:
        mbarrier.wait(ahead, 0)
    for tile in range(gl.program_id(0), t_tiles * chunks, gl.num_programs(0)):
        t_tile, chunk = _tile_place(tile, t_tiles, chunks, panel_tiles)
        logits = gl.zeros((_ROWS, BLOCK_V), gl.float32, layout)
        for d in range(0, width, BLOCK_D):
            mbarrier.wait(full.index(stage), phase)
            h = hidden_ring.index(stage * _GROUPS + GROUP)
            w = lm_head_ring.index(stage).permute((1, 0))
            logits = warpgroup_mma(h, w, logits, is_async=True)
            # The product before has ended, and its place may be filled again.
            logits = warpgroup_mma_wait(1, deps=(logits,))
            mbarrier.arrive(empty.index(before), pred=d > 0)
            before = stage
            if GROUP == 0:
                steps += 1
                mbarrier.arrive(ahead, pred=steps == STAGES // 2)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        logits = warpgroup_mma_wait(0, deps=(logits,))
        mbarrier.arrive(empty.index(before))
        _reduce_tile(
            logits,
            (t_tile * _GROUPS + GROUP) * _ROWS + offs_t,
            offs_v,
            chunk,
            targets_ptr,
            sums,
            options,
            tokens,
            vocabulary,
            first_word,
            last_target,
            HAS_BIAS,
            HAS_SCALE,
            HAS_SOFTCAP,
            ONLY_LOGPROBS,
            BLOCK_V,
        )
    if GROUP == 0:
        mbarrier.arrive(ahead, pred=steps < STAGES // 2)


@gluon.jit(
    do_not_specialize=triton_head.SIZES, do_not_specialize_on_alignment=triton_head.ADDRESSES
)
def head_partials_kernel(
    hidden,  # (T, D): a descriptor of (ROWS, BLOCK_D)
    lm_head,  # (V, D): a descriptor of (BLOCK_V, BLOCK_D)
    bias_ptr,  # (V,) fp32; not read without HAS_BIAS
    targets_ptr,  # (T,)
    max_ptr,  # (chunks, T), as are the next four
    sum_ptr,
    weighted_sum_ptr,
    target_logits_ptr,
    argmax_ptr,
    tokens,
    vocabulary,
    width,
    first_word,
    last_target,
    panel_tiles,
    scale,
    softcap,
    inverse_softcap,
    HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    ONLY_LOGPROBS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
):
    """What `triton_head.head_partials_kernel` computes, two groups a program."""
    hidden_ring = gl.allocate_shared_memory(
        hidden.dtype, [STAGES * _GROUPS, _ROWS, BLOCK_D], hidden.layout
    )
    lm_head_ring = gl.allocate_shared_memory(
        lm_head.dtype, [STAGES, BLOCK_V, BLOCK_D], lm_head.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ahead = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ahead, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=_GROUPS)
    ring = (hidden_ring, lm_head_ring, full, empty, ahead)
    sizes = (tokens, vocabulary, width, panel_tiles)
    sums = (max_ptr, sum_ptr, weighted_sum_ptr, target_logits_ptr, argmax_ptr)
    options = (bias_ptr, scale, softcap, inverse_softcap)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (
                gl.constexpr(0), ring, sizes, targets_ptr, sums, options, first_word, last_target,
                HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, ONLY_LOGPROBS, STAGES, BLOCK_V, BLOCK_D,
            )),
            (_multiply, (
                gl.constexpr(1), ring, sizes, targets_ptr, sums, options, first_word, last_target,
                HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, ONLY_LOGPROBS, STAGES, BLOCK_V, BLOCK_D,
            )),
            (_load, (hidden, lm_head, ring, sizes, STAGES, BLOCK_V, BLOCK_D)),
        ],
        [4, 1],
        [_GROUP_REGISTERS, _LOADER_REGISTERS],
    )
    # fmt: on

"""The Triton kernels, and the only file that imports Triton; `cuda.py` launches them.

    hidden (T, D), lm_head (V, D) ── head_partials_kernel ─▶ sums of chunks of BLOCK_V words
                                  ── fold_kernel ─▶ sums of groups of 1,024 words, (groups, T)
                                  ── fold_kernel ─▶ sums of all words, (1, T)
                                  ── statistics_kernel ─▶ log-probabilities, entropies, ... (T,)

Every number is made in one order: a product runs along the width, a chunk is reduced within its
tile, chunks are folded into groups and groups into the whole from left to right. Which program
computes a tile, and when, changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["TensorDescriptor", "fold_kernel", "head_partials_kernel", "statistics_kernel"]

# One compilation serves all sizes, and all addresses of what is no matrix.
SIZES = "tokens vocabulary width first_word last_target panel_tiles parts run".split()
ADDRESSES = (
    "bias_ptr targets_ptr max_ptr sum_ptr weighted_sum_ptr target_logits_ptr argmax_ptr "
    "total_max_ptr total_sum_ptr total_weighted_sum_ptr total_target_logits_ptr total_argmax_ptr "
    "sums_target_logits_ptr sums_argmax_ptr logprobs_ptr lse_ptr entropy_ptr"
).split()
_LOG2_E = tl.constexpr(1.4426950408889634)
# e^-104 rounds to 0 in fp32, and a finite exponent keeps 0 * -inf from making a NaN.
_LOWEST_EXPONENT = tl.constexpr(-104.0)
_NO_COLUMN = tl.constexpr(1 << 30)
_NAN_WINS = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def tanh(x):
    """Within 4 ulp: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    size = tl.abs(x)
    square = x * x
    near = 0.0066102213 * square - 0.021309384
    near = near * square + 0.053909428
    near = near * square - 0.13333114
    near = near * square + 0.33333332
    near = x - x * square * near
    far = 1.0 - 2.0 / (exp(2.0 * size) + 1.0)
    return tl.where(size < 0.55, near, tl.where(x < 0.0, -far, far))


@triton.jit
def tile_place(tile, t_tiles, chunks, panel_tiles):
    """Which tile of tokens, and which chunk: a panel of tokens meets one chunk after the other."""
    panel = tile // (panel_tiles * chunks)
    place = tile - panel * (panel_tiles * chunks)
    first_tile = panel * panel_tiles
    tiles_here = tl.minimum(t_tiles - first_tile, panel_tiles)
    return first_tile + place % tiles_here, place // tiles_here


@triton.jit
def reduce_tile(
    logits,  # (rows, columns) fp32, products alone
    rows,
    offs_v,  # of the columns, within the chunk
    chunk,
    targets_ptr,
    sums,  # the five pointers to what is stored
    options,  # (bias_ptr, scale, softcap, inverse_softcap)
    tokens,
    vocabulary,
    first_word,
    last_target,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ONLY_LOGPROBS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The partial sums of one tile, stored. Nothing here makes a tensor, so Gluon can call it."""
    max_ptr, sum_ptr, weighted_sum_ptr, target_logits_ptr, argmax_ptr = sums
    bias_ptr, scale, softcap, inverse_softcap = options
    first_column = chunk * BLOCK_V
    columns = first_column + offs_v
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < vocabulary, other=0.0)
        logits += bias[None, :]
    if HAS_SCALE:
        logits *= scale
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits * inverse_softcap)
    # Everywhere: under a condition, or without this where no column is beyond V, ptxas may have
    # to run the instructions of the product one by one.
    logits += tl.where(columns < vocabulary, 0.0, float("-inf"))[None, :]

    mask_t = rows < tokens
    target = tl.load(targets_ptr + rows, mask=mask_t, other=0)
    refused = (target < 0) | (target > last_target)
    column = target.to(tl.int32) - first_word - first_column
    inside = (column >= 0) & (column < BLOCK_V) & (refused == 0)
    target_logit = tl.where(inside, float("nan"), float("-inf"))
    if tl.max(inside.to(tl.int32), axis=0) > 0:  # one tile in several
        is_target = offs_v[None, :] == column[:, None]
        # A sum, not a maximum: a NaN must stay.
        found = tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        target_logit = tl.where(inside, found, target_logit)
    if chunk == 0:
        target_logit = tl.where(refused, float("nan"), target_logit)

    largest = tl.max(logits, axis=1)
    # -inf - (-inf) would be NaN where every word of a chunk is ruled out.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    if ONLY_LOGPROBS:  # a third fewer instructions, and the same bits
        total = tl.sum(exp(logits - shift[:, None]), axis=1)
        argmax = rows * 0
        weighted_sum = argmax.to(tl.float32)
    else:
        is_largest = logits == largest[:, None]
        places = tl.where(is_largest, offs_v[None, :], _NO_COLUMN)
        argmax = tl.min(places, axis=1) + (first_word + first_column)
        exponents = logits - shift[:, None]
        exponents = tl.maximum(exponents, _LOWEST_EXPONENT, propagate_nan=_NAN_WINS)
        exponentials = exp(exponents)
        # In this order, ptxas for sm_90 needs no memory for registers.
        weighted_sum = tl.sum(exponentials * exponents, axis=1)
        total = tl.sum(exponentials, axis=1)

    offs = chunk.to(tl.int64) * tokens + rows
    tl.store(max_ptr + offs, largest, mask=mask_t)
    tl.store(sum_ptr + offs, total, mask=mask_t)
    tl.store(weighted_sum_ptr + offs, weighted_sum, mask=mask_t)
    tl.store(target_logits_ptr + offs, target_logit, mask=mask_t)
    tl.store(argmax_ptr + offs, argmax, mask=mask_t)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ADDRESSES)
def head_partials_kernel(
    hidden,  # (T, D): a descriptor of (BLOCK_T, BLOCK_D) with HAS_TMA, else a pointer
    lm_head,  # (V, D): a descriptor of (BLOCK_V, BLOCK_D) with HAS_TMA, else a pointer
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
    hidden_stride_t,
    hidden_stride_d,
    lm_head_stride_v,
    lm_head_stride_d,
    first_word,
    last_target,  # targets beyond it, and negative ones, get a logit of NaN
    panel_tiles,  # so many tiles of tokens pass over the head together
    scale,
    softcap,
    inverse_softcap,
    HAS_TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ONLY_LOGPROBS: tl.constexpr,  # weighted sums and arg maxima are left out, as zeros
    EVEN_D: tl.constexpr,  # the width is a multiple of BLOCK_D
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The partial sums of each chunk of BLOCK_V words; programs take tiles in turn.

    Tiles are ordered so that a panel of tokens stays in L2 while the head streams past it once.
    """
    tl.assume(width > 0)
    t_tiles = tl.cdiv(tokens, BLOCK_T)
    chunks = tl.cdiv(vocabulary, BLOCK_V)
    # Flattened, the loads of the next tile run ahead while this one is reduced.
    for tile in tl.range(tl.program_id(0), t_tiles * chunks, tl.num_programs(0), flatten=HAS_TMA):
        t_tile, chunk = tile_place(tile, t_tiles, chunks, panel_tiles)
        first_row = t_tile * BLOCK_T
        first_column = chunk * BLOCK_V
        rows = first_row + tl.arange(0, BLOCK_T)
        columns = first_column + tl.arange(0, BLOCK_V)

        logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        if HAS_TMA:
            for d in range(0, width, BLOCK_D):
                h = hidden.load([first_row, d])
                w = lm_head.load([first_column, d])
                logits = tl.dot(h, w.T, logits, input_precision="ieee")
        else:
            offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
            # What lies past the end is the last row again, and is dropped below.
            offs_t = tl.minimum(rows, tokens - 1).to(tl.int64)
            offs_v = tl.minimum(columns, vocabulary - 1).to(tl.int64)
            h_ptrs = hidden + offs_t[:, None] * hidden_stride_t + offs_d[None, :] * hidden_stride_d
            w_ptrs = lm_head + offs_v[None, :] * lm_head_stride_v
            w_ptrs += offs_d[:, None] * lm_head_stride_d
            h_step = tl.cast(hidden_stride_d, tl.int64) * BLOCK_D
            w_step = tl.cast(lm_head_stride_d, tl.int64) * BLOCK_D
            for d in range(0, width, BLOCK_D):
                if EVEN_D:
                    h = tl.load(h_ptrs)
                    w = tl.load(w_ptrs)
                else:
                    mask_d = offs_d < width - d
                    h = tl.load(h_ptrs, mask=mask_d[None, :], other=0.0)
                    w = tl.load(w_ptrs, mask=mask_d[:, None], other=0.0)
                logits = tl.dot(h, w, logits, input_precision="ieee")
                h_ptrs += h_step
                w_ptrs += w_step

        reduce_tile(
            logits,
            rows,
            tl.arange(0, BLOCK_V),
            chunk,
            targets_ptr,
            (max_ptr, sum_ptr, weighted_sum_ptr, target_logits_ptr, argmax_ptr),
            (bias_ptr, scale, softcap, inverse_softcap),
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


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ADDRESSES)
def fold_kernel(
    max_ptr,  # (parts, T), as are the next four
    sum_ptr,
    weighted_sum_ptr,
    target_logits_ptr,
    argmax_ptr,
    total_max_ptr,  # (runs, T), as are the next four; read first with HAS_TOTAL
    total_sum_ptr,
    total_weighted_sum_ptr,
    total_target_logits_ptr,
    total_argmax_ptr,
    parts,
    tokens,
    run,
    HAS_TOTAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Each run of parts folded into one, from left to right."""
    t_blocks = tl.cdiv(tokens, BLOCK_T)
    index = tl.program_id(0) // t_blocks  # of the run
    rows = tl.program_id(0) % t_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = rows < tokens
    place = index.to(tl.int64) * tokens + rows
    if HAS_TOTAL:
        largest = tl.load(total_max_ptr + place, mask=mask_t, other=0.0)
        total = tl.load(total_sum_ptr + place, mask=mask_t, other=0.0)
        weighted_sum = tl.load(total_weighted_sum_ptr + place, mask=mask_t, other=0.0)
        target_logit = tl.load(total_target_logits_ptr + place, mask=mask_t, other=0.0)
        argmax = tl.load(total_argmax_ptr + place, mask=mask_t, other=0)
    else:
        largest = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_T,), dtype=tl.float32)
        weighted_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
        target_logit = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
        argmax = tl.zeros((BLOCK_T,), dtype=tl.int32)
    first = index * run
    offs = first.to(tl.int64) * tokens + rows
    # Unrolled, so that loads run ahead of the chain of sums.
    for _ in tl.range(tl.minimum(parts - first, run), loop_unroll_factor=4):
        part_largest = tl.load(max_ptr + offs, mask=mask_t, other=0.0)
        part_sum = tl.load(sum_ptr + offs, mask=mask_t, other=0.0)
        part_weighted = tl.load(weighted_sum_ptr + offs, mask=mask_t, other=0.0)
        part_target = tl.load(target_logits_ptr + offs, mask=mask_t, other=0.0)
        part_argmax = tl.load(argmax_ptr + offs, mask=mask_t, other=0)
        offs += tokens

        argmax = tl.where(part_largest > largest, part_argmax, argmax)
        before = largest
        largest = tl.maximum(before, part_largest)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        x = tl.maximum(before - shift, _LOWEST_EXPONENT, propagate_nan=_NAN_WINS)
        y = tl.maximum(part_largest - shift, _LOWEST_EXPONENT, propagate_nan=_NAN_WINS)
        weighted_sum = (weighted_sum + total * x) * exp(x)
        weighted_sum += (part_weighted + part_sum * y) * exp(y)
        total = total * exp(x) + part_sum * exp(y)
        # At most one side holds the target, the other has -inf; a NaN stays.
        target_logit = tl.maximum(target_logit, part_target, propagate_nan=_NAN_WINS)
    tl.store(total_max_ptr + place, largest, mask=mask_t)
    tl.store(total_sum_ptr + place, total, mask=mask_t)
    tl.store(total_weighted_sum_ptr + place, weighted_sum, mask=mask_t)
    tl.store(total_target_logits_ptr + place, target_logit, mask=mask_t)
    tl.store(total_argmax_ptr + place, argmax, mask=mask_t)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ADDRESSES)
def statistics_kernel(
    max_ptr,  # (T,), as are all others
    sum_ptr,
    weighted_sum_ptr,
    sums_target_logits_ptr,
    sums_argmax_ptr,
    logprobs_ptr,
    lse_ptr,
    target_logits_ptr,
    entropy_ptr,
    argmax_ptr,
    tokens,
    BLOCK_T: tl.constexpr,
):
    """What sums over all words say, rounded once from fp64."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = rows < tokens
    largest = tl.load(max_ptr + rows, mask=mask_t, other=0.0).to(tl.float64)
    total = tl.load(sum_ptr + rows, mask=mask_t, other=1.0).to(tl.float64)
    weighted_sum = tl.load(weighted_sum_ptr + rows, mask=mask_t, other=0.0).to(tl.float64)
    target_logit = tl.load(sums_target_logits_ptr + rows, mask=mask_t, other=0.0)
    argmax = tl.load(sums_argmax_ptr + rows, mask=mask_t, other=0)
    log_sum = tl.log(total)
    # z - max first: z and log-sum-exp are both large, their difference need not be.
    logprob = (target_logit.to(tl.float64) - largest) - log_sum
    tl.store(logprobs_ptr + rows, logprob.to(tl.float32), mask=mask_t)
    tl.store(lse_ptr + rows, (largest + log_sum).to(tl.float32), mask=mask_t)
    tl.store(target_logits_ptr + rows, target_logit, mask=mask_t)
    entropy = log_sum - weighted_sum / total
    tl.store(entropy_ptr + rows, entropy.to(tl.float32), mask=mask_t)
    tl.store(argmax_ptr + rows, argmax.to(tl.int64), mask=mask_t)

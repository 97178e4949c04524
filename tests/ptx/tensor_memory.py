"""Products of sm_100: `tcgen05`, whose sums stay in a memory of the tensor cores' own.

Source: NVIDIA's PTX ISA, "tensor memory" and "tcgen05 instruction descriptor".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import ALL, LANES, Machine, Warp
from .memory import TENSOR_COLUMNS, TENSOR_ROWS
from .operands import LANE, address, assign, one, source
from .tensor_cores import matrix_of

_FORMATS = {0: "f16", 1: "bf16"}


def _row(place: int, warp: Warp) -> int:
    """The row that an address names; a warp reaches a quarter of them."""
    row = place >> 16
    assert row // LANES == warp.index % 4, "a warp reaches into another's rows"
    return row


def _allocate(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    place_of, count = address(operands[0], machine), int(operands[1])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        block = warp.block
        assert block.tensors.taken + count <= TENSOR_COLUMNS
        place = block.shared.at(np.array([one(place_of(warp), ALL)]), 4)
        block.shared.data.view(np.uint32)[place // 4] = block.tensors.taken
        block.tensors.taken += count

    return run


def _free(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    count = int(operands[1])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        tensors = warp.block.tensors
        assert tensors.done == len(tensors.products), "products that nobody waited for"
        tensors.taken -= count

    return run


def _store(found: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """A lane a row, a register a column."""
    place_of = address(operands[0], machine)
    values = [source(each.strip(), "u4", machine) for each in operands[1].strip("{} ").split(",")]
    assert len(values) == int(found[1])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        place = one(place_of(warp), ALL)
        row, column = _row(place, warp), place & 0xFFFF
        data = warp.block.tensors.data
        for i, value in enumerate(values):
            data[row : row + LANES, column + i] = value(warp)

    return run


def _load(found: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """16 rows; the upper lanes take columns that begin elsewhere."""
    names = [each.strip() for each in operands[0].strip("{} ").split(",")]
    place_of, apart = address(operands[1], machine), int(operands[2])
    assert len(names) == int(found[1])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        place = one(place_of(warp), ALL)
        rows = _row(place, warp) + LANE % 16
        columns = (place & 0xFFFF) + apart * (LANE // 16)
        data = warp.block.tensors.data
        for i, name in enumerate(names):
            assign(warp, name, data[rows, columns + i], ALL)

    return run


def _multiply(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """By one thread, for all: sums (M, N) at an address."""
    place_of = address(operands[0], machine)
    left_of, right_of = (source(each, "u8", machine) for each in operands[1:3])
    described = source(operands[3], "u4", machine)
    adds = source(operands[4], "?", machine)

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is not ALL
        assert mask.sum() == 1
        what = one(described(warp), mask)
        dtype = _FORMATS[what >> 7 & 7]
        assert what >> 4 & 3 == 1, "sums are in fp32"
        assert what >> 10 & 7 == what >> 7 & 7, "both of one dtype"
        rows, columns = (what >> 24 & 31) << 4, (what >> 17 & 63) << 3
        assert rows == TENSOR_ROWS
        by_columns = [bool(what >> bit & 1) for bit in (15, 16)]
        column = one(place_of(warp), mask)
        left, right = (one(each(warp), mask) for each in (left_of, right_of))
        adding = bool(one(adds(warp), mask))
        tensors = warp.block.tensors

        def multiply() -> None:
            a = matrix_of(warp, left, np.arange(rows), dtype, by_columns=by_columns[0])
            b = matrix_of(warp, right, np.arange(columns), dtype, by_columns=by_columns[1])
            sums = tensors.data[:, column : column + columns].view(np.float32)
            # In blocks of 16 rows, so that a row has the same bits in every place.
            for first in range(0, rows, 16):
                own = slice(first, first + 16)
                sums[own] = (a[own] @ b.T + (sums[own] if adding else 0)).astype(np.float32)

        tensors.products.append(multiply)
        if machine.timing.early_products:
            tensors.finish(len(tensors.products))

    return run


def _commit(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """Arrive at a barrier once all products so far have ended."""
    place_of = address(operands[0], machine)

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is not ALL
        assert mask.sum() == 1
        block = warp.block
        barrier = block.mbarrier(one(place_of(warp), mask))
        count = len(block.tensors.products)

        def arrive() -> None:
            block.tensors.finish(count)
            barrier.arrive()

        if machine.timing.early_products:
            arrive()
        else:
            block.transfers.append(arrive)

    return run


def _nothing(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    return lambda warp, mask: None


TENSOR_MEMORY: dict[str, Callable[..., Any]] = {
    r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32": _allocate,
    r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32": _free,
    r"tcgen05\.relinquish_alloc_permit\.cta_group::1\.sync\.aligned": _nothing,
    r"tcgen05\.st\.sync\.aligned\.32x32b\.x(\d+)\.b32": _store,
    r"tcgen05\.ld\.sync\.aligned\.16x32bx2\.x(\d+)\.b32": _load,
    r"tcgen05\.wait::(?:ld|st)\.sync\.aligned": _nothing,
    r"tcgen05\.fence::\w+": _nothing,
    r"tcgen05\.mma\.cta_group::1\.kind::f16": _multiply,
    r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(?:\.shared::cluster)?\.b64": _commit,
}

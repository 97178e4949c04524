"""Products on tensor cores: `wgmma` of sm_90, `mma.sync` and `ldmatrix` of sm_80."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .machine import ALL, LANES, Machine, Warp
from .memory import swizzled
from .operands import LANE, address, source

_K = 16  # elements of the width that one product of half precision sums over
_SWIZZLES = {0: 0, 2: 128, 4: 64, 6: 32}  # bytes, by the three highest bits of a descriptor


@dataclass(frozen=True, slots=True)
class Product:
    """One of a warp's that may still be on its way; `sums` is the first register of its sums."""

    sums: str
    multiply: Callable[[], None]
    give_back: Callable[[], None]


def _floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Half-precision numbers as fp64."""
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def matrix_of(
    warp: Warp, descriptor: int, rows: np.ndarray, dtype: str, *, by_columns: bool
) -> np.ndarray:
    """(rows, 16) of a matrix in shared memory whose rows, or columns, are contiguous.

    Source: PTX ISA, "asynchronous warpgroup level matrix shared memory layout" and "matrix
    descriptor format".
    """
    first, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    assert descriptor >> 49 & 7 == 0, "the swizzle is to begin where addresses say"
    width = _SWIZZLES[descriptor >> 61]
    assert width > 0
    rows, k = rows[:, None], np.arange(_K)
    if by_columns:
        across = width // 2
        places = rows % across * 2 + rows // across * leading + k % 8 * width + k // 8 * stride
    else:
        places = rows // 8 * stride + rows % 8 * width + 2 * k
    places = swizzled(first + places, width)
    return _floats(warp.block.shared.operand(places, 2), dtype)


def _wgmma(found: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """A warp's 16 of the 64 rows.

    Lane l has columns 2 (l % 4) + {0, 1} + 8 i of rows l // 4 + {0, 8}.
    """
    columns, dtype = int(found[1]), found[2]
    names = [each.strip() for each in operands[0].strip("{} ").split(",")]
    left_of, right_of = (source(each, "u8", machine) for each in operands[1:3])
    adds = source(operands[3], "?", machine)
    assert len(names) == columns // 2
    assert operands[4:6] == ("1", "1"), "no signs"
    left_columns, right_columns = (each == "1" for each in operands[6:])
    rows = (LANE // 4)[:, None] + 8 * (np.arange(len(names)) // 2 % 2)
    places = 2 * (LANE % 4)[:, None] + np.arange(len(names)) % 2 + 8 * (np.arange(len(names)) // 4)

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        left, right = (int(np.unique(each(warp)).item()) for each in (left_of, right_of))
        adding = bool(np.broadcast_to(adds(warp), LANES).all())
        assert warp.written.isdisjoint(names), "no fence since these registers were written"
        in_flight = warp.in_flight
        if names[0] not in in_flight:
            sums = np.zeros((16, columns), np.float32)
            held = np.stack([warp.registers[name] for name in names], axis=1)
            sums[rows, places] = held.view(np.float32)
            in_flight[names[0]] = sums
            for name in names:
                warp.registers[name][:] = 0xFFFFFFFF  # NaN, until somebody has waited

        def multiply() -> None:
            own = np.arange(16) + 16 * (warp.index % 4)
            a = matrix_of(warp, left, own, dtype, by_columns=left_columns)
            b = matrix_of(warp, right, np.arange(columns), dtype, by_columns=right_columns)
            sums = in_flight[names[0]]
            sums[:] = (a @ b.T + (sums if adding else 0)).astype(np.float32)

        def give_back() -> None:
            values = in_flight.pop(names[0])[rows, places]
            for i, name in enumerate(names):
                warp.registers[name].view(np.float32)[:] = values[:, i]

        if machine.timing.early_products:
            multiply()
            warp.products.append(Product(names[0], lambda: None, give_back))
        else:
            warp.products.append(Product(names[0], multiply, give_back))

    return run


def _commit(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        warp.product_groups.append(warp.products)
        warp.products = []

    return run


def _wait(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    left = int(operands[0])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        while len(warp.product_groups) > left:
            group = warp.product_groups.pop(0)
            for product in group:
                product.multiply()
            rest = [each for later in warp.product_groups for each in later] + warp.products
            for product in {each.sums: each for each in group}.values():
                if all(product.sums != each.sums for each in rest):
                    product.give_back()

    return run


def _fence(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    return lambda warp, mask: warp.written.clear()


def _halves(warp: Warp, names: list[str], dtype: str) -> np.ndarray:
    """(registers, lanes, 2) of half precision, as fp64."""
    held = np.stack([warp.registers[name] for name in names])
    return _floats(held.view(np.uint16).reshape(len(names), LANES, 2), dtype)


def _mma(found: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """(16, 16) by (16, 8); lane l has row l // 4 and columns 2 (l % 4) + {0, 1} of every 8 x 8."""
    results, left, right, added = (
        [name.strip() for name in each.strip("{} ").split(",")] for each in operands
    )
    dtype = found[1]
    group, pair = LANE[:, None] // 4, 2 * (LANE[:, None] % 4) + np.arange(2)

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        a, b, c = np.zeros((16, 16)), np.zeros((8, 16)), np.zeros((16, 8), np.float32)
        for i, values in enumerate(_halves(warp, left, dtype)):
            a[group + 8 * (i % 2), pair + 8 * (i // 2)] = values
        for i, values in enumerate(_halves(warp, right, dtype)):
            b[group, pair + 8 * i] = values
        for i, name in enumerate(added):
            c[group[:, 0] + 8 * (i // 2), pair[:, i % 2]] = warp.registers[name].view(np.float32)
        c = (a @ b.T + c).astype(np.float32)
        for i, name in enumerate(results):
            warp.registers[name].view(np.float32)[:] = c[group[:, 0] + 8 * (i // 2), pair[:, i % 2]]

    return run


def _stmatrix(found: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """One matrix of 8 x 8, whose rows go where the first eight lanes say."""
    place_of = address(operands[0], machine)
    (name,) = (each.strip() for each in operands[1].strip("{} ").split(","))

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        shared = warp.block.shared
        rows = shared.at(np.broadcast_to(place_of(warp), LANES)[:8], 16)
        places = rows[:, None] + np.arange(16)
        shared.data[places] = warp.registers[name].view(np.uint8).reshape(8, 16)
        shared.writers[places] = warp.index

    return run


def _ldmatrix(found: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """Matrices of 8 x 8, a register each; 8 lanes say where the rows of one are."""
    names = [each.strip() for each in operands[0].strip("{} ").split(",")]
    place_of, transposed = address(operands[1], machine), found[2] is not None
    assert len(names) == int(found[1])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        shared = warp.block.shared
        rows = np.broadcast_to(place_of(warp), LANES)[: 8 * len(names)]
        places = shared.at(rows, 16)[:, None] + 2 * np.arange(8)
        matrices = shared.data.view(np.uint16)[places // 2].reshape(len(names), 8, 8)
        for name, matrix in zip(names, matrices, strict=True):
            held = matrix.T.copy() if transposed else matrix
            warp.registers[name][:] = held.reshape(LANES, 2).copy().view(np.uint32)[:, 0]

    return run


TENSOR_CORES: dict[str, Callable[..., Any]] = {
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2": _wgmma,
    r"wgmma\.fence\.sync\.aligned": _fence,
    r"wgmma\.commit_group\.sync\.aligned": _commit,
    r"wgmma\.wait_group\.sync\.aligned": _wait,
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32": _mma,
    r"stmatrix\.sync\.aligned\.m8n8\.x1\.shared\.b16": _stmatrix,
    r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16": _ldmatrix,
}

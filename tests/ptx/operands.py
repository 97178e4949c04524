"""What an instruction's operands say: registers, constants, addresses."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import numpy as np

from .machine import ALL, LANES, Machine, Warp

Values = Callable[[Warp], np.ndarray]
Operation = Callable[[Warp, "np.ndarray | None"], object]

LANE = np.arange(LANES)
_ADDRESS = re.compile(r"\[\s*([%\w.$]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def source(operand: str, dtype: str, machine: Machine) -> Values:
    """An operand's values: (32,) of a register, or one for all lanes."""
    if operand in machine.program.registers:
        kind = np.dtype(dtype)
        stored = machine.program.registers[operand]
        if kind == stored:
            return lambda warp: warp.registers[operand]
        if kind.itemsize == stored.itemsize:
            return lambda warp: warp.registers[operand].view(kind)
        return lambda warp: warp.registers[operand].astype(kind)  # the lower bits
    if operand == "%tid.x":
        return lambda warp: (LANE + LANES * warp.index).astype(dtype)
    if operand == "%ctaid.x":
        return lambda warp: np.array(warp.block.index, dtype)
    if operand == "%nctaid.x":
        return lambda warp: np.array(warp.block.blocks, dtype)
    if operand == "global_smem":
        constant = np.array(0, dtype)
    elif operand in machine.parameters:  # its address
        constant = machine.parameters[operand].astype(dtype)
    else:
        constant = _constant(operand, dtype)
    return lambda warp: constant


def _constant(text: str, dtype: str) -> np.ndarray:
    if text.startswith(("0f", "0F")):
        return np.array(struct.unpack(">f", bytes.fromhex(text[2:]))[0], np.float32).view(dtype)
    if text.startswith(("0d", "0D")):
        return np.array(struct.unpack(">d", bytes.fromhex(text[2:]))[0], np.float64).view(dtype)
    number = int(text, 0)
    kind = np.dtype(dtype)
    if kind == np.bool_:
        return np.array(number != 0)
    return np.array(number % (1 << 8 * kind.itemsize), f"u{kind.itemsize}").view(kind)


def assigning(register: str, dtype: str, compute: Values) -> Operation:
    """An instruction that puts what is computed into a register."""
    kind = np.dtype(dtype)

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assign(warp, register, np.asarray(compute(warp), kind), mask)

    return run


def assign(warp: Warp, register: str, values: np.ndarray, mask: np.ndarray | None) -> None:
    """Put values of any dtype into a register, where the lanes take part."""
    if register == "_":
        return
    warp.written.add(register)
    held = warp.registers[register]
    if values.dtype.itemsize == held.dtype.itemsize:
        held = held.view(values.dtype)
    if mask is ALL:
        held[:] = values
    else:
        held[mask] = np.broadcast_to(values, LANES)[mask]


def address(operand: str, machine: Machine) -> Values:
    """What stands in brackets: a register, and perhaps an offset."""
    found = _ADDRESS.fullmatch(operand)
    assert found is not None, operand
    base = source(found[1], "u8" if found[1].startswith("%rd") else "u4", machine)
    offset = np.int64(int(found[2], 0) if found[2] else 0)
    return lambda warp: (base(warp).astype(np.int64) + offset).astype(np.uint64)


def one(values: np.ndarray, mask: np.ndarray | None) -> int:
    """The value of the only lane that takes part, or of all if it is one."""
    chosen = np.unique(np.broadcast_to(values, LANES)[slice(None) if mask is ALL else mask])
    assert len(chosen) == 1, "lanes name different places"
    return int(chosen[0])

"""What instructions do to a warp, for those that Triton's kernels of llfast need.

Source: NVIDIA's PTX ISA, by instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import arithmetic
from .asynchronous import ASYNCHRONOUS
from .machine import ALL, LANES, Machine, Warp
from .memory import spread
from .operands import LANE, Operation, address, assign, assigning, source
from .program import Instruction, split
from .tensor_cores import TENSOR_CORES
from .tensor_memory import TENSOR_MEMORY

_MEMORY = re.compile(r"(ld|st)\.(global|shared|param)(?:::cta)?(?:\.(v2|v4))?\.([bsuf])(\d+)")


def translate(machine: Machine) -> None:
    """Give a machine its program's instructions as functions."""
    machine.code = [_predicated(each, machine) for each in machine.program.instructions]


def _predicated(instruction: Instruction, machine: Machine) -> Operation:
    """The instruction as a function of a warp and the lanes that take part."""
    operation = _translated(instruction, machine)
    if instruction.predicate is None:
        return operation
    predicate, negated = instruction.predicate, instruction.negated

    def predicated(warp: Warp, mask: np.ndarray | None) -> object:
        taken = warp.registers[predicate]
        taken = ~taken if negated else taken
        taken = taken if mask is ALL else taken & mask
        if taken.all():
            return operation(warp, ALL)
        return operation(warp, taken.copy()) if taken.any() else None

    return predicated


def _translated(instruction: Instruction, machine: Machine) -> Operation:
    name, operands = instruction.operation, instruction.operands
    if name in ("bra", "bra.uni"):
        target = machine.program.labels[operands[0]]
        return lambda warp, mask: warp.jump(target, LANE >= 0 if mask is ALL else mask)
    if name == "brx.idx":
        table = [machine.program.labels[each] for each in machine.program.tables[operands[1]]]
        index = source(operands[0], "u4", machine)
        return lambda warp, mask: _jump_by(warp, mask, index(warp), table)
    if name == "ret":
        return _end
    if name == "nop":  # what a test has left out
        return lambda warp, mask: None
    if memory := _MEMORY.fullmatch(name):
        return _memory(memory, operands, machine)
    for table in (ASYNCHRONOUS, TENSOR_CORES, TENSOR_MEMORY):
        for pattern, make in table.items():
            if found := re.fullmatch(pattern, name):
                return make(found, operands, machine)
    if name.startswith("mov.") and (operands[0][0] == "{" or operands[1][0] == "{"):
        return _packed(operands, machine)
    if name in _OTHERS:
        return _OTHERS[name](operands, machine)
    found = arithmetic(name, len(operands) - 1)
    if found is None:  # a guess at what it does could hide an error of a kernel
        raise NotImplementedError(f"nobody has taught this machine {instruction.text}")
    compute, read, written = found
    sources = [source(each, dtype, machine) for each, dtype in zip(operands[1:], read, strict=True)]
    return assigning(operands[0], written, lambda warp: compute(*[each(warp) for each in sources]))


def _jump_by(warp: Warp, mask: np.ndarray | None, index: np.ndarray, table: list[int]) -> None:
    assert mask is ALL
    assert (index == index[0]).all(), "lanes of a warp go different ways"
    warp.place = table[int(index[0])]


def _end(warp: Warp, mask: np.ndarray | None) -> None:
    assert mask is ALL, "threads of a warp end at different places"
    assert not warp.products, "products were started, but never waited for"
    assert not any(warp.product_groups), "products were started, but never waited for"
    warp.done = True


def _memory(found: re.Match, operands: tuple[str, ...], machine: Machine) -> Operation:
    loads, space = found[1] == "ld", found[2]
    count, size = int((found[3] or "v1")[1:]), int(found[5]) // 8
    signed = found[4] == "s"
    where, what = operands if not loads else operands[::-1]
    names = [each.strip() for each in what.strip("{} ").split(",")]
    assert len(names) == count
    dtype = f"{'i' if signed else 'u'}{size}"
    if space == "param":
        value = machine.parameters[where.strip("[]")].astype(dtype)
        wider = value.astype(f"i{machine.program.registers[what].itemsize}")
        return assigning(what, wider.dtype.str, lambda warp: wider)
    places_of = address(where, machine)
    values = [] if loads else [source(each, dtype, machine) for each in names]

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        lanes = LANE if mask is ALL else np.flatnonzero(mask)
        addresses = np.broadcast_to(places_of(warp), LANES)[lanes]
        shared = warp.block.shared
        if space == "shared":
            data, places = shared.data, shared.at(addresses, size * count)
        else:
            data, places = machine.memory.at(addresses, size * count)
        assert not (places % size).any(), "what is at the address begins elsewhere"
        elements = (
            data.view(dtype) if len(data) % size == 0 else data[: -(len(data) % size)].view(dtype)
        )
        for i, name in enumerate(names):
            at = places // size + i
            if loads:
                read = np.zeros(LANES, dtype)
                read[lanes] = elements[at]
                widened = read.astype(f"{dtype[0]}{warp.registers[name].itemsize}")
                assign(warp, name, widened, mask)
            else:
                elements[at] = np.broadcast_to(values[i](warp), LANES)[lanes]
        if not loads and space == "shared":
            shared.writers[spread(places, size * count)] = warp.index

    return run


def _packed(operands: tuple[str, ...], machine: Machine) -> Operation:
    """Two halves of a register, put together or taken apart."""
    whole = next(each for each in operands if each[0] != "{")
    halves = split(next(each for each in operands if each[0] == "{").strip("{} "))
    kind = machine.program.registers[whole]
    half = np.dtype(f"u{kind.itemsize // 2}")
    if operands[0] == whole:
        low, high = (source(each, half.str, machine) for each in halves)
        shift = kind.type(8 * half.itemsize)
        return assigning(
            whole, kind.str, lambda warp: low(warp).astype(kind) | high(warp).astype(kind) << shift
        )
    value = source(whole, kind.str, machine)

    def take_apart(warp: Warp, mask: np.ndarray | None) -> None:
        both = np.broadcast_to(value(warp), LANES).copy().view(half).reshape(LANES, 2)
        for name, values in zip(halves, both.T.copy(), strict=True):
            assign(warp, name, values, mask)

    return take_apart


def _shuffle(lanes_of: Callable[[int], np.ndarray]) -> Callable[..., Operation]:
    def make(operands: tuple[str, ...], machine: Machine) -> Operation:
        target, value, amount, clamp, members = operands
        assert (clamp, members) == ("31", "-1")
        read, lanes = source(value, "u4", machine), lanes_of(int(amount, 0))

        def run(warp: Warp, mask: np.ndarray | None) -> None:
            assert mask is ALL
            assign(warp, target, np.broadcast_to(read(warp), LANES)[lanes], ALL)

        return run

    return make


def _elect(operands: tuple[str, ...], machine: Machine) -> Operation:
    register, predicate = operands[0].split("|")

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        assign(warp, register, np.uint32(0), ALL)
        assign(warp, predicate, LANE == 0, ALL)

    return run


def _reduce(reduce: Callable[[np.ndarray], Any], dtype: str = "i4") -> Callable[..., Operation]:
    def make(operands: tuple[str, ...], machine: Machine) -> Operation:
        target, value, _ = operands
        read = source(value, dtype, machine)

        def run(warp: Warp, mask: np.ndarray | None) -> None:
            assert mask is ALL
            values = np.broadcast_to(read(warp), LANES)
            assign(warp, target, np.asarray(reduce(values), dtype), ALL)

        return run

    return make


_OTHERS: dict[str, Callable[..., Operation]] = {
    "elect.sync": _elect,
    "redux.sync.max.s32": _reduce(np.max),
    "redux.sync.max.f32": _reduce(np.fmax.reduce, "f4"),
    "redux.sync.max.NaN.f32": _reduce(np.max, "f4"),
    "redux.sync.min.s32": _reduce(np.min),
    "redux.sync.add.s32": _reduce(np.sum),
    "shfl.sync.bfly.b32": _shuffle(lambda amount: LANE ^ amount),
    "shfl.sync.idx.b32": _shuffle(lambda amount: np.full(LANES, amount)),
}

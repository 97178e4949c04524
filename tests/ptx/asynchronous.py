"""Barriers, fences, and copies into shared memory that end later."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import ALL, BLOCKED, LANES, Machine, Warp
from .memory import POISON, Mbarrier, spread, swizzled
from .operands import address, assign, one, source
from .program import split

_BULK = (
    r"cp\.async\.bulk\.tensor\.2d\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes"
)


def _barrier(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    number = int(operands[0])
    threads = int(operands[1]) if len(operands) > 1 else machine.program.threads

    def run(warp: Warp, mask: np.ndarray | None) -> object:
        assert mask is ALL
        return None if warp.block.meet(warp, number, threads // LANES) else BLOCKED

    return run


def _mbarrier(found: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    action = found[1]
    if action == "try_wait.parity":
        predicate, where, parity = operands
        place_of, parity_of = address(where, machine), source(parity, "u4", machine)

        def wait(warp: Warp, mask: np.ndarray | None) -> object:
            barrier = warp.block.mbarrier(one(place_of(warp), mask))
            ended = barrier.phase != one(parity_of(warp), mask)
            assign(warp, predicate, np.array(ended), mask)
            return None if ended else BLOCKED

        return wait
    where = operands[1] if operands[0] == "_" else operands[0]
    place_of = address(where, machine)
    count = int(operands[-1], 0) if operands[-1] != where else 1

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        place = one(place_of(warp), mask)
        block = warp.block
        lanes = LANES if mask is ALL else int(mask.sum())
        assert lanes == 1, "one thread is to do it"
        if action == "init":
            assert place % 8 == 0
            block.mbarriers[place] = Mbarrier(count)
        elif action == "inval":
            block.mbarrier(place)
            del block.mbarriers[place]
        elif action == "arrive.expect_tx":
            block.mbarrier(place).arrive(count)
        else:
            for _ in range(count):
                block.mbarrier(place).arrive()

    return run


def _bulk_copy(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """A box of a tensor map, by the one thread that asks for it."""
    to, given, barrier = operands
    name, corner = split(given.strip("[]"))
    columns, rows = (source(each, "i4", machine) for each in split(corner.strip("{} ")))
    place_of, barrier_of = address(to, machine), address(barrier, machine)
    descriptor_of = source(name, "u8", machine)

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is not ALL
        assert mask.sum() == 1
        descriptor = machine.descriptors[one(descriptor_of(warp), mask)]
        box = descriptor.copied(one(columns(warp), mask), one(rows(warp), mask))
        block, first = warp.block, one(place_of(warp), mask)
        mbarrier = block.mbarrier(one(barrier_of(warp), mask))
        assert first % 128 == 0
        assert first % (8 * descriptor.swizzle or 128) == 0, "the pattern would begin elsewhere"
        places = swizzled(first + np.arange(box.size), descriptor.swizzle)
        block.shared.at(places, 1)
        # Whoever reads what was there before is too late.
        block.shared.data[places] = POISON
        block.shared.writers[places] = -1

        def arrive() -> None:
            block.shared.data[places] = box.ravel()
            mbarrier.receive(box.size)

        block.transfer(arrive)

    return run


def _copy(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """4, 8 or 16 bytes a lane, or zeros; done when the group is waited for."""
    to, given = operands[:2]
    size = int(operands[2], 0)
    place_of, address_of = address(to, machine), address(given, machine)
    bytes_of = source(operands[-1], "u4", machine)

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        lanes = np.arange(LANES) if mask is ALL else np.flatnonzero(mask)
        shared = warp.block.shared
        addresses = np.broadcast_to(address_of(warp), LANES)[lanes]
        places = shared.at(np.broadcast_to(place_of(warp), LANES)[lanes], size)
        count = np.broadcast_to(bytes_of(warp), LANES)[lanes]
        values = np.zeros((len(lanes), size), np.uint8)
        assert np.isin(count, (0, size)).all()
        if (read := count > 0).any():
            data, found = machine.memory.at(addresses[read], size)
            values[read] = data[spread(found, size)]
        shared.data[spread(places, size)] = POISON

        def arrive() -> None:
            shared.data[spread(places, size)] = values
            shared.writers[spread(places, size)] = warp.index

        if machine.timing.early_copies:
            arrive()
        else:
            warp.copies.append(arrive)

    return run


def _commit_copies(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        warp.copy_groups.append(warp.copies)
        warp.copies = []

    return run


def _wait_for_copies(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    left = int(operands[0])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL
        while len(warp.copy_groups) > left:
            for arrive in warp.copy_groups.pop(0):
                arrive()

    return run


def _fence(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    return lambda warp, mask: warp.block.shared.fence(warp.index)


def _registers(found: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    """A warp gives registers back, or takes them once others have given enough."""
    count, takes = int(operands[0]), found[1] == "inc"

    def run(warp: Warp, mask: np.ndarray | None) -> object:
        assert mask is ALL
        block = warp.block
        more = count - warp.register_count
        if takes and more > block.free_registers:
            return BLOCKED
        assert more >= 0 if takes else more <= 0
        block.free_registers -= more
        warp.register_count = count
        return None

    return run


def _nothing(_: re.Match, operands: tuple[str, ...], machine: Machine) -> Any:
    def run(warp: Warp, mask: np.ndarray | None) -> None:
        assert mask is ALL

    return run


ASYNCHRONOUS: dict[str, Callable[..., Any]] = {
    r"bar(?:rier)?\.sync(?:\.aligned)?": _barrier,
    r"mbarrier\.(init|inval|arrive|arrive\.expect_tx|try_wait\.parity)"
    r"(?:\.release\.cta)?\.shared(?:::cta)?\.b64": _mbarrier,
    r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32": _registers,
    _BULK: _bulk_copy,
    r"cp\.async\.c[ag]\.shared\.global": _copy,
    r"cp\.async\.commit_group": _commit_copies,
    r"cp\.async\.wait_group": _wait_for_copies,
    r"fence\.proxy\.async\.shared::cta": _fence,
    r"bar\.warp\.sync": _nothing,  # lanes of a warp are together, or an assertion fails
}

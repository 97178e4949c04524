"""Blocks of warps that run a program; copies and products that are asynchronous stay so.

Nothing is timed. Warps run in an order drawn at random, and what a GPU does at a time of its own
happens as early or as late as it may, so that a wait or a fence left out gives a wrong result.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import Descriptor, GlobalMemory, Mbarrier, SharedMemory, TensorMemory
from .program import Program

LANES = 32
ALL = None  # the mask of lanes where all take part
BLOCKED = object()  # what an operation returns that has to be tried again
_SLICE = 400  # instructions that a warp runs at most before another's turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """When asynchronous work is done: when it is started, or when somebody waits for it."""

    early_products: bool
    early_copies: bool
    seed: int = 0


@dataclass(slots=True)
class Warp:
    """32 threads; their registers, and what they have started."""

    index: int
    block: Block
    registers: dict[str, np.ndarray]
    place: int = 0
    places: np.ndarray | None = None  # of every lane, while they differ
    done: bool = False
    register_count: int = 0  # of a thread
    waiting: tuple[int, int] | None = None  # barrier, its generation
    written: set[str] = field(default_factory=set)  # registers, since the last `wgmma.fence`
    products: list[Any] = field(default_factory=list)
    product_groups: list[list[Any]] = field(default_factory=list)
    in_flight: dict[str, np.ndarray] = field(default_factory=dict)
    copies: list[Callable[[], None]] = field(default_factory=list)
    copy_groups: list[list[Callable[[], None]]] = field(default_factory=list)

    def jump(self, target: int, taken: np.ndarray) -> None:
        """Let some lanes go on elsewhere, and the others behind this instruction."""
        if taken.all():
            self.place = target
        elif taken.any():
            self.places = np.where(taken, target, self.place)


class Block:
    """A block of threads with its shared memory and its barriers."""

    def __init__(
        self,
        machine: Machine,
        index: int,
        blocks: int,
        *,
        shared_bytes: int,
    ):
        program = machine.program
        self.machine, self.index, self.blocks = machine, index, blocks
        self.shared = SharedMemory(shared_bytes)
        self.tensors = TensorMemory()
        self.mbarriers: dict[int, Mbarrier] = {}
        self.arrived: dict[int, set[int]] = {}
        self.generations: dict[int, int] = {}
        self.transfers: list[Callable[[], None]] = []
        self.free_registers = 0  # a lane's, of all warps
        self.random = random.Random(machine.timing.seed + index)
        self.warps = [
            Warp(
                warp,
                self,
                {name: _undefined(dtype) for name, dtype in program.registers.items()},
                register_count=program.max_registers or 0,
            )
            for warp in range(program.threads // LANES)
        ]

    def run(self) -> None:
        """Until all threads have ended."""
        running = list(self.warps)
        blocked: set[int] = set()
        while running:
            ready = [warp for warp in running if warp.index not in blocked]
            if not ready:
                assert self.transfers, f"all warps wait: {[_where(warp) for warp in running]}"
                self.transfers.pop(self.random.randrange(len(self.transfers)))()
                blocked.clear()
                continue
            warp = self.random.choice(ready)
            if self._run(warp):
                blocked.clear()
            else:
                blocked.add(warp.index)
            running = [warp for warp in running if not warp.done]
        assert not self.transfers, "copies are on their way that nobody waited for"

    def _run(self, warp: Warp) -> bool:
        """A slice of a warp's instructions; whether it got anywhere."""
        code = self.machine.code
        for count in range(self.random.randrange(1, _SLICE)):
            mask = ALL
            place = warp.place
            if warp.places is not None:
                place = int(warp.places.min())
                mask = warp.places == place
                if mask.all():
                    warp.place, warp.places, mask = place, None, ALL
            if mask is ALL:
                warp.place += 1
                if code[place](warp, ALL) is BLOCKED:
                    warp.place = place
                    return count > 0
            else:
                self._run_some(warp, place, mask)
            if warp.done:
                return True
        return True

    def _run_some(self, warp: Warp, place: int, mask: np.ndarray) -> None:
        """One instruction for some lanes; those that lag behind come first."""
        others, warp.places, warp.place = warp.places, None, place + 1
        assert self.machine.code[place](warp, mask) is not BLOCKED
        # A branch leaves places behind, or a place for all that were asked.
        moved = warp.place if warp.places is None else warp.places
        warp.places = np.where(mask, moved, others)

    def meet(self, warp: Warp, barrier: int, warps: int) -> bool:
        """Whether as many warps as that have come to a barrier since this one has."""
        generation = self.generations.get(barrier, 0)
        if warp.waiting is None:
            arrived = self.arrived.setdefault(barrier, set())
            arrived.add(warp.index)
            if len(arrived) < warps:
                warp.waiting = (barrier, generation)
                return False
            arrived.clear()
            self.generations[barrier] = generation + 1
            return True
        if warp.waiting == (barrier, generation):
            return False
        warp.waiting = None
        return True

    def mbarrier(self, place: int) -> Mbarrier:
        """The barrier in shared memory at a place."""
        assert place in self.mbarriers, "no barrier has been made there, or it is gone"
        return self.mbarriers[place]

    def transfer(self, copy: Callable[[], None]) -> None:
        """A copy that ends when it likes."""
        if self.machine.timing.early_copies:
            copy()
        else:
            self.transfers.append(copy)


class Machine:
    """A program, what its parameters are, and the memory that they point to."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        parameters: Sequence[int | float | Descriptor],
        timing: Timing,
    ):
        assert len(parameters) == len(program.parameters)
        self.program, self.memory, self.timing = program, memory, timing
        self.descriptors: dict[int, Descriptor] = {}
        self.parameters: dict[str, np.ndarray] = {}
        for place, ((kind, name), each) in enumerate(
            zip(program.parameters, parameters, strict=True)
        ):
            if isinstance(each, Descriptor):
                self.parameters[name] = np.array(1 + place, np.uint64)
                self.descriptors[1 + place] = each
            elif kind == "f32":
                self.parameters[name] = np.array(each, np.float32).view(np.uint32)
            else:
                self.parameters[name] = np.array(each, f"i{int(kind[1:]) // 8}")
        self.code: list[Callable[[Warp, np.ndarray | None], object]] = []  # by `operations.py`

    def run(self, blocks: int, *, shared_bytes: int) -> None:
        """A grid of one dimension, block after block."""
        with np.errstate(all="ignore"):
            for index in range(blocks):
                Block(self, index, blocks, shared_bytes=shared_bytes).run()


def _undefined(dtype: np.dtype) -> np.ndarray:
    return np.full(LANES, True if dtype == np.bool_ else np.iinfo(dtype).max, dtype)


def _where(warp: Warp) -> str:
    return warp.block.machine.program.instructions[warp.place].text[:80]

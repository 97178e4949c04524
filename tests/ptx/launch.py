"""Triton's compiled kernels, launched on tensors of the CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .machine import Machine, Timing
from .memory import Descriptor, GlobalMemory
from .operations import translate
from .program import parse

_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes, by the number that Triton's driver is given
_NULL = 0


@dataclass(slots=True)
class Emulated:
    """A device that runs what it is given, at once; some instructions can be left out."""

    timing: Timing = field(default_factory=lambda: Timing(early_products=False, early_copies=False))
    dropped: re.Pattern[str] | None = None

    def launch(self, kernel: Any, arguments: dict[str, Any], programs: int) -> None:
        """Run so many programs of a kernel that Triton has compiled."""
        memory = GlobalMemory()
        parameters: list[int | float | Descriptor] = []
        descriptions = iter(kernel.metadata.tensordesc_meta or ())
        for name, kind in kernel.src.signature.items():
            given = arguments[name]
            if kind == "constexpr":
                continue
            if hasattr(given, "block_shape"):  # a descriptor, of Triton or of Gluon
                described = next(descriptions)
                memory.add(given.base)
                box, swizzle = tuple(described["block_size"]), _SWIZZLES[described["swizzle"]]
                parameters.append(Descriptor(matrix=given.base, box=box, swizzle=swizzle))
                parameters += [*given.shape, *given.strides]
            elif isinstance(given, Tensor):
                memory.add(given)
                parameters.append(given.data_ptr())
            else:
                parameters.append(given)
        program = parse(kernel.asm["ptx"])
        if self.dropped is not None:
            program = program.without(self.dropped)
        # Triton adds two pointers to scratch memory, which these kernels do not use.
        machine = Machine(program, memory, [*parameters, _NULL, _NULL], self.timing)
        translate(machine)
        machine.run(programs, shared_bytes=kernel.metadata.shared)

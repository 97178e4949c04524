"""Pages of a checkpoint: stored tensors that are read together, and where they lie in memory.

Tensors lie in a slot as they lie in the file, modulo 4,096. So they are read to where they stay, in
whole blocks, and have the alignment that a memory map of the file gives them: a model gets the same
bits from either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from llfast.dtypes import STORED_DTYPES
from llfast.safetensors_file import StoredTensor

_BLOCK = 4096  # of direct reads
_DEVICE_ALIGNMENT = 256  # as torch has it at least, whose kernels are slower on other addresses


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [first, last) of a stored tensor; all of it, whatever its shape, if `last` is None."""

    tensor: StoredTensor
    first: int = 0
    last: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that is read."""
        if self.last is None:
            return self.tensor.shape
        return (self.last - self.first, *self.tensor.shape[1:])

    @property
    def span(self) -> tuple[int, int]:
        """Where its bytes begin and end in the file."""
        if self.last is None:
            return self.tensor.begin, self.tensor.end
        row = row_bytes(self.tensor)
        return self.tensor.begin + self.first * row, self.tensor.begin + self.last * row


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """What is read at once; pages are compared by identity, not by what is in them.

    Attributes:
        name: what it is called in errors and statistics.
        parts: by the name that each is asked for.
        is_addition: whether it is read to lie beside another one, which stays.
    """

    name: str
    parts: Mapping[str, Part]
    is_addition: bool = False

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(end - begin for begin, end in (part.span for part in self.parts.values()))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the runs of a page go in a slot.

    On another device runs begin at whole addresses instead, each somewhat before its place here.

    Attributes:
        nbytes: that a slot needs, wherever it is.
        extents: of each run its file, its offset there, its size, and where it goes.
        places: of tensors, by name.
        runs_on_device: where runs go there.
        places_on_device: of tensors.
    """

    nbytes: int
    extents: Int64[np.ndarray, "extents 4"]
    places: Mapping[str, int]
    runs_on_device: Int64[np.ndarray, " extents"]
    places_on_device: Mapping[str, int]


def row_bytes(tensor: StoredTensor) -> int:
    """Bytes of one row."""
    return (tensor.end - tensor.begin) // max(tensor.shape[0], 1)


def copied_bytes(parts: Iterable[Part], device: torch.device) -> int:
    """Of those that cannot be used where they lie in a slot, but are copied out of it.

    A processor's tensors begin at a multiple of their item size, and those of a file whose header
    is not padded need not. On another device runs begin at whole addresses.
    """
    total = 0
    for part in parts if device.type == "cpu" else ():
        begin, end = part.span
        kind = STORED_DTYPES.get(part.tensor.dtype)
        total += end - begin if kind is not None and begin % kind.itemsize else 0
    return total


def lay_out(parts: Mapping[str, Part], files: Mapping[Path, int]) -> Layout:
    """Runs of neighbouring tensors, one after the other, each where its file offset says."""
    ordered = sorted(parts.items(), key=lambda item: (files[item[1].tensor.path], item[1].span))
    extents: list[list[int]] = []
    places: dict[str, int] = {}
    on_device: dict[str, int] = {}
    position = 0
    for name, part in ordered:
        begin, end = part.span
        file = files[part.tensor.path]
        last = extents[-1] if extents else None
        if last is not None and last[0] == file and last[1] + last[2] == begin:
            places[name] = last[3] + last[2]
            last[2] += end - begin
        else:
            position = -(-position // _BLOCK) * _BLOCK + begin % _BLOCK
            extents.append([file, begin, end - begin, position])
            places[name] = position
        position = extents[-1][3] + extents[-1][2]
        on_device[name] = places[name] - extents[-1][3] % _DEVICE_ALIGNMENT
    runs = np.array(extents, dtype=np.int64).reshape(-1, 4)
    return Layout(position, runs, places, runs[:, 3] - runs[:, 3] % _DEVICE_ALIGNMENT, on_device)

"""Global and shared memory that refuse what a GPU would read or write past the end of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

POISON = 0xFF  # as a byte of any float: NaN
_NOBODY = -1
TENSOR_ROWS, TENSOR_COLUMNS = 128, 512


class GlobalMemory:
    """Tensors of the CPU, at their own addresses; nothing beside them can be touched."""

    def __init__(self):
        self.regions: list[tuple[int, int, np.ndarray]] = []
        self.tensors: list[Tensor] = []  # kept alive

    def add(self, tensor: Tensor) -> None:
        """Let a kernel reach the elements of a tensor, and what lies between them."""
        if tensor.numel() == 0:
            return
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        flat = torch.as_strided(tensor, (last + 1,), (1,)).view(torch.uint8)
        self.tensors.append(tensor)
        self.regions.append((tensor.data_ptr(), tensor.data_ptr() + len(flat), flat.numpy()))

    def at(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of the tensor that holds all of the addresses, and where in it they are."""
        assert not (addresses % np.uint64(size)).any(), "an address is not aligned"
        low, high = int(addresses.min()), int(addresses.max()) + size
        for first, end, data in self.regions:
            if first <= low and high <= end:
                return data, (addresses - np.uint64(first)).astype(np.int64)
        raise AssertionError(f"global memory from {low:#x} to {high:#x} belongs to no tensor")


class SharedMemory:
    """A block's; it knows which warp's writes tensor cores may not see yet."""

    def __init__(self, size: int):
        self.data = np.full(size, POISON, np.uint8)
        # The warp that wrote a byte since its last fence.
        self.writers = np.full(size, _NOBODY, np.int16)

    def at(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The addresses as places."""
        places = addresses.astype(np.int64)
        assert not (places % size).any(), "an address is not aligned"
        assert places.min() >= 0, "shared memory before its start"
        assert places.max() + size <= len(self.data), "shared memory past its end"
        return places

    def fence(self, warp: int) -> None:
        """What this warp wrote is there for tensor cores and bulk copies."""
        self.writers[self.writers == warp] = _NOBODY

    def operand(self, places: np.ndarray, size: int) -> np.ndarray:
        """Elements for tensor cores that read memory by themselves, as unsigned integers."""
        unfenced = self.writers[places] != _NOBODY
        assert not unfenced.any(), "tensor cores read what no fence has let them see"
        return self.data.view(f"u{size}")[places // size]


class TensorMemory:
    """That of sm_100's tensor cores, a block's, and the products that are on their way to it."""

    def __init__(self):
        self.data = np.full((TENSOR_ROWS, 4 * TENSOR_COLUMNS), POISON, np.uint8).view(np.uint32)
        self.taken = 0  # columns
        self.products: list[Callable[[], None]] = []
        self.done = 0

    def finish(self, count: int) -> None:
        """The first so many of all products, in their order."""
        while self.done < count:
            self.products[self.done]()
            self.done += 1


def spread(places: np.ndarray, size: int) -> np.ndarray:
    """(places, size): the places of every byte of elements."""
    return places[..., None] + np.arange(size)


def swizzled(places: np.ndarray, width: int) -> np.ndarray:
    """Where 16-byte units lie in shared memory that is swizzled in rows of `width` bytes.

    Bits of the row, counted in 128 bytes, are added to those of the unit, modulo 2; 0 keeps all.
    """
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[width]
    return places ^ ((places >> 7 & mask) << 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A tensor map: a matrix whose boxes are copied into shared memory, zeros beyond its edges."""

    matrix: Tensor  # (rows, columns), any strides of rows
    box: tuple[int, int]
    swizzle: int  # bytes

    def bytes_of_a_box(self) -> int:
        """What a copy brings, zeros included."""
        return self.box[0] * self.box[1] * self.matrix.element_size()

    def copied(self, column: int, row: int) -> np.ndarray:
        """A box's bytes, (rows, bytes of a row)."""
        size = self.matrix.element_size()
        box = torch.zeros(self.box, dtype=self.matrix.dtype)
        rows = slice(max(row, 0), max(min(row + self.box[0], self.matrix.shape[0]), 0))
        columns = slice(max(column, 0), max(min(column + self.box[1], self.matrix.shape[1]), 0))
        if rows.start < rows.stop and columns.start < columns.stop:
            box[
                rows.start - row : rows.stop - row,
                columns.start - column : columns.stop - column,
            ] = self.matrix[rows, columns]
        return box.view(torch.uint8).numpy().reshape(self.box[0], self.box[1] * size)


@dataclass(slots=True)
class Mbarrier:
    """A phase ends when all arrivals and all bytes that were announced have come."""

    count: int
    pending: int = field(init=False)
    expected_bytes: int = 0
    phase: int = 0

    def __post_init__(self):
        self.pending = self.count

    def arrive(self, expected_bytes: int = 0) -> None:
        self.expected_bytes += expected_bytes
        self.pending -= 1
        assert self.pending >= 0, "more have arrived at a barrier than were to come"
        self._end_phase()

    def receive(self, size: int) -> None:
        self.expected_bytes -= size
        self._end_phase()

    def _end_phase(self) -> None:
        if self.pending == 0 and self.expected_bytes == 0:
            self.phase ^= 1
            self.pending = self.count

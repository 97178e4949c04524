"""Memory that pages are read to, and copied to: on CUDA, or in another dtype."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llfast.dtypes import STORED_DTYPES
from llfast.errors import CannotPageError, LlfastWarning
from llfast.quantised.dequantise import LazyWeight

from .layout import Layout

try:
    from llfast._native import Memory
except ImportError:  # a package without its C++ module; `Pages` says so
    Memory = None  # type: ignore[assignment, misc]

_OWN_MEMORY_BYTES = 1 << 20
_ADDRESSES = 16  # on a device: kernels that multiply take others element by element, if at all


class Slot:
    """Room for one page.

    On a CPU, tensors are views of what is read. On CUDA, what is read lies in pinned memory, and is
    copied as a whole to a slot of the same size there, on a stream of its own; tensors are views of
    that one. No thread waits for a copy but one that is to read to the same memory again: the
    device itself copies after the last use of a slot, and computes after the copy.

    Attributes:
        nbytes: its size.
        on_device: what is there; None on a CPU, and once it is closed.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = max(nbytes, 1)
        self._memory = Memory(self.nbytes)
        self.on_device: Tensor | None = None
        if device.type == "cuda":
            self.on_device = _empty_on(device, self.nbytes)
            self._copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # The memory may have been another tensor's, which the device is still at.
            self._last_use: Any = torch.cuda.current_stream(device).record_event()
            self._copied: Any = None
            self._is_pinned = self._pin(device)

    def _pin(self, device: torch.device) -> bool:
        """Let the device copy by itself from what is read to; CUDA copies other memory twice."""
        try:
            _check(_cudart().cudaHostRegister(self._memory.address, self.nbytes, 0))
        except RuntimeError as error:
            _forget_error(device)
            if "out of memory" in str(error):
                raise MemoryError(
                    f"not enough memory to pin {self.nbytes:,} bytes for a GPU: {error}"
                ) from error
            warnings.warn(
                f"weights are copied to the GPU more slowly, as memory cannot be pinned: {error}",
                LlfastWarning,
                stacklevel=2,
            )
            return False
        return True

    def memory(self) -> Memory:
        """What is read to, once what it held has been copied to the device."""
        if self.on_device is not None and self._copied is not None:
            self._copied.synchronize()
        return self._memory

    def send(self, layout: Layout) -> None:
        """Copy what was read to the device, after the last use of what is there."""
        if self.on_device is None:
            return
        runs = zip(layout.extents[:, 2:].tolist(), layout.runs_on_device.tolist(), strict=True)
        # The slot was made in inference mode, which is a thread's own; this may be another one.
        with torch.inference_mode(), torch.cuda.stream(self._copies):
            host = torch.frombuffer(self._memory, dtype=torch.uint8)
            self._copies.wait_event(self._last_use)
            for (size, place), on_device in runs:
                _copy(self.on_device[on_device : on_device + size], host[place : place + size])
            self._copied = self._copies.record_event()

    def take(self) -> None:
        """Let nothing that is given to the device from now on begin before the copy has ended."""
        if self.on_device is not None:
            torch.cuda.current_stream(self.on_device.device).wait_event(self._copied)

    def let_go(self) -> None:
        """Say that what uses the slot's tensors has been given to the device, all of it."""
        if self.on_device is not None:
            self._last_use = torch.cuda.current_stream(self.on_device.device).record_event()

    def close(self) -> None:
        """Give back what CUDA holds; memory itself goes with the last tensor that refers to it."""
        if self.on_device is not None:
            device, self.on_device = self.on_device.device, None
            try:
                torch.cuda.synchronize(device)
            finally:
                if self._is_pinned:
                    _check(_cudart().cudaHostUnregister(self._memory.address))

    def tensor(self, layout: Layout, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        """One of those in the slot; a copy where its numbers do not lie on whole addresses.

        Raises:
            CannotPageError: if torch does not have the dtype.
        """
        is_here = self.on_device is None
        offset = layout.places[name] if is_here else layout.places_on_device[name]
        return self.view(offset, dtype, shape)

    def view(self, offset: int, dtype: str, shape: Sequence[int]) -> Tensor:
        """The same, by its offset."""
        kind = STORED_DTYPES.get(dtype)
        if kind is None:
            raise CannotPageError(f"weights must be of a dtype that torch has, got {dtype}")
        count = math.prod(shape)
        device = None if self.on_device is None else self.on_device.device
        if count == 0:
            return torch.empty(tuple(shape), dtype=kind, device=device)
        size = count * kind.itemsize
        if self.on_device is not None:
            raw = self.on_device[offset : offset + size]
        elif offset % kind.itemsize:
            raw = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=offset)
        else:
            flat = torch.frombuffer(self._memory, dtype=kind, count=count, offset=offset)
            return flat.view(tuple(shape))
        if offset % (kind.itemsize if self.on_device is None else _ADDRESSES):
            raw = _copy_of(raw)
        return raw.view(kind).view(tuple(shape))


def move_to(tensor: Tensor | LazyWeight, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on a device, in a dtype; itself if it is so already.

    On a CPU a large copy has memory of its own, see `_own_memory`.
    """
    if isinstance(tensor, LazyWeight):
        return tensor.to(device, dtype)
    nbytes = tensor.numel() * dtype.itemsize
    is_copy = dtype != tensor.dtype and tensor.device.type == device.type == "cpu"
    if not is_copy or nbytes < _OWN_MEMORY_BYTES:
        return tensor.to(device, dtype)
    return _own_memory(nbytes, dtype).view(tensor.shape).copy_(tensor)


def _copy_of(raw: Tensor) -> Tensor:
    """Bytes at a whole address; if they are many on a CPU, in memory of their own."""
    if raw.device.type != "cpu" or raw.nbytes < _OWN_MEMORY_BYTES:
        return raw.clone()
    return _own_memory(raw.nbytes, raw.dtype).copy_(raw)


def _own_memory(nbytes: int, dtype: torch.dtype) -> Tensor:
    """Memory that goes when the tensor does.

    In that of malloc, copies of one layer after the other may add up to most of a model, for
    aligned memory that was freed is hard to find again (glibc before 2.38: its bug 14581); and as
    huge pages are made ready faster, a large copy takes a fifth of the time.
    """
    return torch.frombuffer(Memory(nbytes), dtype=dtype)


def _empty_on(device: torch.device, nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _copy(target: Tensor, host: Tensor) -> None:
    target.copy_(host, non_blocking=True)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(result: Any) -> None:
    torch.cuda.check_error(result)


def _forget_error(device: torch.device) -> None:
    """Ask CUDA for its last error, which the next kernel to be launched would take for its own."""
    with contextlib.suppress(RuntimeError):
        _empty_on(device, 1).fill_(1)

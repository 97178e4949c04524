"""Reads pages, one ahead of those in use, into slots of memory that take turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from llfast.errors import CannotPageError, CheckpointError
from llfast.safetensors_file import StoredTensor

from .layout import Layout, Page, Part, copied_bytes, lay_out, row_bytes
from .slots import Slot
from .statistics import LoadingStatistics, PageRead

try:
    from llfast._native import FileReader, Memory, ReadStatistics
except ImportError:  # a package without its C++ module; `Pages` says so
    FileReader = Memory = ReadStatistics = None  # type: ignore[assignment, misc]


class Pages:
    """Reads pages of weight files, one ahead of those in use.

    Two slots of memory take turns, unless pages are kept; additions have slots of their own. What
    `take` brings is good until `release`; memory itself outlives this object for as long as tensors
    refer to it.
    """

    def __init__(
        self, files: Sequence[Path], device: torch.device, statistics: LoadingStatistics
    ) -> None:
        if FileReader is None:
            raise CannotPageError(
                "weights must be resident in an llfast without its C++ module; build it with "
                "`pip install -e .`"
            )
        self._device, self.statistics = device, statistics
        self._files = {path: number for number, path in enumerate(files)}
        self._reader = FileReader([str(path) for path in files])
        self._layouts: dict[Page, Layout] = {}
        self._free: dict[bool, list[Slot]] = {False: [], True: []}  # for pages, and for additions
        self._ahead: tuple[Page, Future[tuple[Slot, PageRead]]] | None = None
        self._taken: dict[Page, Slot] = {}
        self._on_device: list[Slot] = []  # all that have something there
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llfast-pages")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:  # all of it, whatever goes wrong
            stack.callback(self._forget)
            for slot in self._on_device:
                stack.callback(slot.close)
            stack.callback(self._thread.shutdown, wait=True)
            self._reader.cancel()

    def _forget(self) -> None:
        for slots in self._free.values():
            slots.clear()
        self._taken.clear()
        self._on_device.clear()
        self._ahead = None
        del self._reader  # an exception that is held on to would keep its files open

    def read_ahead(self, page: Page, *, keep: bool = False) -> None:
        """Begin to read a page that will be taken next; does nothing if one is being read."""
        if self._ahead is None and page not in self._taken:
            nbytes = self._layout(page).nbytes
            slot = self._new_slot(nbytes) if keep else self._slot(page)
            self._ahead = (page, self._thread.submit(self._read, page, slot))

    def take(self, page: Page, *, keep: bool = False) -> dict[str, Tensor]:
        """The tensors of a page, once they are there.

        Args:
            page: it may have been read ahead.
            keep: in memory of its own rather than in a slot; it is not to be released.

        Raises:
            CheckpointError: if a file ends too early, cannot be read, or has changed.
        """
        assert page not in self._taken, f"page {page.name} was not released"
        start = time.perf_counter()
        if self._ahead is not None and self._ahead[0] is not page:
            wrong, other = self._ahead[0], self._ahead[1].result()[0]  # it is not what is needed
            self._ahead = None
            other.close() if keep else self._free[wrong.is_addition].append(other)
        self.read_ahead(page, keep=keep)
        assert self._ahead is not None
        try:
            slot, read = self._ahead[1].result()
        finally:
            self._ahead = None
        if not keep:
            self._taken[page] = slot
            self._count()
        slot.take()
        read.stall_seconds = time.perf_counter() - start
        self.statistics.pages.append(read)
        layout = self._layout(page)
        return {
            name: slot.tensor(layout, name, part.tensor.dtype, part.shape)
            for name, part in page.parts.items()
        }

    def release(self, page: Page) -> None:
        """Give a page's slot back; nothing may refer to its tensors any more."""
        slot = self._taken.pop(page)
        slot.let_go()
        self._free[page.is_addition].append(slot)

    def rows(self, tensor: StoredTensor, rows: Int64[np.ndarray, " R"]) -> Tensor:
        """Some rows of a stored matrix, (R, ...), in memory of their own.

        Raises:
            CheckpointError: as `take`.
        """
        size = row_bytes(tensor)
        extents = np.empty((len(rows), 4), dtype=np.int64)
        extents[:, 0] = self._files[tensor.path]
        extents[:, 1] = tensor.begin + size * rows
        extents[:, 2] = size
        extents[:, 3] = size * np.arange(len(rows))
        return self._read_rows(tensor, extents, size * len(rows), (len(rows), *tensor.shape[1:]))

    def table(self, tensor: StoredTensor) -> Tensor:
        """All rows of a stored matrix, likewise.

        Raises:
            CheckpointError: as `take`.
        """
        layout = lay_out({"table": Part(tensor)}, self._files)
        return self._read_rows(tensor, layout.extents, layout.nbytes, tensor.shape)

    def _read_rows(
        self, tensor: StoredTensor, extents: np.ndarray, nbytes: int, shape: Sequence[int]
    ) -> Tensor:
        slot = Slot(nbytes, torch.device("cpu"))
        self._read_extents(tensor.name, slot.memory(), extents)
        self.statistics.rows_bytes += int(extents[:, 2].sum())
        return slot.view(int(extents[0, 3]) if len(extents) else 0, tensor.dtype, shape)

    def slot_bytes(self, page: Page) -> int:
        """What a page takes in a slot."""
        return self._layout(page).nbytes

    @property
    def on_device(self) -> list[Tensor]:
        """What slots have on a device, whether it is in use or not."""
        there = (each.on_device for each in self._on_device)  # a thread that reads may close one
        return [each for each in there if each is not None]

    @property
    def _slots(self) -> list[Slot]:
        """All but the one that is being read to."""
        return [*self._free[False], *self._free[True], *self._taken.values()]

    def _slot(self, page: Page) -> Slot:
        """A free slot that holds a page."""
        free, nbytes = self._free[page.is_addition], self._layout(page).nbytes
        large = [slot for slot in free if slot.nbytes >= nbytes]
        if large:
            slot = min(large, key=lambda slot: slot.nbytes)
            free.remove(slot)
        else:
            if free:
                free.pop().close()  # too small: given back before a larger one is taken
            slot = self._new_slot(nbytes)
        self._count(slot.nbytes)
        return slot

    def _count(self, nbytes: int = 0) -> None:
        """Note what slots take, with one of `nbytes` that is being read to, and copies."""
        in_use = nbytes + sum(each.nbytes for each in self._slots)
        in_use += sum(copied_bytes(page.parts.values(), self._device) for page in self._taken)
        self.statistics.slot_bytes = max(self.statistics.slot_bytes, in_use)

    def _new_slot(self, nbytes: int) -> Slot:
        slot = Slot(nbytes, self._device)
        if slot.on_device is not None:  # on a CPU, tensors hold what they need of it
            self._on_device = [each for each in self._on_device if each.on_device is not None]
            self._on_device.append(slot)
        return slot

    def _read(self, page: Page, slot: Slot) -> tuple[Slot, PageRead]:
        read = PageRead(page.name, page.nbytes)
        layout = self._layout(page)
        try:
            found = self._read_extents(page.name, slot.memory(), layout.extents)
            slot.send(layout)
        except BaseException:
            slot.close()
            raise
        read.disk_bytes, read.cached_bytes = found.read_bytes, found.cached_bytes
        read.read_seconds = found.seconds
        return slot, read

    def _read_extents(self, name: str, memory: Memory, extents: np.ndarray) -> ReadStatistics:
        try:
            found = self._reader.read(memory, extents)
        except EOFError as error:
            raise CheckpointError(
                f"{error}, while {name} was read; is something still writing it?"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{error.filename} must be readable, got {error.strerror} while {name} was read"
            ) from error
        if changed := self._reader.changed():
            raise CheckpointError(
                f"{changed} must stay as it is while it is scored, got another file while {name} "
                "was read; score it again once it is written"
            )
        return found

    def _layout(self, page: Page) -> Layout:
        if page not in self._layouts:
            self._layouts[page] = lay_out(page.parts, self._files)
        return self._layouts[page]

"""Tables of words: of an embedding some rows are read at a time, of a head tiles of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from llfast.kernels.inputs import GROUP
from llfast.safetensors_file import StoredTensor

from .layout import Page, Part, row_bytes
from .pages import Pages
from .skeleton import Skeleton
from .units import StoredEmbedding


def head_tiles(weight: StoredTensor, page_bytes: int) -> list[Page]:
    """A head's rows in pages of at most that size, cut where partial results may be cut."""
    rows = weight.shape[0]
    step = max(page_bytes // max(row_bytes(weight), 1) // GROUP, 1) * GROUP
    return [
        Page(f"rows {first} of the head", {"weight": Part(weight, first, last)})
        for first in range(0, rows, step)
        for last in [min(first + step, rows)]
    ]


class Rows:
    """Rows of stored tables, on the host."""

    def __init__(self, pages: Pages, *, remember: bool) -> None:
        """Read nothing yet.

        Args:
            pages: of the files that the tables are in.
            remember: have rows that were read last there for the next model, too.
        """
        self._pages, self._remember = pages, remember
        self._last: tuple[StoredTensor, bytes, Tensor] | None = None
        self._held: dict[StoredTensor, Tensor] = {}

    def hold(self, table: StoredTensor) -> None:
        """Read a whole table, of which many rows will be wanted: one by one they are slow to read.

        Raises:
            CheckpointError: if it cannot be read.
        """
        self._held[table] = self._pages.table(table)

    def read(self, table: StoredTensor, rows: Int64[np.ndarray, " R"]) -> Tensor:
        """(R, ...), in memory of their own, which nobody may write to.

        Raises:
            CheckpointError: if they cannot be read.
        """
        if table in self._held:
            return self._held[table][torch.from_numpy(rows)]
        if not self._remember:
            return self._pages.rows(table, rows)
        key = rows.tobytes()
        if self._last is not None and self._last[:2] == (table, key):
            self._pages.statistics.shared_bytes += self._last[2].nbytes
            return self._last[2]
        found = self._pages.rows(table, rows)
        self._last = (table, key, found)
        return found


class RowsOnDemand:
    """An embedding that has only the rows that a call asks for."""

    def __init__(
        self, skeleton: Skeleton, rows: Rows, embedding: StoredEmbedding, table: StoredTensor
    ) -> None:
        """Args: table: where its numbers are read."""
        self._skeleton, self._rows, self._table = skeleton, rows, table
        self._embedding = embedding
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        module = self._embedding.module
        self._padding, module.padding_idx = module.padding_idx, None  # which is for gradients
        self._handles = [
            module.register_forward_pre_hook(self._gather, prepend=True),
            module.register_forward_hook(self._forget),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._embedding.module.padding_idx = self._padding

    def _gather(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids, *others = given
        words, places = torch.unique(ids, return_inverse=True)
        rows = self._rows.read(self._table, words.cpu().numpy())
        rows = rows.to(self._skeleton.device, self._embedding.dtype)
        module.weight = nn.Parameter(rows, requires_grad=False)
        return (places, *others)

    def _forget(self, *_: object) -> None:
        self._skeleton.evict([self._embedding.place])

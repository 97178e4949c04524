"""The weights of a paged model: which of them are in place, and which are on their way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from llfast.dtypes import STORED_DTYPES
from llfast.kernels.inputs import GROUP
from llfast.linear import PACKED, linear_layers

from .layout import Page, Part, row_bytes
from .pages import Pages
from .skeleton import Skeleton, get_tensor
from .statistics import LoadingStatistics
from .units import StoredEmbedding, StoredHead, Units


class Weights:
    """Puts pages into a skeleton, one layer at a time, and reads the next one meanwhile.

    Attributes:
        layers: what can be asked for, by name.
        largest: the layer with the largest page.
        more_waves: whether the model will be gone through again.
        keep: whether layers stay once they are there.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        units: Units,
        pages: Pages,
        statistics: LoadingStatistics,
        *,
        linear: str,
        rows: int,
    ) -> None:
        """Prepare; `with` reads what stays in memory.

        Args:
            skeleton: the model.
            units: its parts.
            pages: of its checkpoint.
            statistics: filled in.
            linear: what `linear_layers` is given for every layer.
            rows: the same.
        """
        self._skeleton, self._units, self._pages = skeleton, units, pages
        self._statistics = statistics
        self._linear, self._rows = linear, rows
        self.keep = False
        self.layers = {unit.name: unit for unit in units.layers}
        self.largest = max(units.layers, key=lambda unit: pages.slot_bytes(unit.page))
        self.more_waves = False
        self._tiles = _tiles(units.head, pages.slot_bytes(self.largest.page))
        self._pages_by_name = {unit.name: unit.page for unit in units.layers}
        self._pages_by_name |= {tile.name: tile for tile in self._tiles}
        self._listed = list(self._pages_by_name)
        self._before: list[str] = []  # what the wave before this one asked for
        self._asked: list[str] = []  # and this one, so far
        self._in_place: list[str] = []  # layers and tiles: one, unless they are kept
        self._layers = ExitStack()  # what is to be undone when they go
        self._tile_weights: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        skeleton, units = self._skeleton, self._units
        skeleton.put(units.kept_places, self._pages.take(units.kept, keep=True))
        skeleton.evict(name for name in skeleton.places if name not in units.kept_places)
        kept = (get_tensor(skeleton.model, name).nbytes for name in units.kept_places)
        self._statistics.kept_bytes = sum(kept)
        self._stack.enter_context(self._linear_layers(skeleton.model))
        if units.embedding is not None:
            # Also where layers are kept: reading the rows of a text is faster than the table.
            self._stack.enter_context(_RowsOnDemand(skeleton, self._pages, units.embedding))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._let_go()
        self._stack.close()
        self._tile_weights.clear()
        self._skeleton.evict(self._units.kept_places)

    @property
    def paged_bytes(self) -> int:
        """What they take in memory: what stays, two slots, and a page in another form."""
        places = self._skeleton.places
        packed = 1 if self._linear == PACKED else 0
        kept = sum(places[name].empty.nbytes for name in self._units.kept_places)
        copies = [0]  # of one page: converted, and packed
        for unit in self._units.layers:
            converted = self._skeleton.copies(unit.places)
            nbytes = sum(places[name].empty.nbytes for name in unit.places)
            copies.append((converted + packed) * nbytes)
        for tile in self._tiles:
            part = tile.parts["weight"]
            if STORED_DTYPES.get(part.tensor.dtype) != self._units.head.dtype:
                copies.append(math.prod(part.shape) * self._units.head.dtype.itemsize)
        return (1 + packed) * kept + self._slots_bytes + max(copies)

    @property
    def kept_bytes(self) -> int:
        """What they take in memory if all of them stay, and two pages on their way."""
        copies = 2 if self._linear == PACKED else 1
        places = self._skeleton.places.values()
        return copies * sum(place.empty.nbytes for place in places) + self._slots_bytes

    @property
    def _slots_bytes(self) -> int:
        return 2 * max(self._pages.slot_bytes(page) for page in self._pages_by_name.values())

    def begin_wave(self) -> None:
        """Expect the order of the last wave again."""
        self._before, self._asked = self._asked, []
        self._statistics.waves += 1

    def need(self, name: str) -> None:
        """Have the weights of a layer in place; those of others go, unless they are kept."""
        if name in self._in_place:
            return
        unit = self.layers[name]
        if not self._before:
            self._statistics.order.append(name)
        self._skeleton.put(unit.places, self._bring(name))
        self._layers.callback(self._skeleton.evict, unit.places)
        self._layers.enter_context(self._linear_layers(unit.module))

    def head_tiles(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(first word, rows of the head, their biases), over all of its rows.

        What is yielded is gone when the next is asked for.
        """
        head = self._units.head
        bias = None if head.bias is None else get_tensor(self._skeleton.model, head.bias)
        for tile in self._tiles:
            weight = self._tile_weights.get(tile.name)
            if weight is None:
                weight = self._bring(tile.name)["weight"].to(self._skeleton.device, head.dtype)
            if self.keep:
                self._tile_weights[tile.name] = weight
            first = tile.parts["weight"].first
            yield first, weight, None if bias is None else bias[first : first + len(weight)]
            del weight
        if not self.keep:
            self._let_go()

    def _bring(self, name: str) -> dict[str, Tensor]:
        """A page, and the next one on its way."""
        if not self.keep:
            self._let_go()
        tensors = self._pages.take(self._pages_by_name[name], keep=self.keep)
        self._in_place.append(name)
        self._asked.append(name)
        if (following := self._following(name)) and following not in self._in_place:
            self._pages.read_ahead(self._pages_by_name[following], keep=self.keep)
        return tensors

    def _let_go(self) -> None:
        """Empty what is in place, and give slots back."""
        self._layers.close()
        for name in self._in_place if not self.keep else ():
            self._pages.release(self._pages_by_name[name])
        self._in_place.clear()

    def _following(self, name: str) -> str | None:
        """What is likely asked for next: as the last wave did, or else as the model lists it."""
        order = self._before or self._listed
        place = len(self._asked) if self._before else order.index(name) + 1
        if place < len(order):
            return order[place]
        return self._asked[0] if self.more_waves else None

    def _linear_layers(self, module: nn.Module) -> Any:
        return linear_layers(
            module, self._linear, rows=self._rows, leave_out=self._units.head.module
        )


def _tiles(head: StoredHead, page_bytes: int) -> list[Page]:
    """The head's rows in pages of at most that size, cut where partial results may be cut."""
    rows = head.weight.shape[0]
    step = max(page_bytes // max(row_bytes(head.weight), 1) // GROUP, 1) * GROUP
    return [
        Page(f"rows {first} of the head", {"weight": Part(head.weight, first, last)})
        for first in range(0, rows, step)
        for last in [min(first + step, rows)]
    ]


class _RowsOnDemand:
    """An embedding that has only the rows that a call asks for."""

    def __init__(self, skeleton: Skeleton, pages: Pages, embedding: StoredEmbedding) -> None:
        self._skeleton, self._pages, self._embedding = skeleton, pages, embedding
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
        rows = self._pages.rows(self._embedding.weight, words.cpu().numpy())
        rows = rows.to(self._skeleton.device, self._embedding.dtype)
        module.weight = nn.Parameter(rows, requires_grad=False)
        return (places, *others)

    def _forget(self, *_: object) -> None:
        self._skeleton.evict([self._embedding.place])

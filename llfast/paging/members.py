"""Models that are gone through together, and what has to be read for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llfast.dtypes import STORED_DTYPES
from llfast.linear import PACKED
from llfast.safetensors_file import StoredTensor

from .layout import Page, Part, copied_bytes
from .sharing import in_other_places
from .skeleton import Skeleton
from .tables import head_tiles
from .units import Units

KEPT = "what stays in memory"  # the name of what is read first
_GAP = 4096  # before a tensor, that it may lie in a slot as it does in its file


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One of the models that are gone through together.

    Attributes:
        name: what it is called.
        skeleton: the model.
        units: its parts.
        linear: what `linear_layers` is given for every layer.
        equals: by the name of a stored tensor, another one with the same bytes, which is read in
            its stead.
    """

    name: str
    skeleton: Skeleton
    units: Units
    linear: str
    equals: Mapping[str, StoredTensor]

    @property
    def tensors(self) -> Iterator[StoredTensor]:
        """All that the model is made of."""
        yield from self.units.kept
        yield self.units.head.weight
        if self.units.embedding is not None:
            yield self.units.embedding.weight
        for unit in self.units.layers:
            yield from unit.sources

    def read(self, source: StoredTensor) -> StoredTensor:
        """The stored tensor that is read for one of its own."""
        return self.equals.get(source.name, source)


class Plan:
    """The pages of members, and how much memory they take.

    Attributes:
        layers: of each member, by name.
        listed: their names, in the order in which models list them.
        largest: the page that holds the largest layer.
        tiles: of each head that is read.
    """

    def __init__(self, members: Sequence[Member], slot_bytes: Callable[[Page], int]) -> None:
        """Args: slot_bytes: what a page takes in a slot."""
        self._members, self._slot_bytes = members, slot_bytes
        self._pages: dict[tuple[str, tuple[int, ...]], Page] = {}
        self.layers = [{unit.name: unit for unit in member.units.layers} for member in members]
        self.listed = list(self.layers[0])
        numbers = range(len(members))
        alone = [self.page(name, [number]) for number in numbers for name in self.listed]
        self.largest = max(alone, key=slot_bytes)
        heads = {member.read(member.units.head.weight) for member in members}
        self.tiles = {each: head_tiles(each, slot_bytes(self.largest)) for each in heads}

    def page(self, layer: str, members: Iterable[int]) -> Page:
        """What the last of these members needs of a layer beyond what the others brought."""
        key = layer, tuple(members)
        if key not in self._pages:
            *before, member = key[1]
            there = self.needed(layer, before)
            parts = {
                source.name: Part(read)
                for source in self._sources(layer, member)
                if (read := self._members[member].read(source)) not in there
            }
            name = f"{layer} of {self._members[member].name}" if before else layer
            self._pages[key] = Page(name, parts, is_addition=bool(before))
        return self._pages[key]

    def needed(self, layer: str, members: Iterable[int]) -> set[StoredTensor]:
        """What is read of a layer for any of these members."""
        return {
            self._members[member].read(source)
            for member in members
            for source in self._sources(layer, member)
        }

    def _sources(self, layer: str, member: int) -> tuple[StoredTensor, ...]:
        if layer == KEPT:
            return self._members[member].units.kept
        return self.layers[member][layer].sources

    @property
    def paged_bytes(self) -> int:
        """What they take in memory: what stays, slots, and a page in other forms."""
        copies = [0]  # of one layer: to whole addresses, converted or moved, and packed
        to_whole = {name: self._most_copied_bytes(name) for name in self.listed}
        for member in self._members:
            places, head = member.skeleton.places, member.units.head
            for unit in member.units.layers:
                device = member.skeleton.device
                is_moved = in_other_places(unit.sources, member.equals, device)
                number = member.skeleton.copies(unit.places) + is_moved
                nbytes = sum(places[name].empty.nbytes for name in unit.places)
                number += member.linear == PACKED
                copies.append(number * nbytes + to_whole[unit.name])
            converts = STORED_DTYPES.get(head.weight.dtype) != head.dtype
            for tile in self.tiles[member.read(head.weight)]:
                words = math.prod(tile.parts["weight"].shape)
                copies.append(converts * words * head.dtype.itemsize + self._copied(tile))
        is_packed = any(member.linear == PACKED for member in self._members)
        moving = max(self._slots_bytes + max(copies), self._kept_pages_bytes)
        return (1 + is_packed) * self.kept_places_bytes + moving

    @property
    def kept_bytes(self) -> int:
        """What the one member takes in memory if all of it stays, and two pages on their way."""
        assert len(self._members) == 1, "of several, none is kept"
        member = self._members[0]
        copies = 2 if member.linear == PACKED else 1
        places = member.skeleton.places.values()
        return copies * sum(place.empty.nbytes for place in places) + self._slots_bytes

    @property
    def kept_places_bytes(self) -> int:
        """What stays in memory from the start, counted once where it is there once."""
        total = 0
        for member in self._members:
            for name in member.units.kept_places:
                sources = member.skeleton.sources.get(name, ())
                is_there = sources and all(source.name in member.equals for source in sources)
                is_there = is_there and member.skeleton.is_as_stored([name])
                device = member.skeleton.device
                if not is_there or in_other_places(sources, member.equals, device):
                    total += member.skeleton.places[name].empty.nbytes
        return total

    @property
    def together_bytes(self) -> tuple[int, int]:
        """What is read of one member at a time, and of all once: layers and heads."""
        alone = 0
        of_all: set[StoredTensor] = set()
        for number, member in enumerate(self._members):
            own = {member.read(member.units.head.weight)}
            own.update(*(self.needed(layer, [number]) for layer in self.listed))
            alone = max(alone, _nbytes(own))
            of_all |= own
        return alone, _nbytes(of_all)

    @property
    def _kept_pages_bytes(self) -> int:
        """The most, of what stays, that is held as it was stored until it is converted."""
        members = self._members
        kept = [self.page(KEPT, range(number + 1)) for number in range(len(members))]
        is_there = all(each.skeleton.is_as_stored(each.units.kept_places) for each in members)
        if is_there and not any(map(self._copied, kept)):
            return 0
        most = 0
        for number in range(len(members)):
            needed = self.needed(KEPT, range(number, len(members)))
            pages = kept[: number + 1]
            held = [tensor for page in pages for tensor in tensors_of(page) if tensor in needed]
            copied = 0 if is_there else self._copied_bytes(held)  # which are what stays
            most = max(most, _nbytes(held) + copied)
        return most

    def _most_copied_bytes(self, layer: str) -> int:
        """Of tensors of a layer that are copied to whole addresses, the most at a time."""
        most = 0
        for first in range(len(self._members)):
            stay, additions = self._additions(layer, first)
            largest = max(map(self._copied_bytes, additions), default=0)
            own = self._copied_bytes(self.needed(layer, [first]))
            most = max(most, own + (stay + 1) * largest)
        return most

    def _copied(self, page: Page) -> int:
        return copied_bytes(page.parts.values(), self._members[0].skeleton.device)

    def _copied_bytes(self, tensors: Iterable[StoredTensor]) -> int:
        return copied_bytes(map(Part, tensors), self._members[0].skeleton.device)

    @property
    def _slots_bytes(self) -> int:
        """Two slots for pages, and those for additions."""
        tiles = (tile for tiles in self.tiles.values() for tile in tiles)
        page = max(map(self._slot_bytes, (self.largest, *tiles)))
        numbers = range(len(self._members))
        return 2 * page + max(
            self._additions_bytes(layer, first) for layer in self.listed for first in numbers
        )

    def _additions_bytes(self, layer: str, first: int) -> int:
        """Of a wave that begins with this member, whoever else takes part in it.

        A slot for each addition that stays for a later member, for the one in use, and the next.
        """
        stay, additions = self._additions(layer, first)
        sizes = (_nbytes(each) + _GAP * (len(each) + 1) for each in additions if each)
        return (stay + 2) * max(sizes, default=0)

    def _additions(self, layer: str, first: int) -> tuple[int, list[set[StoredTensor]]]:
        """How many of them stay for a later member, and all of them."""
        there = self.needed(layer, [first])
        later = range(first + 1, len(self._members))
        additions = [self.needed(layer, [member]) - there for member in later]
        stay = sum(
            any(not each.isdisjoint(other) for other in additions[place + 1 :])
            for place, each in enumerate(additions)
        )
        return stay, additions


def _nbytes(tensors: Iterable[StoredTensor]) -> int:
    return sum(tensor.end - tensor.begin for tensor in tensors)


def tensors_of(page: Page) -> list[StoredTensor]:
    """Those that a page has parts of."""
    return [part.tensor for part in page.parts.values()]

"""Models that are gone through together, and what has to be read for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llfast.dtypes import STORED_DTYPES
from llfast.linear import PACKED
from llfast.safetensors_file import StoredTensor

from .layout import Page, Part
from .sharing import in_other_places
from .skeleton import Skeleton
from .tables import head_tiles
from .units import Units

KEPT = "what stays in memory"  # the name of what is read first


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
        """What they take in memory: what stays, slots, and a page in another form."""
        copies = [0]  # of one layer: converted or moved, and packed
        for member in self._members:
            places, head = member.skeleton.places, member.units.head
            for unit in member.units.layers:
                is_moved = in_other_places(unit.sources, member.equals)
                converted = max(member.skeleton.copies(unit.places), is_moved)
                nbytes = sum(places[name].empty.nbytes for name in unit.places)
                copies.append((converted + (member.linear == PACKED)) * nbytes)
            if STORED_DTYPES.get(head.weight.dtype) != head.dtype:
                tiles = self.tiles[member.read(head.weight)]
                shapes = (tile.parts["weight"].shape for tile in tiles)
                copies += [math.prod(shape) * head.dtype.itemsize for shape in shapes]
        is_packed = any(member.linear == PACKED for member in self._members)
        return (1 + is_packed) * self.kept_places_bytes + self._slots_bytes + max(copies)

    @property
    def kept_bytes(self) -> int:
        """What the one member takes in memory if all of it stays, and two pages on their way."""
        (member,) = self._members
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
                if not is_there or in_other_places(sources, member.equals):
                    total += member.skeleton.places[name].empty.nbytes
        return total

    @property
    def _slots_bytes(self) -> int:
        """Two slots for pages; for additions, as many as lie there at once, and one more."""
        tiles = (tile for tiles in self.tiles.values() for tile in tiles)
        page = max(map(self._slot_bytes, (self.largest, *tiles)))
        together, alone = [0], [0]
        for layer in self.listed:
            for number in range(1, len(self._members)):
                additions = self._additions(layer, number)
                together.append(sum(map(self._slot_bytes, additions)))
                alone.append(self._slot_bytes(self.page(layer, range(number + 1))))
        return 2 * page + max(together) + max(alone)

    def _additions(self, layer: str, member: int) -> list[Page]:
        """Those that lie in memory when this member has its turn."""
        needed = self.needed(layer, range(member, len(self._members)))
        pages = (self.page(layer, range(each + 1)) for each in range(1, member + 1))
        return [page for page in pages if not needed.isdisjoint(tensors_of(page))]


def tensors_of(page: Page) -> list[StoredTensor]:
    """Those that a page has parts of."""
    return [part.tensor for part in page.parts.values()]

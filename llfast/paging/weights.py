"""The weights of paged models: which of them are in place, and which are on their way.

Several models of one kind can be gone through together. Then a layer is there for one model after
the other, and what is read for a model is what none of those before it brought already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

from torch import Tensor, nn

from llfast.linear import linear_layers
from llfast.safetensors_file import StoredTensor

from .layout import Page
from .members import KEPT, Member, Plan, tensors_of
from .pages import Pages
from .sharing import at_place
from .skeleton import get_tensor
from .slots import move_to
from .statistics import LoadingStatistics
from .tables import Rows, RowsOnDemand
from .units import StoredEmbedding


class Weights:
    """Puts pages into skeletons, one layer at a time, and reads the next one meanwhile.

    Attributes:
        plan: which pages there are.
        next_member: whose layer the next wave will ask for first; None if there is none.
        keep: whether layers stay once they are there; for one member only.
        keep_table: whether a table of words that is read at once stays where the model is.
    """

    def __init__(
        self,
        members: Sequence[Member],
        pages: Pages,
        statistics: LoadingStatistics,
        *,
        most_table_rows: int,
    ) -> None:
        """Prepare; `with` reads what stays in memory.

        Args:
            members: models with layers of the same names, in one dtype on one device.
            pages: of the files of all.
            statistics: filled in.
            most_table_rows: a table of words that has no more is read at once.
        """
        self._members, self._pages, self._statistics = members, pages, statistics
        self._most_table_rows = most_table_rows
        self.keep = self.keep_table = False
        self.plan = Plan(members, pages.slot_bytes)
        self.next_member: int | None = None
        self._lead: tuple[int, ...] = (0,)  # who goes first
        self._wave: tuple[int, ...] | None = None  # members of the wave, once they are known
        self._before: list[str] = []  # the layers that the wave before this one asked for
        self._asked: list[str] = []  # and this one, so far
        self._layer: tuple[str, int] | None = None  # in place, and whose
        self._kept: set[str] = set()  # layers that stay in place
        self._there: dict[StoredTensor, Tensor] = {}  # of this layer
        self._held: list[Page] = []  # which they lie in
        self._places = ExitStack()  # what is to be undone when the layer goes
        self._tile_weights: dict[Page, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        there: dict[StoredTensor, Tensor] = {}
        cache = Rows(self._pages, remember=len(self._members) > 1)
        for number, member in enumerate(self._members):
            skeleton, units = member.skeleton, member.units
            page = self.plan.page(KEPT, range(number + 1))
            if page.parts or not number:
                there |= self._tensors(page, self._pages.take(page, keep=True))
            self._put(member, units.kept_places, units.kept, page, there)
            needed = self.plan.needed(KEPT, range(number + 1, len(self._members)))
            there = {tensor: each for tensor, each in there.items() if tensor in needed}
            skeleton.evict(name for name in skeleton.places if name not in units.kept_places)
            self._stack.enter_context(self._linear_layers(member, skeleton.model))
            if units.embedding is not None:
                self._provide_words(member, units.embedding, cache)
        self._statistics.kept_bytes = self.plan.kept_places_bytes
        self._statistics.kept_bytes += self.table_bytes if self.keep_table else 0
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()
        self._places.close()
        self._stack.close()
        self._tile_weights.clear()
        for member in self._members:
            member.skeleton.evict(member.units.kept_places)

    @property
    def table_bytes(self) -> int:
        """Of tables of words that are read at once, as models have them."""
        return sum(
            member.skeleton.places[embedding.place].empty.nbytes
            for member in self._members
            if (embedding := member.units.embedding) is not None and self._is_read(embedding)
        )

    def _is_read(self, embedding: StoredEmbedding) -> bool:
        """At once, and not by rows."""
        return embedding.weight.shape[0] <= self._most_table_rows

    def _provide_words(self, member: Member, embedding: StoredEmbedding, cache: Rows) -> None:
        """Let an embedding find its rows: in a table on the device or the host, or in the file.

        Also where layers are kept: the rows of some texts come faster than a table.
        """
        skeleton, table = member.skeleton, member.read(embedding.weight)
        if self._is_read(embedding) and self.keep_table:
            skeleton.put([embedding.place], {embedding.weight.name: self._pages.table(table)})
            self._stack.callback(skeleton.evict, [embedding.place])
            return
        if self._is_read(embedding):
            cache.hold(table)
        self._stack.enter_context(RowsOnDemand(skeleton, cache, embedding, table))

    @property
    def held(self) -> Iterable[Tensor]:
        """What was read of the layer in place, as it was stored, and slots on a device."""
        return [*self._there.values(), *self._pages.on_device]

    def begin_wave(self, member: int) -> None:
        """Expect the order of the last wave again, beginning with this member."""
        self._before, self._asked = self._asked, []
        self._wave = (0,) if len(self._members) == 1 else None
        self._lead = (member,)
        self._statistics.waves += 1

    def expect(self, members: Iterable[int]) -> None:
        """Say which members take part in the wave; the one that leads it among them."""
        is_news = self._wave is None
        self._wave = tuple(sorted(members))
        assert self._wave[:1] == self._lead, "members must come in their order"
        if is_news and self._layer is not None:
            self._read_ahead(self._after(*self._layer))

    def need(self, name: str, member: int) -> None:
        """Put a layer of a member in place; others go, unless they are kept."""
        if (name, member) == self._layer or name in self._kept:
            return
        wave = self._wave or self._lead
        if self._layer is not None and self._layer[0] == name and self._layer[1] < member:
            self._leave(wave[wave.index(member) :])
        else:
            self._let_go()
            if not self._before:
                self._statistics.order.append(name)
            self._asked.append(name)
        self._layer = (name, member)
        unit, page = self.plan.layers[member][name], self.plan.page(name, self._until(member))
        self._bring(page, self._after(name, member))
        self._put(self._members[member], unit.places, unit.sources, page, self._there)
        self._places.callback(self._members[member].skeleton.evict, unit.places)
        self._places.enter_context(self._linear_layers(self._members[member], unit.module))
        if self.keep:
            self._kept.add(name)
            self._there.clear()

    def head_tiles(self) -> Iterator[tuple[list[int], int, Tensor]]:
        """(members, first word, rows of their head), over all rows of all heads of the wave.

        What is yielded is gone when the next is asked for.
        """
        tiles = list(self._wave_tiles())
        for number, (members, tile) in enumerate(tiles):
            head = self._members[members[0]].units.head
            weight = self._tile_weights.get(tile)
            if weight is None:
                if not self.keep:
                    self._let_go()
                later = [each for _, each in tiles[number + 1 :]]
                self._bring(tile, later[0] if later else self._next_wave())
                part = tile.parts["weight"]
                weight = self._there.pop(part.tensor)
                weight = move_to(weight, head.module.weight.device, head.dtype)
                self._statistics.shared_bytes += (len(members) - 1) * tile.nbytes
            if self.keep:
                self._tile_weights[tile] = weight
            yield members, tile.parts["weight"].first, weight
            del weight
        if not self.keep:
            self._let_go()

    def head_bias(self, member: int) -> Tensor | None:
        """Of all words; it stays in memory."""
        found = self._members[member]
        name = found.units.head.bias
        return None if name is None else get_tensor(found.skeleton.model, name)

    def _until(self, member: int) -> tuple[int, ...]:
        """The members of the wave up to this one."""
        return tuple(each for each in self._wave or self._lead if each <= member)

    def _put(
        self,
        member: Member,
        places: Iterable[str],
        sources: Sequence[StoredTensor],
        page: Page,
        there: Mapping[StoredTensor, Tensor],
    ) -> None:
        """Put what is there into a member's places, where its own file would have it."""
        own = {}
        for source in sources:
            read = member.read(source)
            tensor = there[read]
            own[source.name] = tensor if read is source else at_place(tensor, source.begin)
        member.skeleton.put(places, own)
        self._statistics.shared_bytes += (
            sum(each.end - each.begin for each in sources) - page.nbytes
        )

    def _bring(self, page: Page, following: Page | None) -> None:
        """Bring a page, and start reading the next one."""
        if page.parts:
            tensors = self._pages.take(page, keep=self.keep)
            self._there |= self._tensors(page, tensors)
            if not self.keep:
                self._held.append(page)
        self._read_ahead(following)

    def _read_ahead(self, page: Page | None) -> None:
        if page is not None and page.parts:
            self._pages.read_ahead(page, keep=self.keep)

    def _tensors(self, page: Page, tensors: Mapping[str, Tensor]) -> dict[StoredTensor, Tensor]:
        return {part.tensor: tensors[name] for name, part in page.parts.items()}

    def _leave(self, following: Sequence[int] = ()) -> None:
        """Empty the member's places; slots go that none of the following ones needs."""
        self._places.close()
        needed = set() if self._layer is None else self.plan.needed(self._layer[0], following)
        for page in list(self._held):
            if needed.isdisjoint(tensors_of(page)):
                for tensor in tensors_of(page):
                    self._there.pop(tensor, None)
                self._pages.release(page)
                self._held.remove(page)

    def _let_go(self) -> None:
        if not self.keep:
            self._leave()
            self._there.clear()
        self._layer = None

    def _after(self, layer: str, member: int) -> Page | None:
        """What is likely read next: as the last wave went, or else as models are listed."""
        if self._wave is None:
            return None
        for later in self._wave[self._wave.index(member) + 1 :]:
            if (page := self.plan.page(layer, self._until(later))).parts:
                return page
        order = self._before or self.plan.listed
        place = len(self._asked) if self._before else order.index(layer) + 1
        if place < len(order):
            following = order[place]
            return None if following in self._kept else self.plan.page(following, self._wave[:1])
        tile = next(self._wave_tiles())[1]
        return None if tile in self._tile_weights else tile

    def _next_wave(self) -> Page | None:
        """What the next wave begins with."""
        if self.next_member is None or self._asked[0] in self._kept:
            return None
        return self.plan.page(self._asked[0], (self.next_member,))

    def _wave_tiles(self) -> Iterator[tuple[list[int], Page]]:
        """Tiles of the heads of a wave, and who has them."""
        users: dict[StoredTensor, list[int]] = {}
        for number in self._wave or self._lead:
            member = self._members[number]
            users.setdefault(member.read(member.units.head.weight), []).append(number)
        for weight, members in users.items():
            for tile in self.plan.tiles[weight]:
                yield members, tile

    def _linear_layers(self, member: Member, module: nn.Module) -> Any:
        return linear_layers(module, member.linear, leave_out=member.units.head.module)

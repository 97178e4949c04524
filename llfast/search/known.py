"""What an index of a store knows of the store's rows."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import datetime

from llfast.results import ResultKey
from llfast.rows import StoredRow

from .building import Selection
from .models import IndexedModel
from .segment import Segment


class Known:
    """Rows of the store that an index has: when they were created, and which shard has them."""

    def __init__(self, selection: Selection, segment: Segment) -> None:
        columns = ("name", "revision", "dtype", "scoring_version", "created", "shard")
        convention = segment.basis.convention
        self.created: dict[ResultKey, datetime] = {}
        self._shards: dict[ResultKey, str] = {}
        for name, revision, dtype, version, created, shard in zip(
            *(segment.table[each].to_pylist() for each in columns), strict=True
        ):
            key = ResultKey(name, revision, selection.textset, convention, dtype, None, version)
            self.created[key], self._shards[key] = created, shard

    def within(self, shards: AbstractSet[str]) -> list[ResultKey]:
        """Keys of rows in these shards."""
        return [key for key, shard in self._shards.items() if shard in shards] if shards else []

    def forget(self, keys: Iterable[ResultKey]) -> None:
        """Leave out rows that are gone."""
        for key in keys:
            del self.created[key], self._shards[key]

    def at_home(self, model: IndexedModel, key: ResultKey) -> IndexedModel:
        """The model, with the shard that has it now."""
        return replace(model, shard=self._shards.get(key, model.shard))

    def learn(self, rows: Iterable[StoredRow]) -> None:
        """Take in rows that the index has now."""
        for row in rows:
            self.created[row.key], self._shards[row.key] = row.created, row.shard.name

    def move(self, rows: Iterable[StoredRow]) -> None:
        """Note which shard known rows are in now, as after a compaction."""
        for row in rows:
            if self.created.get(row.key) == row.created:
                self._shards[row.key] = row.shard.name

"""What an index knows of its models, by row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from llfast.errors import SpaceError
from llfast.mixed import layer_of
from llfast.where import model_table

_MOST_LIKE = 5000  # names that one that is not there is compared with: 0.1 s


@dataclass(frozen=True, slots=True)
class IndexedModel:
    """A row of an index, without its point.

    Attributes:
        name: unique among the rows that are searched.
        revision: which weights it had.
        dtype: what it ran in; "" if that is not known.
        metadata: the caller's own columns.
        scoring_version: raised when a release changes numbers.
        created: when the store got it; None if it is from no store.
        shard: the name of the store's file that held it.
    """

    name: str
    revision: str
    dtype: str
    metadata: Mapping[str, Any]
    scoring_version: int = 0
    created: datetime | None = None
    shard: str = ""


class Models:
    """Rows in order, some of which are gone.

    Attributes:
        dtypes: what they ran in.
        adds_bos: how many of their tokenizers add BOS, and how many do not.
        gone: numbers of rows that are not searched.
    """

    def __init__(
        self,
        names: Sequence[str],
        row: Callable[[int], IndexedModel],
        revisions: Callable[[], Sequence[str]],
        *,
        dtypes: Iterable[str],
        adds_bos: Mapping[bool, int],
    ) -> None:
        """Rows as they were indexed.

        Args:
            names: of all of them.
            row: what is known of one, looked up when it is asked for.
            revisions: of all of them, looked up when they are asked for.
            dtypes: what they ran in.
            adds_bos: how many of their tokenizers add BOS, and how many do not.
        """
        self._base, self._row, self._names = len(names), row, list(names)
        self._revisions = revisions
        self._table: pa.Table | None = None
        self._by_revision: defaultdict[str, list[int]] | None = None
        self._added: list[IndexedModel] = []
        self._by_name = {name: number for number, name in enumerate(names)}
        self.dtypes, self.adds_bos = set(dtypes), Counter(adds_bos)
        self.gone: set[int] = set()

    @classmethod
    def of(cls, rows: Sequence[IndexedModel]) -> Models:
        """Rows that are in memory."""
        known = [row.metadata["adds_bos"] for row in rows if "adds_bos" in row.metadata]
        return cls(
            [row.name for row in rows],
            rows.__getitem__,
            lambda: [row.revision for row in rows],
            dtypes=[row.dtype for row in rows],
            adds_bos=Counter(known),
        )

    def __len__(self) -> int:
        return len(self._by_name)

    def __getitem__(self, number: int) -> IndexedModel:
        if number < self._base:
            return self._row(number)
        return self._added[number - self._base]

    @property
    def count(self) -> int:
        """How many rows there are, those that are gone included."""
        return len(self._names)

    def name(self, number: int) -> str:
        """The name of a row, even of one that is gone."""
        return self._names[number]

    def table(self, convention: str) -> pa.Table:
        """All rows as columns, for conditions; made once, and again after more have come."""
        table = self._table  # other threads may put theirs in its place
        if table is None or len(table) != self.count:
            rows = [self[number] for number in range(self.count)]
            columns: dict[str, list[Any]] = {
                "model": [row.name for row in rows],
                "revision": [row.revision for row in rows],
                "convention": [convention] * len(rows),
                "dtype": [row.dtype for row in rows],
            }
            if any(row.created for row in rows):
                columns["created"] = [row.created for row in rows]
            self._table = table = model_table(columns, [row.metadata for row in rows])
        return table

    def find(self, name: str) -> int | None:
        """The row of a model that is there."""
        return self._by_name.get(name)

    def find_revision(self, revision: str) -> str | None:
        """The name of a model that is there and had these weights."""
        return min((self._names[row] for row in self._of_revision(revision)), default=None)

    def in_another_dtype(self, model: IndexedModel) -> list[int]:
        """Rows that are there, are this model or this layer of it, and ran in another dtype."""
        if not (model.revision and model.dtype and self.dtypes - {"", model.dtype}):
            return []
        layer = layer_of(model.name)
        same = [
            row for row in self._of_revision(model.revision) if layer_of(self.name(row)) == layer
        ]
        return [row for row in same if self[row].dtype not in ("", model.dtype)]

    def row(self, name: str) -> int:
        """The row of a model that is there.

        Raises:
            SpaceError: if there is none, with names that are like it.
        """
        found = self._by_name.get(name)
        if found is None:
            some = list(islice(self._by_name, _MOST_LIKE))
            close = get_close_matches(name, some, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(close)}?" if close else "score it and pass the result"
            )
            raise SpaceError(f"model must be in the index, got {name!r}; {hint}")
        return found

    @property
    def there(self) -> list[int]:
        """Rows that are not gone, by name."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def allowed(self) -> Bool[np.ndarray, " K"] | None:
        """Which rows are there; None for all."""
        if not self.gone:
            return None
        there = np.ones(self.count, dtype=bool)
        there[list(self.gone)] = False
        return there

    def add(self, row: IndexedModel) -> None:
        """A new last row; one of the same name is gone."""
        self.remove(row.name)
        if self._by_revision is not None:
            self._by_revision[row.revision].append(self.count)
        self._added.append(row)
        self._names.append(row.name)
        self._by_name[row.name] = self.count - 1
        self.dtypes.add(row.dtype)
        if "adds_bos" in row.metadata:
            self.adds_bos[row.metadata["adds_bos"]] += 1

    def remove(self, name: str) -> None:
        """Take a model out, if it is there."""
        number = self._by_name.pop(name, None)
        if number is not None:
            self.gone.add(number)

    def _of_revision(self, revision: str) -> list[int]:
        """Rows that are there with these weights."""
        if self._by_revision is None:
            found: defaultdict[str, list[int]] = defaultdict(list)
            known = [*self._revisions(), *(row.revision for row in self._added)]
            for row, own in enumerate(known):
                found[own].append(row)
            self._by_revision = found
        return [row for row in self._by_revision.get(revision, []) if row not in self.gone]

"""What an index knows of its models, by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from llfast.errors import SpaceError


@dataclass(frozen=True, slots=True)
class IndexedModel:
    """A row of an index, without its point.

    Attributes:
        name: unique among the rows that are searched.
        revision: which weights it had.
        dtype: what it ran in; "" if that is not known.
        metadata: the caller's own columns.
    """

    name: str
    revision: str
    dtype: str
    metadata: Mapping[str, Any]


class Models:
    """Rows in order, some of which are gone."""

    def __init__(self, rows: Sequence[IndexedModel]) -> None:
        self._rows = list(rows)
        self._by_name = {row.name: number for number, row in enumerate(self._rows)}
        self.gone: set[int] = set()

    def __len__(self) -> int:
        return len(self._by_name)

    def __getitem__(self, number: int) -> IndexedModel:
        return self._rows[number]

    def __iter__(self) -> Iterator[IndexedModel]:
        """Those that are there."""
        return (self._rows[number] for number in self._by_name.values())

    @property
    def count(self) -> int:
        """Rows, those that are gone among them."""
        return len(self._rows)

    def find(self, name: str) -> int | None:
        """The row of a model that is there."""
        return self._by_name.get(name)

    def row(self, name: str) -> int:
        """The row of a model that is there.

        Raises:
            SpaceError: if there is none, with names that are like it.
        """
        found = self._by_name.get(name)
        if found is None:
            close = get_close_matches(name, list(self._by_name), n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(close)}?" if close else "score it and pass the result"
            )
            raise SpaceError(f"model must be in the index, got {name!r}; {hint}")
        return found

    def add(self, row: IndexedModel) -> None:
        """A new last row; one of the same name is gone."""
        self.remove(row.name)
        self._by_name[row.name] = len(self._rows)
        self._rows.append(row)

    def remove(self, name: str) -> bool:
        """Whether there was such a model."""
        number = self._by_name.pop(name, None)
        if number is not None:
            self.gone.add(number)
        return number is not None

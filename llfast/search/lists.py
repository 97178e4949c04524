"""Rows in lists of near ones, so that an approximate search looks at few of them.

query ─▶ the lists whose centroids are nearest ─▶ their rows, searched as exactly as all would be

`listing.py` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt32

from .flat import squares_to


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """Which list each row is in.

    Attributes:
        centroids: (L, F) of the rows' first coordinates.
        numbers: (K,) the list of each row.
        probes: how many lists a search looks at.
        recall: the share of the 10 nearest models that are in them, for models that neither
            centroids nor `probes` were chosen with.
    """

    centroids: Float32[np.ndarray, "L F"]
    numbers: UInt32[np.ndarray, " K"]
    probes: int
    recall: float

    def order(self, query: Float32[np.ndarray, "1 F"]) -> Int64[np.ndarray, " L"]:
        """Lists as a search looks at them, nearest first."""
        return np.argsort(squares_to(query, self.centroids)[0], kind="stable")


class ListedRows:
    """First coordinates, list by list.

    Attributes:
        lists: which list each row is in.
    """

    def __init__(self, lists: Lists, first: Float32[np.ndarray, "K F"]) -> None:
        self.lists = lists
        self._rows = np.argsort(lists.numbers, kind="stable")
        numbers = lists.numbers[self._rows]
        self._ends = np.searchsorted(numbers, np.arange(len(lists.centroids)), side="right")
        self._first = first[self._rows]

    @property
    def nbytes(self) -> int:
        """Of memory, the lists' own included."""
        lists = self.lists.centroids.nbytes + self.lists.numbers.nbytes
        return lists + self._rows.nbytes + self._ends.nbytes + self._first.nbytes

    def near(
        self,
        query: Float32[np.ndarray, "1 F"],
        least: int,
        allowed: Bool[np.ndarray, " K"] | None,
    ) -> tuple[Int64[np.ndarray, " C"], Float32[np.ndarray, " C"]]:
        """Rows of the lists nearest to a query, and squares that they are not nearer than.

        Args:
            query: its first coordinates.
            least: how many rows there must be; more lists are looked at until there are.
            allowed: which rows count for that; None for all.
        """
        rows: list[np.ndarray] = []
        squares: list[np.ndarray] = []
        found = 0
        for place, number in enumerate(self.lists.order(query)):
            if place >= self.lists.probes and found >= least:
                break
            block = slice(self._ends[number - 1] if number else 0, self._ends[number])
            own = self._rows[block]
            rows.append(own)
            squares.append(squares_to(query, self._first[block])[0])
            found += len(own) if allowed is None else int(np.count_nonzero(allowed[own]))
        return np.concatenate(rows), np.concatenate(squares)

"""Numbers of many rows, a block at a time: what is held does not grow with the store."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from .errors import StoreError
from .remote import AnyPath
from .results import ResultKey
from .rows import StoredRow
from .shards import read_batches

_TRIES = 20  # that one shard may be listed and not be there, as on a network
_BATCHES = 4  # a block is filled from batches of a quarter of it


class RowGoneError(StoreError):
    """A row was removed from the store between being listed and being read."""


def scan_rows(
    rows: Sequence[StoredRow],
    n: int,
    *,
    block_bytes: int,
    list_again: Callable[[], Iterable[StoredRow]],
) -> Iterator[tuple[list[int], Float64[np.ndarray, "M N"]]]:
    """Log-likelihoods of complete rows on the same N texts, block by block and shard by shard.

    Args:
        rows: whose numbers are wanted.
        n: how many texts there are.
        block_bytes: the size of a block, which holds at least a row; a quarter of that comes to it.
        list_again: the rows as they are now, for those whose shard has been compacted away.

    Yields: numbers into `rows`, and their values (M, N) in nats, in an array of the caller's own.

    Raises:
        RowGoneError: if a row is not in the store any more.
        StoreError: if a shard is damaged, or values are not N finite ones.
    """
    block_rows = max(1, block_bytes // (8 * max(n, 1)))
    left = len(rows)
    numbers: list[int] = []
    for number, found in _each(rows, block_bytes // _BATCHES, list_again):
        if not numbers:
            values = np.empty((min(block_rows, left), n))
        if len(found) != n:
            raise StoreError(wrong_length(rows[number], "loglikelihoods", n, len(found)))
        if not np.isfinite(found).all():
            raise StoreError(
                f"loglikelihoods must be finite, got a NaN or inf for {rows[number].label} in "
                f"{rows[number].shard}; move it away and score its models again"
            )
        values[len(numbers)] = found
        numbers.append(number)
        if len(numbers) == len(values):
            left -= len(numbers)
            yield numbers, values
            numbers = []
            del values  # or two blocks would be held while the next one is filled


def read_row(row: StoredRow) -> dict[str, Any]:
    """All columns of one row; raises as `read_batches` says."""
    for start, batch in read_batches(row.shard, batch_bytes=1 << 20, positions=[row.position]):
        if start <= row.position < start + batch.num_rows:
            found: dict[str, Any] = batch.slice(row.position - start, 1).to_pylist()[0]
            return found
    raise _too_short(row)


def wrong_length(row: StoredRow, name: str, n: int, found: int) -> str:
    """Says that a row is not on the texts of its text set."""
    return f"{row.shard} must have {n} {name} a model, got {found} for {row.label}"


def _each(
    rows: Sequence[StoredRow], batch_bytes: int, list_again: Callable[[], Iterable[StoredRow]]
) -> Iterator[tuple[int, Float64[np.ndarray, " N"]]]:
    """Every row's number and values, wherever compactions put it meanwhile."""
    waiting, tries = dict(enumerate(rows)), Counter[AnyPath]()
    while waiting:
        moved: list[int] = []
        for shard, numbers in _by_shard(waiting).items():
            come = 0  # on a network a shard can go while it is being read
            try:
                for found in _of_shard(shard, waiting, numbers, batch_bytes):
                    yield found
                    come += 1
            except FileNotFoundError:
                moved += numbers[come:]
                tries[shard] += 1
                if tries[shard] > _TRIES:
                    raise StoreError(f"{shard} must be where it is listed, got none") from None
        again = [(number, rows[number]) for number in moved]
        waiting = _find_again(again, list_again()) if again else {}


def _by_shard(rows: Mapping[int, StoredRow]) -> dict[AnyPath, list[int]]:
    """Numbers of the rows in each shard, in the order in which they lie there."""
    found: defaultdict[AnyPath, list[int]] = defaultdict(list)
    for number in sorted(rows, key=lambda number: rows[number].position):
        found[rows[number].shard].append(number)
    return {shard: found[shard] for shard in sorted(found, key=str)}


def _find_again(
    moved: Iterable[tuple[int, StoredRow]], listed: Iterable[StoredRow]
) -> dict[int, StoredRow]:
    now: dict[ResultKey, StoredRow] = {row.key: row for row in listed if row.error is None}
    for _, row in moved:
        if row.key not in now:
            raise RowGoneError(f"the store must hold the result of {row.label}, got none any more")
    return {number: now[row.key] for number, row in moved}


def _of_shard(
    shard: AnyPath, rows: Mapping[int, StoredRow], numbers: Sequence[int], batch_bytes: int
) -> Iterator[tuple[int, Float64[np.ndarray, " N"]]]:
    positions = [rows[number].position for number in numbers]
    done = 0
    for start, batch in read_batches(
        shard, ["loglikelihoods"], batch_bytes=batch_bytes, positions=positions
    ):
        column = batch.column(0)
        offsets = column.offsets.to_numpy()
        # A missing value comes out as a NaN.
        values = column.values.to_numpy(zero_copy_only=False)
        while done < len(positions) and positions[done] < start + batch.num_rows:
            place = positions[done] - start
            yield numbers[done], values[offsets[place] : offsets[place + 1]]
            done += 1
    if done < len(positions):
        raise _too_short(rows[numbers[done]])


def _too_short(row: StoredRow) -> StoreError:
    return StoreError(f"{row.shard} must have the row of {row.label}, got fewer rows")

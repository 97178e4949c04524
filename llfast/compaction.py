"""Many small shards become few large ones, a row group at a time."""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from .errors import StoreError
from .remote import AnyPath, file_bytes, map_paths, sorted_glob
from .rows import StoredRow, lasting, order_of
from .shards import (
    GROUP_BYTES,
    SCHEMA,
    read_batches,
    read_rows,
    warn_of_damage,
    write_shard,
)

SHARD_BYTES = 2 << 30  # about the most that a merged shard has, as long as they are few
LARGE_BYTES = SHARD_BYTES // 2  # of a shard that is not merged any more
MOST_SHARDS = 100  # of a text set after a compaction; beyond 98 GiB shards are larger for it
# Longer than a compaction takes: one that has begun before a removal can still write what it hides.
REMOVALS_LAST = timedelta(days=1)
_TRIES = 20


def merge_shards(folder: AnyPath) -> int:
    """Write the rows that count into few shards, in the place of all that are small or hold others.

    A shard is removed once all that counts of it is in finished ones: a kill loses nothing, and
    leaves rows twice. Damaged shards stay where they are, and count for nothing; so do those that
    another compaction takes meanwhile. While others take whatever is to be written, it is left to
    them.

    Returns: how many shards were merged.

    Raises:
        OSError: if a merged shard cannot be written; what it was to hold is still there then.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):
            return _merge(folder)
    return 0


def _merge(folder: AnyPath) -> int:
    """The same; raises FileNotFoundError, and removes nothing more, if a shard is gone."""
    shards = sorted_glob(folder, "*.parquet")
    read = dict(zip(shards, map_paths(_size_and_rows, shards), strict=True))
    sizes = {shard: size for shard, (size, _) in read.items()}
    whole = {shard: rows for shard, (_, rows) in read.items() if rows}
    # If all that are not merged have a 98th of all bytes, and all but one of the merged have two,
    # they are 99 together; what is a little larger for being merged may make one more.
    part = sum(sizes.values()) // (MOST_SHARDS - 2)
    large_bytes, shard_bytes = max(LARGE_BYTES, part), max(SHARD_BYTES, 2 * part)
    schemas: dict[AnyPath, pa.Schema] = {}
    while True:
        certain = len(whole) == len(shards)  # else a removal may hide what cannot be read now
        rows = list(itertools.chain.from_iterable(whole.values()))
        forget_before = datetime.now(UTC) - REMOVALS_LAST if certain else None
        kept = lasting(rows, forget_before=forget_before)
        small = {shard for shard in whole if sizes[shard] < large_bytes}
        merged = _to_merge(whole, kept, small)
        needed = merged | _replacing(rows, kept) if merged else set()
        unread = sorted(needed - set(schemas), key=str)
        found = dict(zip(unread, map_paths(_check, unread), strict=True))
        lost = {shard for shard, schema in found.items() if schema is None}
        schemas |= {shard: schema for shard, schema in found.items() if schema is not None}
        if not lost:
            break
        whole = {shard: rows for shard, rows in whole.items() if shard not in lost}
    if merged:
        schema = pa.unify_schemas([SCHEMA, *(schemas[shard] for shard in sorted(merged, key=str))])
        left = [row for row in kept if row.shard in merged]
        _remove(merged - _write(left, folder, schema, shard_bytes, after=max(merged, key=_order)))
    return len(merged)


def _to_merge(
    whole: Mapping[AnyPath, Sequence[StoredRow]], kept: Sequence[StoredRow], small: set[AnyPath]
) -> set[AnyPath]:
    """All small shards, and those that hold what does not count; none if that changes nothing."""
    left = Counter(row.shard for row in kept)
    results = Counter(row.shard for row in kept if row.status == "complete")
    merged = {
        shard
        for shard, rows in whole.items()
        if shard in small or results[shard] < sum(row.status == "complete" for row in rows)
    }
    if len(merged) == 1 and all(left[shard] == len(whole[shard]) for shard in merged):
        return set()
    return merged


def _replacing(rows: Iterable[StoredRow], kept: Sequence[StoredRow]) -> set[AnyPath]:
    """Shards whose results take the place of others: with those gone they have to be whole."""
    places = {(row.shard, row.position) for row in kept}
    dropped = {row.key for row in rows if (row.shard, row.position) not in places}
    return {row.shard for row in kept if row.status == "complete" and row.key in dropped}


def _size_and_rows(shard: AnyPath) -> tuple[int, list[StoredRow]]:
    """Bytes of a shard, and what it holds: nothing if it is damaged or gone."""
    with contextlib.suppress(FileNotFoundError):
        return file_bytes(shard), read_rows(shard)
    return 0, []


def _check(shard: AnyPath) -> pa.Schema | None:
    """Read a shard to its end; its columns, or None if it is not whole, or gone."""
    schema = None
    try:
        for _, batch in read_batches(shard, batch_bytes=GROUP_BYTES // 4):
            schema = batch.schema.remove_metadata()
    except FileNotFoundError:
        return None
    except StoreError as error:
        warn_of_damage(error)  # it stays where it is
        return None
    return schema


def _remove(shards: Iterable[AnyPath]) -> None:
    """The oldest first: a failure is gone before what has kept it from counting."""
    for _ in map_paths(lambda shard: shard.unlink(missing_ok=True), sorted(shards, key=_order)):
        pass


def _order(shard: AnyPath) -> tuple[bool, str]:
    return order_of(shard.name)


def _write(
    rows: Sequence[StoredRow],
    folder: AnyPath,
    schema: pa.Schema,
    shard_bytes: int,
    *,
    after: AnyPath,
) -> set[AnyPath]:
    """Write rows into shards of the folder, and remove those that they come from on the way.

    Their names come after one that is given, so that of two copies the later one counts.

    Returns: what was removed.
    """
    removed: set[AnyPath] = set()
    finished: list[AnyPath] = []
    tables = _row_groups(rows, schema, finished)
    for first in tables:
        groups = itertools.chain([first], tables)
        write_shard(folder, groups, most_bytes=shard_bytes, after=after.name)
        _remove(finished)
        removed.update(finished)
        finished.clear()
    return removed


def _row_groups(
    rows: Sequence[StoredRow], schema: pa.Schema, finished: list[AnyPath]
) -> Iterator[pa.Table]:
    """Tables with all columns of rows, shard by shard; small shards are in the order of the rows.

    What a shard has no column for is a missing value.

    Whenever a table is given, `finished` has the shards that have no rows in later ones.
    """
    positions: defaultdict[AnyPath, list[int]] = defaultdict(list)
    for row in rows:
        positions[row.shard].append(row.position)
    waiting: list[pa.Table] = []
    waiting_bytes = 0
    for shard, places in positions.items():
        places.sort()
        for start, batch in read_batches(shard, batch_bytes=GROUP_BYTES // 4, positions=places):
            low, high = (bisect_left(places, end) for end in (start, start + batch.num_rows))
            if low == high:
                continue
            chosen = [place - start for place in places[low:high]]
            waiting.append(pa.Table.from_batches([batch]).take(chosen))
            waiting_bytes += waiting[-1].nbytes
            if waiting_bytes >= GROUP_BYTES:
                yield pa.concat_tables([schema.empty_table(), *waiting], promote_options="default")
                waiting, waiting_bytes = [], 0
        finished.append(shard)
    if waiting:
        yield pa.concat_tables([schema.empty_table(), *waiting], promote_options="default")

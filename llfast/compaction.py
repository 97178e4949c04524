"""Many small shards become few large ones, a row group at a time."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa

from .errors import StoreError
from .rows import StoredRow, lasting
from .shards import GROUP_BYTES, SCHEMA, read_batches, read_rows, warn_of_damage, write_shard

SHARD_BYTES = 2 << 30  # about the most that a merged shard has
LARGE_BYTES = SHARD_BYTES // 2  # of a shard that is not merged any more
# Longer than a compaction takes: one that has begun before a removal can still write what it hides.
REMOVALS_LAST = timedelta(days=1)


def merge_shards(folder: Path) -> int:
    """Write the rows that count into few shards, in the place of all that are small or hold others.

    A shard is removed once all that counts of it is in finished ones: a kill loses nothing, and
    leaves rows twice. Damaged shards stay where they are, and count for nothing.

    Returns: how many shards were merged.

    Raises:
        FileNotFoundError: if another compaction has removed one meanwhile.
        OSError: if a merged shard cannot be written; what it was to hold is still there then.
    """
    listed = {shard: read_rows(shard) for shard in sorted(folder.glob("*.parquet"))}
    whole = {shard: rows for shard, rows in listed.items() if rows}
    schemas: dict[Path, pa.Schema] = {}
    while True:
        certain = len(whole) == len(listed)  # else a removal may hide what cannot be read now
        rows = list(itertools.chain.from_iterable(whole.values()))
        forget_before = datetime.now(UTC) - REMOVALS_LAST if certain else None
        kept = lasting(rows, forget_before=forget_before)
        merged = _to_merge(whole, kept)
        needed = merged | _replacing(rows, kept) if merged else set()
        damaged = {shard for shard in sorted(needed - set(schemas)) if not _check(shard, schemas)}
        if not damaged:
            break
        whole = {shard: rows for shard, rows in whole.items() if shard not in damaged}
    if merged:
        schema = pa.unify_schemas([SCHEMA, *(schemas[shard] for shard in sorted(merged))])
        _write([row for row in kept if row.shard in merged], folder, schema)
        for shard in merged:
            shard.unlink(missing_ok=True)
    return len(merged)


def _to_merge(whole: Mapping[Path, Sequence[StoredRow]], kept: Sequence[StoredRow]) -> set[Path]:
    """All shards but large ones whose results all count; none if that would change nothing."""
    left = Counter(row.shard for row in kept)
    results = Counter(row.shard for row in kept if row.status == "complete")
    merged = {
        shard
        for shard, rows in whole.items()
        if results[shard] < sum(row.status == "complete" for row in rows)
        or shard.stat().st_size < LARGE_BYTES
    }
    if len(merged) == 1 and all(left[shard] == len(whole[shard]) for shard in merged):
        return set()
    return merged


def _replacing(rows: Iterable[StoredRow], kept: Iterable[StoredRow]) -> set[Path]:
    """Shards whose results take the place of others: with those gone they have to be whole."""
    kept = list(kept)
    places = {(row.shard, row.position) for row in kept}
    dropped = {row.key for row in rows if (row.shard, row.position) not in places}
    return {row.shard for row in kept if row.status == "complete" and row.key in dropped}


def _check(shard: Path, schemas: dict[Path, pa.Schema]) -> bool:
    """Read a shard to its end, note its columns, and say whether it is whole."""
    try:
        for _, batch in read_batches(shard, batch_bytes=GROUP_BYTES // 4):
            schemas[shard] = batch.schema.remove_metadata()
    except StoreError as error:
        schemas.pop(shard, None)
        warn_of_damage(error)  # it stays where it is
        return False
    return True


def _write(rows: Sequence[StoredRow], folder: Path, schema: pa.Schema) -> None:
    """Write rows into shards of the folder, and remove those that they come from on the way."""
    finished: list[Path] = []
    tables = _row_groups(rows, schema, finished)
    for first in tables:
        write_shard(folder, itertools.chain([first], tables), most_bytes=SHARD_BYTES)
        for shard in finished:
            shard.unlink(missing_ok=True)
        finished.clear()


def _row_groups(
    rows: Sequence[StoredRow], schema: pa.Schema, finished: list[Path]
) -> Iterator[pa.Table]:
    """Tables with all columns of rows, shard by shard; small shards are in the order of the rows.

    Whenever a table is given, `finished` has the shards that have no rows in later ones.
    """
    positions: defaultdict[Path, list[int]] = defaultdict(list)
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
            waiting.append(_with_columns(pa.Table.from_batches([batch]).take(chosen), schema))
            waiting_bytes += waiting[-1].nbytes
            if waiting_bytes >= GROUP_BYTES:
                yield pa.concat_tables(waiting)
                waiting, waiting_bytes = [], 0
        finished.append(shard)
    if waiting:
        yield pa.concat_tables(waiting)


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of other shards, too, as missing values."""
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)

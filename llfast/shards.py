"""The Parquet shards of a store: their schema, their rows, and which rows count."""

from __future__ import annotations

import itertools
import json
import secrets
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import LlfastWarning, StoreError
from .files import atomic_write
from .results import ResultKey

SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("revision", pa.string()),
        ("convention", pa.string()),
        ("dtype", pa.string()),
        ("layer", pa.int32()),
        ("scoring_version", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("created", pa.timestamp("us", tz="UTC")),
        ("loglikelihoods", pa.list_(pa.float64())),
        ("token_counts", pa.list_(pa.int32())),
        ("truncated", pa.list_(pa.bool_())),
        ("token_budgets", pa.list_(pa.int32())),
        ("provenance", pa.string()),
        ("metadata", pa.string()),
    ]
)
_MOST_LISTED = 20  # rows in an error, which is one line
_LISTED = [field.name for field in SCHEMA if not pa.types.is_list(field.type)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRow:
    """One row of a store, without its numbers.

    Attributes:
        key: what it is a result of.
        error: why it failed; None if it is complete.
        created: when it was written, in UTC.
        provenance: what else decided its bits.
        metadata: the caller's own columns.
        shard: the file that holds it.
        position: its place there.
    """

    key: ResultKey
    error: str | None
    created: datetime
    provenance: Mapping[str, Any]
    metadata: Mapping[str, Any]
    shard: Path
    position: int

    @property
    def subject(self) -> tuple[Any, ...]:
        """The key without revision, dtype and version."""
        key = self.key
        return key.model, key.textset_digest, key.convention, key.layer

    @property
    def label(self) -> str:
        """The name that it is shown under."""
        layer = self.key.layer
        return self.key.model if layer is None else f"{self.key.model}@layer={layer}"


def row_fields(
    key: ResultKey, *, error: str | None = None, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A row of the schema, still without numbers."""
    row = key._asdict()
    del row["textset_digest"]
    row["status"] = "complete" if error is None else "failed"
    row["error"] = error
    row["created"] = datetime.now(UTC)
    row["metadata"] = json.dumps(dict(metadata or {}))
    return row


def newest(rows: Iterable[StoredRow]) -> list[StoredRow]:
    """One row a key: the newest complete one, else the newest failure."""
    best: dict[ResultKey, StoredRow] = {}
    for row in rows:
        other = best.get(row.key)
        rank = (row.error is None, row.created, row.shard.name)
        if other is None or rank > (other.error is None, other.created, other.shard.name):
            best[row.key] = row
    # A failure may lack the revision and dtype that a later success has: compare without them.
    done: dict[tuple[Any, ...], datetime] = {}
    for row in best.values():
        if row.error is None:
            done[row.subject] = max(row.created, done.get(row.subject, row.created))
    best = {
        key: row
        for key, row in best.items()
        if row.error is None or row.subject not in done or done[row.subject] < row.created
    }
    return sorted(best.values(), key=lambda row: (row.label, row.created))


def one_row_a_model(
    rows: Sequence[StoredRow],
    convention: str | None,
    dtype: str | None,
    models: Sequence[str] | None,
    duplicates: str,
) -> tuple[str, list[StoredRow]]:
    """Choose complete rows as `Store.matrix` says.

    Returns: the convention, and the rows ordered by label; none if none is left.

    Raises:
        StoreError: if there is more than one convention or row to choose from, or a model is not
            there.
    """
    convention = convention or _only_convention({row.key.convention for row in rows})
    rows = [
        row for row in rows if row.key.convention == convention and dtype in (None, row.key.dtype)
    ]
    if models is not None:
        rows = _named(rows, models)
    chosen = {row.label: row for row in sorted(rows, key=lambda row: row.created)}
    if duplicates == "error" and len(chosen) < len(rows):
        _refuse_several(rows)
    return convention, [chosen[label] for label in sorted(chosen)]


def read_table(shard: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard, with all columns or some.

    Raises:
        FileNotFoundError: if a compaction has removed it.
        StoreError: if it is damaged.
    """
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            _check_footer(list(file.schema_arrow), file.metadata)
            return file.read(columns)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"{shard} must be a whole shard, got: {reason}; move it away and score its models again"
        ) from None


def read_rows(shard: Path) -> list[StoredRow]:
    """What a shard holds; a damaged one holds nothing, and a warning names it.

    Raises:
        FileNotFoundError: if a compaction has removed it.
    """
    try:
        return _stored_rows(shard, read_table(shard, _LISTED))
    except StoreError as error:
        _warn_of_damage(error)
        return []


def read_folder(folder: Path) -> list[StoredRow]:
    """The rows of all shards of a text set, some of them perhaps twice.

    Raises:
        FileNotFoundError: if a compaction has removed one meanwhile.
    """
    rows: list[StoredRow] = []
    seen: set[Path] = set()
    # A listing is no snapshot: it can miss a merged shard that is just being made as well as those
    # that it replaces. What one listing has missed is in the next.
    for listing in itertools.count():
        new = sorted(set(folder.glob("*.parquet")) - seen)
        if listing and not new:
            break
        for shard in new:
            rows += read_rows(shard)
        seen.update(new)
    return rows


def write_shard(folder: Path, table: pa.Table) -> None:
    """Add a shard under a name that no other writer takes; raises OSError if that fails."""
    name = f"{time.time_ns():020d}-{secrets.token_hex(8)}.parquet"
    with atomic_write(folder / name) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def merge_shards(folder: Path) -> int:
    """Put one shard in the place of all, without the rows that newer ones replace.

    Returns: how many shards were merged.

    Raises:
        FileNotFoundError: if another compaction has removed one meanwhile.
        OSError: if the merged shard cannot be written; all others are still there then.
    """
    tables: dict[Path, pa.Table] = {}
    rows: list[StoredRow] = []
    for shard in sorted(folder.glob("*.parquet")):
        try:
            table = read_table(shard)
            rows += _stored_rows(shard, table)
            tables[shard] = table
        except StoreError as error:
            _warn_of_damage(error)  # it stays where it is
    if len(tables) < 2:
        return 0
    positions: dict[Path, list[int]] = {}
    for row in newest(rows):
        positions.setdefault(row.shard, []).append(row.position)
    parts = [tables[shard].take(chosen) for shard, chosen in positions.items()]
    write_shard(folder, pa.concat_tables(parts, promote_options="default"))
    for shard in tables:
        shard.unlink(missing_ok=True)
    return len(tables)


def _check_footer(fields: Sequence[pa.Field], footer: pq.FileMetaData) -> None:
    """Pages have checksums, but the footer has none: it must at least fit what is written here."""
    if any(field not in fields for field in SCHEMA):
        raise ValueError("its columns are not those of a store")
    groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if not footer.num_rows or sum(groups) != footer.num_rows:
        raise ValueError("its number of rows is wrong")


def _stored_rows(shard: Path, table: pa.Table) -> list[StoredRow]:
    digest = shard.parent.name.removeprefix("textset=")
    rows = []
    for position, row in enumerate(table.select(_LISTED).to_pylist()):
        if row["status"] not in ("complete", "failed"):
            raise StoreError(
                f"{shard} must have a status in each row, got {row['status']!r} in row {position}"
            )
        rows.append(
            StoredRow(
                key=ResultKey(
                    row["model"],
                    row["revision"],
                    digest,
                    row["convention"],
                    row["dtype"],
                    row["layer"],
                    row["scoring_version"],
                ),
                error=row["error"],
                created=row["created"],
                provenance=json.loads(row["provenance"] or "{}"),
                metadata=json.loads(row["metadata"] or "{}"),
                shard=shard,
                position=position,
            )
        )
    return rows


def _warn_of_damage(error: StoreError) -> None:
    warnings.warn(f"left out of the store: {error}", LlfastWarning, stacklevel=4)


def _only_convention(conventions: set[str]) -> str:
    if "paper" in conventions or not conventions:
        return "paper"
    if len(conventions) > 1:
        raise StoreError(
            "convention must be named where a store has several, got "
            f"{', '.join(sorted(conventions))}"
        )
    return conventions.pop()


def _named(rows: Sequence[StoredRow], models: Sequence[str]) -> list[StoredRow]:
    chosen: list[StoredRow] = []
    for name in models:
        found = [row for row in rows if row.label == name]
        if not found and "@" in name:
            model, _, revision = name.rpartition("@")
            found = [
                row for row in rows if row.label == model and row.key.revision.startswith(revision)
            ]
        if not found:
            raise StoreError(f"models must be in the store, got {name!r}")
        chosen.extend(row for row in found if row not in chosen)
    return chosen


def _refuse_several(rows: Sequence[StoredRow]) -> None:
    """Raise an error that lists all rows of the models that have more than one."""
    counts = Counter(row.label for row in rows)
    listed = [
        f"{row.label}@{row.key.revision[:12] or '(none)'} in {row.key.dtype or 'no dtype'} of "
        f"{row.created:%Y-%m-%d %H:%M:%S}"
        for row in rows
        if counts[row.label] > 1
    ]
    more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
    raise StoreError(
        f"matrix must have one row a model, got {', '.join(listed[:_MOST_LISTED])}{more}; choose "
        "with dtype, models=['name@revision'] or duplicates='newest'"
    )

"""The Parquet shards of a store: their schema, their rows, and which rows count."""

from __future__ import annotations

import json
import secrets
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import LlfastWarning
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


def read_rows(shard: Path) -> list[StoredRow]:
    """What a shard holds; a damaged one holds nothing, and a warning names it.

    Raises:
        FileNotFoundError: if a compaction has removed it.
    """
    try:
        table = pq.read_table(shard, columns=_LISTED, partitioning=None)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        line = str(error).splitlines()[0]
        message = f"{shard} cannot be read and is left out: {line}"
        warnings.warn(message, LlfastWarning, stacklevel=3)
        return []
    digest = shard.parent.name.removeprefix("textset=")
    return [
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
        for position, row in enumerate(table.to_pylist())
    ]


def write_shard(folder: Path, table: pa.Table) -> None:
    """Add a shard under a name that no other writer takes; raises OSError if that fails."""
    name = f"{time.time_ns():020d}-{secrets.token_hex(8)}.parquet"
    with atomic_write(folder / name) as file:
        pq.write_table(table, file, compression="zstd")

"""The Parquet shards of a store: their schema, and how they are read and written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import secrets
import time
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import LlfastWarning, RemoteError, StoreError
from .files import atomic_write
from .remote import AnyPath, RemotePath, map_paths, sorted_glob
from .results import LogLikelihoodMatrix, LogLikelihoods, ResultKey, plain_metadata
from .rows import StoredRow, order_of

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
GROUP_BYTES = 64 << 20  # of numbers in a row group, which is what readers hold at once
_BUFFER_BYTES = 1 << 20
_REQUEST_BYTES = 8 << 20  # at s3://, where a request takes as long as sending some MB
_LISTINGS = 20  # of a folder that changes all the time
_KEY = ("model", "revision", "convention", "dtype", "layer", "scoring_version")
_LISTED = [field.name for field in SCHEMA if not pa.types.is_list(field.type)]


def row_fields(
    key: ResultKey,
    *,
    error: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    removed: datetime | None = None,
) -> dict[str, Any]:
    """A row of the schema, still without numbers: a result, a failure, or a removal at a time."""
    row = key._asdict()
    del row["textset_digest"]
    row["status"] = "removed" if removed else "complete" if error is None else "failed"
    row["error"] = error
    row["created"] = removed or datetime.now(UTC)
    row["metadata"] = json.dumps(dict(plain_metadata(metadata or {})))
    return row


def result_groups(results: Sequence[LogLikelihoods]) -> Iterator[list[dict[str, Any]]]:
    """Results on one text set, as many at a time as a row group holds."""
    step = max(1, GROUP_BYTES // (17 * len(results[0])))  # bytes of the four lists
    for start in range(0, len(results), step):
        yield [_result_fields(result) for result in results[start : start + step]]


def matrix_groups(matrix: LogLikelihoodMatrix) -> Iterator[list[dict[str, Any]]]:
    """The rows of a matrix, as many at a time as a row group holds."""
    step = max(1, GROUP_BYTES // (8 * len(matrix.text_bytes)))
    for start in range(0, len(matrix), step):
        yield [_matrix_fields(matrix, row) for row in range(len(matrix))[start : start + step]]


def read_batches(
    shard: AnyPath,
    columns: Sequence[str] | None = None,
    *,
    batch_bytes: int,
    positions: Sequence[int] | None = None,
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows of a shard, some at a time, and with them the position of the first.

    Args:
        shard: the file.
        columns: only these; all if None.
        batch_bytes: about what is held at once, if that is more than a row.
        positions: ascending; row groups without any of them are passed over.

    Raises:
        FileNotFoundError: if a compaction has removed it before the first batch.
        StoreError: if it is damaged.
    """
    with _open_shard(shard) as file:
        end = 0
        for group in range(file.num_row_groups):
            footer = file.metadata.row_group(group)
            start, end = end, end + footer.num_rows
            if positions is not None:
                at = bisect_left(positions, start)
                if at == len(positions) or positions[at] >= end:
                    continue
            rows = max(1, batch_bytes * footer.num_rows // _decoded_bytes(footer, columns))
            for batch in file.iter_batches(
                rows, row_groups=[group], columns=columns, use_threads=_may_thread(shard)
            ):
                yield start, batch
                start += batch.num_rows
            if start != end:
                raise ValueError("a row group has another number of rows than its footer says")


def read_rows(shard: AnyPath) -> list[StoredRow]:
    """What a shard holds; a damaged one holds nothing, and a warning names it.

    Raises:
        FileNotFoundError: if a compaction has removed it.
    """
    try:
        with _open_shard(shard) as file:
            return _stored_rows(shard, file.read(_LISTED, use_threads=_may_thread(shard)))
    except StoreError as error:
        warn_of_damage(error)
        return []


class RowState(NamedTuple):
    """What a row says of a result.

    Attributes:
        key: which.
        status: "complete", "failed" or "removed".
        created_us: when it was written, in microseconds since 1970, UTC.
        error: why it failed; None if it did not.
        facts: as JSON, the metadata of a failure, and the provenance of a result.
    """

    key: ResultKey
    status: str
    created_us: int
    error: str | None
    facts: str | None


def read_states(shard: AnyPath) -> list[RowState]:
    """As `read_rows`, but in short: ten times as fast where rows are many.

    Raises:
        FileNotFoundError: if a compaction has removed it.
    """
    try:
        with _open_shard(shard) as file:
            read = [*_KEY, "status", "created", "error", "metadata", "provenance"]
            table = file.read(read, use_threads=_may_thread(shard))
    except StoreError as error:
        warn_of_damage(error)
        return []
    failed = pc.equal(table["status"], "failed")
    columns = [table[name] for name in (*_KEY, "status")]
    columns += [table["created"].cast(pa.int64()), table["error"]]
    columns.append(pc.if_else(failed, table["metadata"], table["provenance"]))
    digest = shard.parent.name.removeprefix("textset=")
    return [
        RowState(ResultKey(model, revision, digest, convention, dtype, layer, version), *rest)
        for model, revision, convention, dtype, layer, version, *rest in zip(
            *(column.to_pylist() for column in columns), strict=True
        )
    ]


def list_shards(folder: AnyPath) -> dict[str, int]:
    """Names of a text set's shards, and their bytes."""
    before: set[str] | None = None
    # A listing is no snapshot, see `read_folder`. The next is whole if it has all that one has.
    for _ in range(_LISTINGS):
        sizes = _listed_bytes(folder)
        if before is not None and before <= set(sizes):
            break
        before = set(sizes)
    return dict(sorted(sizes.items()))


def _listed_bytes(folder: AnyPath) -> dict[str, int]:
    if isinstance(folder, RemotePath):
        return {shard.name: shard.size for shard in folder.glob("*.parquet")}
    sizes: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".parquet"):
                with contextlib.suppress(FileNotFoundError):
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def read_folder(folder: AnyPath) -> list[StoredRow]:
    """The rows of all shards of a text set, some of them perhaps twice.

    Raises:
        FileNotFoundError: if a compaction has removed one meanwhile.
    """
    rows: list[StoredRow] = []
    seen: set[AnyPath] = set()
    # A listing is no snapshot: it can miss a merged shard that is just being made as well as those
    # that it replaces. What one listing has missed is in the next.
    for listing in itertools.count():
        new = [shard for shard in sorted_glob(folder, "*.parquet") if shard not in seen]
        if listing and not new:
            break
        for found in map_paths(read_rows, new):
            rows += found
        seen.update(new)
    return rows


def write_shard(
    folder: AnyPath,
    tables: Iterable[pa.Table],
    *,
    most_bytes: int | None = None,
    after: str = "",
) -> str:
    """Add a shard under a name that no other writer takes; raises OSError if that fails.

    Args:
        folder: of the text set.
        tables: at least one; each, of at most about `GROUP_BYTES`, is a row group of its own.
        most_bytes: once the shard has so many, no more tables are taken.
        after: a name that this one comes after (`rows.order_of`), whatever the clock says.

    Returns: the name.
    """
    earliest = int(after[:20]) + 1 if order_of(after)[0] else 0
    name = f"{max(time.time_ns(), earliest):020d}-{secrets.token_hex(8)}.parquet"
    tables = iter(tables)
    first = next(tables)
    # Numbers seldom repeat: a dictionary of them takes 31 MB to make and a quarter of a file.
    repeating = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in first.schema
        if field.name != "loglikelihoods"
    ]
    with (
        atomic_write(folder / name) as file,
        pq.ParquetWriter(
            file,
            first.schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=repeating,
        ) as writer,
    ):
        for table in itertools.chain([first], tables):
            writer.write_table(table)
            if most_bytes is not None and file.tell() >= most_bytes:
                break
    return name


def warn_of_damage(error: StoreError) -> None:
    """Say that a shard is left out."""
    warnings.warn(f"left out of the store: {error}", LlfastWarning, stacklevel=4)


@contextlib.contextmanager
def _open_shard(shard: AnyPath) -> Iterator[pq.ParquetFile]:
    """A shard whose footer has been checked; what its pages turn out to be is a StoreError, too."""
    try:
        # Without a buffer of its own a whole column of a row group is read at once.
        with pq.ParquetFile(
            shard.reader() if isinstance(shard, RemotePath) else shard,
            page_checksum_verification=True,
            buffer_size=_BUFFER_BYTES if _may_thread(shard) else _REQUEST_BYTES,
            pre_buffer=False,
        ) as file:
            _check_footer(list(file.schema_arrow), file.metadata)
            yield file
    except (FileNotFoundError, RemoteError):
        raise
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno == errno.ESTALE:
            # On a network file system a shard can go while it is open.
            raise FileNotFoundError(errno.ENOENT, "There is no such shard", str(shard)) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        is_private = isinstance(error, PermissionError)
        hint = "let it be read" if is_private else "move it away and score its models again"
        raise StoreError(f"{shard} must be a whole shard, got: {reason}; {hint}") from None


def _may_thread(shard: AnyPath) -> bool:
    """Not at s3://: pyarrow's threads, holding Python objects, can crash at exit (arrow#34314)."""
    return not isinstance(shard, RemotePath)


def _decoded_bytes(group: pq.RowGroupMetaData, columns: Sequence[str] | None) -> int:
    """About what a row group takes in memory: numbers are of at most 8 bytes."""
    found = (group.column(number) for number in range(group.num_columns))
    sizes: Iterator[int] = (
        max(8 * column.num_values, column.total_uncompressed_size)
        for column in found
        if columns is None or column.path_in_schema.split(".")[0] in columns
    )
    return 1 + sum(sizes)


def _check_footer(fields: Sequence[pa.Field], footer: pq.FileMetaData) -> None:
    """Pages have checksums, but the footer has none: it must at least fit what is written here."""
    if any(field not in fields for field in SCHEMA):
        raise ValueError("its columns are not those of a store")
    groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if not footer.num_rows or sum(groups) != footer.num_rows:
        raise ValueError("its number of rows is wrong")


def _stored_rows(shard: AnyPath, table: pa.Table) -> list[StoredRow]:
    digest = shard.parent.name.removeprefix("textset=")
    rows = []
    for position, row in enumerate(table.to_pylist()):
        if row["status"] not in ("complete", "failed", "removed"):
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
                status=row["status"],
                error=row["error"],
                created=row["created"],
                provenance=json.loads(row["provenance"] or "{}"),
                metadata=json.loads(row["metadata"] or "{}"),
                shard=shard,
                position=position,
            )
        )
    return rows


def _result_fields(result: LogLikelihoods) -> dict[str, Any]:
    return row_fields(result.key, metadata=result.metadata) | {
        "loglikelihoods": result.loglikelihoods,
        "token_counts": result.token_counts,
        "truncated": result.truncated,
        "token_budgets": result.token_budgets,
        "provenance": json.dumps(dict(result.provenance)),
    }


def _matrix_fields(matrix: LogLikelihoodMatrix, row: int) -> dict[str, Any]:
    model, metadata = matrix.models[row], dict(matrix.metadata[row])
    layer = metadata.get("layer")
    # As a matrix of a store names a layer, and says whose it is.
    if isinstance(layer, int) and model == f"{metadata.get('layer_of')}@layer={layer}":
        model = metadata.pop("layer_of")
        del metadata["layer"]
    else:
        layer = None
    key = ResultKey(
        model,
        matrix.revisions[row],
        matrix.textset_digest,
        matrix.convention,
        matrix.dtypes[row],
        layer,
        0,
    )
    values = {"loglikelihoods": matrix.values[row], "provenance": "{}"}
    return row_fields(key, metadata=metadata) | values

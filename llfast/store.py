"""An append-only store of log-likelihoods: immutable Parquet shards that any tool can read.

    STORE/_llfast-store.json                says that this is a store
    STORE/textset=<digest>/_texts.json      ids, byte lengths and groups of the texts
    STORE/textset=<digest>/<name>.parquet   rows, one a model; a shard never changes
    STORE/_partial/<digest>.npz             finished texts of unfinished models

STORE is a folder, or s3://bucket/prefix. Writers need no lock: a shard is written under a temporary
name, synced and renamed, or put there as one object, and every name is unique. Of several rows with
one key the newest complete one counts; a removal is a row, too, and hides those before it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from .compaction import merge_shards
from .errors import StoreError
from .remote import AnyPath, RemotePath, map_paths, sorted_glob, to_path
from .results import LogLikelihoodMatrix, LogLikelihoods, ResultKey
from .rows import StoredRow, matrix_metadata, named, newest, one_row_a_model, refuse_incomplete
from .scans import RowGoneError, read_row, scan_rows, wrong_length
from .shards import (
    SCHEMA,
    list_shards,
    matrix_groups,
    read_folder,
    read_rows,
    result_groups,
    row_fields,
    write_shard,
)
from .storefiles import (
    check_marker,
    find_partial,
    only_textset,
    read_texts,
    write_marker,
    write_texts,
)

# What begins with _ or . is no data to pyarrow, Spark and DuckDB: they can be given the store.
_TEXTS = "_texts.json"
_PER_TEXT = ("loglikelihoods", "token_counts", "truncated", "token_budgets")
_TRIES = 20  # that one shard may be listed and not be there, as on a network
_Read = TypeVar("_Read")


class Store:
    """A folder of results, or s3://bucket/prefix; it is made by the first write.

    Raises:
        StoreError: if the folder is something else.
        RemoteError: if s3:// cannot be reached or read; every method may raise it then.
    """

    def __init__(self, folder: str | os.PathLike[str] | RemotePath) -> None:
        self.folder = to_path(folder)
        check_marker(self.folder)

    # ---------------------------------------------------------------- writing

    def add(self, result: LogLikelihoods) -> str:
        """Keep a result, durably, before this returns.

        Returns: the name of its shard.

        Raises:
            OSError: if it cannot be written.
        """
        return self.add_all([result])

    def add_all(self, results: Sequence[LogLikelihoods]) -> str:
        """Keep results on one text set in one shard, as `add` does: all of them, or none.

        Raises:
            ValueError: if there is none, or one is on another text set than the first.
        """
        digests = {result.textset_digest for result in results}
        if len(digests) != 1:
            raise ValueError(f"results must be on one text set, got {len(digests)}")
        first, digest = results[0], digests.pop()
        self._write_texts(digest, first.ids, first.text_bytes, first.groups)
        return self._write_shard(digest, result_groups(results))

    def add_failure(self, key: ResultKey, reason: str, **metadata: Any) -> None:
        """Keep the reason why a model could not be scored; a complete row takes its place."""
        self._write_shard(key.textset_digest, [[row_fields(key, error=reason, metadata=metadata)]])

    def add_matrix(self, matrix: LogLikelihoodMatrix) -> None:
        """Keep a matrix that was made elsewhere; ValueError if it names no text set."""
        if not matrix.textset_digest:  # or matrices of other texts would be taken for models of it
            raise ValueError("textset_digest must name the matrix's texts, got ''; give it a name")
        ids = matrix.ids or tuple(map(str, range(len(matrix.text_bytes))))
        self._write_texts(matrix.textset_digest, ids, matrix.text_bytes, matrix.groups)
        self._write_shard(matrix.textset_digest, matrix_groups(matrix))

    def remove(self, models: Sequence[str]) -> int:
        """Take models and their layers out of the store, on all text sets, durably.

        Readers do not see their results and failures any more. The numbers are on disk until
        `compact`; a model that is scored again is back.

        Args:
            models: as `name` or `name@revision` (the beginning of it); a layer as `name@layer=i`.

        Returns: how many results and failures were removed.

        Raises:
            StoreError: if a model is not there; nothing is removed then.
        """
        rows = named(self.rows(), models, layers=True)
        removals: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            # Newer than the row also where the clock that wrote it was ahead of this one.
            when = max(datetime.now(UTC), row.created + timedelta(microseconds=1))
            digest = row.key.textset_digest
            removals.setdefault(digest, []).append(row_fields(row.key, removed=when))
        for digest, each in removals.items():
            self._write_shard(digest, [each])
        return len(rows)

    def partial_path(self, key: ResultKey) -> Path | None:
        """Where finished texts of an unfinished model are kept; None where they cannot be.

        A store at s3:// has them on this machine, in llfast's cache.
        """
        return find_partial(self.folder, repr(key))

    def prepare(self) -> None:
        """Make the folder; raises OSError if it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_marker(self.folder)

    def compact(self) -> int:
        """Merge each text set's small shards; drop what is removed, or replaced by newer rows.

        At most 100 are left of each. Large ones whose results all count stay as they are, so that
        it costs no more than what is new.

        Readers and writers may go on meanwhile.

        Returns: how many shards were merged.

        Raises:
            StoreError: if there is no such store.
        """
        if not self.folder.is_dir():
            raise StoreError(f"{self.folder} must be a store, got no such folder")
        return sum(merge_shards(folder) for folder in self._partitions())

    # ---------------------------------------------------------------- reading

    def rows(self, digest: str | None = None) -> list[StoredRow]:
        """The newest row of every key: complete if there is one, else the failure; none if removed.

        Args:
            digest: only results on this text set.
        """
        return self.retry(lambda: self._rows(digest))

    def completed(self) -> set[ResultKey]:
        """The keys of all complete rows."""
        return {row.key for row in self.rows() if row.error is None}

    def textsets(self, *, failures: bool = False) -> list[str]:
        """Digests of the text sets that have results; with `failures`, or only failures."""
        return [
            folder.name.removeprefix("textset=")
            for folder in self._partitions()
            if failures or (folder / _TEXTS).exists()
        ]

    def shards(self, digest: str) -> dict[str, int]:
        """Names and bytes of a text set's shards, in milliseconds: a shard never changes."""
        return list_shards(self.partition(digest))

    def partition(self, digest: str) -> AnyPath:
        """The folder of a text set's shards."""
        return self.folder / f"textset={digest}"

    def read_shards(self, digest: str, names: Iterable[str]) -> list[StoredRow]:
        """All rows of some shards: failures, removals, and what newer ones replace, too.

        A damaged shard has none, and a warning names it. `rows.changes` says what they change.

        Raises:
            FileNotFoundError: if a compaction has removed one: look at `shards` again.
        """
        paths = [self.partition(digest) / name for name in names]
        return [row for rows in map_paths(read_rows, paths) for row in rows]

    def texts(self, digest: str) -> dict[str, Any]:
        """`ids`, `text_bytes` (N,) and `groups` of a text set.

        Raises:
            StoreError: if they cannot be read.
        """
        return read_texts(self.partition(digest) / _TEXTS)

    def load(self, row: StoredRow) -> LogLikelihoods:
        """A stored result with its numbers, wherever a compaction has put it since.

        Raises:
            StoreError: if it cannot be read.
            ValueError: if the row is a failure.
        """
        refuse_incomplete(row)
        return self.retry(lambda: self._load(row))

    def scan(
        self, rows: Sequence[StoredRow], *, block_bytes: int = 64 << 20
    ) -> Iterator[tuple[list[int], Float64[np.ndarray, "M N"]]]:
        """The numbers of many complete rows on one text set, without holding them all.

        Shards are read one after the other, and a row that a compaction moves meanwhile is found
        again: where a newer one has replaced it, that one's numbers are given.

        Args:
            rows: as `rows()` or `read_shards()` give them.
            block_bytes: what a block of values takes, if that is more than a row does. Beyond it
                and the caller's own block, a quarter of it is held.

        Yields: numbers into `rows` in the order in which they are read, and an array (M, N) of
            nats that belongs to the caller.

        Raises:
            ValueError: if a row is a failure, or of another text set than the first.
            StoreError: if a shard is damaged, values are not N finite ones, or a row was removed
                meanwhile.
        """
        for row in rows:
            refuse_incomplete(row)
            if row.key.textset_digest != rows[0].key.textset_digest:
                raise ValueError(f"rows must be on one text set, got another for {row.label}")
        if not rows:
            return iter(())
        digest = rows[0].key.textset_digest
        return scan_rows(
            rows,
            len(self.texts(digest)["ids"]),
            block_bytes=block_bytes,
            list_again=lambda: self.rows(digest),
        )

    def matrix(
        self,
        digest: str | None = None,
        convention: str | None = None,
        dtype: str | None = None,
        *,
        models: Sequence[str] | None = None,
        duplicates: str = "error",
        layers: bool = False,
    ) -> LogLikelihoodMatrix:
        """All models' log-likelihoods on one text set under one convention.

        Args:
            digest: the text set, or the beginning of its digest; may be left out if there is one.
            convention: which tokens were scored; "paper" if there is any such row, else the only
                other one.
            dtype: only models that ran in it.
            models: only these, as `name` or `name@revision` (the beginning of it).
            duplicates: of several rows of one name (revisions, dtypes), "error", or "newest".
            layers: rows of layers, too, which are named `model@layer=i` and have `layer` and
                `layer_of` in their metadata; else only those among `models`.

        Raises:
            StoreError: if there is nothing, or more than one thing, of what is asked for.
            TypeError: if `models` is a single name.
        """
        if duplicates not in ("error", "newest"):
            raise ValueError(f"duplicates must be error or newest, got {duplicates!r}")
        digest = self.find_textset(digest)
        read = partial(self._matrix, digest, convention, dtype, models, duplicates, layers)
        return self.retry(read)

    def find_textset(self, digest: str | None = None) -> str:
        """The one text set whose digest begins so.

        Raises:
            StoreError: if there is none or several.
        """
        return only_textset(self.folder, self.textsets(), digest, self.rows)

    # ---------------------------------------------------------------- inside

    def _matrix(
        self,
        digest: str,
        convention: str | None,
        dtype: str | None,
        models: Sequence[str] | None,
        duplicates: str,
        layers: bool,
    ) -> LogLikelihoodMatrix:
        convention, chosen = one_row_a_model(
            self._rows(digest), convention, dtype, models, duplicates, layers
        )
        if not chosen:
            in_dtype = f" in {dtype}" if dtype else ""
            raise StoreError(
                f"{self.folder} must hold complete results on text set {digest[:12]} under "
                f"convention {convention!r}{in_dtype}, got none"
            )
        texts = self.texts(digest)
        values = np.empty((len(chosen), len(texts["ids"])))
        for numbers, block in self.scan(chosen):
            values[numbers] = block
        return LogLikelihoodMatrix(
            [row.label for row in chosen],
            values,
            np.array(texts["text_bytes"], dtype=np.float64),
            [matrix_metadata(row) for row in chosen],
            ids=texts["ids"],
            groups=texts["groups"],
            textset_digest=digest,
            convention=convention,
            dtypes=[row.key.dtype for row in chosen],
            revisions=[row.key.revision for row in chosen],
        )

    def _load(self, row: StoredRow) -> LogLikelihoods:
        texts = self.texts(row.key.textset_digest)
        if not row.shard.exists():
            row = self._find(row.key)
        found = read_row(row)
        n = len(texts["ids"])
        lists = {name: found[name] for name in _PER_TEXT if found[name] is not None}
        for name, values in lists.items():
            if len(values) != n:
                raise StoreError(wrong_length(row, name, n, len(values)))
        zeros = [0] * n
        return LogLikelihoods(
            **row.key._asdict(),
            ids=tuple(texts["ids"]),
            loglikelihoods=np.array(lists["loglikelihoods"], dtype=np.float64),
            token_counts=np.array(lists.get("token_counts", zeros), dtype=np.int64),
            text_bytes=np.array(texts["text_bytes"]),
            truncated=np.array(lists.get("truncated", zeros), dtype=bool),
            token_budgets=np.array(lists.get("token_budgets", zeros), dtype=np.int32),
            groups=tuple(texts["groups"]) if texts["groups"] else None,
            provenance=row.provenance,
            metadata=row.metadata,
        )

    def _find(self, key: ResultKey) -> StoredRow:
        for row in self._rows(key.textset_digest):
            if row.key == key and row.error is None:
                return row
        raise StoreError(f"{self.folder} must hold the result of {key.model}, got none any more")

    def _rows(self, digest: str | None) -> list[StoredRow]:
        folders = self._partitions() if digest is None else [self.partition(digest)]
        return newest(row for folder in folders for row in read_folder(folder))

    def _partitions(self) -> list[AnyPath]:
        return sorted_glob(self.folder, "textset=*")

    def _write_texts(
        self,
        digest: str,
        ids: Sequence[str],
        text_bytes: np.ndarray,
        groups: Sequence[str] | None,
    ) -> None:
        self.prepare()
        path = self.partition(digest) / _TEXTS
        path.parent.mkdir(exist_ok=True)
        write_texts(path, ids, text_bytes, groups)

    def _write_shard(self, digest: str, groups: Iterable[list[dict[str, Any]]]) -> str:
        self.prepare()
        folder = self.partition(digest)
        folder.mkdir(exist_ok=True)
        return write_shard(folder, (pa.Table.from_pylist(rows, schema=SCHEMA) for rows in groups))

    def retry(self, read: Callable[[], _Read]) -> _Read:
        """Call `read`, again if a shard or a row was removed between listing and reading.

        As long as it is another one each time, others get on: that lasts no longer than they work.
        """
        tries: Counter[str] = Counter()
        while True:
            try:
                return read()
            except (FileNotFoundError, RowGoneError) as error:
                tries[str(error)] += 1
                if tries[str(error)] > _TRIES:
                    raise

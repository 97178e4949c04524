"""An append-only store of log-likelihoods: immutable Parquet shards that any tool can read.

    STORE/llfast-store.json                 says that this is a store
    STORE/textset=<digest>/_texts.json      ids, byte lengths and groups of the texts
    STORE/textset=<digest>/<name>.parquet   rows, one a model; a shard never changes
    STORE/partial/<digest>.npz              finished texts of unfinished models

Writers need no lock: a shard is written under a temporary name, synced and renamed, and every name
is unique. Of several rows with one key the newest complete one counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import StoreError
from .files import atomic_write
from .results import LogLikelihoodMatrix, LogLikelihoods, ResultKey
from .shards import SCHEMA, StoredRow, newest, read_rows, row_fields, write_shard

_MARKER = "llfast-store.json"
_FORMAT = 1
_Read = TypeVar("_Read")


class Store:
    """A folder of results; it is made by the first write.

    Raises:
        StoreError: if the folder is something else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        marker = self.folder / _MARKER
        foreign = self.folder.exists() and (
            not self.folder.is_dir()
            or any(not each.name.startswith(f".{_MARKER}") for each in self.folder.iterdir())
        )
        # In this order: another writer may be making the store right now.
        if marker.exists():
            try:
                version = json.loads(marker.read_bytes())["format"]
            except (ValueError, KeyError, TypeError):
                raise StoreError(
                    f"{marker} must name the store's format, got something else"
                ) from None
            if version != _FORMAT:
                raise StoreError(
                    f"{self.folder} must be a store of format {_FORMAT}, got {version}; use the "
                    "llfast that wrote it"
                )
        elif foreign:
            raise StoreError(
                f"{self.folder} must be a store or an empty folder, got one with other things and "
                f"no {_MARKER}"
            )

    # ---------------------------------------------------------------- writing

    def add(self, result: LogLikelihoods) -> None:
        """Keep a result, durably, before this returns.

        Raises:
            OSError: if it cannot be written.
        """
        self._write_texts(result.textset_digest, result.ids, result.text_bytes, result.groups)
        row = row_fields(result.key, metadata=result.metadata) | {
            "loglikelihoods": result.loglikelihoods,
            "token_counts": result.token_counts,
            "truncated": result.truncated,
            "token_budgets": result.token_budgets,
            "provenance": json.dumps(dict(result.provenance)),
        }
        self._write_shard(result.textset_digest, [row])

    def add_failure(self, key: ResultKey, reason: str) -> None:
        """Keep the reason why a model could not be scored; a complete row takes its place."""
        self._write_shard(key.textset_digest, [row_fields(key, error=reason)])

    def add_matrix(self, matrix: LogLikelihoodMatrix) -> None:
        """Keep a model x text matrix that was made elsewhere."""
        n = len(matrix.text_bytes)
        ids = matrix.ids or tuple(str(text) for text in range(n))
        self._write_texts(matrix.textset_digest, ids, matrix.text_bytes, matrix.groups)
        rows = []
        for number, model in enumerate(matrix.models):
            key = ResultKey(
                model,
                matrix.revisions[number],
                matrix.textset_digest,
                matrix.convention,
                matrix.dtypes[number],
                None,
                0,
            )
            values = {"loglikelihoods": matrix.values[number], "provenance": "{}"}
            rows.append(row_fields(key, metadata=matrix.metadata[number]) | values)
        self._write_shard(matrix.textset_digest, rows)

    def partial_path(self, key: ResultKey) -> Path:
        """Where finished texts of an unfinished model are kept."""
        return self.folder / "partial" / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.npz"

    def prepare(self) -> None:
        """Make the folder; raises OSError if it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _MARKER).exists():
            with atomic_write(self.folder / _MARKER) as file:
                file.write(json.dumps({"format": _FORMAT}).encode())

    def compact(self) -> int:
        """Merge each text set's shards into one, and drop rows that newer ones replace.

        Readers and writers may go on meanwhile.

        Returns: how many shards were merged.
        """
        merged = 0
        for folder in self._partitions():
            shards = sorted(folder.glob("*.parquet"))
            if len(shards) < 2:
                continue
            rows = newest(row for shard in shards for row in read_rows(shard))
            tables = [
                pq.read_table(shard, schema=SCHEMA, partitioning=None).take(
                    [row.position for row in rows if row.shard == shard]
                )
                for shard in sorted({row.shard for row in rows})
            ]
            write_shard(folder, pa.concat_tables(tables))
            for shard in shards:
                shard.unlink(missing_ok=True)
            merged += len(shards)
        return merged

    # ---------------------------------------------------------------- reading

    def rows(self, digest: str | None = None) -> list[StoredRow]:
        """The newest row of every key: complete if there is one, else the failure.

        Args:
            digest: only results on this text set.
        """
        return self._retry(lambda: self._rows(digest))

    def completed(self) -> set[ResultKey]:
        """The keys of all complete rows."""
        return {row.key for row in self.rows() if row.error is None}

    def textsets(self) -> list[str]:
        """Digests of the text sets that have results."""
        return [folder.name.removeprefix("textset=") for folder in self._partitions()]

    def texts(self, digest: str) -> dict[str, Any]:
        """`ids`, `text_bytes` (N,) and `groups` of a text set.

        Raises:
            StoreError: if they cannot be read.
        """
        path = self._partition(digest) / "_texts.json"
        try:
            return dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{path} must describe the texts, got {error}") from None

    def load(self, row: StoredRow) -> LogLikelihoods:
        """A stored result with its numbers."""
        texts = self.texts(row.key.textset_digest)
        table = pq.read_table(row.shard, schema=SCHEMA, partitioning=None)
        found = table.slice(row.position, 1).to_pylist()[0]
        n = len(texts["ids"])
        zeros = [0] * n
        return LogLikelihoods(
            **row.key._asdict(),
            ids=tuple(texts["ids"]),
            loglikelihoods=np.array(found["loglikelihoods"], dtype=np.float64),
            token_counts=np.array(found["token_counts"] or zeros, dtype=np.int64),
            text_bytes=np.array(texts["text_bytes"]).astype(np.int64),
            truncated=np.array(found["truncated"] or zeros, dtype=bool),
            token_budgets=np.array(found["token_budgets"] or zeros, dtype=np.int32),
            groups=tuple(texts["groups"]) if texts["groups"] else None,
            provenance=row.provenance,
            metadata=row.metadata,
        )

    def matrix(
        self,
        digest: str | None = None,
        convention: str | None = None,
        dtype: str | None = None,
        *,
        models: Sequence[str] | None = None,
        duplicates: str = "error",
    ) -> LogLikelihoodMatrix:
        """All models' log-likelihoods on one text set under one convention.

        Args:
            digest: the text set, or the beginning of its digest; may be left out if there is one.
            convention: which tokens were scored; "paper" if there is any such row, else the only
                other one.
            dtype: only models that ran in it.
            models: only these, as `name` or `name@revision` (the beginning of it).
            duplicates: what to do with several rows of one name (revisions, dtypes): "error", or
                "newest".

        Raises:
            StoreError: if there is nothing, or more than one thing, of what is asked for.
        """
        if duplicates not in ("error", "newest"):
            raise ValueError(f"duplicates must be error or newest, got {duplicates!r}")
        digest = self.find_textset(digest)
        return self._retry(lambda: self._matrix(digest, convention, dtype, models, duplicates))

    def find_textset(self, digest: str | None = None) -> str:
        """The one text set whose digest begins so.

        Raises:
            StoreError: if there is none or several.
        """
        found = [each for each in self.textsets() if each.startswith(digest or "")]
        if len(found) == 1:
            return found[0]
        if not found:
            what = f"results on text set {digest}" if digest else "results"
            raise StoreError(f"{self.folder} must hold {what}, got none")
        listed = ", ".join(each[:12] for each in found)
        raise StoreError(f"the text set must be named where a store has several, got {listed}")

    # ---------------------------------------------------------------- inside

    def _matrix(
        self,
        digest: str,
        convention: str | None,
        dtype: str | None,
        models: Sequence[str] | None,
        duplicates: str,
    ) -> LogLikelihoodMatrix:
        rows = [row for row in self._rows(digest) if row.error is None and row.key.layer is None]
        convention = convention or _only_convention({row.key.convention for row in rows})
        rows = [
            row
            for row in rows
            if row.key.convention == convention and dtype in (None, row.key.dtype)
        ]
        if models is not None:
            rows = _named(rows, models)
        chosen: dict[str, StoredRow] = {}
        for row in sorted(rows, key=lambda row: row.created):
            other = chosen.get(row.label)
            if other is not None and duplicates == "error":
                raise StoreError(
                    f"matrix must have one row a model, got {_describe(other)} and "
                    f"{_describe(row)}; choose with dtype, models=['name@revision'] or "
                    "duplicates='newest'"
                )
            chosen[row.label] = row
        if not chosen:
            raise StoreError(
                f"{self.folder} must hold complete results on text set {digest[:12]} under "
                f"convention {convention!r}, got none"
            )
        texts = self.texts(digest)
        ordered = [chosen[label] for label in sorted(chosen)]
        return LogLikelihoodMatrix(
            [row.label for row in ordered],
            self._values(ordered, len(texts["ids"])),
            texts["text_bytes"],
            [_matrix_metadata(row) for row in ordered],
            ids=texts["ids"],
            groups=texts["groups"],
            textset_digest=digest,
            convention=convention,
            dtypes=[row.key.dtype for row in ordered],
            revisions=[row.key.revision for row in ordered],
        )

    def _values(self, rows: Sequence[StoredRow], n: int) -> np.ndarray:
        values = np.empty((len(rows), n))
        by_shard: dict[Path, list[int]] = {}
        for number, row in enumerate(rows):
            by_shard.setdefault(row.shard, []).append(number)
        for shard, numbers in by_shard.items():
            column = pq.read_table(shard, columns=["loglikelihoods"], partitioning=None)[0]
            for number in numbers:
                row_values = column[rows[number].position].values
                if len(row_values) != n:
                    raise StoreError(
                        f"{shard} must have {n} numbers a model, got {len(row_values)} for "
                        f"{rows[number].label}"
                    )
                values[number] = row_values.to_numpy()
        return values

    def _rows(self, digest: str | None) -> list[StoredRow]:
        folders = self._partitions() if digest is None else [self._partition(digest)]
        found = (
            row
            for folder in folders
            for shard in sorted(folder.glob("*.parquet"))
            for row in read_rows(shard)
        )
        return newest(found)

    def _partitions(self) -> list[Path]:
        return sorted(self.folder.glob("textset=*"))

    def _partition(self, digest: str) -> Path:
        return self.folder / f"textset={digest}"

    def _write_texts(
        self,
        digest: str,
        ids: Sequence[str],
        text_bytes: np.ndarray,
        groups: Sequence[str] | None,
    ) -> None:
        self.prepare()
        folder = self._partition(digest)
        folder.mkdir(exist_ok=True)
        if not (folder / "_texts.json").exists():
            texts = {
                "ids": list(ids),
                "text_bytes": text_bytes.tolist(),
                "groups": list(groups) if groups is not None else None,
            }
            with atomic_write(folder / "_texts.json") as file:
                file.write(json.dumps(texts).encode())

    def _write_shard(self, digest: str, rows: list[dict[str, Any]]) -> None:
        self.prepare()
        folder = self._partition(digest)
        folder.mkdir(exist_ok=True)
        write_shard(folder, pa.Table.from_pylist(rows, schema=SCHEMA))

    def _retry(self, read: Callable[[], _Read]) -> _Read:
        """Read again if a compaction removed a shard between listing and reading."""
        for _ in range(20):
            try:
                return read()
            except FileNotFoundError:
                continue
        return read()


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
    chosen = []
    for name in models:
        found = [row for row in rows if row.label == name]
        if not found and "@" in name:
            model, _, revision = name.rpartition("@")
            found = [
                row for row in rows if row.label == model and row.key.revision.startswith(revision)
            ]
        if not found:
            raise StoreError(f"models must be in the store, got {name!r}")
        chosen.extend(found)
    return chosen


def _describe(row: StoredRow) -> str:
    return f"{row.label}@{row.key.revision[:12] or '(none)'} in {row.key.dtype or 'no dtype'}"


def _matrix_metadata(row: StoredRow) -> dict[str, Any]:
    adds_bos = row.provenance.get("adds_bos")
    return dict(row.metadata) | ({} if adds_bos is None else {"adds_bos": adds_bos})

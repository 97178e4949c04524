"""An index on disk: one folder of plain arrays that never changes; `writer.py` writes it.

    points.f32   (K, N) coordinates in fp32, mapped; every row is checked before it is first used
    first.f32    (K, m0 + 1) and rest.f32 (K, m1 - m0 + 1), lower-bound coordinates
    lists.u32    (K,) the list of each row, and centroids.f32 (L, m0 + 1), for approximate searches
    checks.u64   (K,) xxh3 of each row of points
    models.parquet   what is known of each row
    index.npz    the basis, the directions, and the sizes and xxh3 of the files above

The folder's name is the xxh3 of index.npz, so that none of this can be another's. faiss reads none
of it: it is given arrays whose sizes, types and sums have been checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from llfast.basis import BASIS_ARRAYS, BASIS_FACTS, Basis
from llfast.errors import SearchError, SpaceError
from llfast.spacefile import read_space

from .lists import Lists
from .models import IndexedModel, Models
from .projection import Projection, Reduced
from .searched import Rows

_ARRAYS = (*BASIS_ARRAYS, "directions")
_Bytes = TypeVar("_Bytes", bytes, memoryview)
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("revision", pa.string()),
        ("dtype", pa.string()),
        ("scoring_version", pa.int32()),
        ("created", pa.timestamp("us", tz="UTC")),
        ("shard", pa.string()),
        ("metadata", pa.string()),
    ]
)


class Segment:
    """A folder that `SegmentWriter` has written.

    Attributes:
        folder: where it is.
        basis: of its points.
        projection: what its lower-bound coordinates were made with; None if it has none.
        rows: its points.
        lists: which list each row is in; None if it has none.
        facts: what else its writer had to say.

    Raises:
        OSError: if it cannot be read.
        SearchError: if it is damaged, or of another format; with the file's path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if digest_of(folder / "index.npz") != folder.name:
            raise SearchError(_damaged(folder / "index.npz", "other bytes than were written"))
        try:
            fields = read_space(folder / "index.npz", _ARRAYS)
        except SpaceError as error:
            raise SearchError(f"{folder} must be a whole index, got: {error}") from None
        try:
            self.basis = Basis(**{name: fields[name] for name in (*BASIS_FACTS, *BASIS_ARRAYS)})
            self.facts: Mapping[str, Any] = fields["facts"]
            self._files: Mapping[str, Any] = fields["files"]
            count, first = int(fields["count"]), int(fields["first"])
            listed = {name: fields["lists"][name] for name in ("count", "probes", "recall")}
            directions = fields["directions"]
            n, m = len(self.basis), len(directions)
        except (KeyError, TypeError, ValueError, SpaceError) as error:
            raise SearchError(f"{folder} must be a whole index, got {error!r}") from None
        if directions.shape != (m, n) or not 0 <= first <= m or count < 1:
            raise SearchError(_damaged(folder / "index.npz", "sizes that do not fit together"))
        explained = self.facts["explained"]
        self.projection = Projection(directions, first, tuple(explained)) if m else None
        self._sums = self._read("checks.u64", np.dtype("<u8"), (count,))
        fp32 = np.dtype("<f4")
        reduced = self.lists = None
        if self.projection is not None:
            reduced = Reduced(
                self._read("first.f32", fp32, (count, first + 1)),
                self._read("rest.f32", fp32, (count, m - first + 1)),
            )
        if some := listed.pop("count"):
            centroids = self._read("centroids.f32", fp32, (some, first + 1))
            self.lists = Lists(
                centroids, self._read("lists.u32", np.dtype("<u4"), (count,)), **listed
            )
        points = self._map("points.f32", np.dtype("<f4"), (count, n))
        self._points = points
        self._checked = np.zeros(count, dtype=bool)
        self.rows = Rows(points=points, flat=points, reduced=reduced, check=self._check)

    def __len__(self) -> int:
        return len(self._sums)

    @cached_property
    def table(self) -> pa.Table:
        """What is known of each row; raises SearchError if it is damaged."""
        path = self.folder / "models.parquet"
        content = pa.BufferReader(self._check_sum(path.name, path.read_bytes()))
        # A thread of pyarrow that lets go of Python's bytes while Python ends takes the process
        # down with it (https://github.com/apache/arrow/issues/34314).
        with pq.ParquetFile(content, pre_buffer=False) as file:
            table = file.read(use_threads=False)
        if table.schema != SCHEMA or len(table) != len(self):
            raise SearchError(_damaged(path, f"{len(table)} rows of another kind"))
        return table

    def header(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Fields and arrays of its index.npz, as `write_space` takes them."""
        fields = read_space(self.folder / "index.npz", _ARRAYS)
        return fields, {name: fields.pop(name) for name in _ARRAYS}

    def verify(self) -> None:
        """Read all of it; raises SearchError if it is damaged."""
        len(self.table)
        self._check(range(len(self)))

    def models(self) -> Models:
        """Its rows, by name; another object each time, for models come and go."""
        return Models(
            self.table["name"].to_pylist(),
            self._model,
            self.table["revision"].to_pylist,
            dtypes=self.facts["dtypes"],
            adds_bos={json.loads(key): count for key, count in self.facts["adds_bos"].items()},
        )

    def _model(self, number: int) -> IndexedModel:
        row = {name: column[number].as_py() for name, column in self._columns.items()}
        return IndexedModel(**row | {"metadata": json.loads(row["metadata"])})

    @cached_property
    def _columns(self) -> dict[str, pa.Array]:
        """The table's columns in one piece each, so that looking up a row takes 10 us."""
        return {name: self.table[name].combine_chunks() for name in self.table.column_names}

    def _read(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        """A small file, whole and checked."""
        array = np.array(self._map(name, dtype, shape))
        self._check_sum(name, array.data)
        return array

    def _check_sum(self, name: str, data: _Bytes) -> _Bytes:
        if xxhash.xxh3_64_intdigest(data) != self._files.get(name):
            raise SearchError(_damaged(self.folder / name, "other bytes than were written"))
        return data

    def _map(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        path, size = self.folder / name, math.prod(shape) * dtype.itemsize
        if path.stat().st_size != size:
            raise SearchError(_damaged(path, f"{path.stat().st_size} bytes instead of {size}"))
        mapped: np.ndarray = np.memmap(path, dtype=dtype, mode="r", shape=shape)
        return mapped

    def _check(self, numbers: Sequence[int] | range) -> None:
        for number in numbers:
            if self._checked[number]:
                continue
            if xxhash.xxh3_64_intdigest(self._points[number]) != int(self._sums[number]):
                raise SearchError(
                    _damaged(
                        self.folder / "points.f32", f"other bytes than were written in row {number}"
                    )
                )
            self._checked[number] = True


def _damaged(path: Path, reason: str) -> str:
    return f"{path} must be as it was written, got {reason}; build it again with refit=True"


def digest_of(path: Path) -> str:
    """What a folder with this index.npz is called."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())

"""An index on disk: one folder of plain arrays that never changes.

    points.f32   (K, N) coordinates in fp32, mapped; every row is checked before it is first used
    first.f32    (K, m0 + 1) and rest.f32 (K, m1 - m0 + 1), lower-bound coordinates
    checks.u64   (K,) xxh3 of each row of points
    models.parquet   what is known of each row
    index.npz    the basis, the directions, and the sizes and xxh3 of the files above

The folder's name is the xxh3 of index.npz, so that none of this can be another's. faiss reads none
of it: it is given arrays whose sizes, types and sums have been checked.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from jaxtyping import Float64

from llfast.basis import Basis
from llfast.errors import SearchError, SpaceError
from llfast.files import atomic_write
from llfast.intervals import half_variances
from llfast.mixed import dtype_pairs
from llfast.spacefile import read_space, write_space

from .certified import Rows
from .flat import refuse_large_rows
from .models import IndexedModel, Models
from .projection import Projection, Reduced

_BASIS = ("clip", "ids", "groups", "textset_digest", "convention")
_ARRAYS = ("reference", "text_bytes", "directions")
_Bytes = TypeVar("_Bytes", bytes, memoryview)
_SCHEMA = pa.schema(
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
        facts: what else its writer had to say.

    Raises:
        OSError: if it cannot be read.
        SearchError: if it is damaged, or of another format; with the file's path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if _digest(folder / "index.npz") != folder.name:
            raise SearchError(_damaged(folder / "index.npz", "other bytes than were written"))
        try:
            fields = read_space(folder / "index.npz", _ARRAYS)
        except SpaceError as error:
            raise SearchError(f"{folder} must be a whole index, got: {error}") from None
        try:
            self.basis = Basis(
                reference=fields["reference"],
                text_bytes=fields["text_bytes"],
                **{name: fields[name] for name in _BASIS},
            )
            self.facts: Mapping[str, Any] = fields["facts"]
            self._files: Mapping[str, Any] = fields["files"]
            count, first = int(fields["count"]), int(fields["first"])
            directions = fields["directions"]
            n, m = len(self.basis), len(directions)
        except (KeyError, TypeError, ValueError, SpaceError) as error:
            raise SearchError(f"{folder} must be a whole index, got {error!r}") from None
        if directions.shape != (m, n) or not 0 <= first <= m or count < 1:
            raise SearchError(_damaged(folder / "index.npz", "sizes that do not fit together"))
        explained = self.facts.get("explained", (0.0, 0.0))
        self.projection = Projection(directions, first, tuple(explained)) if m else None
        self._sums = self._read("checks.u64", np.dtype("<u8"), (count,))
        reduced = None
        if self.projection is not None:
            fp32 = np.dtype("<f4")
            reduced = Reduced(
                self._read("first.f32", fp32, (count, first + 1)),
                self._read("rest.f32", fp32, (count, m - first + 1)),
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
        table = pq.read_table(pa.BufferReader(self._check_sum(path.name, path.read_bytes())))
        if table.schema != _SCHEMA or len(table) != len(self):
            raise SearchError(_damaged(path, f"{len(table)} rows of another kind"))
        return table

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
        """In one piece each, so that looking up a row takes 10 us."""
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


class SegmentWriter:
    """Writes a folder, a block of rows at a time; `finish` makes it one that can be read."""

    def __init__(self, folder: Path, basis: Basis, projection: Projection | None) -> None:
        """Begin.

        Raises:
            OSError: if the folder is there, or cannot be made.
        """
        folder.mkdir()
        self._folder, self._basis, self._projection = folder, basis, projection
        names = ["points.f32", "checks.u64"]
        names += [] if projection is None else ["first.f32", "rest.f32"]
        self._files = {name: (folder / name).open("wb") for name in names}
        self._sums = {name: xxhash.xxh3_64() for name in names if name != "points.f32"}
        self._models: list[IndexedModel] = []
        self.largest = self.offset = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._files.values():
            opened.close()

    def append(self, models: Sequence[IndexedModel], points: Float64[np.ndarray, "M N"]) -> None:
        """More rows, rounded to fp32; raises SearchError if that cannot hold them."""
        refuse_large_rows(points, [row.name for row in models])
        rounded = np.ascontiguousarray(points, dtype="<f4")
        exact = rounded.astype(np.float64)
        self.largest = max(self.largest, float(np.sqrt(np.einsum("ij,ij->i", exact, exact)).max()))
        self.offset = max(self.offset, float(np.abs(exact.mean(axis=1)).max()))
        sums = np.array([xxhash.xxh3_64_intdigest(row) for row in rounded], dtype="<u8")
        self._write("checks.u64", sums)
        self._write("points.f32", rounded)
        if self._projection is not None:
            reduced = self._projection.reduce(exact)
            self._write("first.f32", reduced.first.astype("<f4"))
            self._write("rest.f32", reduced.rest.astype("<f4"))
        self._models += models

    def finish(self, facts: Mapping[str, Any]) -> str:
        """Have all of it on the disk.

        Args:
            facts: what JSON can hold; kept as `Segment.facts`, with norms, dtypes and tokenizers.

        Returns: a digest of all of it, to be the folder's name.
        """
        for opened in self._files.values():
            opened.flush()
            os.fsync(opened.fileno())
        table = pa.Table.from_pydict(
            {
                field.name: [
                    json.dumps(dict(row.metadata))
                    if field.name == "metadata"
                    else getattr(row, field.name)
                    for row in self._models
                ]
                for field in _SCHEMA
            },
            schema=_SCHEMA,
        )
        written = pa.BufferOutputStream()
        pq.write_table(table, written, compression="zstd")
        with atomic_write(self._folder / "models.parquet") as file:
            file.write(written.getvalue())
        self._sums["models.parquet"] = xxhash.xxh3_64(written.getvalue())
        known = [row.metadata["adds_bos"] for row in self._models if "adds_bos" in row.metadata]
        projection, basis = self._projection, self._basis
        directions = np.empty((0, len(basis))) if projection is None else projection.directions
        fields = {name: getattr(basis, name) for name in _BASIS} | {
            "count": len(self._models),
            "first": 0 if projection is None else projection.first,
            "files": {name: digest.intdigest() for name, digest in self._sums.items()},
            "facts": {
                **facts,
                "explained": None if projection is None else projection.explained,
                "largest": self.largest,
                "offset": self.offset,
                "dtypes": sorted({row.dtype for row in self._models}),
                "adds_bos": {json.dumps(each): known.count(each) for each in (True, False)},
                "noise_floor": self._noise_floor(),
            },
        }
        arrays = {"reference": basis.reference, "text_bytes": basis.text_bytes}
        write_space(self._folder / "index.npz", fields, arrays | {"directions": directions})
        return _digest(self._folder / "index.npz")

    def _noise_floor(self) -> float:
        """The largest KL between two dtypes of one model, nats a text; 0 if there is none."""
        models = self._models
        shape = (len(models), len(self._basis))
        points = np.memmap(self._folder / "points.f32", dtype="<f4", mode="r", shape=shape)
        pairs = dtype_pairs(*zip(*((m.name, m.revision, m.dtype) for m in models), strict=True))
        return max(
            (
                float(half_variances(points[[a]].astype(np.float64) - points[b])[0])
                for a, b in pairs
            ),
            default=0.0,
        )

    def _write(self, name: str, rows: np.ndarray) -> None:
        self._files[name].write(rows.data)
        if name in self._sums:
            self._sums[name].update(rows.data)


def _damaged(path: Path, reason: str) -> str:
    return f"{path} must be as it was written, got {reason}; build it again with refit=True"


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())

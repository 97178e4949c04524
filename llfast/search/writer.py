"""Writes the folder of an index; `segment.py` says what is in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from jaxtyping import Float32, Float64

from llfast.basis import BASIS_ARRAYS, BASIS_FACTS, Basis
from llfast.files import atomic_write
from llfast.mixed import noise_floor
from llfast.spacefile import write_space

from .flat import norms_of, refuse_large_rows
from .listing import fit_lists
from .lists import Lists
from .models import IndexedModel
from .projection import Projection, Reduced
from .searched import Rows
from .segment import SCHEMA, Segment, digest_of


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
        self._files: dict[str, BinaryIO] = {}
        self._sums: dict[str, xxhash.xxh3_64] = {}
        for name in names:
            self._open(name)
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
        self.largest = max(self.largest, float(norms_of(exact).max()))
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
        """Write everything to disk.

        Args:
            facts: what JSON can hold; kept as `Segment.facts`, with norms, dtypes and tokenizers.

        Returns: a digest of all of it, to be the folder's name.
        """
        for opened in self._files.values():
            opened.flush()
        points = self._map("points.f32", len(self._basis))
        lists = self._lists(points)
        for opened in self._files.values():
            opened.flush()
            os.fsync(opened.fileno())
        known = [row.metadata["adds_bos"] for row in self._models if "adds_bos" in row.metadata]
        named = ((row.name, row.revision, row.dtype) for row in self._models)
        projection, basis = self._projection, self._basis
        directions = np.empty((0, len(basis))) if projection is None else projection.directions
        self._sums["models.parquet"] = _write_table(self._folder, self._models)
        fields = {name: getattr(basis, name) for name in BASIS_FACTS} | {
            "count": len(self._models),
            "first": 0 if projection is None else projection.first,
            "lists": {
                "count": 0 if lists is None else len(lists.centroids),
                "probes": 0 if lists is None else lists.probes,
                "recall": 1.0 if lists is None else lists.recall,
            },
            "files": {name: digest.intdigest() for name, digest in self._sums.items()},
            "facts": {
                **facts,
                "explained": None if projection is None else projection.explained,
                "largest": self.largest,
                "offset": self.offset,
                "dtypes": sorted({row.dtype for row in self._models}),
                "adds_bos": {json.dumps(each): known.count(each) for each in (True, False)},
                "noise_floor": noise_floor(points, *zip(*named, strict=True)),
            },
        }
        arrays = {name: getattr(basis, name) for name in BASIS_ARRAYS}
        write_space(self._folder / "index.npz", fields, arrays | {"directions": directions})
        return digest_of(self._folder / "index.npz")

    # ------------------------------------------------------------------ inside

    def _lists(self, points: Float32[np.ndarray, "K N"]) -> Lists | None:
        """Which list each row is in, written; None for few rows."""
        projection = self._projection
        if projection is None:
            return None
        first = np.array(self._map("first.f32", projection.first + 1))
        rest = self._map("rest.f32", len(projection.directions) - projection.first + 1)
        rows = Rows(points=points, flat=points, reduced=Reduced(first, rest))
        lists = fit_lists(rows, largest=self.largest, offset=self.offset)
        if lists is not None:
            for name, array in (("centroids.f32", lists.centroids), ("lists.u32", lists.numbers)):
                self._open(name)
                self._write(name, array)
        return lists

    def _map(self, name: str, columns: int) -> Float32[np.ndarray, "K C"]:
        """What has been written of a file of fp32."""
        shape = (len(self._models), columns)
        return np.memmap(self._folder / name, dtype="<f4", mode="r", shape=shape)

    def _open(self, name: str) -> None:
        self._files[name] = (self._folder / name).open("wb")
        if name != "points.f32":  # every row of which has its own
            self._sums[name] = xxhash.xxh3_64()

    def _write(self, name: str, rows: np.ndarray) -> None:
        self._files[name].write(rows.data)
        if name in self._sums:
            self._sums[name].update(rows.data)


def relabelled(
    segment: Segment, folder: Path, models: Sequence[IndexedModel], facts: Mapping[str, Any]
) -> str:
    """A folder with a segment's own points and other facts; its files are links to the old ones.

    Args:
        segment: whose points.
        folder: it must not be there.
        models: one a row, as `SegmentWriter.append` has them.
        facts: all of them.

    Returns: as `SegmentWriter.finish`.
    """
    folder.mkdir()
    for path in segment.folder.iterdir():
        if path.name not in ("models.parquet", "index.npz"):
            try:
                (folder / path.name).hardlink_to(path)
            except OSError:  # not every file system has them
                shutil.copyfile(path, folder / path.name)
                with (folder / path.name).open("rb") as copy:
                    os.fsync(copy.fileno())
    sums = {"models.parquet": _write_table(folder, models).intdigest()}
    fields, arrays = segment.header()
    fields |= {"files": {**fields["files"], **sums}, "facts": facts}
    write_space(folder / "index.npz", fields, arrays)
    return digest_of(folder / "index.npz")


def _write_table(folder: Path, models: Sequence[IndexedModel]) -> xxhash.xxh3_64:
    """What is known of each row, and the file's sum."""
    columns = {
        field.name: [
            json.dumps(dict(row.metadata)) if field.name == "metadata" else getattr(row, field.name)
            for row in models
        ]
        for field in SCHEMA
    }
    written = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pydict(columns, schema=SCHEMA), written, compression="zstd")
    with atomic_write(folder / "models.parquet") as file:
        file.write(written.getvalue())
    return xxhash.xxh3_64(written.getvalue())

"""The files of a store that are no shards: what says that it is one, and describes its texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import StoreError
from .files import atomic_write

# Like all that begins with _ or ., no data to pyarrow, Spark and DuckDB.
_MARKER = "_llfast-store.json"
_FORMAT = 1


def check_marker(folder: Path) -> None:
    """Accept a store, an empty folder, and none.

    Raises:
        StoreError: if the folder is something else.
    """
    marker = folder / _MARKER
    foreign = folder.exists() and (
        not folder.is_dir()
        or any(not each.name.startswith(f".{_MARKER}") for each in folder.iterdir())
    )
    # In this order: another writer may be making the store right now.
    if marker.exists():
        try:
            version = json.loads(marker.read_bytes())["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StoreError(f"{marker} must name the store's format, got something else") from None
        if version != _FORMAT:
            raise StoreError(
                f"{folder} must be a store of format {_FORMAT}, got {version}; use the llfast "
                "that wrote it"
            )
    elif foreign:
        raise StoreError(
            f"{folder} must be a store or an empty folder, got one with other things and no "
            f"{_MARKER}"
        )


def write_marker(folder: Path) -> None:
    """Say that a folder is a store, if nothing does so yet."""
    if not (folder / _MARKER).exists():
        with atomic_write(folder / _MARKER) as file:
            file.write(json.dumps({"format": _FORMAT}).encode())


def read_texts(path: Path) -> dict[str, Any]:
    """`ids`, `text_bytes` (N,) and `groups` of a text set.

    Raises:
        StoreError: if they cannot be read.
    """
    try:
        texts = dict(json.loads(path.read_bytes()))
        return {name: texts[name] for name in ("ids", "text_bytes", "groups")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} must describe the texts, got {error!r}; it is written again with the next "
            "result"
        ) from None


def write_texts(
    path: Path, ids: Sequence[str], text_bytes: np.ndarray, groups: Sequence[str] | None
) -> None:
    """Describe texts, if nothing whole does so yet.

    Raises:
        StoreError: if other texts are described there.
    """
    try:
        known = read_texts(path)
    except StoreError:  # not there, or damaged: here they are again
        texts = {
            "ids": list(ids),
            "text_bytes": text_bytes.tolist(),
            "groups": list(groups) if groups is not None else None,
        }
        with atomic_write(path) as file:
            file.write(json.dumps(texts).encode())
        return
    for name, given in (("ids", list(ids)), ("text_bytes", text_bytes.tolist())):
        if given != known[name]:
            raise StoreError(f"{name} must be those in {path}, got others for the same texts")

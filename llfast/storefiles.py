"""The files of a store that are no shards: what says that it is one, and describes its texts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import cache
from .errors import RemoteError, StoreError
from .files import atomic_write
from .remote import AnyPath, RemotePath
from .rows import StoredRow

# Like all that begins with _ or ., no data to pyarrow, Spark and DuckDB.
_MARKER = "_llfast-store.json"
_PARTIAL = "_partial"
_FORMAT = 1


def check_marker(folder: AnyPath) -> None:
    """Accept a store, an empty folder, and none.

    Raises:
        StoreError: if the folder is something else.
    """
    marker = folder / _MARKER
    if isinstance(folder, RemotePath):
        foreign = folder.is_dir()
    else:
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


def write_marker(folder: AnyPath, *, again: bool = False) -> None:
    """Say that a folder is a store, if nothing does so yet, or `again`."""
    if again or not (folder / _MARKER).exists():
        with atomic_write(folder / _MARKER) as file:
            file.write(json.dumps({"format": _FORMAT}).encode())


def refuse_unwritable_store(folder: AnyPath) -> None:
    """Refuse, before any work, a store that cannot be written to; a new one is not made yet.

    At s3:// only a write tells, and it makes the store.

    Raises:
        OSError: if it cannot.
    """
    if isinstance(folder, RemotePath):
        write_marker(folder, again=True)
        return
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "The store cannot be written to", str(folder))


def find_partial(folder: AnyPath, key: str) -> Path | None:
    """Where a model's finished texts are kept: in the store, or in the cache for one at s3://.

    Returns: None where the cache cannot be written.
    """
    name = f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
    if not isinstance(folder, RemotePath):
        return folder / _PARTIAL / name
    try:
        own = cache.folder() / "partial" / cache.key(str(folder))
        own.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return own / name if os.access(own, os.W_OK) else None


def only_textset(
    folder: AnyPath,
    found: Sequence[str],
    digest: str | None,
    rows: Callable[[str], Sequence[StoredRow]] | None = None,
) -> str:
    """The one of several text sets whose digest begins so, and of whose `rows` one is a result.

    Raises:
        StoreError: if there is none or several.
    """
    if digest and digest in found:  # matrices name their texts, and a name can begin another
        return digest
    found = [each for each in found if each.startswith(digest or "")]
    if rows is not None and len(found) > 1:  # of some of them all results may have been removed
        found = [each for each in found if any(row.error is None for row in rows(each))]
    if len(found) == 1:
        return found[0]
    if not found:
        what = f"results on text set {digest}" if digest else "results"
        found_there = "none" if folder.is_dir() else "no such folder"
        raise StoreError(f"{folder} must hold {what}, got {found_there}")
    listed = ", ".join(each[:12] for each in found)
    raise StoreError(
        f"the text set must be named where a store has several, got {listed}; choose with --textset"
    )


def read_texts(path: AnyPath) -> dict[str, Any]:
    """`ids`, `text_bytes` (N,) and `groups` of a text set.

    Raises:
        StoreError: if they cannot be read.
    """
    try:
        texts = dict(json.loads(path.read_bytes()))
        return {name: texts[name] for name in ("ids", "text_bytes", "groups")}
    except RemoteError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} must describe the texts, got {error!r}; it is written again with the next "
            "result"
        ) from None


def write_texts(
    path: AnyPath, ids: Sequence[str], text_bytes: np.ndarray, groups: Sequence[str] | None
) -> None:
    """Describe texts, if nothing whole does so yet, or nothing that knows their groups.

    Raises:
        StoreError: if other texts are described there.
    """
    texts = {
        "ids": list(ids),
        "text_bytes": text_bytes.tolist(),
        "groups": list(groups) if groups is not None else None,
    }
    known = None
    with contextlib.suppress(StoreError):  # not there, or damaged: here they are again
        known = read_texts(path)
    if known is not None:
        for name in ("ids", "text_bytes"):
            if texts[name] != known[name]:
                raise StoreError(f"{name} must be those in {path}, got others for the same texts")
        # Groups are no part of the digest: whoever was here first need not have known them.
        if groups is None or known["groups"] is not None:
            return
    with atomic_write(path) as file:
        file.write(json.dumps(texts).encode())

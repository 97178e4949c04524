"""The file of a model space: an .npz with a JSON header, written atomically, checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import SpaceError
from .files import atomic_write, read_npz

_FORMAT = 1


def write_space(
    path: str | os.PathLike[str],
    fields: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Write fields that JSON knows, and arrays, in one file.

    Raises:
        OSError: if it cannot be written; what was there stays.
        TypeError: if a field holds what JSON cannot.
    """
    header = json.dumps({"format": _FORMAT, **fields}, default=_plain).encode()
    with atomic_write(path) as file:
        members: dict[str, Any] = {"header": np.frombuffer(header, dtype=np.uint8), **arrays}
        np.savez(file, **members)


def read_space(path: str | os.PathLike[str], arrays: tuple[str, ...]) -> dict[str, Any]:
    """Read the fields and the named arrays (fp64); lists become tuples. Nothing is executed.

    Raises:
        OSError: if the file cannot be opened.
        SpaceError: if it is damaged, of another kind or of another version.
    """
    try:
        found = read_npz(path)
        fields = json.loads(found["header"].tobytes())
        version = fields.pop("format")
        values = {name: np.asarray(found[name], dtype=np.float64) for name in arrays}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SpaceError(f"{path} must be a whole file of a space, got {error!r}") from error
    if version != _FORMAT:
        raise SpaceError(
            f"{path} must have format {_FORMAT}, got {version!r}; save the space again with this "
            "release"
        )
    tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return {**fields, **tuples, **values}


def _plain(value: object) -> object:
    """Numpy scalars and mappings as what JSON knows."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"metadata must hold what JSON can, got {type(value).__name__}")

"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from .remote import RemotePath


@contextmanager
def atomic_write(path: str | os.PathLike[str] | RemotePath) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the place of `path` once it is written and on disk.

    A reader, a second writer or a kill at any moment finds the old file or the new one. Temporary
    names begin with a dot and are the writer's own. A link stays one, and what it leads to is
    replaced; a pipe or a device is written to as it is. At s3:// it is one upload.

    Raises:
        OSError: if it cannot be written; `path` is as it was then.
    """
    if isinstance(path, RemotePath):
        with path.writer() as file:
            yield file
        return
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        # Root could otherwise put a file in the place of /dev/null, for the whole machine.
        with path.open("wb") as file:
            yield file
        return
    if path.is_symlink():
        path = path.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # "No space left on device" does not say where, and a temporary name says little.
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, outlives a power cut
    finally:
        os.close(folder)


def refuse_unwritable(path: str | os.PathLike[str], what: str) -> None:
    """Refuse, before any work, a place where no file can be written after it.

    Args:
        path: the file to be.
        what: that it will be, as an error's first words: "A map".

    Raises:
        OSError: if it is a folder, or its folder is not there.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{what} is written to a file", os.fspath(path))
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no such folder", os.fspath(path))


def as_utf8(text: str) -> str:
    """Text that can be stored: bytes of a path that are not UTF-8 are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an .npz file; those that would have to be unpickled are refused.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is something else, or damaged.
    """
    with Path(path).open("rb") as file:
        try:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.ndarray):
                return dict(arrays)
            reason = "a single array"
        except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f"{path} must be an .npz file without pickled objects, got: {reason}")

"""A folder of things that can be made again: token ids, digests of files.

It is `$LLFAST_CACHE`, else `$XDG_CACHE_HOME/llfast`, else `~/.cache/llfast`. A missing, damaged or
unwritable cache, or a user without a home, costs time and nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .files import atomic_write, read_npz

_CLOCK_TICK_NS = 2_000_000_000  # of the coarsest file systems
_FORMAT = "1"  # part of every key: raised when what is cached changes its meaning
_BEFORE_TRUNCATION = re.compile(r'\{"version":"[^"]*","truncation":')
_shared: SharedArrays | None = None


def folder() -> Path:
    """Where the cache is; it need not exist.

    Raises:
        FileNotFoundError: if nothing says where, as for a container's user without a name.
    """
    given = os.environ.get("LLFAST_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "llfast"
    try:
        return Path.home() / ".cache" / "llfast"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "No home folder; set LLFAST_CACHE") from error


def key(*parts: str) -> str:
    """A file name for what `parts` describe."""
    digest = hashlib.sha256()
    for part in (_FORMAT, *parts):
        data = part.encode("utf-8", "surrogatepass")  # paths need not be UTF-8
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class SharedArrays(Protocol):
    """What other machines have made: for keys that mean the same on all of them."""

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a key; None if this machine is to make them."""

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Let others have them."""


def share_with(shared: SharedArrays | None) -> None:
    """Get what is not in the folder from other machines, in this process."""
    global _shared  # noqa: PLW0603 (of the process, as the folder is)
    _shared = shared


def load_arrays(name: str, *, portable: bool = False) -> dict[str, np.ndarray] | None:
    """The arrays saved under a key, or None if there are none that can be read.

    Args:
        name: the key.
        portable: whether it means the same on all machines.
    """
    try:
        return read_npz(folder() / f"{name}.npz")
    except (OSError, ValueError):
        return _shared.load(name) if portable and _shared is not None else None


def save_arrays(name: str, *, portable: bool = False, **arrays: np.ndarray) -> None:
    """Keep arrays under a key, atomically; does nothing if the folder cannot be written."""
    if portable and _shared is not None:
        _shared.save(name, arrays)
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with atomic_write(folder() / f"{name}.npz") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError:
        return


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, remembered by its place, size, time of change and inode.

    Raises:
        OSError: if the file cannot be read.
    """
    name, is_settled = file_key("sha256", path)
    known = load_arrays(name)
    if known is not None and "sha256" in known:
        return str(known["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if is_settled:
        save_arrays(name, sha256=np.array(digest))
    return digest


def file_key(kind: str, path: Path) -> tuple[str, bool]:
    """A key for what is known of a file, by its place, size, time of change and inode.

    Returns: it, and whether the file is old enough to keep anything under it: one that was just
        written may be written again within one tick of its clock.

    Raises:
        OSError: if there is no such file.
    """
    stat = path.stat()
    name = key(kind, str(path.resolve()), f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}")
    return name, time.time_ns() - stat.st_mtime_ns > _CLOCK_TICK_NS


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """What decides a fast tokenizer's output; None for one that cannot be asked, as slow ones."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # Truncation and padding, which come first, are set by the last call and not by the tokenizer.
    # All the rest, a vocabulary, is long: it is left as it is written.
    text = backend.to_str()
    head = _BEFORE_TRUNCATION.match(text)
    if head is None:
        return None
    _, end = json.JSONDecoder().raw_decode(text, head.end())
    padding = ',"padding":'
    if not text.startswith(padding, end):
        return None
    _, end = json.JSONDecoder().raw_decode(text, end + len(padding))
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    return f"{type(tokenizer).__name__} {split} {text[end:]}"

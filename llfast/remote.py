"""Paths at s3://, with what a store needs of `pathlib.Path`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TypeAlias, TypeVar, cast

from . import s3
from .errors import StoreError
from .redaction import without_secrets

# pathlib takes away one of several slashes.
_URL = re.compile(
    r"(?i:s3)://?(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]*)(/(?P<key>[^\x00-\x1f?#\\]*?))??/?"
)
_NO_NAME = re.compile(r"/\.{0,2}/.")
_AT_ONCE = 16  # requests, each of which takes far longer than what it is for
_Found = TypeVar("_Found")


class RemotePath:
    """An object, or what begins with its key and a slash: a folder, which is never made.

    Methods are those of `pathlib.Path`; what fails raises RemoteError, an OSError.
    """

    __slots__ = ("_place", "_size")

    def __init__(self, bucket: str, key: str, *, size: int | None = None) -> None:
        self._place, self._size = s3.S3Object(bucket, key), size

    def __str__(self) -> str:
        return str(self._place)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._place == other._place

    def __hash__(self) -> int:
        return hash(self._place)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._place.bucket, self._beneath(name))

    @property
    def name(self) -> str:
        """What is after the last slash."""
        return self._place.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without what is after its last dot."""
        return Path(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """What is before the last slash."""
        return RemotePath(self._place.bucket, self._place.key.rpartition("/")[0])

    @property
    def size(self) -> int:
        """In bytes; known if it comes from a listing."""
        if self._size is None:
            self._size = s3.look_up(self._place).size
        return self._size

    def with_size(self, size: int) -> RemotePath:
        """The same, without asking."""
        return RemotePath(*self._place, size=size)

    def facts(self) -> s3.Facts:
        """Size and times, as they are now."""
        return s3.look_up(self._place)

    def exists(self) -> bool:
        """Whether there is such an object."""
        try:
            s3.look_up(self._place)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether anything is beneath it."""
        return any(True for _ in s3.listed(self._place))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What is directly beneath it and has such a name."""
        for name, size in s3.listed(self._place, re.split(r"[*?\[]", pattern)[0]):
            if fnmatchcase(name, pattern):
                yield RemotePath(self._place.bucket, self._beneath(name), size=size)

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there with what is in it."""

    def read_bytes(self) -> bytes:
        """All of it."""
        return s3.read(self._place)

    def write_bytes(self, data: bytes) -> None:
        """Write it, in place of what is there."""
        s3.write(self._place, data)

    def create(self, data: bytes) -> bool:
        """Write it unless it is there; whether it was written."""
        return s3.create(self._place, data)

    def unlink(self, missing_ok: bool = True) -> None:
        """Remove it; S3 does not say whether it was there."""
        assert missing_ok
        s3.remove(self._place)

    def reader(self) -> s3.ObjectReader:
        """A file of which only those ranges are fetched that are read."""
        return s3.ObjectReader(self._place, self.size)

    def _beneath(self, name: str) -> str:
        return f"{self._place.key}/{name}" if self._place.key else name

    @contextmanager
    def writer(self) -> Iterator[IO[bytes]]:
        """A file that is there, all of it at once, when all has been written to it."""
        upload = s3.Upload(self._place)
        try:
            yield cast("IO[bytes]", upload)
            upload.commit()
        except BaseException:
            upload.abort()
            raise


AnyPath: TypeAlias = Path | RemotePath


def sorted_glob(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """What is directly in a folder and has such a name."""
    return sorted(folder.glob(pattern), key=str)


def file_bytes(path: AnyPath) -> int:
    """The size of a file or object."""
    return path.size if isinstance(path, RemotePath) else path.stat().st_size


def with_bytes(path: AnyPath, size: int) -> AnyPath:
    """The same path, of which the size is known."""
    return path.with_size(size) if isinstance(path, RemotePath) else path


def map_paths(function: Callable[[AnyPath], _Found], paths: Sequence[AnyPath]) -> Iterator[_Found]:
    """What a function makes of each path, in their order; of those at s3://, several at once."""
    if len(paths) < 2 or not isinstance(paths[0], RemotePath):
        yield from map(function, paths)
        return
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield from pool.map(function, paths)
    finally:
        pool.shutdown(cancel_futures=True)


def is_remote(place: object) -> bool:
    """Whether a store's place is no folder of a file system."""
    text = os.fspath(place) if isinstance(place, os.PathLike) else place
    return isinstance(place, RemotePath) or (
        isinstance(text, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|s3:/", text) is not None
    )


def to_path(place: str | os.PathLike[str] | RemotePath) -> AnyPath:
    """A folder, or a prefix of an S3 bucket.

    Raises:
        StoreError: if it is of another kind.
    """
    if isinstance(place, RemotePath):
        return place
    if not is_remote(place):
        return Path(place)
    found = _URL.fullmatch(os.fspath(place))
    if found is None or _NO_NAME.search(f"/{found['key'] or ''}/"):
        raise StoreError(
            f"store must be a folder or s3://bucket/prefix, got {without_secrets(os.fspath(place))}"
        )
    return RemotePath(found["bucket"], found["key"] or "")

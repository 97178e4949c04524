"""Single requests to S3-compatible storage, and what may become of them.

Objects are whole or not there, and a listing has what was written before it: S3 promises both.
Credentials and the endpoint come from where all AWS tools find them (`AWS_PROFILE`,
`AWS_ENDPOINT_URL`, ...), and other settings of s3fs from fsspec's configuration. No listing is
cached, and errors say what was asked of which object, without secrets.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from .errors import RemoteError, needed
from .redaction import without_secrets

_PART_BYTES = 32 << 20  # of an object that is sent in parts: what is held of it in memory
_TAIL_BYTES = 64 << 10  # what pyarrow reads first, for the footer
_AHEAD_BYTES = 16 << 10  # small columns lie side by side: one request for all of them
_TRIES = 2  # of s3fs, each of which is five of botocore's within some seconds
_DENIED = "check the credentials, and what they allow"
_HINTS = {
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": _DENIED,
    "PermissionError": _DENIED,
    "EndpointConnectionError": "check AWS_ENDPOINT_URL",
    "ConnectTimeoutError": "check AWS_ENDPOINT_URL",
}
_filesystems: dict[tuple[Any, ...], Any] = {}
_Result = TypeVar("_Result")


class S3Object(NamedTuple):
    """Which object, or the beginning of the keys of several."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")


class Facts(NamedTuple):
    """What is known of an object.

    Attributes:
        size: in bytes.
        changed_ns: when it was written, in nanoseconds since 1970, by the server's clock; to the
            second.
        now_ns: what time it is there.
    """

    size: int
    changed_ns: int
    now_ns: int


def look_up(place: S3Object) -> Facts:
    """What is known of an object; raises FileNotFoundError, RemoteError."""
    found = _request("looked up", "head_object", place)
    date = found["ResponseMetadata"]["HTTPHeaders"].get("date")
    try:
        now = email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):  # a server that does not say
        now = time.time()
    changed_ns = int(found["LastModified"].timestamp() * 1e9)
    return Facts(int(found["ContentLength"]), changed_ns, int(now * 1e9))


def listed(folder: S3Object, prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """Names beneath a folder that begin so, and their bytes; None for a folder's.

    Raises:
        RemoteError: if that cannot be found out, or there is no such bucket.
    """
    beneath = f"{folder.key}/" if folder.key else ""
    arguments = {"Prefix": beneath + prefix, "Delimiter": "/"}
    while True:
        page = _request("listed", "list_objects_v2", folder, Key=None, **arguments)
        for each in page.get("CommonPrefixes", ()):
            yield each["Prefix"].removeprefix(beneath).rstrip("/"), None
        for each in page.get("Contents", ()):
            if each["Key"] != beneath:  # an object that some tools make for a folder
                yield each["Key"].removeprefix(beneath), int(each["Size"])
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def read(place: S3Object, start: int = 0, end: int | None = None) -> bytes:
    """An object, or a range of its bytes, which is in it; raises FileNotFoundError, RemoteError."""
    filesystem = _filesystem()
    options = {} if end is None else {"start": start, "end": end}
    data: bytes = _explained(
        "read", place, lambda: filesystem.cat_file(f"{place.bucket}/{place.key}", **options)
    )
    if end is not None and len(data) != end - start:
        raise RemoteError(f"{place} cannot be read: got {len(data)} bytes of {end - start}")
    return data


def write(place: S3Object, data: bytes) -> None:
    """Write an object, in place of any that is there; raises RemoteError."""
    _write("put_object", place, Body=data)


def create(place: S3Object, data: bytes) -> bool:
    """Write an object unless there is one; whether it was written. Raises RemoteError.

    A server that knows no conditional writes replaces what is there.
    """
    try:
        _write("put_object", place, Body=data, IfNoneMatch="*")
    except RemoteError as error:
        if error.errno != errno.ENOSYS:
            raise
        write(place, data)  # a server that says that it does not know them
    except FileExistsError:
        # An answer may have been lost, and the request been sent again.
        try:
            return read(place) == data
        except FileNotFoundError:
            return False
    return True


def remove(place: S3Object) -> None:
    """Remove an object, if it is there; raises RemoteError."""
    _request("removed", "delete_object", place)


class ObjectReader(io.RawIOBase):
    """An object as a file: a request for every range that is read.

    Args:
        place: the object.
        size: its bytes.
    """

    def __init__(self, place: S3Object, size: int) -> None:
        super().__init__()
        self._place, self._size, self._at = place, size, 0
        self._tail = self._last = (0, b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Read from there on."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """So many of the next bytes; raises FileNotFoundError, RemoteError."""
        rest = max(self._size - self._at, 0)
        count = rest if size is None or size < 0 else min(size, rest)
        data = self._range(self._at, self._at + count) if count else b""
        self._at += count
        return data

    def _range(self, start: int, end: int) -> bytes:
        for first, data in (self._tail, self._last):
            if first <= start and end <= first + len(data):
                return data[start - first : end - first]
        ahead = min(max(end, start + _AHEAD_BYTES), self._size)
        data = read(self._place, start, ahead)
        if ahead == self._size and len(data) <= _TAIL_BYTES:
            self._tail = start, data
        else:
            self._last = start, data
        return data[: end - start]


class Upload(io.RawIOBase):
    """A file to write to; it becomes an object, all of it at once, by `commit`."""

    def __init__(self, place: S3Object) -> None:
        super().__init__()
        self._place, self._size = place, 0
        self._waiting = bytearray()
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []

    def writable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """How many bytes there are so far."""
        return self._size

    def write(self, data: Any) -> int:
        """Add bytes, which may be sent now; raises RemoteError."""
        before = len(self._waiting)
        self._waiting += data
        count = len(self._waiting) - before
        self._size += count
        while len(self._waiting) >= _PART_BYTES:
            self._send()
        return count

    def commit(self) -> None:
        """Make the object; raises RemoteError, and there is none then."""
        if self._upload is None:
            write(self._place, bytes(self._waiting))
            return
        if self._waiting:
            self._send()
        _write(
            "complete_multipart_upload",
            self._place,
            UploadId=self._upload,
            MultipartUpload={"Parts": self._parts},
        )

    def abort(self) -> None:
        """Discard what was sent; what cannot be discarded now is seen by nobody."""
        if self._upload is not None:
            with contextlib.suppress(OSError):
                _write("abort_multipart_upload", self._place, UploadId=self._upload)

    def _send(self) -> None:
        if self._upload is None:
            self._upload = _write("create_multipart_upload", self._place)["UploadId"]
        part = bytes(self._waiting[:_PART_BYTES])
        number = len(self._parts) + 1
        sent = _write(
            "upload_part", self._place, UploadId=self._upload, PartNumber=number, Body=part
        )
        # A server that has computed checksums wants them back.
        kept = {name: value for name, value in sent.items() if name.startswith("Checksum")}
        kept.pop("ChecksumType", None)
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"], **kept})
        del self._waiting[:_PART_BYTES]


def _write(method: str, place: S3Object, **arguments: Any) -> Any:
    try:
        return _request("written", method, place, **arguments)
    except FileNotFoundError:  # of an upload in parts, which somebody has cleared away
        raise RemoteError(f"{place} cannot be written: the upload is not there any more") from None


def _request(done: str, method: str, place: S3Object, **arguments: Any) -> Any:
    whole = {"Bucket": place.bucket, "Key": place.key, **arguments}
    whole = {name: value for name, value in whole.items() if value is not None}
    filesystem = _filesystem()
    return _explained(done, place, lambda: filesystem.call_s3(method, **whole))


def _explained(done: str, place: S3Object, ask: Callable[[], _Result]) -> _Result:
    """What comes of a request; an error says what could not be done."""
    try:
        return ask()
    except Exception as error:  # botocore and aiohttp have a hundred kinds
        response = getattr(error.__cause__, "response", None) or {}
        code = response.get("Error", {}).get("Code")
        if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
            raise FileNotFoundError(errno.ENOENT, "There is no such object", str(place)) from None
        if isinstance(error, FileExistsError) or code == "ConditionalRequestConflict":
            raise FileExistsError(errno.EEXIST, "There is such an object", str(place)) from None
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = (said.strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        reason = re.sub(r'\?[^"]*"$', '"', reason)  # an address without its query
        hint = _HINTS.get(type(error).__name__)
        told = RemoteError(
            without_secrets(f"{place} cannot be {done}: {reason}{f'; {hint}' if hint else ''}")
        )
        told.errno = getattr(error, "errno", None)
        raise told from None


def _filesystem() -> Any:
    """s3fs, for this process (a fork has its own) and the settings of its environment."""
    settings = sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "FSSPEC")))
    key = (os.getpid(), *settings)
    if key not in _filesystems:
        with needed("s3fs", "stores at s3:// need s3fs; run: pip install 'llfast[s3]'"):
            import s3fs
        # Of two threads that make one, both go on with the first.
        made = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            max_concurrency=1,  # or it asks for an object's size before it reads it
        )
        made.retries = _TRIES
        _filesystems.setdefault(key, made)
    return _filesystems[key]

"""Whether weights are the bytes that they should be, found out while they are used."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Self

from .checkpoint import Checkpoint, refuse_irregular
from .errors import CheckpointError, LlfastError
from .paging import LoadingStatistics

# The digest alone takes 0.56 s of a core a GB here, reading like this 0.09 s more. Past the page
# cache it is 0.02 s less, at half the rate; and pages find in the cache what was verified before
# them, so that a cold paged run reads 1.3 to 1.6 times its bytes from the disk, not twice.
_CHUNK_BYTES = 8 << 20


class Verification:
    """sha256 of every byte of a checkpoint's weights, in a thread of its own."""

    def __init__(
        self, checkpoint: Checkpoint, manifest: Path | None, statistics: LoadingStatistics
    ) -> None:
        """Prepare; `with` begins.

        Args:
            checkpoint: what is verified.
            manifest: as `sha256sum` writes it; None for the names that the Hub's cache gives to
                files, which are their digests.
            statistics: filled in with what it takes.

        Raises:
            CheckpointError: if a weight file has no digest to be compared with.
            OSError: if the manifest cannot be read.
        """
        known = {} if manifest is None else read_manifest(manifest)
        self._expected: dict[Path, str] = {}
        for path in checkpoint.weights:
            digest = known.get(path.name) if manifest is not None else _blob_digest(path)
            if digest is None:
                where = str(manifest) if manifest is not None else "the Hub's cache"
                raise CheckpointError(
                    f"{path} must have a sha256 to be verified, got none from {where}; pass a "
                    "manifest made by `sha256sum`"
                )
            self._expected[path] = digest
        self._statistics = statistics
        self._error: Exception | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="llfast-verify", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, LlfastError):
            self.check(wait=True)  # wrong bytes explain whatever else is wrong
        self._stop.set()
        self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether a file is known to be wrong."""
        return self._error is not None

    def check(self, *, wait: bool = False) -> None:
        """Raise what was found so far; with `wait`, once all is read.

        Raises:
            CheckpointError: if a file is not what it should be, or could not be read.
        """
        if wait:
            start = time.perf_counter()
            self._thread.join()
            self._statistics.verify_wait_seconds += time.perf_counter() - start
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        start = time.perf_counter()
        try:
            for path, expected in self._expected.items():
                found = self._digest(path)
                if found not in (None, expected):
                    self._error = CheckpointError(
                        f"{path} must have the sha256 {expected}, got {found}; download it again"
                    )
                    return
        except OSError as error:  # a failed read does not say of which file
            self._error = CheckpointError(f"{path} must be read to be verified, got: {error}")
        except Exception as error:  # no result without a digest, whatever kept it from being taken
            self._error = error
        finally:
            self._statistics.verify_seconds += time.perf_counter() - start

    def _digest(self, path: Path) -> str | None:
        """None if it was told to stop."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if self._stop.is_set():
                    return None
                digest.update(buffer[:count])
                self._statistics.verified_bytes += count
        return digest.hexdigest()


def manifest_path(verify: bool | str | PathLike[str]) -> Path | None:
    """The manifest to verify with; None without one.

    Raises:
        TypeError: if it is neither a truth value nor a path.
    """
    if isinstance(verify, bool):
        return None
    if not isinstance(verify, str | PathLike):
        raise TypeError(f"verify must be True, False or the path of a manifest, got {verify!r}")
    return Path(verify)


def read_manifest(path: Path) -> Mapping[str, str]:
    """Digests by file name, from lines of a sha256 (hex), spaces or " *", and a name.

    Raises:
        CheckpointError: if a line is something else, or it is no regular file.
        OSError: if it cannot be read.
    """
    refuse_irregular(path)
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if match is None:
            raise CheckpointError(
                f"{path}, line {number} must be a sha256 and a file name, got {line[:80]!r}"
            )
        name, digest = Path(match[2]).name, match[1].lower()
        if found.setdefault(name, digest) != digest:
            raise CheckpointError(
                f"{path} must have one sha256 for {name}, got two; make a manifest a folder"
            )
    return found


def _blob_digest(path: Path) -> str | None:
    """The digest by which the Hub's cache names the file that a snapshot links to."""
    if not path.is_symlink():
        return None
    name = path.readlink().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None

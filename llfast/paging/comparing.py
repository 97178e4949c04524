"""Whether stored tensors have the same bytes: by a few of them, and then by their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from threading import Event

import numpy as np

from llfast import cache
from llfast.checkpoint import Checkpoint
from llfast.errors import CheckpointError
from llfast.safetensors_file import StoredTensor

from .statistics import LoadingStatistics

_SAMPLE_BYTES = 4096  # of a tensor, which tell most others from it
_CHUNK_BYTES = 8 << 20
_HASHING_THREADS = 4
_DIGEST_BYTES = 32

Contents = list[dict[str, object]]  # of each checkpoint, by name: the same for equal tensors


def contents_of(checkpoints: Sequence[Checkpoint], statistics: LoadingStatistics) -> Contents:
    """What tells tensors from others of their name; what only one checkpoint has is left out.

    Args:
        checkpoints: opened ones.
        statistics: told what was read.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    candidates = _candidates(checkpoints)
    resolved = {path: path.resolve() for each in checkpoints for path in each.weights}
    # A place in a file is one content, also if two folders link to it.
    places = {
        tensor: (resolved[tensor.path], tensor.begin) for group in candidates for tensor in group
    }
    samples = _samples(places)
    in_doubt: dict[object, StoredTensor] = {}
    for group in candidates:
        ties: dict[bytes, list[StoredTensor]] = {}
        for tensor in group:
            ties.setdefault(samples[tensor], []).append(tensor)
        for tie in ties.values():
            if len({places[tensor] for tensor in tie}) > 1:
                in_doubt |= {places[tensor]: tensor for tensor in tie}
    digests, hashed_bytes = _digests(in_doubt)
    statistics.compared_bytes += hashed_bytes
    return [
        {
            name: (tensor.dtype, tensor.shape, digests.get(places[tensor], places[tensor]))
            for name, tensor in checkpoint.tensors.items()
            if tensor in places
        }
        for checkpoint in checkpoints
    ]


def _candidates(checkpoints: Sequence[Checkpoint]) -> list[list[StoredTensor]]:
    """Tensors that may be equal."""
    found: dict[object, list[StoredTensor]] = {}
    for checkpoint in checkpoints:
        for tensor in checkpoint.tensors.values():
            if tensor.end > tensor.begin:
                found.setdefault((tensor.name, tensor.dtype, tensor.shape), []).append(tensor)
    return [each for each in found.values() if len(each) > 1]


def _by_file(tensors: Iterable[StoredTensor]) -> dict[Path, list[StoredTensor]]:
    found: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.path, []).append(tensor)
    return found


def _samples(tensors: Iterable[StoredTensor]) -> dict[StoredTensor, bytes]:
    """Of each tensor a digest of some bytes from its middle."""
    found = {}
    for path, stored in _by_file(tensors).items():
        with _opened(path) as file:
            for tensor in stored:
                begin = max((tensor.begin + tensor.end - _SAMPLE_BYTES) // 2, tensor.begin)
                end = min(begin + _SAMPLE_BYTES, tensor.end)
                found[tensor] = _sha256(file, tensor, begin, end, Event())
    return found


def _digests(tensors: Mapping[object, StoredTensor]) -> tuple[dict[object, object], int]:
    """The sha256 of each tensor by its place, and how many bytes were read to know."""
    places = {tensor: place for place, tensor in tensors.items()}
    found: dict[object, object] = {}
    hashed_bytes = 0
    stop = Event()
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        try:
            work = partial(_file_digests, stop=stop)
            for digests, nbytes in threads.map(work, _by_file(places).values()):
                found |= {places[tensor]: digest for tensor, digest in digests.items()}
                hashed_bytes += nbytes
        except BaseException:
            stop.set()  # Ctrl-C must not wait for whole files
            raise
    return found, hashed_bytes


def _file_digests(
    tensors: Sequence[StoredTensor], *, stop: Event
) -> tuple[dict[StoredTensor, bytes], int]:
    """The same, of one file; what was known before is not read again."""
    path, hashed_bytes = tensors[0].path, 0
    with _opened(path) as file:
        name, is_settled = cache.file_key("tensors", path)
        known = _known_digests(name)
        for tensor in tensors:
            if tensor.begin not in known:
                known[tensor.begin] = _sha256(file, tensor, tensor.begin, tensor.end, stop)
                hashed_bytes += tensor.end - tensor.begin
    if is_settled and hashed_bytes and not stop.is_set():
        sha256s = np.frombuffer(b"".join(known.values()), np.uint8).reshape(-1, _DIGEST_BYTES)
        cache.save_arrays(name, begins=np.array(list(known), dtype=np.int64), sha256s=sha256s)
    return {tensor: known[tensor.begin] for tensor in tensors}, hashed_bytes


def _known_digests(name: str) -> dict[int, bytes]:
    """By where tensors begin; none where what was kept is damaged."""
    arrays = cache.load_arrays(name) or {}
    begins, sha256s = arrays.get("begins"), arrays.get("sha256s")
    if (
        begins is None
        or sha256s is None
        or (str(begins.dtype), str(sha256s.dtype)) != ("int64", "uint8")
        or begins.ndim != 1
        or sha256s.shape != (len(begins), _DIGEST_BYTES)
    ):
        return {}
    return {int(begin): row.tobytes() for begin, row in zip(begins, sha256s, strict=True)}


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """A file to read.

    Raises:
        CheckpointError: if it cannot be, now or while it is open.
    """
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{path} must be readable, got {error.strerror} while it was compared"
        ) from error


def _sha256(file: FileIO, tensor: StoredTensor, begin: int, end: int, stop: Event) -> bytes:
    """Of some of a tensor's bytes.

    Raises:
        CheckpointError: if they are not there.
    """
    digest = hashlib.sha256()
    file.seek(begin)
    while begin < end and not stop.is_set():
        chunk = file.read(min(_CHUNK_BYTES, end - begin))
        if not chunk:
            raise CheckpointError(
                f"{tensor.path} must hold {end} bytes, got {begin}, while {tensor.name} was "
                "compared; is something still writing it?"
            )
        begin += len(chunk)
        digest.update(chunk)
    return digest.digest()

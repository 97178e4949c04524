"""Which stored tensors of several checkpoints have the same bytes, and who is related by that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llfast import cache
from llfast.checkpoint import Checkpoint
from llfast.errors import CheckpointError
from llfast.safetensors_file import StoredTensor

from .statistics import LoadingStatistics

_ALIGNMENT = 64  # of what a processor's matrix product may look at
_SAMPLE_BYTES = 4096  # of a tensor, which tell most others from it
_CHUNK_BYTES = 8 << 20
_HASHING_THREADS = 4
_LEAST_SHARE = 0.05  # of a checkpoint's bytes: less does not make up for going together
_MOST_FILES = 400  # in one group; each stays open twice

Equals = dict[str, StoredTensor]  # by a tensor's name, that of an earlier checkpoint


def find_equals(
    checkpoints: Sequence[Checkpoint], statistics: LoadingStatistics | None = None
) -> list[Equals]:
    """For each checkpoint the tensors that an earlier one has, too, byte for byte, by that name.

    Tensors of one name, shape and dtype are compared by a few of their bytes, then by their sha256,
    which is remembered by the file's place, size, time of change and inode.

    Args:
        checkpoints: opened ones.
        statistics: told what was read.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    groups = list(_candidates(checkpoints))
    resolved = {path: path.resolve() for each in checkpoints for path in each.weights}
    contents: dict[StoredTensor, object] = {}  # tells what is in a tensor from what is in others
    in_doubt: dict[object, StoredTensor] = {}
    for group in groups:
        by_sample: dict[bytes, list[StoredTensor]] = {}
        for _, tensor in group:
            contents[tensor] = (resolved[tensor.path], tensor.begin)
            by_sample.setdefault(_sample(tensor), []).append(tensor)
        for tie in by_sample.values():
            if len({contents[tensor] for tensor in tie}) > 1:
                in_doubt |= {contents[tensor]: tensor for tensor in tie}
    digests, hashed_bytes = _digests(in_doubt)
    if statistics is not None:
        statistics.compared_bytes += hashed_bytes
    equals: list[Equals] = [{} for _ in checkpoints]
    for group in groups:
        first: dict[object, tuple[int, StoredTensor]] = {}
        for number, tensor in group:
            content = digests.get(contents[tensor], contents[tensor])
            owner, same = first.setdefault(content, (number, tensor))
            if owner != number:
                equals[number][tensor.name] = same
    return equals


def relatives(
    checkpoints: Sequence[Checkpoint], statistics: LoadingStatistics | None = None
) -> list[list[int]]:
    """Numbers of checkpoints that are worth going through together, in groups.

    They are of one architecture, and each shares a twentieth of its bytes with another one of its
    group. Pickled ones are alone.

    Args:
        checkpoints: opened ones.
        statistics: told what was read to find out.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    shapes: dict[object, list[int]] = {}
    for number, checkpoint in enumerate(checkpoints):
        shapes.setdefault(_shape(checkpoint, number), []).append(number)
    groups: list[list[int]] = []
    for numbers in shapes.values():
        related = [checkpoints[number] for number in numbers]
        groups += _by_shared_bytes(related, numbers, statistics)
    return sorted(part for group in groups for part in _parts(group, checkpoints))


def at_place(tensor: Tensor, begin: int) -> Tensor:
    """A tensor as its own file would have it: at an address like its offset there, modulo 64.

    Products of matrices may have other bits where these lie differently.
    """
    there = begin % _ALIGNMENT
    if tensor.numel() == 0 or tensor.data_ptr() % _ALIGNMENT == there or there % tensor.itemsize:
        return tensor
    raw = torch.empty(tensor.nbytes + _ALIGNMENT, dtype=torch.uint8, device=tensor.device)
    first = (there - raw.data_ptr()) % _ALIGNMENT
    moved = raw[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return moved.copy_(tensor)


def in_other_places(sources: Iterable[StoredTensor], equals: Mapping[str, StoredTensor]) -> bool:
    """Whether `at_place` copies any of these, if their equals are read in their stead."""
    return any(
        (source.begin - equals[source.name].begin) % _ALIGNMENT
        for source in sources
        if source.name in equals
    )


def _candidates(
    checkpoints: Sequence[Checkpoint],
) -> Iterable[list[tuple[int, StoredTensor]]]:
    """Tensors that may be equal, with the numbers of their checkpoints."""
    found: dict[tuple[object, ...], list[tuple[int, StoredTensor]]] = {}
    for number, checkpoint in enumerate(checkpoints):
        for tensor in checkpoint.tensors.values():
            if tensor.end > tensor.begin:
                key = (tensor.name, tensor.dtype, tensor.shape)
                found.setdefault(key, []).append((number, tensor))
    return (each for each in found.values() if len(each) > 1)


def _sample(tensor: StoredTensor) -> bytes:
    """Some bytes from the middle."""
    begin = max((tensor.begin + tensor.end - _SAMPLE_BYTES) // 2, tensor.begin)
    return b"".join(_chunks(tensor, begin, min(begin + _SAMPLE_BYTES, tensor.end)))


def _digests(tensors: Mapping[object, StoredTensor]) -> tuple[dict[object, object], int]:
    """The sha256 of each tensor, and how many bytes were read to know."""
    by_file: dict[Path, list[tuple[object, StoredTensor]]] = {}
    for place, tensor in tensors.items():
        by_file.setdefault(tensor.path, []).append((place, tensor))
    found: dict[object, object] = {}
    hashed_bytes = 0
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        for digests, nbytes in threads.map(_file_digests, by_file.values()):
            found |= digests
            hashed_bytes += nbytes
    return found, hashed_bytes


def _file_digests(
    tensors: Sequence[tuple[object, StoredTensor]],
) -> tuple[dict[object, object], int]:
    """The same, of one file; what was known before is not read again."""
    path = tensors[0][1].path
    name, is_settled = cache.file_key("tensors", path)
    arrays = cache.load_arrays(name) or {}
    known = dict(zip(arrays.get("begins", ()), map(str, arrays.get("sha256s", ())), strict=False))
    hashed_bytes = 0
    for _, tensor in tensors:
        if tensor.begin not in known:
            digest = hashlib.sha256()
            for chunk in _chunks(tensor, tensor.begin, tensor.end):
                digest.update(chunk)
            known[tensor.begin] = digest.hexdigest()
            hashed_bytes += tensor.end - tensor.begin
    if is_settled and hashed_bytes:
        begins, sha256s = np.array(list(known)), np.array(list(known.values()))
        cache.save_arrays(name, begins=begins, sha256s=sha256s)
    return {place: known[tensor.begin] for place, tensor in tensors}, hashed_bytes


def _chunks(tensor: StoredTensor, begin: int, end: int) -> Iterator[bytes]:
    """Bytes of a tensor's file.

    Raises:
        CheckpointError: if they are not there.
    """
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(begin)
            while begin < end:
                chunk = file.read(min(_CHUNK_BYTES, end - begin))
                if not chunk:
                    raise CheckpointError(
                        f"{tensor.path} must hold {end} bytes, got {begin}, while {tensor.name} "
                        "was read; is something still writing it?"
                    )
                begin += len(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(
            f"{tensor.path} must be readable, got {error.strerror} while {tensor.name} was read"
        ) from error


def _shape(checkpoint: Checkpoint, number: int) -> object:
    """What relatives have in common; how many words they know may differ."""
    if checkpoint.pickled:
        return number
    tensors = checkpoint.tensors.values()
    shapes = frozenset((each.name, each.dtype, each.shape[1:]) for each in tensors)
    return checkpoint.config.get("model_type"), shapes


def _by_shared_bytes(
    checkpoints: Sequence[Checkpoint],
    numbers: Sequence[int],
    statistics: LoadingStatistics | None,
) -> Iterable[list[int]]:
    """Cut checkpoints of one shape into groups that share bytes."""
    owners: dict[StoredTensor, int] = {}
    for place, checkpoint in enumerate(checkpoints):
        for tensor in checkpoint.tensors.values():
            owners.setdefault(tensor, place)
    groups = {place: [place] for place in range(len(checkpoints))}
    for place, equals in enumerate(find_equals(checkpoints, statistics)):
        shared: dict[int, int] = {}
        for tensor in equals.values():
            owner = owners[tensor]
            shared[owner] = shared.get(owner, 0) + tensor.end - tensor.begin
        for owner, nbytes in shared.items():
            joined, own = groups[owner], groups[place]
            if nbytes >= _LEAST_SHARE * checkpoints[place].weight_bytes and joined is not own:
                joined += own
                groups |= dict.fromkeys(own, joined)
    unique = {id(group): group for group in groups.values()}
    return [sorted(numbers[place] for place in group) for group in unique.values()]


def _parts(group: Sequence[int], checkpoints: Sequence[Checkpoint]) -> Iterator[list[int]]:
    """A group in parts that do not open too many files."""
    part: list[int] = []
    files = 0
    for number in group:
        count = len(checkpoints[number].weights)
        if part and files + count > _MOST_FILES:
            yield part
            part, files = [], 0
        part.append(number)
        files += count
    yield part

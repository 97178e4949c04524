"""Which stored tensors of several checkpoints have the same bytes, and who is related by that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llfast.checkpoint import Checkpoint
from llfast.safetensors_file import StoredTensor

from .comparing import Contents, contents_of
from .statistics import LoadingStatistics

_ALIGNMENT = 64  # of what a processor's matrix product may look at
_LEAST_SHARE = 0.05  # of a checkpoint's bytes: less does not make up for going together
_MOST_FILES = 400  # in one group; each stays open twice

Equals = dict[str, StoredTensor]  # by a tensor's name, that of an earlier checkpoint


@dataclass(frozen=True, slots=True)
class Relatives:
    """Checkpoints that are worth going through together; one alone has nothing in common.

    Attributes:
        numbers: which ones.
        equals: of each, the tensors that an earlier one of them has, too.
    """

    numbers: tuple[int, ...]
    equals: tuple[Equals, ...]

    @classmethod
    def alone(cls, number: int) -> Relatives:
        """One without relatives."""
        return cls((number,), ({},))

    def among(self, numbers: Sequence[int]) -> Relatives:
        """The same, where its numbers are places in these."""
        return Relatives(tuple(numbers[place] for place in self.numbers), self.equals)


def relatives(checkpoints: Sequence[Checkpoint], statistics: LoadingStatistics) -> list[Relatives]:
    """All checkpoints, in groups that are worth going through together.

    Those of a group are of one architecture, and each shares a twentieth of its bytes with another
    one. Pickled ones are alone. Tensors of one name, shape and dtype are compared by a few of their
    bytes, then by their sha256, which is remembered by the file's place, size, time of change and
    inode.

    Args:
        checkpoints: opened ones.
        statistics: told what was read to find out.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    shapes: dict[object, list[int]] = {}
    for number, checkpoint in enumerate(checkpoints):
        shapes.setdefault(_shape(checkpoint, number), []).append(number)
    found: list[Relatives] = []
    for numbers in shapes.values():
        related = [checkpoints[number] for number in numbers]
        contents = contents_of(related, statistics)
        for group in _by_shared_bytes(related, contents):
            for part in _parts(group, related):
                equals = tuple(_equals(related, contents, part))
                found.append(Relatives(tuple(part), equals).among(numbers))
    return sorted(found, key=lambda group: group.numbers)


def at_place(tensor: Tensor, begin: int) -> Tensor:
    """A tensor as its own file would have it: at an address like its offset there, modulo 64.

    Products of matrices may have other bits where these lie differently. On a GPU tensors stay:
    there they lie on whole addresses wherever their file has them, for one model as for several.
    """
    if tensor.device.type != "cpu":
        return tensor
    there = begin % _ALIGNMENT
    if there % tensor.itemsize:  # its own file would not have it there, but a copy of it
        there = 0
    if tensor.numel() == 0 or tensor.data_ptr() % _ALIGNMENT == there:
        return tensor
    raw = torch.empty(tensor.nbytes + _ALIGNMENT, dtype=torch.uint8, device=tensor.device)
    first = (there - raw.data_ptr()) % _ALIGNMENT
    moved = raw[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return moved.copy_(tensor)


def in_other_places(
    sources: Iterable[StoredTensor], equals: Mapping[str, StoredTensor], device: torch.device
) -> bool:
    """Whether `at_place` copies any of these, if their equals are read in their stead."""
    return device.type == "cpu" and any(
        (source.begin - equals[source.name].begin) % _ALIGNMENT
        for source in sources
        if source.name in equals
    )


def _equals(
    checkpoints: Sequence[Checkpoint], contents: Contents, numbers: Iterable[int]
) -> list[Equals]:
    """Of each of these checkpoints, what an earlier one of them has, too."""
    first: dict[object, tuple[int, StoredTensor]] = {}
    found = []
    for number in numbers:
        equals: Equals = {}
        for name, content in contents[number].items():
            tensor = checkpoints[number].tensors[name]
            owner, same = first.setdefault((name, content), (number, tensor))
            if owner != number:
                equals[name] = same
        found.append(equals)
    return found


def _shape(checkpoint: Checkpoint, number: int) -> object:
    """What relatives have in common; how many words they know may differ."""
    if checkpoint.pickled:
        return number
    tensors = checkpoint.tensors.values()
    shapes = frozenset((each.name, each.dtype, each.shape[1:]) for each in tensors)
    return checkpoint.config.get("model_type"), shapes


def _by_shared_bytes(checkpoints: Sequence[Checkpoint], contents: Contents) -> list[list[int]]:
    """Cut checkpoints of one shape into groups that share bytes."""
    owners: dict[StoredTensor, int] = {}
    for number, checkpoint in enumerate(checkpoints):
        for tensor in checkpoint.tensors.values():
            owners.setdefault(tensor, number)
    groups = {number: [number] for number in range(len(checkpoints))}
    for number, equals in enumerate(_equals(checkpoints, contents, range(len(checkpoints)))):
        shared: dict[int, int] = {}
        for tensor in equals.values():
            owner = owners[tensor]
            shared[owner] = shared.get(owner, 0) + tensor.end - tensor.begin
        for owner, nbytes in shared.items():
            joined, own = groups[owner], groups[number]
            if nbytes >= _LEAST_SHARE * checkpoints[number].weight_bytes and joined is not own:
                joined += own
                groups |= dict.fromkeys(own, joined)
    unique = {id(group): group for group in groups.values()}
    return [sorted(group) for group in unique.values()]


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

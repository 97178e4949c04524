"""A weight that several stored tensors make up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from llfast.errors import CheckpointError
from llfast.safetensors_file import StoredTensor, short

DTYPES_OF_SCALES = frozenset({"F32", "BF16", "F16"})


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight that is made of a tensor of small numbers and others that scale them.

    Attributes:
        name: what a plain checkpoint calls it.
        shape: its sizes there.
        parts: what it is made of: the small numbers, their scales, and more.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]

    @property
    def parameters(self) -> int:
        """Numbers; scales are none."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> str:
        """What the small numbers are stored in."""
        return self.parts[0].dtype


@dataclass(frozen=True, slots=True)
class Fp8Weight(QuantisedWeight):
    """Of transformers' fp8.

    Attributes:
        block: rows and columns of a matrix that share a scale; the last ones may be fewer.
    """

    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class CompressedWeight(QuantisedWeight):
    """Of compressed-tensors.

    Attributes:
        format: its name for how they are stored.
        scheme: its settings of one group, as the config has them.
    """

    format: str
    scheme: dict[str, object]


def refuse(tensor: StoredTensor, rule: str, got: str) -> NoReturn:
    """Refuse a stored tensor.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"{tensor.path}'s {short(tensor.name)} must {rule}, got {got}; download or save it again"
    )

"""How far checkpoints of one shape are from each other in the space of their weights.

    a piece of a tensor, of all checkpoints, in fp64 ─▶ differences of pairs, squared and added up

No model is ever held whole. Differences are explicit, for ‖x‖² + ‖y‖² - 2xy would cancel for
checkpoints that are close.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Float64

from .checkpoint import Checkpoint
from .errors import CheckpointError, UnsupportedModelError
from .safetensors_file import StoredTensor, short

_PIECE_BYTES = 64 << 20  # in fp64, of all checkpoints together
_BLOCK_VALUES = 1 << 17  # differences worked on at once: 1 MiB, which stays in a core's cache
_STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
_NO_WEIGHTS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}  # but buffers


def squared_weight_distances(
    checkpoints: Sequence[Checkpoint], pairs: Iterable[tuple[int, int]] | None = None
) -> Float64[np.ndarray, "K K"]:
    """Squared Euclidean distances between the weights of K checkpoints, added up in fp64.

    Weights are the stored tensors of floating numbers; buffers of integers are left out. Where all
    checkpoints have the same infinity, as in a mask, they do not differ. Files are read once, a
    piece of a tensor at a time, of which all checkpoints together take 64 MiB.

    Args:
        checkpoints: opened ones; each may be stored in a dtype of its own.
        pairs: the places in `checkpoints` of those to compare; None for all.

    Returns: a symmetric matrix with 0 on its diagonal; NaN for pairs that were not asked for.

    Raises:
        ValueError: if there are fewer than two, or a pair is of none of them.
        CheckpointError: if names or shapes of weights differ, one is not finite, or a file is not
            what it was when it was opened.
        UnsupportedModelError: if weights are quantised or pickled.
    """
    weights = comparable_weights(checkpoints)
    k = len(checkpoints)
    partners = _partners(k, pairs)
    sums = {first: np.zeros(len(others)) for first, others in partners.items()}
    step = max(1, _BLOCK_VALUES // max(map(len, partners.values()), default=1))
    for stored in weights:
        for piece in _pieces(stored):
            for start in range(0, piece.shape[1], step):
                block = piece[:, start : start + step]
                for first, others in partners.items():
                    differences = block[others]
                    differences -= block[first]
                    sums[first] += np.einsum("ij,ij->i", differences, differences)
    for checkpoint in checkpoints:
        checkpoint.refuse_changes()
    distances = np.full((k, k), np.nan)
    np.fill_diagonal(distances, 0.0)
    for first, others in partners.items():
        distances[first, others] = distances[others, first] = sums[first]
    return distances


def comparable_weights(checkpoints: Sequence[Checkpoint]) -> list[tuple[StoredTensor, ...]]:
    """Each weight as all of some checkpoints store it; nothing of it is read yet.

    Raises: as `squared_weight_distances` says.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"checkpoints must be at least two, got {len(checkpoints)}")
    weights = [_weights(each) for each in checkpoints]
    first = weights[0]
    for checkpoint, others in zip(checkpoints[1:], weights[1:], strict=True):
        for name in [*first, *others]:
            wanted, got = (
                str(list(each[name].shape)) if name in each else "none" for each in (first, others)
            )
            if got != wanted:
                raise CheckpointError(
                    f"{checkpoint.folder} must hold weights of the names and shapes of "
                    f"{checkpoints[0].folder} to be compared with it, got {got} for "
                    f"{short(name)}, where that has {wanted}"
                )
    return [tuple(each[name] for each in weights) for name in first]


def _weights(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    what = "pickled" if checkpoint.pickled else checkpoint.quantised
    if what:
        raise UnsupportedModelError(
            f"{checkpoint.folder} must hold plain .safetensors weights for distances between "
            f"weights, got {what} ones; leave these distances out (--no-weights)"
        )
    found = {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in _STORED:
            found[name] = tensor
        elif tensor.dtype not in _NO_WEIGHTS:
            raise UnsupportedModelError(
                f"{tensor.path} must hold weights in {', '.join(_STORED)} for distances between "
                f"weights, got {short(name)} in {tensor.dtype}"
            )
    return found


def _partners(k: int, pairs: Iterable[tuple[int, int]] | None) -> dict[int, list[int]]:
    """Of each place, those after it that it is compared with."""
    found: dict[int, set[int]] = {}
    for pair in itertools.combinations(range(k), 2) if pairs is None else pairs:
        low, high = min(pair), max(pair)
        if low < 0 or high >= k:
            raise ValueError(f"pairs must be of places in {k} checkpoints, got {pair}")
        if low < high:
            found.setdefault(low, set()).add(high)
    return {low: sorted(highs) for low, highs in found.items()}


def _pieces(stored: Sequence[StoredTensor]) -> Iterator[Float64[np.ndarray, "K n"]]:
    """One tensor of all checkpoints, from its first number to its last."""
    count = stored[0].parameters
    most = max(1, _PIECE_BYTES // (8 * len(stored)))
    for start in range(0, count, most):
        piece = np.empty((len(stored), min(most, count - start)))
        for row, tensor in zip(piece, stored, strict=True):
            row[:] = _read(tensor, start, len(row))
        odd = ~np.isfinite(piece).all(axis=0)
        if odd.any():
            _refuse_unlike(piece[:, odd], stored)
            piece[:, odd] = 0.0
        yield piece


def _read(tensor: StoredTensor, start: int, count: int) -> Float[np.ndarray, " n"]:
    kind = np.dtype(_STORED[tensor.dtype])
    offset = tensor.begin + start * kind.itemsize
    values = np.fromfile(tensor.path, kind, count, offset=offset)
    if len(values) < count:
        raise CheckpointError(
            f"{tensor.path} must hold {short(tensor.name)} whole, got its end before that; is "
            "something still writing it?"
        )
    if tensor.dtype == "BF16":  # the upper half of fp32
        values = (values.astype("<u4") << 16).view("<f4")
    return values


def _refuse_unlike(values: Float64[np.ndarray, "K n"], stored: Sequence[StoredTensor]) -> None:
    """Refuse what is not finite, unless all checkpoints have the same infinity there."""
    if (values == values[0]).all():  # which no NaN is
        return
    row = int(np.argmin(np.isfinite(values).all(axis=1)))
    raise CheckpointError(
        f"{stored[row].path} must hold finite weights for distances between them, got NaN or inf "
        f"in {short(stored[row].name)}"
    )

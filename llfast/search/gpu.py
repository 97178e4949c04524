"""The nearest rows by faiss on a GPU, in fp32, and how far their squared distances can be off.

A GPU multiplies matrices, ‖x - y‖² = ‖x‖² + ‖y‖² - 2 x·y, so that errors are as large as the norms
make them. They are bounded; what may be near is compared again on the CPU. On a GPU faiss has no
search by radius, and at most 2,048 answers to a question: the CPU does these.
"""

from __future__ import annotations

import math
import os
import warnings
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from llfast.errors import LlfastWarning

from .flat import import_faiss

MOST_ANSWERS = 2048
_LEAST_BYTES = 64 << 20  # of points: fewer are read by a CPU while a GPU is asked
_SPARE_BYTES = 1 << 30  # of a GPU's memory, for faiss' own use and others'
_SCRATCH_BYTES = 256 << 20
_CHECKED = 16  # rows whose distances are compared with fp64 when they have been copied
_TF32 = "NVIDIA_TF32_OVERRIDE"  # "1" has GPUs round factors to 10 bits, which faiss never asks for


class GpuRows:
    """Rows on a GPU."""

    def __init__(self, index: Any, resources: Any) -> None:
        """Use `copied`."""
        self._index, self._resources = index, resources  # it uses them as long as it lives
        self._process = os.getpid()
        self._lock = Lock()  # faiss' GPU indexes are for one thread at a time

    def near(
        self, queries: Float32[np.ndarray, "Q N"], count: int
    ) -> tuple[Float32[np.ndarray, "Q C"], Int64[np.ndarray, "Q C"]] | None:
        """The `count` nearest rows: squared distances as the GPU finds them, and their numbers.

        All others are at least as far as the last, as the GPU finds them; see `gpu_reach`.

        Returns: None after a fork, which CUDA does not outlive, and once the GPU has failed.
        Warns: LlfastWarning when it fails.
        """
        with self._lock:
            if self._process != os.getpid():
                return None
            try:
                squares, numbers = self._index.search(queries, count)
            except RuntimeError as error:  # as faiss says that there is no memory, and more
                self._process = -1
                _warn(_first_line(error))
                return None
        return squares, numbers


def gpu_reach(distance: float, dimensions: int, norms: float, slack: float) -> float:
    """The largest square that a GPU can find for points at most `distance` apart.

    Each of the two norms and the product is a sum of D products in fp32, off by at most g / (1 - g)
    of the sum of their absolute values, with g = (D + 8) u (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1), u being half of fp32's epsilon; all of these together are
    no more than the square of both norms' sum. Points were rounded to fp32 before, see `reach`.

    Args:
        distance: between the points as they are.
        dimensions: D of the rows.
        norms: the query's norm, and the largest of the rows'.
        slack: what else may be between `distance` and the points.
    """
    eps = float(np.finfo(np.float32).eps)
    share = (dimensions + 8) * eps / 2
    if share >= 0.5:
        return math.inf
    moved = distance + slack + eps * norms
    underflow = 3 * dimensions * float(np.finfo(np.float32).tiny)
    return (moved * moved + share / (1 - share) * norms * norms) * (1 + 1e-6) + underflow


def copied(points: Float32[np.ndarray, "K N"]) -> GpuRows | None:
    """Rows on the GPU, which should have room.

    Returns: None if it has none after all, or distances are off by more than can be.

    Warns: LlfastWarning then.
    """
    try:
        index, resources = _make_index(points.shape[1])
        index.add(points)  # at once: each further call would have the GPU hold all of it twice
        rows = GpuRows(index, resources)
    except RuntimeError as error:
        _warn(_first_line(error))
        return None
    is_right = _is_right(rows, points)
    if is_right is False:
        _warn("its distances are farther from those in fp64 than rounding explains")
    return rows if is_right else None


def has_room(nbytes: int) -> bool:
    """Whether so many bytes are worth it, and there is a GPU of faiss' with room for them."""
    faiss = import_faiss()
    if nbytes < _LEAST_BYTES or not hasattr(faiss, "StandardGpuResources"):
        return False
    if faiss.get_num_gpus() < 1 or os.environ.get(_TF32) == "1":
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.mem_get_info(0)[0] > nbytes + _SPARE_BYTES


def _make_index(dimensions: int) -> tuple[Any, Any]:
    faiss = import_faiss()
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_SCRATCH_BYTES)
    return faiss.GpuIndexFlatL2(resources, dimensions), resources


def _warn(reason: str) -> None:
    warnings.warn(f"searches go on without the GPU: {reason}", LlfastWarning, stacklevel=7)


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or ["it failed"])[0][:200]


def _is_right(rows: GpuRows, points: Float32[np.ndarray, "K N"]) -> bool | None:
    """Whether squares of some rows are what fp64 says, and rows come in order; None if it fails."""
    asked = np.linspace(0, len(points) - 1, _CHECKED).astype(int)
    count = min(len(points), MOST_ANSWERS // 16)
    near = rows.near(np.ascontiguousarray(points[asked]), count)
    if near is None:
        return None
    squares, numbers = near
    for row, found, nearest in zip(asked, squares, numbers, strict=True):
        some = points[nearest].astype(np.float64)
        point = points[row].astype(np.float64)
        truth = np.square(some - point).sum(axis=1)
        norms = np.linalg.norm(point) + np.linalg.norm(some, axis=1)
        limits = [gpu_reach(0.0, points.shape[1], each, 0.0) for each in norms.tolist()]
        if (np.abs(found - truth) > np.array(limits)).any() or (np.diff(found) < 0).any():
            return False
    return True

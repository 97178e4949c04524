"""Which kernels serve a device, and the whole way from hidden states to statistics."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch

from llfast.errors import LlfastWarning

from . import cpu, cuda, reference
from .inputs import HeadInputs
from .sums import PartialSums, TokenStatistics


@runtime_checkable
class Kernels(Protocol):
    """What `cpu.py`, `cuda.py` and `reference.py` offer."""

    def name(self, device: torch.device, /) -> str:
        """What computes on a device: an instruction set, "triton sm_90", or "torch"."""

    def rows_of_a_slice(self, inputs: HeadInputs) -> int:
        """How many tokens' partial sums to hold at once."""

    def partial_sums(self, inputs: HeadInputs, rows: slice) -> PartialSums:
        """The partial sums of each group of words, (groups, rows)."""

    def fold(self, parts: PartialSums, total: PartialSums | None = None) -> PartialSums:
        """The parts folded left to right, (1, T), onto the sums (1, T) of all to their left."""

    def write_statistics(self, total: PartialSums, found: TokenStatistics) -> None:
        """Fill `found` (T,) with the statistics of sums (1, T)."""


def kernels_of(device: torch.device) -> Kernels:
    """C++ on a CPU, Triton on CUDA, and the plain-torch twin, with a warning, for all others."""
    if device.type == "cpu":
        return reference if cpu.native() is None else cpu
    reason = cuda.why_unusable(device)
    if reason is None:
        return cuda
    _warn_of_the_twin(device.type, reason)
    return reference


@functools.cache
def _warn_of_the_twin(device_type: str, reason: str) -> None:
    warnings.warn(
        f"llfast's fused kernels do not run on {device_type} here ({reason}), so a slow torch "
        "version runs in their place",
        LlfastWarning,
        stacklevel=2,
    )


def folded_sums(kernels: Kernels, inputs: HeadInputs) -> PartialSums:
    """The sums of all tokens over all words given, (1, T), made a slice of the tokens at a time."""
    return _side_by_side(
        kernels.fold(kernels.partial_sums(inputs, rows)) for rows in _slices(kernels, inputs)
    )


def group_sums(kernels: Kernels, inputs: HeadInputs) -> PartialSums:
    """The sums of all tokens over each group of words, (groups, T), made in such slices, too."""
    return _side_by_side(kernels.partial_sums(inputs, rows) for rows in _slices(kernels, inputs))


def statistics(kernels: Kernels, total: PartialSums) -> TokenStatistics:
    """The statistics (T,) of sums (1, T)."""
    found = TokenStatistics.empty(total.shape[1], total.max.device)
    kernels.write_statistics(total, found)
    return found


def _slices(kernels: Kernels, inputs: HeadInputs) -> Iterator[slice]:
    tokens = inputs.hidden.shape[0]
    step = kernels.rows_of_a_slice(inputs)
    for begin in range(0, tokens, step) or [0]:
        yield slice(begin, min(begin + step, tokens))


def _side_by_side(sums: Iterator[PartialSums]) -> PartialSums:
    found = list(sums)
    return found[0] if len(found) == 1 else PartialSums.joined(*found, dim=1)

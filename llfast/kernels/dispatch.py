"""Which kernels serve a device, and the whole way from hidden states to statistics."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from . import cpu, reference
from .inputs import HeadInputs
from .sums import PartialSums, TokenStatistics


@runtime_checkable
class Kernels(Protocol):
    """What `cpu.py` and `reference.py` offer."""

    def name(self) -> str:
        """What computes: an instruction set, or "torch"."""

    def rows_of_a_slice(self, inputs: HeadInputs) -> int:
        """How many tokens' partial sums to hold at once."""

    def partial_sums(self, inputs: HeadInputs, rows: slice) -> PartialSums:
        """The partial sums of each group of words, (groups, rows)."""

    def fold(self, total: PartialSums, parts: PartialSums) -> PartialSums:
        """Sums (1, T) with the parts to their right folded in, left to right."""

    def write_statistics(self, total: PartialSums, found: TokenStatistics) -> None:
        """Fill `found` (T,) with the statistics of sums (1, T)."""


def kernels_of(device: torch.device) -> Kernels:
    """C++ on a CPU where it was built, the plain-torch twin elsewhere."""
    return cpu if device.type == "cpu" and cpu.native() is not None else reference


def folded_sums(kernels: Kernels, inputs: HeadInputs) -> PartialSums:
    """The sums of all tokens over all words given, (1, T), made a slice of the tokens at a time."""
    tokens, device = len(inputs.hidden), inputs.hidden.device
    step = kernels.rows_of_a_slice(inputs)
    slices = []
    for begin in range(0, tokens, step) or [0]:
        rows = slice(begin, min(begin + step, tokens))
        parts = kernels.partial_sums(inputs, rows)
        none = PartialSums.neutral(1, rows.stop - begin, device)
        slices.append(kernels.fold(none, parts))
    return slices[0] if len(slices) == 1 else PartialSums.joined(*slices, dim=1)


def statistics(kernels: Kernels, total: PartialSums) -> TokenStatistics:
    """The statistics (T,) of sums (1, T)."""
    found = TokenStatistics.empty(total.shape[1], total.max.device)
    kernels.write_statistics(total, found)
    return found

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


def all_statistics(kernels: Kernels, inputs: HeadInputs) -> TokenStatistics:
    """The statistics of all tokens, a slice of them at a time; slices change no bit."""
    tokens, device = len(inputs.hidden), inputs.hidden.device
    found = TokenStatistics.empty(tokens, device)
    step = kernels.rows_of_a_slice(inputs)
    for begin in range(0, tokens, step):
        rows = slice(begin, min(begin + step, tokens))
        parts = kernels.partial_sums(inputs, rows)
        total = kernels.fold(PartialSums.neutral(1, rows.stop - begin, device), parts)
        kernels.write_statistics(total, found.rows(rows))
    return found

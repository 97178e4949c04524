"""Log-probabilities of a head that comes in slices: paged in tiles, or sharded by rows."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from .dispatch import Kernels, folded_sums, group_sums, kernels_of, statistics
from .inputs import GROUP, HeadInputs
from .sums import PartialSums, TokenStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialLogprobs:
    """What the words [first_word, end_word) add to the softmax of T tokens.

    However a head is cut, and in whatever order the slices are merged, the whole has the bits that
    the C++ and the Triton kernels give in one call for the whole head: groups of 1,024 words are
    folded from left to right only, and kept apart (20 bytes a token and group) until all that lies
    to their left is there. The plain-torch twin promises no bits: its products depend on how much
    it is given.
    """

    first_word: int
    end_word: int
    kernel: str  # what computed it
    sums: PartialSums  # (1, T), folded, if first_word is 0; else (groups, T)

    def __post_init__(self) -> None:
        groups = -(-(self.end_word - self.first_word) // GROUP)
        parts = 1 if self.first_word == 0 else groups
        if self.first_word % GROUP or groups < 1 or self.sums.shape[0] != parts:
            raise ValueError(
                f"sums must have {parts} parts for the words [{self.first_word}, {self.end_word}), "
                f"got {self.sums.shape[0]}; take them as of_slice or merge gave them"
            )

    @staticmethod
    def of_slice(
        hidden: Float[Tensor, "T D"],
        lm_head: Float[Tensor, "V D"],
        targets: Int[Tensor, " T"],
        *,
        first_word: int,
        bias: Float[Tensor, " V"] | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> PartialLogprobs:
        """Compute those of some rows of a head.

        Args:
            hidden: as for `token_logprobs`.
            lm_head: the rows of the slice.
            targets: ids in the whole vocabulary; they need not lie in the slice.
            first_word: the id of the slice's first row, a multiple of 1,024.
            bias: of the slice's rows.
            scale: as for `token_logprobs`.
            softcap: as for `token_logprobs`.

        Raises:
            TypeError: as `token_logprobs`, or if `first_word` is no whole number.
            ValueError: as `token_logprobs`, or if `first_word` is not a multiple of 1,024.
        """
        first_word = operator.index(first_word)
        inputs = HeadInputs(
            hidden=hidden.resolve_neg(),
            lm_head=lm_head.resolve_neg(),
            targets=targets,
            bias=None if bias is None else bias.resolve_neg(),
            scale=float(scale),
            softcap=None if softcap is None else float(softcap),
            first_word=first_word,
        )
        inputs.check_targets()
        kernels = kernels_of(hidden.device)
        sums = (folded_sums if first_word == 0 else group_sums)(kernels, inputs)
        end = first_word + len(lm_head)
        return PartialLogprobs(
            first_word=first_word, end_word=end, kernel=kernels.name(hidden.device), sums=sums
        )

    def merge(self, other: PartialLogprobs) -> PartialLogprobs:
        """Both slices as one; either may be the left one.

        Raises: ValueError if they are not neighbours, or not of the same tokens, device and kernel.
        """
        left, right = (self, other) if self.first_word <= other.first_word else (other, self)
        if left.end_word != right.first_word or left.end_word % GROUP:
            raise ValueError(
                f"slices must be neighbours, cut at a multiple of {GROUP}, got words "
                f"[{left.first_word}, {left.end_word}) and [{right.first_word}, {right.end_word}); "
                "merge what lies between them first"
            )
        if left.kernel != right.kernel or left.sums.max.device != right.sums.max.device:
            raise ValueError(
                f"slices must be computed alike, got {left.kernel} on {left.sums.max.device} and "
                f"{right.kernel} on {right.sums.max.device}; compute both on one device"
            )
        if left.sums.shape[1] != right.sums.shape[1]:
            raise ValueError(
                f"slices must be of the same tokens, got {left.sums.shape[1]} and "
                f"{right.sums.shape[1]}; use the same hidden states for both"
            )
        if left.first_word == 0:
            sums = self._kernels().fold(right.sums, left.sums)
        else:
            sums = PartialSums.joined(left.sums, right.sums)
        return PartialLogprobs(
            first_word=left.first_word, end_word=right.end_word, kernel=left.kernel, sums=sums
        )

    def to(self, device: torch.device | str) -> PartialLogprobs:
        """The same on another device, for slices that were computed on several."""
        return replace(self, sums=self.sums.to(torch.device(device)))

    def statistics(self) -> TokenStatistics:
        """The statistics of a softmax over the words of this slice alone.

        They are those of the model once all slices are merged. A token whose target lies in none of
        them has a logprob of -inf.

        Raises: ValueError if other kernels run now than those that computed this.
        """
        return statistics(self._kernels(), self.folded())

    def logprobs(self) -> Float32[Tensor, " T"]:
        """Of the targets, in nats; see `statistics`."""
        return self.statistics().logprobs

    def folded(self) -> PartialSums:
        """The slice's own sums as one part, (1, T)."""
        if self.first_word == 0:
            return self.sums
        return self._kernels().fold(self.sums)

    def _kernels(self) -> Kernels:
        device = self.sums.max.device
        kernels = kernels_of(device)
        if kernels.name(device) != self.kernel:
            raise ValueError(
                f"sums must be folded by the kernels that computed them, {self.kernel}, got "
                f"{kernels.name(device)}; LLFAST_ISA chooses a CPU's instruction set"
            )
        return kernels

"""What kernels return: partial sums of a softmax, and the statistics that come of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

PARTIAL_BYTES = 20  # of one row and part


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialSums:
    """The softmax of T rows of logits z, each seen through the words of one part.

    Natural units, fp32. A part without any word but those ruled out has a maximum of -inf.
    """

    max: Float32[Tensor, "parts T"]  # m, the largest logit
    sum: Float32[Tensor, "parts T"]  # of e^(z - m)
    weighted_sum: Float32[Tensor, "parts T"]  # of e^(z - m) (z - m)
    target_logits: Float32[Tensor, "parts T"]  # -inf where the target is in another part
    argmax: Int32[Tensor, "parts T"]  # the id of the first of the largest

    @staticmethod
    def neutral(parts: int, tokens: int, device: torch.device) -> PartialSums:
        """Parts without words: folding them into others changes no bit."""
        shape = (parts, tokens)
        return PartialSums(
            max=torch.full(shape, -math.inf, device=device),
            sum=torch.zeros(shape, device=device),
            weighted_sum=torch.zeros(shape, device=device),
            target_logits=torch.full(shape, -math.inf, device=device),
            argmax=torch.zeros(shape, dtype=torch.int32, device=device),
        )

    @staticmethod
    def joined(*several: PartialSums, dim: int = 0) -> PartialSums:
        """The parts of all, side by side; with `dim=1` the tokens of all."""
        return PartialSums(
            **{
                field.name: torch.cat([getattr(each, field.name) for each in several], dim)
                for field in fields(PartialSums)
            }
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(parts, T)."""
        parts, tokens = self.max.shape
        return parts, tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """What the softmax over the vocabulary says of each token; `lse` and `entropy` in nats.

    `argmax` is the first of the likeliest words; it means nothing where `lse` is NaN.
    """

    logprobs: Float32[Tensor, " T"]  # of the target
    lse: Float32[Tensor, " T"]  # log of the sum of e^z
    target_logits: Float32[Tensor, " T"]
    entropy: Float32[Tensor, " T"]
    argmax: Int64[Tensor, " T"]

    @staticmethod
    def empty(tokens: int, device: torch.device) -> TokenStatistics:
        """Room for the statistics of T tokens."""
        names = ("logprobs", "lse", "target_logits", "entropy")
        return TokenStatistics(
            **{name: torch.empty(tokens, device=device) for name in names},
            argmax=torch.empty(tokens, dtype=torch.int64, device=device),
        )

    def rows(self, rows: slice) -> TokenStatistics:
        """Views of some tokens' statistics."""
        return TokenStatistics(
            **{field.name: getattr(self, field.name)[rows] for field in fields(TokenStatistics)}
        )

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

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            array = getattr(self, name)
            dtype = torch.int32 if name == "argmax" else torch.float32
            if (
                array.dtype != dtype
                or array.ndim != 2
                or array.shape != self.max.shape
                or array.device != self.max.device
                or not array.is_contiguous()
            ):
                raise ValueError(
                    f"{name} must be {dtype} of shape (parts, T), contiguous and with the others, "
                    f"got {array.dtype} {tuple(array.shape)} on {array.device} beside "
                    f"{tuple(self.max.shape)} on {self.max.device}; take sums as kernels gave them"
                )

    @staticmethod
    def empty(parts: int, tokens: int, device: torch.device) -> PartialSums:
        """Room for sums."""
        # Neither dtype nor device may follow torch's defaults.
        largest, total, weighted, target = torch.empty(
            (4, parts, tokens), dtype=torch.float32, device=device
        ).unbind()
        argmax = torch.empty((parts, tokens), dtype=torch.int32, device=device)
        return PartialSums(
            max=largest, sum=total, weighted_sum=weighted, target_logits=target, argmax=argmax
        )

    @staticmethod
    def neutral(tokens: int, device: torch.device) -> PartialSums:
        """A part without words: folding it into others changes no bit."""
        sums = PartialSums.empty(1, tokens, device)
        sums.max.fill_(-math.inf)
        sums.sum.zero_()
        sums.weighted_sum.zero_()
        sums.target_logits.fill_(-math.inf)
        sums.argmax.zero_()
        return sums

    @staticmethod
    def joined(*several: PartialSums, dim: int = 0) -> PartialSums:
        """The parts of all, side by side; with `dim=1` the tokens of all."""
        return PartialSums(
            **{
                field.name: torch.cat([getattr(each, field.name) for each in several], dim)
                for field in fields(PartialSums)
            }
        )

    def to(self, device: torch.device) -> PartialSums:
        """The same sums on another device."""
        return PartialSums(
            **{field.name: getattr(self, field.name).to(device) for field in fields(PartialSums)}
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
        """Room for the statistics of T tokens, each in memory of its own."""

        def room(dtype: torch.dtype) -> Tensor:
            return torch.empty(tokens, dtype=dtype, device=device)

        return TokenStatistics(
            logprobs=room(torch.float32),
            lse=room(torch.float32),
            target_logits=room(torch.float32),
            entropy=room(torch.float32),
            argmax=room(torch.int64),
        )

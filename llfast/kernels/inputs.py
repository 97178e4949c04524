"""What every kernel is given: one value, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The vocabulary is cut at multiples of this, and nowhere else, so that partial sums can be folded
# in one order.
GROUP = 1024
LAST_WORD = 2**31 - GROUP - 1  # ids are int32, those of padding to a group included

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FP32 = torch.finfo(torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs:
    """Hidden states against an output head, or against a slice of its rows.

    `first_word` is the id of the slice's first row; None stands for the whole head, whose rows must
    hold every target. With `only_logprobs` a kernel may leave out what entropies and arg maxima are
    made of. What the other fields are is said at `llfast.kernels.token_logprobs`, and so is what is
    refused.
    """

    hidden: Float[Tensor, "T D"]
    lm_head: Float[Tensor, "V D"]
    targets: Int[Tensor, " T"]
    bias: Float[Tensor, " V"] | None
    scale: float
    softcap: float | None
    first_word: int | None = None
    only_logprobs: bool = False

    def __post_init__(self) -> None:
        self._check_dtypes()
        self._check_shapes()
        self._check_devices()
        self._check_numbers()
        self._check_slice()

    def _check_dtypes(self) -> None:
        if self.hidden.dtype not in _DTYPES:
            raise TypeError(
                f"hidden must be float32, bfloat16 or float16, got {self.hidden.dtype}; convert it"
            )
        if self.lm_head.dtype != self.hidden.dtype:
            raise TypeError(
                f"lm_head must have the dtype of hidden, {self.hidden.dtype}, got "
                f"{self.lm_head.dtype}; convert one of them"
            )
        if self.targets.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"targets must be int64 or int32, got {self.targets.dtype}; convert them"
            )
        if self.bias is not None and not self.bias.is_floating_point():
            raise TypeError(f"bias must be of a floating dtype, got {self.bias.dtype}; convert it")

    def _check_shapes(self) -> None:
        hidden, lm_head, targets, bias = self.hidden, self.lm_head, self.targets, self.bias
        if hidden.ndim != 2:
            raise ValueError(
                f"hidden must be of shape (T, D), got {tuple(hidden.shape)}; flatten batch and "
                "length"
            )
        if lm_head.ndim != 2 or lm_head.shape[1] != hidden.shape[1] or lm_head.numel() == 0:
            raise ValueError(
                f"lm_head must be of shape (V, D) with V > 0 and D = {hidden.shape[1]} > 0, got "
                f"{tuple(lm_head.shape)}; give one row of weights for each word"
            )
        if targets.shape != hidden.shape[:1]:
            raise ValueError(
                f"targets must be of shape (T,) with T = {hidden.shape[0]}, got "
                f"{tuple(targets.shape)}; give one for each row of hidden"
            )
        if bias is not None and bias.shape != lm_head.shape[:1]:
            raise ValueError(
                f"bias must be of shape (V,) with V = {lm_head.shape[0]}, got {tuple(bias.shape)}; "
                "give one for each row of lm_head"
            )

    def _check_devices(self) -> None:
        device = self.hidden.device
        for name in ("lm_head", "targets", "bias"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                raise ValueError(
                    f"{name} must be on the device of hidden, {device}, got {tensor.device}; "
                    "move one of them"
                )

    def _check_numbers(self) -> None:
        # C++ takes both in fp32, where a softcap of 0 stands for none.
        if not abs(self.scale) <= _FP32.max:
            raise ValueError(
                f"scale must be finite in fp32, got {self.scale}; 1.0 leaves the logits as they are"
            )
        if self.softcap is not None and not (_FP32.tiny <= self.softcap <= _FP32.max):
            raise ValueError(
                f"softcap must be positive and finite in fp32, got {self.softcap}; use None for "
                "no cap"
            )

    def _check_slice(self) -> None:
        first = self.first_word or 0
        if first < 0 or first % GROUP or first + self.lm_head.shape[0] - 1 > LAST_WORD:
            raise ValueError(
                f"first_word must be a multiple of {GROUP}, and word ids at most {LAST_WORD}, got "
                f"{first} for {self.lm_head.shape[0]} rows; cut the head at multiples of {GROUP}"
            )

    def check_targets(self) -> None:
        """Refuse targets outside the vocabulary, where that is known without waiting for a device.

        On CUDA the kernels answer such targets with NaN.
        """
        if self.targets.shape[0] == 0 or self.targets.device.type == "cuda":
            return
        lowest, highest = (int(bound) for bound in self.targets.aminmax())
        if lowest < 0 or (self.first_word is None and highest >= self.lm_head.shape[0]):
            raise ValueError(
                f"targets must lie in [0, V) with V = {self.lm_head.shape[0]}, got values from "
                f"{lowest} to {highest}; leave out padding and check that the tokenizer belongs "
                "to the model"
            )

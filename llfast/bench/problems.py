"""Output heads to measure, whose numbers are the same on every machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from llfast.dtypes import dtype_name

LOGIT_SD = 4.0  # logits then reach about 20
# Numbers that are made at once: on a CPU such as stay in its cache.
_PIECES = {"cpu": 1 << 15, "cuda": 1 << 24}

_FIELD = 1 << 16
_FIELDS = 4  # of 16 bits, whose sum is close to normal
_FIELDS_MEAN = _FIELDS * (_FIELD - 1) // 2
_FIELDS_SD = math.sqrt(_FIELDS * (_FIELD**2 - 1) / 12)


@dataclass(frozen=True, slots=True)
class Problem:
    """An output head, and what makes logits of its products."""

    hidden: Float[Tensor, "T D"]
    lm_head: Float[Tensor, "V D"]
    targets: Int[Tensor, " T"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, V, D."""
        return len(self.hidden), len(self.lm_head), self.hidden.shape[1]

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.hidden.device

    @property
    def dtype_name(self) -> str:
        """Of hidden states and weights: "bfloat16" and the like."""
        return dtype_name(self.hidden.dtype)

    @property
    def gflop(self) -> float:
        """2 FLOP a multiply-add of the product (T, D) x (D, V); exponentials are not counted."""
        tokens, words, width = self.shape
        return 2 * tokens * words * width / 1e9

    @property
    def lm_head_gb(self) -> float:
        """What a call has to read at least."""
        return self.lm_head.numel() * self.lm_head.element_size() / 1e9

    @property
    def logits_bytes(self) -> int:
        """What the logits would take in the dtype of the inputs."""
        tokens, words, _ = self.shape
        return tokens * words * self.hidden.element_size()

    def first(self, tokens: int) -> Problem:
        """The same with fewer tokens."""
        return replace(self, hidden=self.hidden[:tokens], targets=self.targets[:tokens])


def make_problem(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    has_bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Problem:
    """Close to normal hidden states and weights, so that logits are normal.

    They are made where they are used, of integers alone and one product: every machine and device
    gets the same bits, and a head of gigabytes is neither made nor held twice.
    """
    tokens, words, width = shape
    device = torch.device(device)
    return Problem(
        _normal((tokens, width), dtype, device, stream=0),
        _normal((words, width), dtype, device, stream=1, sd=LOGIT_SD / math.sqrt(width)),
        _mixed(0, tokens, stream=2, device=device).bitwise_and_((1 << 62) - 1) % words,
        _normal((words,), torch.float32, device, stream=3) if has_bias else None,
        scale,
        softcap,
    )


def _normal(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    stream: int,
    sd: float = 1.0,
) -> Float[Tensor, ...]:
    found = torch.empty(shape, dtype=dtype, device=device)
    flat = found.view(-1)
    step = _PIECES[device.type]
    for begin in range(0, flat.numel(), step):
        piece = flat[begin : begin + step]
        piece.copy_(_fields_sum(_mixed(begin, len(piece), stream=stream, device=device), sd))
    return found


def _fields_sum(bits: Int64[Tensor, " n"], sd: float) -> Float32[Tensor, " n"]:
    total = bits & (_FIELD - 1)
    for _ in range(_FIELDS - 1):
        total += bits.bitwise_right_shift_(16) & (_FIELD - 1)
    # Exact in fp32 up to here, so there is one rounding.
    return (total - _FIELDS_MEAN).to(torch.float32).mul_(sd / _FIELDS_SD)


def _mixed(begin: int, count: int, *, stream: int, device: torch.device) -> Int64[Tensor, " count"]:
    """64 bits for each number from `begin`, as SplitMix64 mixes them; integers wrap around."""
    first = begin + (stream << 40)
    bits = torch.arange(first, first + count, dtype=torch.int64, device=device)
    bits.mul_(_wrapped(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        # Shifts of signed numbers carry the sign along.
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        bits.mul_(_wrapped(factor))
    return bits


def _wrapped(factor: int) -> int:
    return factor - (1 << 64) if factor >> 63 else factor

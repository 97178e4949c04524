"""Quantised weights turned back into plain ones, as transformers dequantises them.

The same function does it for a model that is loaded whole and for a page of one, so both have the
same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llfast.errors import CheckpointError
from llfast.safetensors_file import short

from .weight import CompressedWeight, Fp8Weight, QuantisedWeight

_ROWS_AT_ONCE = 256  # so that what is in fp32 meanwhile stays small


class LazyWeight:
    """Stands in for a weight in what transformers loads; dequantised when it is asked for.

    Attributes:
        shape: of the weight.
    """

    def __init__(self, weight: QuantisedWeight, stored: Mapping[str, Any]) -> None:
        """Prepare.

        Args:
            weight: which one.
            stored: tensors, or slices of a file, by name.
        """
        self.shape = weight.shape
        self._weight = weight
        self._parts = [stored[part.name] for part in weight.parts]

    def __getitem__(self, _: object) -> LazyWeight:
        return self

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The weight's numbers.

        Raises:
            CheckpointError: if scales are not finite.
        """
        parts = [part[...].to(device) for part in self._parts]
        dtype = torch.float32 if dtype is None else dtype
        _refuse_infinite(self._weight, parts[1])
        if isinstance(self._weight, Fp8Weight):
            return multiplied(self._weight, parts[0], parts[1], dtype)
        assert isinstance(self._weight, CompressedWeight)
        return decompressed(self._weight, parts).to(dtype)


def _refuse_infinite(weight: QuantisedWeight, scales: Tensor) -> None:
    if scales.dtype == torch.uint8:  # exponents of two
        scales = scales.view(torch.float8_e8m0fnu)
    scales = scales.float()
    if not scales.isfinite().all():
        part = weight.parts[1]
        raise CheckpointError(
            f"{part.path}'s {short(part.name)} must be finite, for it scales weights, got "
            f"{scales[~scales.isfinite()][0].item()}; download or save it again"
        )


def multiplied(weight: Fp8Weight, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers times scales in fp32, rounded once.

    Equals transformers' `Fp8Dequantize` wherever that takes the blocks for what they are.
    """
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    scales = scales.float()
    rows, columns = weight.shape[-2:]
    height, width = weight.block
    plain = torch.empty(weight.shape, dtype=dtype, device=numbers.device)
    if not plain.numel():
        return plain
    matrices = zip(
        plain.view(-1, rows, columns),
        numbers.reshape(-1, rows, columns),
        scales.reshape(-1, -(-rows // height), -(-columns // width)),
        strict=True,
    )
    for to, given, scale in matrices:
        of_row = scale.repeat_interleave(height, 0)
        for first in range(0, rows, _ROWS_AT_ONCE):
            strip = slice(first, first + _ROWS_AT_ONCE)
            of_number = of_row[strip].repeat_interleave(width, 1)[:, :columns]
            to[strip] = in_fp32(given[strip]).mul_(of_number[: len(given[strip])])
    return plain


def in_fp32(numbers: Tensor) -> Tensor:
    """8-bit floats in fp32, exactly.

    torch 2.13 is slow at it on a CPU: 3.2 s for 1e9 on a busy Zen 5 thread, against 0.9 s for this
    (medians of 40). With its bits moved, an e4m3 is an fp16 that is 2 ** 8 times smaller.
    """
    if numbers.dtype != torch.float8_e4m3fn or numbers.device.type != "cpu":
        return numbers.float()
    bits = numbers.contiguous().view(torch.int8)
    if not bits.numel() or (bits & 0x7F).max() == 0x7F:  # NaN, which would be 480
        return numbers.float()
    # The sign is all over the upper byte: it stays in the first bit, and goes from the second.
    moved = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return moved.view(torch.float16).float().mul_(256.0)


def decompressed(weight: CompressedWeight, parts: Sequence[Tensor]) -> Tensor:
    """What compressed-tensors makes of it, in the dtype of its scales.

    The package does it with each layer of a model by itself, and so it is done here.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    prefix = weight.name.removesuffix("weight")
    named = zip(weight.parts, parts, strict=True)
    state = {part.name.removeprefix(prefix): tensor for part, tensor in named}
    compressor: Any = BaseCompressor.get_value_from_registry(weight.format)
    scheme = QuantizationScheme.model_validate(weight.scheme)
    plain: Tensor = compressor.decompress(state, scheme)["weight"]
    return plain

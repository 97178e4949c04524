"""Which stored tensors make up a weight in fp8, found out from headers alone.

What transformers calls `fp8` (DeepSeek-V3, Qwen3, MiniMax and others): 8-bit floats with a scale
for each block, or for all of them. Blocks are counted here as the config gives them. transformers
(5.23) divides the rows by the scales instead: it cuts 192 rows with two of them into 96 and 96,
where those who quantised them had 128 and 64, and cannot load DeepSeek-V3's 576 rows with five.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llfast.errors import CheckpointError
from llfast.safetensors_file import StoredTensor, short

from .weight import DTYPES_OF_SCALES, Fp8Weight, refuse

FLOATS_OF_8_BITS = frozenset({"F8_E4M3", "F8_E5M2"})
_EXPONENTS = frozenset({"F8_E8M0", "U8"})
_FIXED_BLOCK = (128, 128)  # transformers' own, where a config names none


def check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a config that does not give blocks.

    Raises:
        CheckpointError: if it does not.
    """
    _block(folder, settings)


def _block(folder: Path, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None for all of a matrix."""
    block = settings.get("weight_block_size", _FIXED_BLOCK)
    if block is None:
        return None
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(
            f"{folder / 'config.json'} must give weight_block_size as two sizes, got {short(block)}"
        )
    return block[0], block[1]


def find(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[Fp8Weight]:
    """Weights and their scales.

    Raises:
        CheckpointError: if they do not fit one another.
    """
    block = _block(folder, settings)
    for name, tensor in tensors.items():
        names = scale_names(name)
        scale = next((tensors[each] for each in names if each in tensors), None)
        if tensor.dtype not in FLOATS_OF_8_BITS:
            is_packed = tensor.dtype[0] in "IU" and name.endswith(".weight") and scale is not None
            if is_packed or names[0] in tensors:
                refuse(tensor, "be of 8-bit floats, for it has scales", f"it in {tensor.dtype}")
            continue
        if scale is None:
            refuse(tensor, f"come with scales ({short(names[0])})", "none")
        if scale.dtype not in DTYPES_OF_SCALES | _EXPONENTS:
            refuse(scale, "be of scales", f"it in {scale.dtype}")
        yield Fp8Weight(name, tensor.shape, (tensor, scale), _share(tensor, scale, block))


def scale_names(weight: str) -> list[str]:
    """What the scales of a weight go by, in the order in which transformers would rename them."""
    module = weight.removesuffix(".weight")
    others = [f"{module}.scale", f"{module}.qscale_weight"] if module != weight else []
    return [f"{weight}_scale_inv", *others]


def _share(
    weight: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None
) -> tuple[int, int]:
    """How many rows and columns share a scale.

    Raises:
        CheckpointError: if there are not as many scales as that takes.
    """
    if len(weight.shape) < 2:
        refuse(weight, "have rows and columns, for it has scales", f"shape {list(weight.shape)}")
    *matrices, rows, columns = weight.shape
    if block is None:
        if math.prod(scale.shape) == math.prod(matrices):
            return max(rows, 1), max(columns, 1)
        block = (1, max(columns, 1))
    wanted = (*matrices, -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != wanted:
        refuse(
            scale,
            f"have shape {list(wanted)}, one for {block[0]} x {block[1]} numbers of a weight of "
            f"shape {list(weight.shape)}",
            f"{list(scale.shape)}",
        )
    return block

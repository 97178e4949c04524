"""Which stored tensors make up a quantised weight, found out from headers alone.

What transformers calls `fp8` (DeepSeek-V3, Qwen3, MiniMax and others): 8-bit floats with a scale
for each block, or for all of them. Blocks are counted here as the config gives them. transformers
(5.23) divides the rows by the scales instead: it cuts 192 rows with two of them into 96 and 96,
where those who quantised them had 128 and 64, and cannot load DeepSeek-V3's 576 rows with five.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError, UnsupportedModelError
from .safetensors_file import StoredTensor, short

FP8 = "fp8"
FLOATS_OF_8_BITS = frozenset({"F8_E4M3", "F8_E5M2"})
_DTYPES_OF_SCALES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})
# Of how inputs were quantised, which they are not here.
_OF_INPUTS = (".activation_scale", ".input_scale")
_FIXED_BLOCK = (128, 128)  # transformers' own, where a config names none


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight that is made of a tensor of small numbers and others that scale them.

    Attributes:
        name: what a plain checkpoint calls it.
        shape: its sizes there.
        parts: what it is made of, the small numbers first.
        block: rows and columns of a matrix that share a scale; the last ones may be fewer.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]
    block: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Numbers; scales are none."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> str:
        """The dtype of the small numbers."""
        return self.parts[0].dtype


def plain_weights(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor | QuantisedWeight]:
    """What a checkpoint holds, by the names of a plain one.

    Args:
        folder: where it is.
        config: the content of its config.json, which `quantisation` has let pass.
        tensors: all that is stored.

    Raises:
        CheckpointError: if weights and scales do not fit one another.
        UnsupportedModelError: if weights are quantised in yet another way.
    """
    settings = _settings(config)
    if settings is None:
        _refuse_unexplained(folder, tensors)
        return dict(tensors)
    found = {weight.name: weight for weight in _fp8_weights(folder, settings, tensors)}
    used = {part.name for weight in found.values() for part in weight.parts}
    others = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in used and not name.endswith(_OF_INPUTS)
    }
    return others | found


def quantisation(folder: Path, config: Mapping[str, Any]) -> str:
    """How weights are quantised, by transformers' name; "" if they are not.

    Raises:
        CheckpointError: if the config does not say what has to be known.
        UnsupportedModelError: if it is in a way that is not turned back.
    """
    settings = _settings(config)
    if settings is None:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(settings, dict) or method != FP8:
        raise UnsupportedModelError(
            f"{folder} must hold plain weights or fp8 ones, got quantised ones ({short(method)}); "
            "use the checkpoint that they were made from"
        )
    _block(folder, settings)
    return FP8


def _settings(config: Mapping[str, Any]) -> Any:
    """What a config says of quantisation, None if nothing."""
    inner = config.get("text_config")
    for each in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if each.get(key):
                return each[key]
    return None


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


def _fp8_weights(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[QuantisedWeight]:
    block = _block(folder, settings)
    for name, tensor in tensors.items():
        names = _scale_names(name)
        scale = next((tensors[each] for each in names if each in tensors), None)
        if tensor.dtype not in FLOATS_OF_8_BITS:
            is_packed = tensor.dtype[0] in "IU" and name.endswith(".weight") and scale is not None
            if is_packed or names[0] in tensors:
                _refuse(tensor, "be of 8-bit floats, for it has scales", f"it in {tensor.dtype}")
            continue
        if scale is None:
            _refuse(tensor, f"come with scales ({short(names[0])})", "none")
        if scale.dtype not in _DTYPES_OF_SCALES:
            _refuse(scale, "be of scales", f"it in {scale.dtype}")
        yield QuantisedWeight(name, tensor.shape, (tensor, scale), _share(tensor, scale, block))


def _scale_names(weight: str) -> list[str]:
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
        _refuse(weight, "have rows and columns, for it has scales", f"shape {list(weight.shape)}")
    *matrices, rows, columns = weight.shape
    if block is None:
        if math.prod(scale.shape) == math.prod(matrices):
            return max(rows, 1), max(columns, 1)
        block = (1, max(columns, 1))
    wanted = (*matrices, -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != wanted:
        _refuse(
            scale,
            f"have shape {list(wanted)}, one for {block[0]} x {block[1]} numbers of a weight of "
            f"shape {list(weight.shape)}",
            f"{list(scale.shape)}",
        )
    return block


def _refuse_unexplained(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse scales that no config explains: transformers would leave them out, and go on."""
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS_OF_8_BITS and any(each in tensors for each in _scale_names(name)):
            raise CheckpointError(
                f"{folder / 'config.json'} must have a quantization_config, for {short(name)} has "
                "scales, got none"
            )


def _refuse(tensor: StoredTensor, rule: str, got: str) -> NoReturn:
    raise CheckpointError(
        f"{tensor.path}'s {short(tensor.name)} must {rule}, got {got}; download or save it again"
    )

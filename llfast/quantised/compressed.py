"""Which stored tensors make up a weight of compressed-tensors, found out from headers and shapes.

https://github.com/vllm-project/compressed-tensors, whose own functions turn each layer back.
"""

from __future__ import annotations

import importlib.metadata
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llfast.errors import CheckpointError, MissingDependencyError, UnsupportedModelError
from llfast.safetensors_file import StoredTensor, short

from .weight import DTYPES_OF_SCALES, CompressedWeight, refuse

_NAIVE = ("float-quantized", "int-quantized", "naive-quantized")
_PACKED = "pack-quantized"
_TYPES = {"float": "F8_E4M3", "int": "I8"}  # what the naive formats store


def check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse by name what is not turned back, and a missing package.

    Raises:
        CheckpointError: if the config is not one of compressed-tensors.
        UnsupportedModelError: for sparse and other formats, rotations, and models in calibration.
        MissingDependencyError: without the package.
    """
    status = settings.get("quantization_status")
    sparsity = settings.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if sparse not in (None, "dense", "{}") and sparsity:
        _refuse(folder, f"sparse weights ({short(sparse)})")
    if settings.get("transform_config"):
        _refuse(folder, "rotated ones (transform_config)")
    if status != "compressed":
        _refuse(folder, f"ones of the status {short(status)}")
    if not _is_installed():
        raise MissingDependencyError(
            f"{folder} holds weights of compressed-tensors, which takes that package in 0.20 or "
            "later; run `pip install 'llfast[compressed]'`"
        )
    for form, group in _groups(folder, settings):
        if form not in (*_NAIVE, _PACKED):
            _refuse(folder, f"the format {short(form)}")
        if group.weights.strategy not in ("tensor", "channel", "group", "block"):
            _refuse(folder, f"scales by {short(group.weights.strategy)}")


def _is_installed() -> bool:
    # Older ones pack 3, 5, 6 and 7 bits into other words, and know no blocks that are cut short.
    try:
        version = importlib.metadata.version("compressed-tensors")
    except importlib.metadata.PackageNotFoundError:
        return False
    parts = re.match(r"(\d+)\.(\d+)", version)
    return parts is not None and (int(parts[1]), int(parts[2])) >= (0, 20)


def find(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[CompressedWeight]:
    """Weights and what scales them.

    Raises:
        CheckpointError: if they do not fit one another.
        UnsupportedModelError: if columns were put into another order.
    """
    groups = _groups(folder, settings)
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        scale = tensors.get(f"{module}.weight_scale")
        if last == "weight" and scale is None and tensor.dtype in _TYPES.values():
            refuse(tensor, f"come with scales ({short(module + '.weight_scale')})", "none")
        if last != "weight_packed" and (last != "weight" or scale is None):
            continue
        if scale is None:
            refuse(tensor, f"come with scales ({short(module + '.weight_scale')})", "none")
        if scale.dtype not in DTYPES_OF_SCALES:
            refuse(scale, "be of scales", f"it in {scale.dtype}")
        if f"{module}.weight_g_idx" in tensors:
            _refuse(folder, f"columns in another order ({short(module + '.weight_g_idx')})")
        form, group = _group_of(tensor, module, groups)
        if (form == _PACKED) != (last == "weight_packed"):
            refuse(tensor, f"be stored as {form}", "it otherwise")
        yield _weight(tensors, module, tensor, scale, form, group)


def _weight(
    tensors: Mapping[str, StoredTensor],
    module: str,
    numbers: StoredTensor,
    scale: StoredTensor,
    form: str,
    group: Any,
) -> CompressedWeight:
    """One of them, once the shapes of its parts have been found to fit."""
    weights = group.weights
    parts = [numbers, scale]
    if len(numbers.shape) != 2:
        refuse(numbers, "have rows and columns", f"shape {list(numbers.shape)}")
    if form == _PACKED:
        sizes = tensors.get(f"{module}.weight_shape")
        if sizes is None:
            refuse(numbers, f"come with {short(module + '.weight_shape')}", "none")
        shape = _stored_sizes(sizes)
        _expect(numbers, "I32", (shape[0], _words(shape[1], weights.num_bits)))
        parts.append(sizes)
    else:
        shape = (numbers.shape[0], numbers.shape[1])
        _expect(numbers, _TYPES[str(weights.type)], shape)
    grid = _grid(weights, shape)
    if grid is None:
        if scale.parameters != 1:
            refuse(scale, "be one number, for all of a weight", f"shape {list(scale.shape)}")
    else:
        _expect(scale, scale.dtype, grid)
    zero = tensors.get(f"{module}.weight_zero_point")
    if zero is not None:
        is_packed = form == _PACKED and not weights.symmetric and grid is not None
        _expect(
            zero,
            "I32" if is_packed else zero.dtype,
            (_words(shape[0], weights.num_bits), scale.shape[1]) if is_packed else scale.shape,
        )
        parts.append(zero)
    elif not weights.symmetric:
        refuse(numbers, f"come with {short(module + '.weight_zero_point')}", "none")
    scheme = group.model_dump(mode="json", include={"targets", "weights"})
    return CompressedWeight(f"{module}.weight", shape, tuple(parts), form, scheme)


def _words(numbers: int, bits: int) -> int:
    """How many words of 32 bits hold them."""
    return -(-numbers * bits // 32)


def _grid(weights: Any, shape: tuple[int, int]) -> tuple[int, int] | None:
    """How many scales a weight has down and across; None for a single one."""
    rows, columns = shape
    match str(weights.strategy):
        case "channel":
            return rows, 1
        case "group":
            return rows, -(-columns // weights.group_size)
        case "block":
            height, width = weights.block_structure
            return -(-rows // height), -(-columns // width)
    return None


def _expect(tensor: StoredTensor, dtype: str, shape: Sequence[int]) -> None:
    if (tensor.dtype, tensor.shape) != (dtype, tuple(shape)):
        refuse(
            tensor,
            f"be of {dtype} and shape {list(shape)} by its config group",
            f"{tensor.dtype} and {list(tensor.shape)}",
        )


def _stored_sizes(tensor: StoredTensor) -> tuple[int, int]:
    """The two numbers in a weight_shape."""
    code = {"I64": "<2q", "I32": "<2i"}.get(tensor.dtype)
    if code is None or tensor.shape != (2,):
        refuse(tensor, "be two integers", f"{tensor.dtype} of shape {list(tensor.shape)}")
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin)
        content = file.read(tensor.end - tensor.begin)
    try:
        rows, columns = struct.unpack(code, content)
    except struct.error:
        refuse(tensor, "be two integers", f"{len(content)} bytes")
    if rows < 0 or columns < 0:
        refuse(tensor, "be two sizes", f"{rows} and {columns}")
    return rows, columns


def _groups(folder: Path, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Formats and schemes of the config's groups that have weights.

    Raises:
        CheckpointError: if it is not a config of compressed-tensors.
    """
    from compressed_tensors.quantization import QuantizationConfig

    try:
        config = QuantizationConfig.model_validate(dict(settings))
        schemes = [group for group in config.config_groups.values() if group.weights is not None]
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder / 'config.json'} must have a quantization_config that compressed-tensors "
            f"takes, got: {reason}"
        ) from error
    return [(_text(group.format or config.format), group) for group in schemes]


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _group_of(tensor: StoredTensor, module: str, groups: list[tuple[str, Any]]) -> tuple[str, Any]:
    """The group of a layer: by its name, else a pattern, else its class, as the package does it."""
    from compressed_tensors.utils.match import match_name

    if len(groups) == 1:
        return groups[0]
    rules = (
        lambda target: target == module,
        lambda target: match_name(module, target),
        lambda target: target == "Linear",  # the one class that is known without a model
    )
    for rule in rules:
        for form, group in groups:
            if any(map(rule, group.targets)):
                return form, group
    return refuse(tensor, "be a target of a config group", "one of none")


def _refuse(folder: Path, what: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{folder} must hold weights of compressed-tensors in {', '.join(_NAIVE)} or {_PACKED}, "
        f"got {what}; use the checkpoint that they were made from"
    )

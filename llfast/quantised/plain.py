"""How a checkpoint is quantised, and what it holds by the names of a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llfast.errors import CheckpointError, UnsupportedModelError
from llfast.safetensors_file import StoredTensor, short

from . import compressed, fp8
from .weight import QuantisedWeight

# Of how inputs were quantised, which they are not here.
_OF_INPUTS = (".activation_scale", ".input_scale", ".input_zero_point", ".input_global_scale")
_INTEGERS = frozenset({"BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"})
_METHODS = {"fp8": fp8, "compressed-tensors": compressed}


def quantisation(folder: Path, config: Mapping[str, Any]) -> str:
    """How weights are quantised, by transformers' name; "" if they are not.

    Raises:
        CheckpointError: if the config does not say what has to be known.
        UnsupportedModelError: if it is in a way that is not turned back.
        MissingDependencyError: if that takes a package that is not there.
    """
    settings = _settings(config)
    if settings is None:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(method, str) or method not in _METHODS or not isinstance(settings, dict):
        raise UnsupportedModelError(
            f"{folder} must hold plain weights, or fp8 or compressed-tensors ones, got quantised "
            f"ones ({short(method)}); use the checkpoint that they were made from"
        )
    _METHODS[method].check(folder, settings)
    return method


def plain_weights(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Mapping[str, StoredTensor | QuantisedWeight]:
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
        return tensors
    method = _METHODS[settings["quant_method"]]
    found = {weight.name: weight for weight in method.find(folder, settings, tensors)}
    used = {part.name for weight in found.values() for part in weight.parts}
    others = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in used and not name.endswith(_OF_INPUTS)
    }
    return {**others, **found}


def _settings(config: Mapping[str, Any]) -> Any:
    """What a config says of quantisation, None if nothing."""
    inner = config.get("text_config")
    for each in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if each.get(key):
                return each[key]
    return None


def _refuse_unexplained(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse what no config explains: transformers would drop scales, and take codes as numbers."""
    for name, tensor in tensors.items():
        # Masks and the like are integers, too, but no weights.
        if tensor.dtype in _INTEGERS and name.endswith(".weight"):
            raise CheckpointError(
                f"{folder / 'config.json'} must have a quantization_config, for {short(name)} is "
                f"stored as {tensor.dtype}, got none"
            )
        names = [*fp8.scale_names(name), f"{name}_scale"]
        if tensor.dtype in fp8.FLOATS_OF_8_BITS and any(each in tensors for each in names):
            raise CheckpointError(
                f"{folder / 'config.json'} must have a quantization_config, for {short(name)} has "
                "scales, got none"
            )

"""Weights through transformers: whole models, and what they must hold."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from .checkpoint import Checkpoint
from .errors import CheckpointError, LlfastWarning, MissingDependencyError
from .quantised import QuantisedWeight
from .quantised.dequantise import LazyWeight
from .safetensors_file import StoredTensor

# `refuse_incomplete` refuses tensors of another size by name.
_REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_QUIET_LOCK = threading.Lock()
_BEFORE: list[tuple[int, bool]] = []  # verbosity and bars, once for each that is quiet


def count_parameters(checkpoint: Checkpoint, config: Any) -> int:
    """Stored numbers; of pickles, which are not opened for that, as many as have room in them."""
    if not checkpoint.pickled:
        return checkpoint.parameters
    stored = getattr(config, "dtype", None)
    itemsize = stored.itemsize if isinstance(stored, torch.dtype) else torch.float32.itemsize
    return checkpoint.weight_bytes // itemsize


def load_whole(
    name: str, checkpoint: Checkpoint, config: Any, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Mapping[str, Any]]:
    """A model on the CPU with all its weights, and transformers' report of what it found.

    Raises:
        CheckpointError: if transformers cannot read it, or scales are not finite; by name, if it
            lacks tensors that are put together with others.
    """
    try:
        if checkpoint.quantised or checkpoint.bare_index:
            with _weights(checkpoint) as weights:
                model, report = load_from(
                    weights, config, dtype=dtype, trust_remote_code=trust_remote_code
                )
        else:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                use_safetensors=not checkpoint.pickled,
                trust_remote_code=trust_remote_code,
                **_REPORT,
            )
    except (torch.OutOfMemoryError, MemoryError, CheckpointError):
        raise
    except Exception as error:
        refuse_lacking(name, checkpoint.plain, config, trust_remote_code)
        raise CheckpointError(
            f"{name} must be a checkpoint that transformers loads, got: {one_line(error)}"
        ) from error
    if report["mismatched_keys"]:
        refuse_lacking(name, checkpoint.plain, config, trust_remote_code)
    return model, report


def load_from(
    weights: Mapping[str, Any], config: Any, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[Any, Mapping[str, Any]]:
    """A model of weights by name, and transformers' report of what it found.

    Of one that takes images, too, it may be the part that takes text, which has a config of its
    own: as where transformers opens the files.
    """
    with torch.device("meta"):
        outline = transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    if type(outline.config) is not type(config):
        config = config.get_text_config()
    model, report = type(outline).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, **_REPORT
    )
    return model, report


@contextlib.contextmanager
def _weights(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """What transformers asks for weights, by the names of a plain checkpoint; read when asked.

    Not transformers' own way, which cuts some quantised weights into the wrong blocks (see
    `quantised`), and reads no index without metadata.
    """
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in checkpoint.weights}
        # A slice for each, for they are read in threads, and a file must not be asked by two.
        stored = {
            name: files[tensor.path].get_slice(name) for name, tensor in checkpoint.tensors.items()
        }
        yield {
            name: LazyWeight(weight, stored)
            if isinstance(weight, QuantisedWeight)
            else stored[name]
            for name, weight in checkpoint.plain.items()
        }


def refuse_incomplete(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a model with weights that its checkpoint does not hold; warn of those left over.

    transformers fills what is missing with random numbers and goes on.

    Raises:
        CheckpointError: with the first few of them.
    """
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report[what]:
            raise CheckpointError(
                f"{name} must hold every weight of {type(model).__name__}, got "
                f"{_listed(what.replace('_', ' '), report[what])}"
            )
    # Old checkpoints hold masks and other buffers, too, which are no loss.
    if unused := [key for key in report["unexpected_keys"] if key.endswith("weight")]:
        more = _listed("unexpected keys", unused)
        message = f"{name} holds more than its config asks for, left out: {more}"
        warnings.warn(message, LlfastWarning, stacklevel=4)


def refuse_lacking(
    name: str,
    stored: Mapping[str, StoredTensor | QuantisedWeight],
    config: Any,
    trust_remote_code: bool = False,
) -> None:
    """Refuse a checkpoint that lacks some of what transformers would store, for many alike.

    Where tensors are put together, such as those of experts, transformers fails and only logs of
    what, or names what they would have been.

    Raises:
        CheckpointError: with the first few of them, if that is what is wrong.
    """
    try:
        with quiet(), torch.device("meta"):
            outline = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
            core = importlib.import_module("transformers.core_model_loading")
            wanted = core.revert_weight_conversion(outline, dict(outline.named_parameters()))
    except Exception:  # it is explained in other words, then
        return
    # In another layout every name is another.
    kinds = {_kind(key) for key in stored}
    missing = [key for key in wanted if key not in stored and _kind(key) in kinds]
    mismatched = [
        (key, stored[key].shape, tensor.shape)
        for key, tensor in wanted.items()
        if key in stored and tuple(stored[key].shape) != tuple(tensor.shape)
    ]
    report = {"missing_keys": missing, "mismatched_keys": mismatched}
    refuse_incomplete(name, outline, report | {"error_msgs": [], "unexpected_keys": []})


def _kind(key: str) -> str:
    """A tensor's name whatever its layer and expert."""
    return re.sub(r"\d+", "*", key)


def refuse_without_peft() -> None:
    """Refuse an adapter as soon as it is looked up; peft takes its time to be imported.

    Raises:
        MissingDependencyError: if peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(
            "merging a LoRA adapter needs peft; run `pip install 'llfast[lora]'`"
        )


def merge_adapter(model: Any, adapter: Path) -> Any:
    """The model with a LoRA adapter added to its weights.

    Raises:
        CheckpointError: if the adapter is not one of this model.
        MissingDependencyError: without peft.
    """
    refuse_without_peft()
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys: they are refused below
            adapted = peft.PeftModel.from_pretrained(model, adapter)
            wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except Exception as error:
        raise CheckpointError(
            f"{adapter} must be an adapter of {type(model).__name__}, got: {one_line(error)}"
        ) from error
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    unknown = {key for key in found - wanted if "lora_" in key}
    for what, keys in (("missing keys", wanted - found), ("unexpected keys", unknown)):
        if keys:
            raise CheckpointError(
                f"{adapter} must be an adapter of this {type(model).__name__}, got "
                f"{_listed(what, keys)}"
            )
    return adapted.merge_and_unload()


def _listed(what: str, keys: Iterable[Any]) -> str:
    # A mismatched key comes with the shape that is there and the one that should be.
    ordered = sorted(
        key if isinstance(key, str) else "{} {} not {}".format(key[0], *map(list, key[1:]))
        for key in keys
    )
    return f"{len(ordered)} {what}: {', '.join(ordered[:3])}"


def one_line(error: BaseException) -> str:
    """What an error of transformers says, without its colours and line breaks, if it is short."""
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
    return text[:300] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, reports and hints from transformers: what matters is raised.

    What was set before comes back when the last thread is through.
    """
    with _QUIET_LOCK:
        if not _BEFORE:
            bars = transformers_logging.is_progress_bar_enabled()
            _BEFORE.append((transformers_logging.get_verbosity(), bars))
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
        else:
            _BEFORE.append(_BEFORE[0])
    try:
        yield
    finally:
        with _QUIET_LOCK:
            verbosity, bars = _BEFORE.pop()
            if not _BEFORE:
                transformers_logging.set_verbosity(verbosity)
                if bars:
                    transformers_logging.enable_progress_bar()

"""A transformers model without its weights, and the way of stored tensors into it.

The one file that touches transformers' loading internals, which move between releases. They are
tried out before they are used; whatever goes wrong with them means that models are loaded whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from llfast.dtypes import STORED_DTYPES
from llfast.errors import CannotPageError, CheckpointError
from llfast.loading import load_from, one_line, quiet, refuse_incomplete, refuse_lacking
from llfast.quantised import QuantisedWeight
from llfast.quantised.dequantise import LazyWeight
from llfast.safetensors_file import StoredTensor

from .slots import move_to

# Models that change their weights in a forward, which a page does not outlive.
_CHANGE_THEIR_WEIGHTS = {"rwkv"}


class _Shape:
    """Stands in for a stored tensor where only shapes and names are asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, _: object) -> _Shape:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ARG002
        """A tensor without numbers, wherever it is asked to go."""
        return torch.empty(self.shape, dtype=dtype, device="meta")


class _Part:
    """Stands in for a stored tensor that transformers puts together with others.

    Attributes:
        shape: of the tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self._tensor = tensor

    def __getitem__(self, _: object) -> _Part:
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As `move_to` has it; of torch's own copies, made by threads, most of them would stay."""
        return move_to(self._tensor, torch.device(device), dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A parameter or buffer of a model.

    Attributes:
        names: all that it goes by; more than one if it is tied.
        empty: what stands for it while its weights are elsewhere, on the meta device.
    """

    names: tuple[str, ...]
    empty: Tensor


class Skeleton:
    """A model whose parameters come and go.

    Attributes:
        model: in evaluation mode. What its checkpoint does not hold, such as the tables of rotary
            embeddings, is there; parameters without weights are on the meta device until `evict`.
        places: every parameter and stored buffer, by its first name.
        device: where its weights go.
        sources: by the same name, the stored tensors that it, or a group of which it is the first,
            is made of.
    """

    def __init__(
        self,
        weights: Mapping[str, StoredTensor | QuantisedWeight],
        config: Any,
        *,
        dtype: torch.dtype,
        device: torch.device,
        name: str,
    ) -> None:
        """Build the model.

        Args:
            weights: all that its checkpoint holds, by the names of a plain one.
            config: the model's.
            dtype: that it runs in.
            device: where it runs.
            name: what it is called in errors.

        Raises:
            CheckpointError: if the checkpoint does not fill it.
            CannotPageError: if it is one that cannot be built without weights.
        """
        self._name = name
        if config.model_type in _CHANGE_THEIR_WEIGHTS:
            raise CannotPageError(
                f"{name} must leave its weights as they are to be paged, got a {config.model_type}"
            )
        shapes = {key: _Shape(weight.shape) for key, weight in weights.items()}
        try:
            with quiet():
                self.model, report = load_from(shapes, config, dtype=dtype)
        except Exception as error:
            refuse_lacking(name, weights, config)
            raise CannotPageError(
                f"{name} must be a model that can be built without weights to be paged, got: "
                f"{one_line(error)}"
            ) from error
        if report["mismatched_keys"]:
            refuse_lacking(name, weights, config)
        refuse_incomplete(name, self.model, report)
        self.model.eval()
        self.device = device
        _move_buffers(self.model, device)
        self.places = dict(_places(self.model))
        first_names = {each: first for first, place in self.places.items() for each in place.names}
        self.sources: dict[str, list[StoredTensor]] = {}
        self._converted: set[str] = set()
        self._quantised: dict[str, list[QuantisedWeight]] = {}
        try:
            self._config = _loading_config(self.model, dtype, device)
            for key, target, is_converted in _targets(self.model, self._config, weights):
                if target in first_names:
                    first, weight = first_names[target], weights[key]
                    sources = self.sources.setdefault(first, [])
                    if isinstance(weight, QuantisedWeight):
                        self._quantised.setdefault(first, []).append(weight)
                        sources.extend(weight.parts)
                    else:
                        sources.append(weight)
                    if is_converted:
                        self._converted.add(first)
        except Exception as error:
            raise CannotPageError(
                f"{name} must be loaded whole by transformers {transformers.__version__}, whose "
                f"loading is not as llfast knows it: {one_line(error)}"
            ) from error

    def is_plain(self, name: str) -> bool:
        """Whether a parameter is stored as it is, under whatever name and in whatever dtype."""
        return len(self.sources.get(name, ())) == 1 and self._is_alone(name)

    def _is_alone(self, name: str) -> bool:
        """Whether a parameter is one weight of a plain checkpoint, if it may be a quantised one."""
        quantised = self._quantised.get(name, [])
        others = len(self.sources.get(name, ())) - sum(len(each.parts) for each in quantised)
        return name not in self._converted and len(quantised) + others == 1

    @property
    def converts(self) -> bool:
        """Whether stored tensors are put together or taken apart."""
        return not all(self._is_alone(name) for name in self.sources)

    def is_as_stored(self, names: Iterable[str]) -> bool:
        """Whether parameters can be the very bytes of a file."""
        return all(
            self.is_plain(name)
            and STORED_DTYPES.get(self.sources[name][0].dtype) == self.places[name].empty.dtype
            for name in names
        )

    def copies(self, names: Iterable[str]) -> int:
        """How often parameters are in memory beside their page while they are put in place.

        Those that are put together are there in two forms, at times in three, but not all of them.
        """
        names = list(names)
        is_merged = not all(self._is_alone(name) for name in names)
        return 2 if is_merged else int(not self.is_as_stored(names))

    def put(self, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        """Put weights in their places, converted as transformers converts them.

        Args:
            names: of the places to fill.
            tensors: all that they are made of, by stored name. Where nothing has to be converted,
                the model takes these very tensors.

        Raises:
            CheckpointError: if they do not fill the places.
        """
        names = list(names)
        others: dict[str, Any] = dict(tensors)
        for weight in (weight for name in names for weight in self._quantised.get(name, ())):
            for part in weight.parts:
                del others[part.name]
            others[weight.name] = LazyWeight(weight, tensors)
        converted = []
        for name in names:
            empty = self.places[name].empty
            if self._is_alone(name):  # transformers takes 36 ms a layer to say the same
                key = self._quantised[name][0].name if name in self._quantised else None
                tensor = others.pop(key or self.sources[name][0].name)
                self._set(name, move_to(tensor, self.device, empty.dtype))
            else:
                self._set(name, empty)  # whose shape and dtype transformers asks for
                converted.append(name)
        if converted:
            self._convert(converted, others)

    def _convert(self, names: Sequence[str], tensors: Mapping[str, Any]) -> None:
        """Let transformers fill places of tensors that have to be put together or taken apart."""
        parts = {
            name: _Part(tensor) if isinstance(tensor, Tensor) else tensor
            for name, tensor in tensors.items()
        }
        with quiet():
            report, _ = _internals().convert_and_load_state_dict_in_model(
                self.model, parts, self._config
            )
        problems = [*map(str, report.conversion_errors), *map(str, report.error_msgs)]
        problems += map(str, report.mismatched_keys)
        for name in names:
            first, *others = self.places[name].names
            found = [get_tensor(self.model, each) for each in (first, *others)]
            real = [tensor for tensor in found if not tensor.is_meta]
            if not real:
                problems.append(f"{name} without weights")
            elif others:
                self._set(name, real[0])
        if problems:
            raise CheckpointError(
                f"{self._name} must fill {type(self.model).__name__}, got {len(problems)} "
                f"problems: {', '.join(problems[:3])[:300]}"
            )

    def evict(self, names: Iterable[str]) -> None:
        """Leave nothing in these places: an empty tensor, which no layer can multiply by."""
        for name in names:
            self._set(name, self.places[name].empty.new_empty(0, device=self.device))

    def watch(self, names: Iterable[str]) -> Callable[[], bool]:
        """What says, in microseconds, whether all of these parameters have their weights."""
        watched = []
        for name in names:
            path, _, attribute = name.rpartition(".")
            shape = self.places[name].empty.shape
            watched.append((self.model.get_submodule(path), attribute, shape))
        return lambda: all(
            getattr(module, attribute).shape == shape for module, attribute, shape in watched
        )

    def _set(self, name: str, tensor: Tensor) -> None:
        is_parameter = isinstance(self.places[name].empty, nn.Parameter)
        if is_parameter and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        for each in self.places[name].names:
            path, _, attribute = each.rpartition(".")
            setattr(self.model.get_submodule(path), attribute, tensor)


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its full name."""
    path, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), attribute)
    return tensor


def _places(model: nn.Module) -> Iterable[tuple[str, Place]]:
    """Parameters, and those buffers that are stored, each once."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if tensor.is_meta:
            found.setdefault(id(tensor), (tensor, []))[1].append(name)
    for tensor, names in found.values():
        yield names[0], Place(names=tuple(names), empty=tensor)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move buffers that have numbers; `Module.to` would refuse the parameters that have none."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(module, name, buffer.to(device))


def _internals() -> Any:
    from transformers import core_model_loading

    return core_model_loading


def _loading_config(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """What transformers would load this model with."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    return LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),  # noqa: SLF001
        weight_mapping=get_model_conversion_mapping(model),
    )


def _targets(model: Any, config: Any, keys: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Stored keys, the (first) name in the model that each goes to, and if it is converted."""
    internals = _internals()
    renamings = [e for e in config.weight_mapping if isinstance(e, internals.WeightRenaming)]
    converters = [e for e in config.weight_mapping if isinstance(e, internals.WeightConverter)]
    known = model.state_dict()
    for key in sorted(keys, key=internals.dot_natural_key):  # some renamings count
        for rules in ((renamings, converters), ([], [])):  # in this order transformers tries them
            target, pattern = internals.rename_source_key(
                key, *rules, model.base_model_prefix, known
            )
            if target in known or key not in known:
                break
        yield key, target, pattern is not None


@functools.cache
def why_not() -> str | None:
    """What is wrong with this transformers, tried on a small mixture of experts, layer by layer.

    Its checkpoints have a tensor for every expert, which are merged, and other names than the
    model.
    """
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            config = transformers.AutoConfig.for_model("mixtral", **sizes, **heads)
            whole = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            stored = _internals().revert_weight_conversion(whole, whole.state_dict())
        tensors = {
            key: StoredTensor(key, Path(), "F32", tuple(tensor.shape), 0, tensor.nbytes)
            for key, tensor in stored.items()
        }
        cpu = torch.device("cpu")
        skeleton = Skeleton(tensors, config, dtype=torch.float32, device=cpu, name="a trial model")
        for layer in ("model.layers.0.", "model.layers.1."):
            names = [name for name in skeleton.places if name.startswith(layer)]
            keys = [source.name for name in names for source in skeleton.sources.get(name, ())]
            skeleton.put(names, {key: stored[key] for key in keys})
            if len(names) < 2 or not all(
                torch.equal(get_tensor(skeleton.model, name), get_tensor(whole, name))
                for name in names
            ):
                return "layers come out differently"
    except Exception as error:
        return one_line(error)
    return None

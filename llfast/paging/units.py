"""What is paged of a model: its layers, the rows of its embedding, the rows of its head.

Everything else (norms, buffers, whatever several layers share) is small, and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llfast.errors import CannotPageError
from llfast.head import linear_head
from llfast.linear import PACKED
from llfast.safetensors_file import StoredTensor
from llfast.traits import listed_modules

from .skeleton import Skeleton

# A larger table of embeddings is read by rows.
LARGEST_KEPT_EMBEDDING_BYTES = 64 << 20
# A larger linear layer or table that is not in a list of layers is a unit of its own.
LARGEST_KEPT_LAYER_BYTES = 64 << 20
# Models that take rows out of their embedding's weight themselves, instead of calling it.
_INDEX_THEIR_EMBEDDING = {"gemma4", "gemma4_unified"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A layer whose weights come and go together.

    Attributes:
        name: of its module.
        module: what a forward stops in front of.
        places: the parameters that only it has, by their names in the skeleton.
        sources: the stored tensors that they are made of.
    """

    name: str
    module: nn.Module
    places: tuple[str, ...]
    sources: tuple[StoredTensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHead:
    """A head that is read in tiles of rows.

    Attributes:
        module: the layer; its weights are never put there.
        weight: (V, D), as stored.
        bias: where it is kept in the skeleton, None if there is none.
        dtype: what the model has its weight in.
    """

    module: nn.Linear
    weight: StoredTensor
    bias: str | None
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEmbedding:
    """A table of token embeddings that is read by rows.

    Attributes:
        module: the layer; its weight is put there for a call only.
        weight: (V, D), as stored.
        place: of its weight in the skeleton.
        dtype: what the model has it in.
    """

    module: nn.Embedding
    weight: StoredTensor
    place: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """A model's parts.

    Attributes:
        layers: in the order in which the model lists them, which need not be that of a forward.
        kept: the stored tensors that are read first, and stay.
        kept_places: what they fill.
        head: in tiles.
        embedding: by rows; None if it is small, and kept.
    """

    layers: tuple[Unit, ...]
    kept: tuple[StoredTensor, ...]
    kept_places: tuple[str, ...]
    head: StoredHead
    embedding: StoredEmbedding | None


def find_units(skeleton: Skeleton, linear: str) -> Units:
    """Cut a model into units.

    Args:
        skeleton: the model.
        linear: the path of its linear layers. A packed one must be in place before it is called,
            so it can be a part of a unit, but not a unit.

    Raises:
        CannotPageError: if it has no list of layers, or a head that cannot be read in tiles.
    """
    model = skeleton.model
    head, head_weight = _stored_head(skeleton)
    embedding = _stored_embedding(skeleton)
    others: set[nn.Module | None] = {head.module, None if embedding is None else embedding.module}
    single = (nn.Embedding,) if linear == PACKED else (nn.Embedding, nn.Linear)
    owners = _owners(model, single, others)
    by_layer: dict[str, list[str]] = {}
    kept = []
    for name, place in skeleton.places.items():
        layer, *more = {_owner(owners, each) for each in place.names}
        if name == head_weight or (embedding is not None and name == embedding.place):
            continue
        if layer is not None and not more and isinstance(place.empty, nn.Parameter):
            by_layer.setdefault(layer, []).append(name)
        else:
            kept.append(name)
    if embedding is None and len(skeleton.places[head_weight].names) > 1:
        kept.append(head_weight)  # a tied table: kept for the embedding, and tiled for the head
    if not by_layer:
        raise CannotPageError(
            f"model must have a list of layers to be paged, got a {type(model).__name__}"
        )
    units = tuple(
        Unit(
            name=name,
            module=owners[name],
            places=tuple(by_layer[name]),
            sources=_sources(skeleton, by_layer[name]),
        )
        for name in owners
        if name in by_layer
    )
    return Units(
        layers=units,
        kept=_sources(skeleton, kept),
        kept_places=tuple(kept),
        head=head,
        embedding=embedding,
    )


def _sources(skeleton: Skeleton, places: list[str]) -> tuple[StoredTensor, ...]:
    return tuple(source for place in places for source in skeleton.sources.get(place, ()))


def _owners(
    model: nn.Module, single: tuple[type, ...], others: set[nn.Module | None]
) -> dict[str, nn.Module]:
    """The modules that are units: items of the outermost lists, and large layers elsewhere.

    Args:
        model: whose they are.
        single: kinds of layers that are units by themselves, if they are large.
        others: layers that are none.
    """
    found = dict(listed_modules(model))
    inside = tuple(f"{name}." for name in found)
    for name, module in model.named_modules():
        if module in others or f"{name}.".startswith(inside):
            continue
        weight: Any = getattr(module, "weight", None)
        if type(module) in single and weight.is_meta and weight.nbytes > LARGEST_KEPT_LAYER_BYTES:
            found[name] = module
    return found


def _owner(owners: dict[str, nn.Module], name: str) -> str | None:
    """The unit that a parameter's name lies in."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        path = ".".join(parts[:length])
        if path in owners:
            return path
    return None


def _stored_head(skeleton: Skeleton) -> tuple[StoredHead, str]:
    """The head, and the place of its weight."""
    model = skeleton.model
    module = linear_head(model)
    name = None if module is None else _name_of(skeleton, module.weight)
    if module is None or name is None or not skeleton.is_plain(name):
        raise CannotPageError(
            f"model must have a linear head, stored as it is, to be paged, got a "
            f"{type(model).__name__}"
        )
    head = StoredHead(
        module=module,
        weight=skeleton.sources[name][0],
        bias=None if module.bias is None else _name_of(skeleton, module.bias),
        dtype=module.weight.dtype,
    )
    return head, name


def _stored_embedding(skeleton: Skeleton) -> StoredEmbedding | None:
    """The table of token embeddings, if it is worth reading by rows."""
    model = skeleton.model
    module: Any = model.get_input_embeddings()
    if not isinstance(module, nn.Embedding) or model.config.model_type in _INDEX_THEIR_EMBEDDING:
        return None
    name = _name_of(skeleton, module.weight)
    if name is None or not skeleton.is_plain(name):
        return None
    # Nobody but the head may use it otherwise than by a call.
    paths = (each.rpartition(".")[0] for each in skeleton.places[name].names)
    users = {model.get_submodule(path) for path in paths}
    weight = skeleton.sources[name][0]
    if users - {module, model.get_output_embeddings()} or (
        weight.end - weight.begin <= LARGEST_KEPT_EMBEDDING_BYTES
    ):
        return None
    return StoredEmbedding(module=module, weight=weight, place=name, dtype=module.weight.dtype)


def _name_of(skeleton: Skeleton, parameter: Tensor) -> str | None:
    """The place of a parameter."""
    names = (name for name, place in skeleton.places.items() if place.empty is parameter)
    return next(names, None)

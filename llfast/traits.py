"""What a loaded model is like, as far as scoring depends on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from .batches import TokenizedTexts, model_max_length
from .errors import CheckpointError, UnsupportedModelError

_PROBE_TOKENS = 24


def is_mixture_of_experts(model: Any) -> bool:
    """Whether tokens of a batch are routed to experts, and may so touch one another's bits.

    Asked of the modules: configs name their experts in a dozen ways, and some name what is off.
    """
    return any("Expert" in type(module).__name__ for module in model.modules())


def listed_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Items of module lists, none inside of another; of lists of lists, the inner items."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, nn.ModuleList) and not isinstance(
            child, nn.ModuleList | nn.ModuleDict | nn.ParameterList
        ):
            yield path, child
        else:
            yield from listed_modules(child, f"{path}.")


def rope_limits(config: Any) -> list[tuple[str, int]]:
    """Kinds of rotary embeddings that depend on the length of the input, and from where on."""
    config = config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    sets = [found, *(each for each in found.values() if isinstance(each, dict))]
    fallback = getattr(config, "original_max_position_embeddings", None)
    fallback = fallback or getattr(config, "max_position_embeddings", None)
    limits = []
    for parameters in sets:
        kind = parameters.get("rope_type")
        limit = parameters.get("original_max_position_embeddings") or fallback
        if kind in ("dynamic", "longrope") and limit:
            limits.append((kind, int(limit)))
    return limits


def vocabulary_rows(model: Any) -> int | None:
    """How many tokens a model can both read and predict, if its embedding and head say."""
    sizes = (
        getattr(model.get_input_embeddings(), "num_embeddings", None),
        getattr(model.get_output_embeddings(), "out_features", None),
    )
    return min((size for size in sizes if size), default=None)


def check_fit(model: Any, tokens: TokenizedTexts, ids: Sequence[str]) -> None:
    """Refuse tokens that a model cannot take.

    Raises:
        CheckpointError: if a token id is beyond the model's vocabulary.
        UnsupportedModelError: if a text is longer than dynamic RoPE gives one answer for.
    """
    rows = vocabulary_rows(model)
    largest = int(tokens.ids.max(initial=0))
    if rows is not None and largest >= rows:
        raise CheckpointError(
            f"token ids must be below the model's {rows} words, got {largest}; the tokenizer does "
            "not belong to this model"
        )
    for kind, limit in rope_limits(model.config):
        longer = np.flatnonzero(tokens.input_lengths > limit)
        if kind == "dynamic" and len(longer):
            raise UnsupportedModelError(
                f"texts must have at most {limit} tokens for a model with dynamic RoPE, got "
                f"{tokens.input_lengths[longer[0]]} for {ids[longer[0]]!r}: beyond that its "
                "numbers depend on what it read before"
            )


def probe_tokens(model: Any) -> Int64[Tensor, " S"]:
    """A few tokens to try a model with.

    They depend on the model alone, so that what is decided by them does not depend on the texts;
    they are from the middle of the vocabulary, where ordinary words are.
    """
    rows = vocabulary_rows(model) or 2
    most = model_max_length(model.config, None, "paper") or _PROBE_TOKENS
    count = max(2, min(_PROBE_TOKENS, most))
    ids = np.unique(np.linspace(rows // 4, rows // 2, count).astype(np.int64))
    return torch.from_numpy(np.minimum(ids, rows - 1)).to(model.device)

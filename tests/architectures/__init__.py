"""Tiny random decoders, one for every causal language model type that transformers has.

Each is built from its own configuration class, shrunk as `sizes.py` says, with random weights that
make it say something: logits spread over several nats and depend on tokens far back.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .names import COVERED, EXCLUDED
from .sizes import HEADS, MAX_LENGTH, OVERRIDES, PADDING_ROWS, SIZES, VOCAB_SIZE

__all__ = [
    "EXCLUDED",
    "MAX_LENGTH",
    "TOKENS",
    "VOCAB_SIZE",
    "architectures",
    "build",
    "is_mixture",
    "tiny_config",
    "unlisted",
]

# Token ids that a text may hold: neither special nor padding in any of the vocabularies.
TOKENS = range(3, VOCAB_SIZE - PADDING_ROWS)

# Per-layer lists of names. Other per-layer lists follow from the depth by themselves.
_PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# At width 64 this about keeps the variance of activations from layer to layer.
_NOISE_STD = 0.1
# Raises the standard deviation of the logits from 0.8 to about 3 nats.
_HEAD_GAIN = 4.0


def architectures() -> tuple[str, ...]:
    """The covered model types that the installed transformers has."""
    return tuple(name for name in COVERED if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def unlisted() -> tuple[str, ...]:
    """Model types of the installed transformers that are neither covered nor excluded."""
    return tuple(
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name not in COVERED and name not in EXCLUDED
    )


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny fp32 model of type `name` in eval mode; equal seeds give equal weights.

    Raises: KeyError if the installed transformers has no such type.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
            _randomise(model)
    finally:
        logging.set_verbosity(verbosity)
    return model.eval()


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether any layer of `model` routes tokens to experts."""
    return any("Expert" in type(module).__name__ for module in model.modules())


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of model type `name`, shrunk."""
    kind = CONFIG_MAPPING[name]
    return kind(**_shrunk(kind(), OVERRIDES.get(name, {})))


def _shrunk(default: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make a small configuration of the kind of `default`."""
    fields = default.to_dict()
    small = {key: size for key, size in SIZES.items() if key in fields}
    if "qk_rope_head_dim" in fields:
        # Latent attention: head sizes follow from their parts, and no two heads share a key.
        small.pop("head_dim", None)
        small["num_key_value_heads"] = HEADS
    patterns = {
        key: list(dict.fromkeys(fields[key]))
        for key in _PATTERNS
        if fields.get(key) and key not in overrides
    }
    depth = max([2, *map(len, patterns.values())])
    small |= {key: depth for key in _DEPTHS if key in small}
    small |= {key: (kinds * depth)[:depth] for key, kinds in patterns.items()}
    small |= overrides
    for key in default.sub_configs:
        part = getattr(default, key, None)
        if isinstance(part, PreTrainedConfig):
            nested = _shrunk(part, overrides.get(key, {}))
            small[key] = {"model_type": part.model_type, **nested}
    return small


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Shift every parameter by noise: the defaults are too quiet, and many biases are zero."""
    for parameter in model.parameters():
        parameter.add_(_NOISE_STD * torch.randn(parameter.shape))
    head = model.get_output_embeddings()
    head.weight.mul_(_HEAD_GAIN)

"""Models in well-known shapes, with random weights, and the FLOPs that scoring takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llfast.loading import quiet
from llfast.traits import is_mixture_of_experts

# What `config.json` says of them; what is left out is transformers' default for the architecture.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "stories15M": (
        "llama",
        {
            "hidden_size": 288,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "vocab_size": 32000,
            "max_position_embeddings": 1024,
        },
    ),
    "GPT-2": ("gpt2", {}),
    "GPT-2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "SmolLM2-135M": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-0.6B": (
        "qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "Llama-3.2-1B": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "Llama-3-8B": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """What a model computes, as far as it is counted: matrix products of its forward pass.

    2 FLOP a weight of every linear layer and token, and for attention, of each layer and token,
    2 · S · d: a query meets half of the S keys on average, and is multiplied with keys and values.
    Source: Kaplan et al., arXiv 2001.08361, table 1, where it is 2 N + 2 n_layer n_ctx d_attn.
    Norms, activations and softmaxes are not counted.

    Attributes:
        linear: (inputs, outputs) of the body's linear layers, and how many there are of each.
        attention_width: heads times width of a head, summed over layers.
        vocabulary: rows of the output head, V.
        width: its columns, D.
    """

    linear: dict[tuple[int, int], int]
    attention_width: int
    vocabulary: int
    width: int

    @staticmethod
    def of(config: Any) -> Flops:
        """Of a model that transformers makes from a config; no weights are made.

        Raises:
            ValueError: for mixtures of experts, and models without a linear output head.
        """
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        if is_mixture_of_experts(model) or not isinstance(head, nn.Linear):
            raise ValueError(
                f"model must be dense, with a linear output head, for its FLOPs to be counted, got "
                f"a {type(model).__name__}"
            )
        linear: Counter[tuple[int, int]] = Counter()
        for module in model.modules():
            if module is not head and isinstance(module, nn.Linear | Conv1D):
                shape = tuple(module.weight.shape)
                linear[shape if isinstance(module, Conv1D) else shape[::-1]] += 1
        text = config.get_text_config()
        layers, heads = (
            getattr(text, f"num_{name}", 0) for name in ("hidden_layers", "attention_heads")
        )
        head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
        return Flops(
            linear=dict(linear),
            attention_width=layers * heads * head_dim,
            vocabulary=head.out_features,
            width=head.in_features,
        )

    def body(self, shapes: Sequence[tuple[int, int]]) -> int:
        """FLOP of the body for batches of (B, S) tokens, padding included, for it is computed."""
        weights = sum(count * math.prod(shape) for shape, count in self.linear.items())
        return sum(
            rows * (2 * length * weights + 2 * length**2 * self.attention_width)
            for rows, length in shapes
        )

    def head(self, tokens: int) -> int:
        """FLOP of the head for so many scored tokens."""
        return 2 * tokens * self.vocabulary * self.width


def make_checkpoint(
    folder: Path, shape: str, tokenizer: Any, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Write a checkpoint of random weights.

    Args:
        folder: where.
        shape: one of `SHAPES`.
        tokenizer: goes with it.
        dtype: of the weights as they are stored.
        device: where weights are drawn.

    Raises:
        ValueError: for an unknown shape.
        OSError: if the folder cannot be written.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_shapes([shape])
    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=0, pad_token_id=None, **sizes)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_shapes(names: Sequence[str]) -> None:
    """Refuse what is none of `SHAPES`; ValueError."""
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")

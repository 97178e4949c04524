"""Write a checkpoint of random weights in the shape of a real model, a tensor at a time.

    python benchmarks/make_checkpoint.py FOLDER [--layers 28] [--hidden 3072] ...

Shape, names, dtype, shards and order of the tensors are those of Llama-3.2-3B as it is published:
6.4 GB in bf16. Weights are drawn so that activations stay of order one whatever the shape, and
logits have a standard deviation of one. There is no tokenizer: ids are drawn, too, by `draw_texts`.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

MOST_SHARD_BYTES = 5_000_000_000  # as transformers cuts checkpoints by default, or did
_PIECE = 1 << 22  # numbers that are drawn at once
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's sizes; the defaults are those of Llama-3.2-3B."""

    layers: int = 28
    hidden: int = 3072
    intermediate: int = 8192
    heads: int = 24
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128_256
    tied: bool = True

    def config(self) -> dict[str, Any]:
        """What `config.json` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 131_072,
            "mlp_bias": False,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500_000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in the order in which the model has them."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for number in range(self.layers):
            found |= {f"model.layers.{number}.{name}.weight": size for name, size in layer.items()}
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found


SMALL = Shape(
    layers=6, hidden=512, intermediate=1024, heads=8, kv_heads=4, head_dim=64, vocabulary=8192
)


def make_checkpoint(
    folder: Path,
    shape: Shape,
    *,
    seed: int = 0,
    most_shard_bytes: int = MOST_SHARD_BYTES,
    device: torch.device = _CPU,
) -> int:
    """Write a checkpoint; nothing of it but a few million numbers is ever in memory.

    Args:
        folder: where.
        shape: of the model.
        seed: of the numbers, which are others on another device.
        most_shard_bytes: of a file.
        device: where numbers are drawn.

    Returns: bytes of its tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = shape.tensors()
    shards = _cut(tensors, most_shard_bytes)
    files: dict[str, str] = {}
    generator = torch.Generator(device).manual_seed(seed)
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        files |= dict.fromkeys(names, file)
        _write_shard(folder / file, {name: tensors[name] for name in sorted(names)}, generator)
    total = sum(map(_nbytes, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    return total


def draw_texts(texts: int, tokens: int, vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    """Ids of texts of so many tokens each."""
    rng = np.random.default_rng(seed)
    return list(rng.integers(2, vocabulary, size=(texts, tokens)))


def _cut(tensors: dict[str, tuple[int, ...]], most_bytes: int) -> list[list[str]]:
    """Names shard by shard, in their order: a layer may lie in two of them, as it does in real."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in tensors.items():
        if shards[-1] and size + _nbytes(shape) > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(shape)
    return shards


def _write_shard(
    path: Path, tensors: dict[str, tuple[int, ...]], generator: torch.Generator
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        end = position + _nbytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            file.writelines(_weights(name, shape, generator))


def _weights(
    name: str, shape: tuple[int, ...], generator: torch.Generator
) -> Iterator[memoryview[int]]:
    """The bytes of a tensor: norms are ones, and all else keeps the size of what goes through."""
    count = int(np.prod(shape))
    # What a layer adds is kept to a quarter, or the stream would grow with every layer.
    std = shape[-1] ** -0.5 * (0.25 if "o_proj" in name or "down_proj" in name else 1.0)
    if "embed_tokens" in name:
        std = shape[-1] ** -0.5  # it is the head, too: logits of order one after a norm
    for start in range(0, count, _PIECE):
        piece = torch.ones(min(_PIECE, count - start), device=generator.device)
        if len(shape) > 1:
            piece.normal_(std=std, generator=generator)
        yield memoryview(piece.bfloat16().view(torch.uint8).cpu().numpy())


def _nbytes(shape: Iterable[int]) -> int:
    return 2 * int(np.prod(list(shape)))


def main() -> None:
    """Write one, and say how large it is."""
    defaults = Shape()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    sizes = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")
    for name in sizes:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name))
    parser.add_argument("--untied", action="store_true", help="a head apart from the embeddings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-shard-bytes", type=int, default=MOST_SHARD_BYTES)
    options = parser.parse_args()
    shape = Shape(**{name: getattr(options, name) for name in sizes}, tied=not options.untied)
    size = make_checkpoint(
        options.folder, shape, seed=options.seed, most_shard_bytes=options.most_shard_bytes
    )
    print(f"wrote {size:,} bytes of weights to {options.folder}")


if __name__ == "__main__":
    main()

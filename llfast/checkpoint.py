"""What a checkpoint folder holds, found out before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cache
from .errors import CheckpointError, UnsupportedModelError

# https://huggingface.co/docs/safetensors: a longer header is refused by its own reader, too.
_MAX_HEADER_BYTES = 100_000_000
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "tekken.json",
    "*.tiktoken", "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder with a causal language model's config and weights.

    Attributes:
        folder: where it is.
        config: the content of config.json.
        weights: the weight files, in name order.
        pickled: whether they are pickles rather than safetensors.
        parameters: stored numbers; 0 if pickled, for then they cannot be counted unread.
        weight_bytes: size of the weight files.
        stored_dtype: the safetensors dtype of most parameters ("BF16"); "" if pickled.
    """

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    pickled: bool
    parameters: int
    weight_bytes: int
    stored_dtype: str

    @classmethod
    def open(cls, folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
        """Look at a folder and refuse, by name, what cannot be scored.

        Raises:
            CheckpointError: if something is missing or damaged.
            UnsupportedModelError: for adapters, GGUF files, and pickles unless allowed.
        """
        config = _read_config(folder)
        weights = _safetensors_files(folder)
        if not weights:
            pickles = sorted(path for pattern in _PICKLED for path in folder.glob(pattern))
            if not pickles:
                raise CheckpointError(
                    f"{folder} must hold .safetensors weights, got none; is the download complete?"
                )
            if not allow_pickle:
                raise UnsupportedModelError(
                    f"{folder} must hold .safetensors weights, got pickled ones "
                    f"({pickles[0].name}), which can run code when loaded; pass "
                    "--allow-pickle if you trust them"
                )
            size = sum(path.stat().st_size for path in pickles)
            return cls(
                folder=folder,
                config=config,
                weights=tuple(pickles),
                pickled=True,
                parameters=0,
                weight_bytes=size,
                stored_dtype="",
            )
        counts: dict[str, int] = {}
        for path in weights:
            for dtype, parameters in _count_parameters(path).items():
                counts[dtype] = counts.get(dtype, 0) + parameters
        return cls(
            folder=folder,
            config=config,
            weights=tuple(weights),
            pickled=False,
            parameters=sum(counts.values()),
            weight_bytes=sum(path.stat().st_size for path in weights),
            stored_dtype=max(counts, key=lambda dtype: counts[dtype], default=""),
        )

    def digest(self) -> str:
        """sha256 (hex) over the names and contents of config, tokenizer and weights.

        Each file's own digest is remembered by its size, time of change and inode.
        """
        names = {"config.json", *(path.name for path in self.weights)}
        names.update(path.name for pattern in _TOKENIZER for path in self.folder.glob(pattern))
        digest = hashlib.sha256()
        for name in sorted(names):
            digest.update(name.encode() + b"\0")
            digest.update(cache.file_sha256(self.folder / name).encode())
        return digest.hexdigest()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA (peft) adapter rather than a model."""
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        if is_adapter(folder):
            raise UnsupportedModelError(
                f"{folder} must be a whole model, got a LoRA adapter; pass the model it was "
                "trained on with --adapter-base"
            )
        if any(folder.glob("*.gguf")):
            raise UnsupportedModelError(
                f"{folder} must hold .safetensors weights, got GGUF files; use the checkpoint "
                "that they were converted from"
            )
        raise CheckpointError(f"{folder} must be a checkpoint folder, got one without config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON, got {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(config).__name__}")
    return config


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(shards))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{index} must hold a weight_map, got something else") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} must name files of its own folder, got {name!r}")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} must hold every shard, got none named {name}")
    return [folder / name for name in names]


def _count_parameters(path: Path) -> dict[str, int]:
    """Parameters by dtype, after checking that the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{path} must be weights, got a git-lfs pointer; run `git lfs pull`"
            )
        length = int.from_bytes(start, "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} must begin with a safetensors header, got a length of {length} bytes in "
                f"a file of {size}; is the download complete?"
            )
        header = file.read(length)
    ends = [0]
    counts: dict[str, int] = {}
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for name, tensor in tensors.items():
            dtype = tensor["dtype"]
            parameters = math.prod(tensor["shape"])
            begin, end = tensor["data_offsets"]
            if (end - begin) * 8 != parameters * _DTYPE_BITS[dtype]:
                raise CheckpointError(
                    f"{path} must give each tensor the bytes of its shape, got {end - begin} for "
                    f"{name!r}, {tensor['shape']} in {dtype}"
                )
            ends.append(end)
            counts[dtype] = counts.get(dtype, 0) + parameters
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} must have a safetensors header, got {error!r}") from None
    if 8 + length + max(ends) != size:
        raise CheckpointError(
            f"{path} must be {8 + length + max(ends)} bytes long by its header, got {size}; is the "
            "download complete?"
        )
    return counts

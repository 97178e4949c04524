"""What a checkpoint folder holds, found out before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
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
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
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
        state: size, time of change and inode of config and weights when they were looked at.
    """

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    pickled: bool
    parameters: int
    weight_bytes: int
    stored_dtype: str
    state: tuple[tuple[int, int, int], ...]

    @classmethod
    def open(cls, folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
        """Look at a folder and refuse, by name, what cannot be scored.

        Raises:
            CheckpointError: if something is missing or damaged.
            UnsupportedModelError: for adapters, GGUF files, quantised weights, and pickles unless
                allowed.
        """
        config = _read_config(folder)
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise UnsupportedModelError(
                f"{folder} must hold plain weights, got quantised ones ({method}); use the "
                "checkpoint that they were made from"
            )
        weights = _weight_files(folder, "model.safetensors")
        if not weights:
            pickles = _pickles(folder, allow_pickle)
            state = _state(folder, pickles)
            return cls(
                folder=folder,
                config=config,
                weights=tuple(pickles),
                pickled=True,
                parameters=0,
                weight_bytes=sum(path.stat().st_size for path in pickles),
                stored_dtype="",
                state=state,
            )
        state = _state(folder, weights)
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
            state=state,
        )

    def refuse_changes(self) -> None:
        """Refuse what is not as it was when it was opened: its numbers would go by a wrong digest.

        Weights are mapped, not copied: what is written over them is scored.

        Raises:
            CheckpointError: if a file was written, replaced or removed.
        """
        try:
            same = _state(self.folder, self.weights) == self.state
        except FileNotFoundError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self.folder} must stay as it is while it is scored, got other files; score it "
                "again once they are written"
            )

    def digest(self) -> str:
        """sha256 (hex) over the names and contents of config, tokenizer, weights and own code.

        Each file's own digest is remembered by its size, time of change and inode.
        """
        code = ("*.py",) if "auto_map" in self.config else ()
        names = _names(self.folder, ("config.json", *_TOKENIZER, *code))
        return _digest(self.folder, names | {path.name for path in self.weights})


def tokenizer_digest(folder: Path) -> str:
    """sha256 (hex) over the names and contents of a folder's tokenizer files."""
    return _digest(folder, _names(folder, _TOKENIZER))


def adapter_digest(folder: Path) -> str:
    """sha256 (hex) over a LoRA adapter."""
    return _digest(folder, {"adapter_config.json", "adapter_model.safetensors"})


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that cannot be merged.

    Raises:
        CheckpointError: if it is damaged.
        UnsupportedModelError: if it is another kind of adapter, or a pickle.
    """
    kind = _read_json(folder / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(f"{folder} must hold a LoRA adapter, got one of type {kind}")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UnsupportedModelError(f"{folder} must hold adapter_model.safetensors, got none")
    _count_parameters(weights)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA (peft) adapter rather than a model."""
    whole = _names(folder, ("model.safetensors*", "pytorch_model.bin*"))
    return (folder / "adapter_config.json").exists() and not whole


def _names(folder: Path, patterns: Sequence[str]) -> set[str]:
    return {path.name for pattern in patterns for path in folder.glob(pattern)}


def _state(folder: Path, weights: Sequence[Path]) -> tuple[tuple[int, int, int], ...]:
    stats = [path.stat() for path in (folder / "config.json", *weights)]
    return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats)


def _digest(folder: Path, names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0")
        digest.update(cache.file_sha256(folder / name).encode())
    return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    if is_adapter(folder):
        raise UnsupportedModelError(
            f"{folder} must be a whole model, got a LoRA adapter; pass the model it was trained on "
            "with --adapter-base"
        )
    if (folder / "adapter_config.json").exists():
        # transformers would put the adapter on, or even look for its base elsewhere.
        raise UnsupportedModelError(
            f"{folder} must hold a model or a LoRA adapter, got both; move adapter_config.json "
            "away to score the model alone"
        )
    if not (folder / "config.json").exists():
        _refuse_gguf(folder)
        raise CheckpointError(f"{folder} must be a checkpoint folder, got one without config.json")
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    _refuse_pointer(path, content)
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON, got {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(found).__name__}")
    return found


def _refuse_gguf(folder: Path) -> None:
    if any(folder.glob("*.gguf")):
        raise UnsupportedModelError(
            f"{folder} must hold .safetensors weights, got GGUF files; use the checkpoint that "
            "they were converted from"
        )


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(b"version "):
        raise CheckpointError(
            f"{path} must be a whole file, got a git-lfs pointer; run `git lfs pull`"
        )


def _pickles(folder: Path, allow_pickle: bool) -> list[Path]:
    """Pickled weights, if there are any and they may be loaded."""
    pickles = _weight_files(folder, "pytorch_model.bin")
    if not pickles:
        _refuse_gguf(folder)
        others = ", ".join(sorted(_names(folder, _OTHER_WEIGHTS))[:3])
        but = f" by the names that transformers knows, but {others}" if others else ""
        raise CheckpointError(
            f"{folder} must hold .safetensors weights, got none{but}; is the download complete?"
        )
    if not allow_pickle:
        raise UnsupportedModelError(
            f"{folder} must hold .safetensors weights, got pickled ones ({pickles[0].name}), which "
            "can run code when loaded; pass --allow-pickle if you trust them"
        )
    for path in pickles:
        with path.open("rb") as file:
            _refuse_pointer(path, file.read(8))
    return pickles


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The file of that name, else the shards that its index names; none if there is neither."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    try:
        shards = sorted(set(_read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index} must hold a weight_map, got something else") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or shard == "..":
            raise CheckpointError(f"{index} must name files of its own folder, got {shard!r}")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} must hold every shard, got none named {shard}")
    return [folder / shard for shard in shards]


def _count_parameters(path: Path) -> dict[str, int]:
    """Parameters by dtype, after checking that header and file fit one another."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        _refuse_pointer(path, start)
        length = int.from_bytes(start, "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} must begin with a safetensors header, got a length of {length} bytes in "
                f"a file of {size}; is the download complete?"
            )
        header = file.read(length)
    try:
        counts, end = _parse_header(header)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} must have a safetensors header, got: {reason}") from None
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} must be {8 + length + end} bytes long by its header, got {size}; is the "
            "download complete?"
        )
    return counts


def _parse_header(header: bytes) -> tuple[dict[str, int], int]:
    """Parameters by dtype, and where the last tensor ends.

    Raises:
        ValueError: or another of its kind, if tensors leave holes, overlap, or are not as large as
            their shapes.
    """
    tensors = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    metadata = tensors.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is no text")
    counts: dict[str, int] = {}
    spans = []
    for name, tensor in tensors.items():
        dtype, shape, (begin, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
            raise ValueError(f"a size that is no natural number for {name!r}")
        parameters = math.prod(shape)
        if (end - begin) * 8 != parameters * _DTYPE_BITS[dtype]:
            raise ValueError(f"{end - begin} bytes for {name!r}, {shape} in {dtype}")
        spans.append((begin, end, name))
        counts[dtype] = counts.get(dtype, 0) + parameters
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{name!r} at {begin}, where the tensor before it ends at {position}")
        position = end
    return counts, position


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("one name for two things")
    return found

"""What a checkpoint folder holds, found out before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import cache
from .errors import CheckpointError, UnsupportedModelError
from .quantised import QuantisedWeight, plain_weights, quantisation
from .safetensors_file import StoredTensor, read_header, refuse_pointer, short, unique_keys

_WEIGHTS = "model.safetensors"
_PICKLES = "pytorch_model.bin"
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "tekken.json",
    "*.tiktoken", "sentencepiece.bpe.model",
)  # fmt: skip
# So many may be in a config however few tensors there are: layers can share them.
_LAYERS_WITHOUT_DOUBT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder with a causal language model's config and weights.

    Attributes:
        folder: where it is.
        config: the content of config.json.
        weights: the weight files, in name order.
        pickled: whether they are pickles rather than safetensors.
        parameters: stored numbers, without the scales of quantised ones; 0 if pickled, for then
            they cannot be counted unread.
        weight_bytes: size of the weight files.
        stored_dtype: the safetensors dtype of most parameters ("BF16"); "" if pickled.
        quantised: how weights are, by transformers' name ("fp8"); "" if they are not.
        bare_index: whether shards have an index without the metadata that transformers asks for.
        state: size, time of change and inode of config and weights when they were looked at.
        tensors: what is stored where, by name, file after file; empty if pickled.
        plain: the same once quantised weights are turned back, by the names that they then have.
    """

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    pickled: bool
    parameters: int
    weight_bytes: int
    stored_dtype: str
    quantised: str
    bare_index: bool
    state: tuple[tuple[int, int, int], ...]
    # There may be a million. What they are follows from the files, which `state` tells apart.
    tensors: Mapping[str, StoredTensor] = field(repr=False, compare=False)
    plain: Mapping[str, StoredTensor | QuantisedWeight] = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
        """Look at a folder and refuse, by name, what cannot be scored.

        Raises:
            CheckpointError: if something is missing or damaged.
            MissingDependencyError: if its weights take a package that is not there.
            UnsupportedModelError: for adapters, GGUF files, Mistral's own format, weights quantised
                in a way that is not turned back, and pickles unless allowed.
        """
        config = _read_config(folder)
        quantised = quantisation(folder, config)
        weights, index = _weight_files(folder, _WEIGHTS)
        pickled = not weights
        if pickled:
            weights = _pickles(folder, allow_pickle)
            if quantised:
                raise UnsupportedModelError(
                    f"{folder} must hold .safetensors weights, for they are quantised "
                    f"({quantised}), got pickled ones ({weights[0].name})"
                )
        own = _PICKLES if pickled else f"{_WEIGHTS}.index.json" if index else _WEIGHTS
        _refuse_others(folder, config, own)
        state = _state(folder, weights)
        tensors = {} if pickled else _stored_tensors(weights, index.get("weight_map", {}))
        _refuse_layers(folder, config, most=max(_LAYERS_WITHOUT_DOUBT, len(tensors)))
        plain = {} if pickled else plain_weights(folder, config, tensors)
        counts: Counter[str] = Counter()
        for tensor in plain.values():
            counts[tensor.dtype] += tensor.parameters
        return cls(
            folder=folder,
            config=config,
            weights=tuple(weights),
            pickled=pickled,
            parameters=counts.total(),
            weight_bytes=sum(path.stat().st_size for path in weights),
            stored_dtype=max(counts, key=counts.__getitem__, default=""),
            quantised=quantised,
            bare_index=_is_bare(index),
            state=state,
            tensors=tensors,
            plain=plain,
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
        names = _names(self.folder, ("config.json", *TOKENIZER_FILES, *code))
        return _digest(self.folder, names | {path.name for path in self.weights})


def tokenizer_digest(folder: Path) -> str:
    """sha256 (hex) over the names and contents of a folder's tokenizer files."""
    return _digest(folder, _names(folder, TOKENIZER_FILES))


def adapter_digest(folder: Path) -> str:
    """sha256 (hex) over a LoRA adapter, and the tokenizer that may be with it."""
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    return _digest(folder, adapter | _names(folder, TOKENIZER_FILES))


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
    read_header(weights)


def refuse_irregular(path: Path) -> None:
    """Refuse a pipe and the like, which would be waited for, for ever if nobody writes to it.

    Raises:
        CheckpointError: if something is there, but no regular file.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} must be a regular file, got something else")


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
        refuse_irregular(folder / name)
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
        _refuse_formats(folder)
        raise CheckpointError(f"{folder} must be a checkpoint folder, got one without config.json")
    return _read_json(folder / "config.json")


def _read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    refuse_irregular(path)
    content = path.read_bytes()
    refuse_pointer(path, content)
    try:
        found = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique_keys if unique else None
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON, got {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(found).__name__}")
    return found


def _refuse_others(folder: Path, config: Mapping[str, Any], own: str) -> None:
    """Refuse a config that has transformers load another file than the one by the usual name."""
    named = config.get("transformers_weights")
    if named not in (None, own):
        raise UnsupportedModelError(
            f"{folder} must hold its weights as {own}, got {short(named)} for "
            "transformers_weights in config.json; save the model again"
        )


def _refuse_layers(folder: Path, config: Mapping[str, Any], most: int) -> None:
    """Refuse far more layers than can be stored: to build them would take for ever."""
    inner = config.get("text_config")
    for each in (config, inner if isinstance(inner, dict) else {}):
        for key in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
            if isinstance(count := each.get(key), int) and count > most:
                raise CheckpointError(
                    f"{folder / 'config.json'} must have a {key} of at most {most:,}, by the "
                    f"number of tensors that are stored, got {count:,}"
                )


def _refuse_formats(folder: Path) -> None:
    """Refuse, by name, a folder without weights for transformers that has others."""
    if any(folder.glob("*.gguf")):
        raise UnsupportedModelError(
            f"{folder} must hold .safetensors weights, got GGUF files; use the checkpoint that "
            "they were converted from"
        )
    found = sorted(_names(folder, ("consolidated*.safetensors*",)))
    names, whose = [name for name in found if (folder / name).exists()], "Mistral's"
    if not names and _has_native_params(folder / "params.json"):
        names, whose = ["params.json"], "Mistral's or Meta's"
    if names:
        raise UnsupportedModelError(
            f"{folder} must hold a model as transformers saves it, got {names[0]}, of {whose} own "
            "format; use a checkpoint that was converted"
        )


def _has_native_params(path: Path) -> bool:
    """Whether these are a model's sizes as both call them: the Hub's weights are not downloaded."""
    try:
        return {"dim", "n_layers"} <= _read_json(path).keys()
    except (OSError, CheckpointError):
        return False


def _pickles(folder: Path, allow_pickle: bool) -> list[Path]:
    """Pickled weights, if there are any and they may be loaded."""
    pickles, index = _weight_files(folder, _PICKLES)
    if not pickles:
        _refuse_formats(folder)
        there = (name for name in _names(folder, _OTHER_WEIGHTS) if (folder / name).exists())
        others = ", ".join(sorted(there)[:3])
        but = f" by the names that transformers knows, but {others}" if others else ""
        saved = ", and saved by transformers" if others else ""
        raise CheckpointError(
            f"{folder} must hold .safetensors weights, got none{but}; is the download complete"
            f"{saved}?"
        )
    if not allow_pickle:
        raise UnsupportedModelError(
            f"{folder} must hold .safetensors weights, got pickled ones ({pickles[0].name}), which "
            "can run code when loaded; pass --allow-pickle if you trust them"
        )
    if _is_bare(index):
        raise CheckpointError(
            f"{folder / _PICKLES}.index.json must hold metadata, which transformers asks for, got "
            f'{short(index.get("metadata"))}; add "metadata": {{}}'
        )
    for path in pickles:
        with path.open("rb") as file:
            refuse_pointer(path, file.read(8))
    return pickles


def _is_bare(index: Mapping[str, Any]) -> bool:
    """Whether transformers fails for want of metadata, in which it looks for nothing."""
    return bool(index) and not isinstance(index.get("metadata"), dict)


def _weight_files(folder: Path, name: str) -> tuple[list[Path], dict[str, Any]]:
    """The file of that name, else the shards that its index names, and the index.

    Both are empty if there is neither.
    """
    if (folder / name).is_file():
        return [folder / name], {}
    path = folder / f"{name}.index.json"
    if not path.exists():
        return [], {}
    index = _read_json(path, unique=True)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} must hold a weight_map, got {short(weight_map)} for it")
    # transformers goes by the end of the name whether it opens a file as a pickle.
    ending = Path(name).suffix
    for tensor, shard in weight_map.items():
        if not _is_file_name(shard):
            raise CheckpointError(
                f"{path} must name files of its own folder, got {short(shard)} for {short(tensor)}"
            )
        if not shard.endswith(ending):
            raise CheckpointError(
                f"{path} must name {ending} files, got {short(shard)} for {short(tensor)}"
            )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} must hold every shard, got none named {shard}")
    return [folder / shard for shard in shards], index


def _is_file_name(name: Any) -> bool:
    """Whether it is the plain name of a file, in one line and without a folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name.isprintable()
        and not {"/", "\\"} & set(name)
        and len(name.encode()) <= 255
    )


def _stored_tensors(files: Sequence[Path], index: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors of all files, after checking that they are where the index has them.

    A tensor that the index does not name is one of the checkpoint, too: transformers loads all
    that is in the files. Of two with one name it would load the last, whatever the index says.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        header = read_header(path)
        if twice := tensors.keys() & header.keys():
            name = min(twice)
            raise CheckpointError(
                f"{path} must hold tensors that no other shard holds, got {short(name)}, which is "
                f"in {tensors[name].path.name}, too; remove one"
            )
        tensors |= header
    for name, shard in index.items():
        if name not in tensors or tensors[name].path.name != shard:
            elsewhere = f"it in {tensors[name].path.name}" if name in tensors else "none"
            raise CheckpointError(
                f"{files[0].parent / shard} must hold {short(name)} by its index, got {elsewhere}; "
                "are index and shards of one download?"
            )
    return tensors

"""Where a model's weights come from: a folder, the Hub, or memory.

`open_model` finds out everything that can be known without reading weights, and refuses what cannot
be scored; the source that it returns reads them when it is asked to.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .checkpoint import Checkpoint, adapter_digest, check_adapter, tokenizer_digest
from .dtypes import DTYPES, STORED_DTYPES, fast_dtype, parse_dtype
from .errors import CheckpointError, UnsupportedModelError
from .files import as_utf8
from .loading import load_whole, merge_adapter, one_line, quiet, refuse_incomplete

# What a scoring run reads from the Hub: never code, never pickles, unless asked for.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken"]
# Nor the same weights once more, in formats that are not transformers'.
_HUB_OTHERS = ["*/*.safetensors", "*/*.bin", "consolidated*.safetensors"]
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FolderSource:
    """A checkpoint folder, which may be a snapshot of a Hub repository."""

    name: str
    revision: str
    config: Any
    checkpoint: Checkpoint
    tokenizer_folder: Path
    trust_remote_code: bool
    adapter: Path | None = None

    def dtype(self, asked: str, device: torch.device) -> torch.dtype:
        """The dtype asked for, else the checkpoint's own where this device is fast in it."""
        if asked != "auto":
            return parse_dtype(asked)
        # Quantised weights run in the dtype that they were made from.
        kind = "" if self.checkpoint.quantised else self.checkpoint.stored_dtype
        stored: Any = STORED_DTYPES.get(kind)
        stored = stored or getattr(self.config, "dtype", None)
        return fast_dtype(stored if stored in DTYPES.values() else torch.float32, device)

    def tokenizer(self) -> Any:
        """The folder's tokenizer.

        Raises:
            CheckpointError: if there is none that can be loaded.
        """
        with quiet():
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    self.tokenizer_folder, trust_remote_code=self.trust_remote_code
                )
            except Exception as error:
                if "trust_remote_code" in str(error):
                    raise UnsupportedModelError(
                        f"{self.tokenizer_folder} must hold a tokenizer that transformers has, got "
                        "one that brings its own code; pass --trust-remote-code if you trust it"
                    ) from None
                raise CheckpointError(
                    f"{self.tokenizer_folder} must hold a tokenizer, got none that loads "
                    f"({one_line(error)}); pass one with --tokenizer"
                ) from error
        # Of some kinds, transformers makes an empty tokenizer where a folder has none.
        if len(tokenizer) - len(getattr(tokenizer, "added_tokens_decoder", ())) < 2:
            raise CheckpointError(
                f"{self.tokenizer_folder} must hold a tokenizer, got none with a vocabulary; pass "
                "one with --tokenizer"
            )
        return tokenizer

    def outline(self) -> Any:
        """The model without numbers, on the meta device; None if it cannot be built so."""
        with quiet(), torch.device("meta"):
            try:
                return transformers.AutoModelForCausalLM.from_config(
                    self.config, trust_remote_code=self.trust_remote_code
                )
            except Exception:  # it is another matter whether it can be loaded
                return None

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """Read the weights with transformers, and refuse to run with any of them missing.

        Raises:
            CheckpointError: if they cannot be read, or do not fill the model.
        """
        with quiet():
            model, report = load_whole(
                self.name, self.checkpoint, self.config, dtype, self.trust_remote_code
            )
            refuse_incomplete(self.name, model, report)
            if self.adapter is not None:
                model = merge_adapter(model, self.adapter)
        return model.to(device).eval()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemorySource:
    """A model that the caller has loaded; it is used as and where it is."""

    name: str
    revision: str
    config: Any
    model: Any
    given_tokenizer: Any
    checkpoint: Checkpoint | None = None

    def dtype(self, asked: str, device: torch.device) -> torch.dtype:  # noqa: ARG002 (protocol)
        """The dtype that it is in.

        Raises:
            ValueError: if another one is asked for, or it is in one that is not scored.
        """
        own: torch.dtype = self.model.dtype
        if own not in DTYPES.values():
            raise ValueError(f"a loaded model must be in {', '.join(DTYPES)}, got {own}")
        if asked != "auto" and parse_dtype(asked) != own:
            raise ValueError(f"dtype must be 'auto' for a loaded model in {own}, got {asked!r}")
        return own

    def tokenizer(self) -> Any:
        """The tokenizer that came with it.

        Raises:
            ValueError: if there is none.
        """
        if self.given_tokenizer is None:
            raise ValueError("tokenizer must be given with a loaded model, got None")
        return self.given_tokenizer

    def outline(self) -> Any:
        """The model itself."""
        return self.model

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:  # noqa: ARG002 (protocol)
        """The model itself.

        Raises:
            UnsupportedModelError: if some of its weights are elsewhere.
        """
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise UnsupportedModelError(
                f"model must hold its weights, got a {type(self.model).__name__} with some on the "
                "meta device; load it whole, without offloading"
            )
        return self.model


ModelSource = FolderSource | MemorySource


def open_model(
    model: Any,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    adapter_base: str | None = None,
) -> ModelSource:
    """Find a model without reading its weights.

    Args:
        model: a checkpoint folder, a Hub id, a loaded transformers model, or a pair
            (loaded model, tokenizer). What this function has returned is returned as it is.
        tokenizer: a loaded one for a loaded model; for any other, the folder of one.
        revision: a branch, tag or commit, for a Hub id.
        name: what to call it; a folder's name is its path as given.
        trust_remote_code: let the checkpoint bring code of its own.
        allow_pickle: let weights be pickles.
        adapter_base: the model that a LoRA adapter belongs to; both are merged.

    Raises:
        CheckpointError: if there is no such model, or it is damaged.
        UnsupportedModelError: if it is of a kind that cannot be scored.
    """
    if isinstance(model, FolderSource | MemorySource):
        return model
    if isinstance(model, tuple):
        if tokenizer is not None:
            raise ValueError(
                "tokenizer must be given once, got a pair with one and another; leave out one"
            )
        model, tokenizer = model
    if not isinstance(model, str | os.PathLike):
        if not hasattr(model, "config"):
            raise TypeError(
                f"model must be a folder, a Hub id or a loaded model, got a {type(model).__name__}"
            )
        if isinstance(tokenizer, str | os.PathLike):
            raise TypeError(
                f"tokenizer must be a loaded one for a loaded model, got {os.fspath(tokenizer)!r}; "
                "load it with transformers.AutoTokenizer.from_pretrained"
            )
        if adapter_base is not None:
            raise ValueError(
                "adapter_base must go with the folder or Hub id of a LoRA adapter, got a loaded "
                "model; load the adapter into it"
            )
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"model must be a causal decoder, got an encoder-decoder: {type(model).__name__}"
            )
        own_name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        return MemorySource(
            name=as_utf8(name or own_name),
            revision=revision or "",
            config=model.config,
            model=model,
            given_tokenizer=tokenizer,
        )
    if tokenizer is not None and not isinstance(tokenizer, str | os.PathLike):
        raise TypeError(
            "tokenizer must be a folder where the model is one or a Hub id, got a "
            f"{type(tokenizer).__name__}"
        )
    given = os.fspath(model)
    folder, commit = find_folder(given, revision, trust_remote_code, allow_pickle)
    base, base_commit = folder, commit
    if adapter_base is not None:
        if not (folder / "adapter_config.json").exists():
            raise ValueError(
                f"adapter_base must go with a LoRA adapter, got {given}, which is none; leave it "
                "out"
            )
        check_adapter(folder)
        base, base_commit = find_folder(adapter_base, None, trust_remote_code, allow_pickle)
    checkpoint = Checkpoint.open(base, allow_pickle=allow_pickle)
    config = _load_config(base, trust_remote_code)
    _refuse_other_kinds(given, config)
    revision_parts = [base_commit or checkpoint.digest()]
    if adapter_base is not None:
        revision_parts.append(commit or adapter_digest(folder))
    if tokenizer is not None:
        other = Path(tokenizer)
        revision_parts.append(tokenizer_digest(other) if other.is_dir() else str(other))
    own_tokenizer = (folder / "tokenizer_config.json").exists()  # an adapter may have none
    return FolderSource(
        name=as_utf8(name or (os.path.normpath(given) if commit is None else given)),
        revision=_revision(revision_parts),
        config=config,
        checkpoint=checkpoint,
        tokenizer_folder=Path(tokenizer or (folder if own_tokenizer else base)),
        trust_remote_code=trust_remote_code,
        adapter=folder if adapter_base is not None else None,
    )


def find_folder(
    given: str, revision: str | None, trust_remote_code: bool, allow_pickle: bool
) -> tuple[Path, str | None]:
    """The folder of a model, and its commit if it comes from the Hub, which is asked then.

    Raises:
        CheckpointError: if there is none.
        UnsupportedModelError: if it is a file.
    """
    path = Path(given)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision is for Hub ids, got {revision!r} for the folder {given}")
        return path, None
    if path.exists():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a file"
        raise UnsupportedModelError(
            f"model must be a checkpoint folder or Hub id, got {kind}: {given}"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given) or given.startswith("."):
        raise CheckpointError(
            f"model must be a checkpoint folder or Hub id, got {given}: no folder"
        )
    from huggingface_hub import errors, snapshot_download

    files = [*_HUB_FILES]
    files += ["*.py"] * trust_remote_code + ["*.bin"] * allow_pickle
    download = partial(
        snapshot_download,
        given,
        revision=revision,
        allow_patterns=files,
        ignore_patterns=_HUB_OTHERS,
    )
    try:
        folder = Path(download())
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"revision must be one of {given}'s, got {revision!r}") from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"model {given} must be open to you, got a gated one; accept its terms on the Hub and "
            "run `hf auth login`"
        ) from None
    except Exception as error:
        # Of a commit, huggingface_hub 1 wants a list of files, which older caches lack; a name has
        # been looked up in the cache by now. After other errors the cache may have half of it.
        if _COMMIT.fullmatch(revision or "") and _is_unreachable(error):
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                folder = Path(download(local_files_only=True))
                return folder, folder.name
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"model must be a checkpoint folder or Hub id, got {given}{at}: there is no such "
            f"folder, and the Hub did not give it ({one_line(error)})"
        ) from error
    return folder, folder.name


def _is_unreachable(error: Exception) -> bool:
    """Whether the Hub could not be asked at all; huggingface_hub hands errors of httpx on."""
    names = ("ConnectError", "ConnectTimeout")
    return isinstance(error, ConnectionError) or type(error).__name__ in names


def _load_config(folder: Path, trust_remote_code: bool) -> Any:
    """The model's, as if its weights were plain: `Checkpoint` knows how they are quantised."""
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise UnsupportedModelError(
                    f"{folder} must be of an architecture that transformers has, got one that "
                    "brings its own code; pass --trust-remote-code if you trust it"
                ) from None
            raise UnsupportedModelError(
                f"{folder} must have a config that transformers understands, got: {one_line(error)}"
            ) from error
    for each in (config, config.get_text_config()):
        _refuse_counts(folder, each)
        each.return_dict = True  # without names, transformers' own models do not find their states
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    return config


def _refuse_counts(folder: Path, config: Any) -> None:
    """Refuse counts below zero, and no words: some fail in the first forward, some do nothing."""
    if not type(config).__module__.startswith("transformers."):
        return  # code of its own may mean something by them
    for key, count in vars(config).items():
        least = 1 if key == "vocab_size" else 0
        is_count = key == "vocab_size" or key.startswith("num_")
        if is_count and isinstance(count, int) and count < least:
            raise UnsupportedModelError(
                f"{folder} must have a config with {key} of at least {least}, got {count}"
            )


def _refuse_other_kinds(name: str, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    brings_causal_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    what = ", ".join(architectures) or config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} must be a causal decoder, got an encoder-decoder: {what}"
        )
    if brings_causal_code:
        return
    # A bare "...Model" may be a causal model saved without its tied head, and one that takes images
    # may hold one that takes text; their keys will tell.
    kinds = ("Model", "ForConditionalGeneration")
    fits = any(each == causal or each.endswith(kinds) for each in architectures)
    if causal is None or (architectures and not fits):
        raise UnsupportedModelError(f"{name} must be a causal language model, got {what}")


def _revision(parts: Sequence[str]) -> str:
    """Of a model that is put together from several places, a digest of what each one is."""
    return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()

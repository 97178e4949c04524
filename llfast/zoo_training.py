"""Trains the demo's small models: a tokenizer, batches of tokens, runs with snapshots, a merge.

Everything here is a function of its arguments and of files that it names, so that the runs of a
zoo can go to several processes.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt16
from torch.nn import functional

from .files import atomic_write
from .loading import quiet
from .zoo_corpora import Document, name_fraction

END_OF_TEXT = "<|endoftext|>"
ARCHITECTURES = ("gpt2", "llama", "gpt_neox", "qwen3")
PROVENANCE = "provenance.json"
MAX_TOKENS = 1024  # positions a model has: at one token a byte, a text of 1,024 bytes still fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What a run reads.

    Attributes:
        name: with the run's seed it chooses the documents that are read.
        prose_share: the share of training windows that are prose; the others are code.
        pool_share: about this share of the training documents is read.
    """

    name: str
    prose_share: float
    pool_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """One run of an optimiser: from where, on what, how long, and what is kept of it.

    Attributes:
        name: the name of the run; with `seed` it seeds its weights and batches.
        architecture: transformers' model type.
        start: the model that the run goes on from; None starts from random weights.
        mixture: what is read.
        learning_rate: the peak, reached after a tenth of the steps; a cosine then falls to a tenth.
        snapshots: (step, model name) of every model that is saved; the last is the run's end.
    """

    name: str
    architecture: str
    start: str | None
    mixture: Mixture
    learning_rate: float
    snapshots: tuple[tuple[int, str], ...]
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.snapshots[-1][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The shape of every model and batch of a zoo.

    Attributes:
        vocabulary: tokens of the tokenizer, at most 65,536.
        width: hidden width, a multiple of `8 * heads`.
        layers: decoder layers.
        heads: attention heads.
        window_tokens: tokens in a training window, about those of a 1,024-byte text.
        batch_rows: windows in a batch.
    """

    vocabulary: int = 2048
    width: int = 128
    layers: int = 2
    heads: int = 4
    window_tokens: int = 384
    batch_rows: int = 2

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "window_tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 257 <= self.vocabulary <= 65_536:
            raise ValueError(
                "vocabulary must lie in 257 to 65,536 (every byte, and the end of a text), "
                f"got {self.vocabulary}"
            )
        if self.width < 1 or self.width % (8 * self.heads):
            raise ValueError(f"width must be a multiple of 8 * heads, got {self.width}")
        if self.window_tokens > MAX_TOKENS:
            raise ValueError(
                f"window_tokens must be at most {MAX_TOKENS}, got {self.window_tokens}"
            )


def train_tokenizer(documents: Sequence[Document], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (a transformers fast tokenizer) that adds no special tokens.

    None is added so that all models are scored alike; the end of a text is there for training.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def tokenize_documents(
    folder: Path, documents: Sequence[Document]
) -> list[tuple[Document, UInt16[np.ndarray, " tokens"]]]:
    """Each document with its tokens and an end of text after them."""
    tokenizer = _load_tokenizer(folder)
    encodings = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    end = tokenizer.eos_token_id
    return [
        (document, np.array([*encoding.ids, end], dtype=np.uint16))
        for document, encoding in zip(documents, encodings, strict=True)
    ]


def sample_batches(
    run: TrainingRun,
    sizes: Sizes,
    documents: Sequence[tuple[Document, UInt16[np.ndarray, " tokens"]]],
) -> UInt16[np.ndarray, "steps rows tokens"]:
    """All batches of a run: windows at random places of its pool's prose and code.

    Raises:
        ValueError: if the pool has fewer tokens of a kind than a window.
    """
    streams = {}
    pool = f"{run.seed}: {run.mixture.name}"
    for kind in ("prose", "code"):
        ranked = [
            (rank, tokens)
            for document, tokens in documents
            if document.kind == kind
            and (rank := name_fraction(document.name, pool)) < run.mixture.pool_share
        ]
        ranked.sort(key=lambda entry: entry[0])
        stream = np.concatenate([tokens for _, tokens in ranked] or [np.empty(0, np.uint16)])
        if len(stream) < sizes.window_tokens:
            raise ValueError(
                f"window_tokens must be at most the {len(stream)} tokens of {kind} in "
                f"{run.mixture.name}, got {sizes.window_tokens}; give more training documents"
            )
        streams[kind] = stream
    random = np.random.default_rng([run.seed, zlib.crc32(run.name.encode()), 1])
    batches = np.empty((run.steps, sizes.batch_rows, sizes.window_tokens), np.uint16)
    for row in batches.reshape(-1, sizes.window_tokens):
        stream = streams["prose" if random.random() < run.mixture.prose_share else "code"]
        start = random.integers(len(stream) - sizes.window_tokens + 1)
        row[:] = stream[start : start + sizes.window_tokens]
    return batches


def train(
    run: TrainingRun,
    sizes: Sizes,
    batches: UInt16[np.ndarray, "steps rows tokens"],
    folder: Path,
    provenance: bytes,
    missing: frozenset[str],
) -> None:
    """Run the optimiser and save those snapshots that are `missing` into `folder`.

    The caller's random state is left as it was.

    Raises:
        OSError: if a model cannot be written.
    """
    wanted = {step: name for step, name in run.snapshots if name in missing}
    tokenizer = _load_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((run.seed << 32) + zlib.crc32(run.name.encode()))
        model = (
            _new_model(run.architecture, sizes, tokenizer.eos_token_id)
            if run.start is None
            else _load_model(folder / run.start)
        )
        model.train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        for step in range(1, max(wanted) + 1):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate * _learning_rate_factor(step, run.steps)
            ids: Int64[torch.Tensor, "rows tokens"]
            ids = torch.from_numpy(batches[step - 1].astype(np.int64))
            logits = model(input_ids=ids, use_cache=False).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step in wanted:
                publish_model(folder / wanted[step], model, tokenizer, provenance)


def merge(name: str, parents: Sequence[str], folder: Path, provenance: bytes) -> None:
    """Save the model whose weights are the mean of its parents' weights."""
    models = [_load_model(folder / parent) for parent in parents]
    state = [model.state_dict() for model in models]
    merged = {key: sum(other[key] for other in state) / len(state) for key in state[0]}
    models[0].load_state_dict(merged)
    publish_model(folder / name, models[0], _load_tokenizer(folder), provenance)


def publish(path: Path, provenance: bytes, save: Callable[[Path], object]) -> None:
    """Let `save` fill a temporary folder, then give it its name: a folder is whole or not there.

    What had the name is removed. Temporary names begin with a dot and are the writer's own.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        save(temporary)
        with atomic_write(temporary / PROVENANCE) as file:
            file.write(provenance)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_model(path: Path, model: Any, tokenizer: Any, provenance: bytes) -> None:
    """Save a model and its tokenizer as an ordinary safetensors checkpoint."""

    def save(temporary: Path) -> None:
        with quiet():
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    publish(path, provenance, save)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def _load_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _new_model(architecture: str, sizes: Sizes, end_of_text: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    gated_width = sizes.width * 8 // 3 // 8 * 8  # three matrices of it equal two of 4 * width
    extra: dict[str, dict[str, Any]] = {
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "llama": {"intermediate_size": gated_width, "num_key_value_heads": sizes.heads},
        "gpt_neox": {"intermediate_size": 4 * sizes.width},
        "qwen3": {
            "intermediate_size": gated_width,
            "num_key_value_heads": sizes.heads // 2 or 1,
            "head_dim": sizes.width // sizes.heads,
        },
    }
    config = AutoConfig.for_model(
        architecture,
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=None,
        **extra[architecture],
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth."""
    warm_up = max(1, steps // 10)
    if step <= warm_up:
        return step / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


def start_worker() -> None:
    """Set up a process of the pool: one thread, and gone when it is no longer wanted."""
    import signal
    import threading
    from multiprocessing import parent_process

    # Two processes of one thread train twice as fast as one process of two threads (matrices of
    # this size are too small to share), and more threads than cores bring it to a crawl.
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # a killed parent must not leave a worker waiting for tasks

    threading.Thread(target=watch, daemon=True).start()

"""Score texts with a causal language model: the hot path.

score ── open_model (models.py) ── tokenize (batches.py) ── find_head (head.py)
  ├─ linear_layers (linear.py)   the body's matrix products, by a table of processors
  └─ _score_texts       plan the batches; halve the token budget when memory runs out
       └─ _run_batch    ids (B, S) ─▶ model body ─▶ hidden (B, S, D)
                        ─▶ real positions, packed (T, D) ─▶ token_logprobs (kernels/) ─▶ (T,)
  └─ partial.py keeps finished texts on disk; results.py holds what is returned
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float32, Int64
from torch import Tensor

from .batches import (
    GIVEN_TOKENS,
    Batch,
    TokenizedTexts,
    added_bos,
    given_tokens,
    model_max_length,
    plan_batches,
    tokenize,
)
from .borrowing import borrowed
from .devices import default_token_budget, device_name, resolve_device
from .errors import LlfastWarning, ScoringError
from .head import Head, find_head, hidden_states, run_model
from .kernels import instruction_set
from .linear import linear_layers, linear_path
from .models import FolderSource, MemorySource, open_model
from .partial import PartialScores
from .progress import progress_bar
from .results import LogLikelihoods
from .texts import TextSet
from .traits import (
    check_fit,
    is_mixture_of_experts,
    probe_tokens,
    rope_limits,
    vocabulary_rows,
)

SCORING_VERSION = 1  # part of every stored key: raised when a release changes numbers
# Beyond what any chip needs; short batches are filled up to it with dummy rows.
_LARGEST_TOKEN_BUDGET = 1 << 20
_OWN_LOGITS_BYTES = 256 << 20  # the most that a model's own logits may take where they are needed


def score(
    model: Any,
    texts: TextSet | Iterable[str] | None = None,
    *,
    tokenizer: Any = None,
    token_ids: Sequence[Any] | None = None,
    convention: str = "paper",
    dtype: str = "auto",
    device: str = "auto",
    token_budget: int | None = None,
    per_token: bool = False,
    name: str | None = None,
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    adapter_base: str | None = None,
    partial: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> LogLikelihoods:
    """The log-likelihood of every text under a causal language model.

    A dense model gives a text the same bits whatever else is scored with it, in any order, and
    after any restart, on one machine with one torch version and thread count. A mixture of experts
    runs one text a batch, so that no text's routing can touch another's.

    Args:
        model: a checkpoint folder, a Hub id, a loaded transformers model, a pair (loaded model,
            tokenizer), or what `models.open_model` returns.
        texts: N texts; may be left out if `token_ids` are given (bits per byte are NaN then).
        tokenizer: for a loaded model; or the folder of a tokenizer.
        token_ids: N lists or arrays of token ids, scored as they are, tokens 2..n of each. A store
            keeps the newest such result of a model and text set; the ids' sha256 goes with it.
        convention: which tokens are fed and scored, see `batches.tokenize`.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own, except that a CPU
            runs fp16 (and bf16, where it is slower) in fp32.
        device: "cpu", "cuda", "cuda:1", ..., or "auto": a CUDA device if there is one.
        token_budget: the most tokens in a batch; halved when memory runs out.
        per_token: keep the logprob of every token, too.
        name: what to call the model; by default its path or id as given.
        revision: branch, tag or commit of a Hub id; for a loaded model, what names its weights.
        metadata: columns to keep with the result; plain JSON values.
        trust_remote_code: let the checkpoint bring code of its own.
        allow_pickle: let weights be pickles.
        adapter_base: the model that a LoRA adapter belongs to.
        partial: a file in which finished texts are kept while the run goes on, so that a killed
            run can continue with the same bits; remove it once the result is stored.
        progress: show a bar; None means if standard error is a terminal.

    Returns:
        (N,) log-likelihoods in nats, with all that names how they were made.

    Raises:
        CheckpointError: if the model cannot be found or loaded.
        UnsupportedModelError: if it is of a kind that has no log-likelihood.
        ScoringError: if the numbers are not finite, or memory does not do for one text.
        ValueError: for arguments that make no sense.
        TypeError: for metadata that is not JSON.
    """
    source = (
        model
        if isinstance(model, FolderSource | MemorySource)
        else open_model(
            model,
            tokenizer=tokenizer,
            revision=revision,
            name=name,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            adapter_base=adapter_base,
        )
    )
    if partial is not None and not source.revision:
        raise ValueError(
            "partial must go with weights that have a name, got a loaded model without a revision; "
            "pass revision, or the checkpoint's folder"
        )
    place = resolve_device(device, source)
    body_dtype = source.dtype(dtype, place)
    budget = default_token_budget(place) if token_budget is None else token_budget
    json.dumps(dict(metadata or {}))  # what a store could not keep is refused before the work
    if not 1 <= budget <= _LARGEST_TOKEN_BUDGET:
        raise ValueError(
            f"token_budget must be from 1 to {_LARGEST_TOKEN_BUDGET:,}, got {budget}; leave it out "
            "for the default"
        )
    if token_ids is not None:
        if convention != "paper":
            raise ValueError(
                f"convention must be left out with token_ids, got {convention!r}; they are scored "
                "as they are"
            )
        convention, adds_bos = GIVEN_TOKENS, None
        tokens = given_tokens(token_ids, model_max_length(source.config, None, convention))
        texts, text_bytes = _texts_of(tokens, texts)
    else:
        if texts is None:
            raise ValueError("texts must be given, got neither texts nor token_ids")
        texts = texts if isinstance(texts, TextSet) else TextSet.from_texts(texts)
        text_bytes = texts.text_bytes
        own = source.tokenizer()
        tokens = tokenize(texts, own, convention, model_max_length(source.config, own, convention))
        adds_bos = convention != "paper" or added_bos(own) is not None

    loaded = source.load(body_dtype, place)
    if source.checkpoint is not None:
        source.checkpoint.refuse_changes()  # before a text is kept on disk
    provenance = {
        "device": device_name(place),
        "instruction_set": instruction_set(place),
        "threads": torch.get_num_threads() if place.type == "cpu" else 0,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": getattr(loaded.config, "_attn_implementation", None) or "",
        "mixture_of_experts": is_mixture_of_experts(loaded),
        "adds_bos": adds_bos,
        "tokens_sha256": tokens.digest(),
    }
    with borrowed(loaded):
        check_fit(loaded, tokens, texts.ids)
        head = find_head(loaded, probe_tokens(loaded))
        provenance["head"] = "own logits" if head is None else str(head)
        output = None if head is None else head.module
        linear = linear_path(place, body_dtype, model=loaded, leave_out=output)
        provenance["linear"] = linear
        key = repr((source.revision, texts.digest, convention, body_dtype, provenance))
        with (
            PartialScores.open(tokens, partial, key=key, per_token=per_token) as scores,
            progress_bar(source.name, done=scores.done, total=len(texts), show=progress) as advance,
            linear_layers(loaded, linear, rows=budget, leave_out=output),
        ):
            run = _Run(loaded, head, tokens, texts.ids)
            for batch_texts in _score_texts(run, scores, budget):
                advance(len(batch_texts), int(tokens.token_counts[batch_texts].sum()))
    if source.checkpoint is not None:
        source.checkpoint.refuse_changes()
    return LogLikelihoods(
        model=source.name,
        revision=source.revision,
        textset_digest=texts.digest,
        convention=convention,
        dtype=str(body_dtype).removeprefix("torch."),
        scoring_version=SCORING_VERSION,
        ids=texts.ids,
        loglikelihoods=scores.loglikelihoods,
        token_counts=tokens.token_counts,
        text_bytes=text_bytes,
        truncated=tokens.truncated,
        token_budgets=scores.token_budgets,
        groups=texts.groups,
        logprobs=scores.logprobs,
        provenance=provenance,
        metadata=dict(metadata or {}),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """What stays the same from batch to batch."""

    model: Any
    head: Head | None
    tokens: TokenizedTexts
    ids: Sequence[str]

    def plan(self, token_budget: int) -> list[Batch]:
        """The batches of all texts."""
        rows = 1 if is_mixture_of_experts(self.model) else None
        if self.head is None:
            vocabulary = vocabulary_rows(self.model) or 1
            token_budget = min(token_budget, _OWN_LOGITS_BYTES // (4 * vocabulary))
        limits = [limit for _, limit in rope_limits(self.model.config)]
        return plan_batches(self.tokens, max(token_budget, 1), rows_per_batch=rows, limits=limits)


def _score_texts(run: _Run, scores: PartialScores, token_budget: int) -> Iterator[list[int]]:
    """Score what is not yet scored, and yield the texts of each batch that is done."""
    while True:
        smaller = False
        for batch in run.plan(token_budget):
            unscored = [text for text in batch.texts if np.isnan(scores.loglikelihoods[text])]
            if not unscored:
                continue
            name = run.ids[batch.texts[0]]
            try:
                logprobs = _run_batch(run, batch)
            except IndexError as error:  # some models have fewer positions than they say
                raise ScoringError(
                    f"{batch.shape[1]} tokens must fit the model's embeddings, got {error} for "
                    f"text {name!r}; leave out the longest texts"
                ) from error
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if batch.shape[0] == 1:
                    raise ScoringError(
                        f"memory must hold one text of {batch.shape[1]} tokens, got too little for "
                        f"text {name!r}; use a smaller dtype or another device"
                    ) from error
                smaller = True
                break
            _keep(run, batch, logprobs, unscored, scores, token_budget)
            yield unscored
        if not smaller:
            return
        token_budget //= 2
        warnings.warn(
            f"out of memory: token_budget halved to {token_budget}", LlfastWarning, stacklevel=3
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run_batch(run: _Run, batch: Batch) -> Float32[Tensor, " T"]:
    """Log-probabilities (T,) of all scored tokens of a batch, text after text, on the host."""
    input_ids = np.zeros(batch.shape, dtype=np.int64)  # padding and dummy rows: token 0
    targets = []
    for row, text in enumerate(batch.texts):
        ids = run.tokens[text]
        inputs = ids[: run.tokens.max_length]
        input_ids[row, : len(inputs)] = inputs
        targets.append(ids[1:])
    counts = [len(target) for target in targets]
    device = run.model.device
    rows = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device)
    columns = torch.from_numpy(np.concatenate([np.arange(count) for count in counts])).to(device)
    target = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device)
    inputs_on_device = torch.from_numpy(input_ids).to(device)
    if run.head is None:
        return _own_logprobs(run_model(run.model, inputs_on_device), rows, columns, target).cpu()
    with hidden_states(run.head) as collected:
        run_model(run.model, inputs_on_device)
    return run.head.token_logprobs(collected[0][rows, columns], target).cpu()


def _own_logprobs(
    logits: Tensor, rows: Tensor, columns: Tensor, target: Tensor
) -> Float32[Tensor, " T"]:
    """From the model's own logits (B, S, V), a bounded number of rows at a time."""
    step = max(1, (_OWN_LOGITS_BYTES // 4) // (4 * logits.shape[-1]))
    parts = []
    for start in range(0, len(target), step):
        part = slice(start, start + step)
        chosen = torch.log_softmax(logits[rows[part], columns[part]].float(), dim=-1)
        parts.append(chosen.gather(1, target[part, None])[:, 0])
    return torch.cat(parts)


def _keep(
    run: _Run,
    batch: Batch,
    logprobs: Float32[Tensor, " T"],
    unscored: Sequence[int],
    scores: PartialScores,
    token_budget: int,
) -> None:
    """Sum a batch's logprobs by text, rounded once, to fp64; refuse what is not finite."""
    ends = np.cumsum(run.tokens.token_counts[list(batch.texts)])
    for text, part in zip(batch.texts, np.split(logprobs.numpy(), ends[:-1]), strict=True):
        if text not in unscored:
            continue
        total = math.fsum(part)
        if not math.isfinite(total):
            dtype = run.model.dtype
            hint = "; score it with dtype bfloat16 or float32" if dtype == torch.float16 else ""
            raise ScoringError(
                f"logprobs must be finite, got {total} for text {run.ids[text]!r} in "
                f"{str(dtype).removeprefix('torch.')}{hint}"
            )
        scores.keep(text, total, part, token_budget)
    scores.save_now_and_then()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def _texts_of(
    tokens: TokenizedTexts, texts: TextSet | Iterable[str] | None
) -> tuple[TextSet, Int64[np.ndarray, " N"]]:
    """The texts that given token ids stand for, and their bytes (0 where nobody says)."""
    if texts is None:
        # A stand-in that gives the ids a digest.
        stand_in = [" ".join(map(str, tokens[row].tolist())) for row in range(len(tokens))]
        return TextSet.from_texts(stand_in), np.zeros(len(tokens), dtype=np.int64)
    texts = texts if isinstance(texts, TextSet) else TextSet.from_texts(texts)
    if len(tokens) != len(texts):
        raise ValueError(f"token_ids must be one a text ({len(texts)}), got {len(tokens)}")
    return texts, texts.text_bytes

"""Score texts with a causal language model: the hot path.

score ── open_model (models.py) ── tokenize (batches.py) ── open_engine (engines.py)
  ├─ resident    find_head (head.py), then batch after batch (batchwise.py)
  ├─ paged       layer after layer, under many batches at once (paging/)
  │    either:   ids (B, S) ─▶ model body, its matrix products by linear.py ─▶ hidden (B, S, D)
  │              ─▶ real positions, packed (T, D) ─▶ fused head (kernels/) ─▶ (T,)
  └─ _keep       sums by text; partial.py keeps them on disk, results.py is what is returned
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Int64

from .batches import (
    GIVEN_TOKENS,
    TokenizedTexts,
    added_bos,
    given_tokens,
    model_max_length,
    tokenize,
)
from .devices import default_token_budget, device_name, resolve_device
from .engines import Engine, Finished, Job, check_budget, open_engine
from .errors import CheckpointError, ScoringError
from .kernels import instruction_set
from .models import FolderSource, MemorySource, ModelSource, open_model
from .paging import LoadingStatistics
from .partial import PartialScores
from .progress import progress_bar
from .results import LogLikelihoods
from .texts import TextSet
from .traits import is_mixture_of_experts
from .verify import Verification

SCORING_VERSION = 1  # part of every stored key: raised when a release changes numbers
# Beyond what any chip needs; short batches are filled up to it with dummy rows.
_LARGEST_TOKEN_BUDGET = 1 << 20


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
    weights: str = "auto",
    memory_budget: int | str | None = None,
    verify: bool | str | PathLike[str] = False,
    per_token: bool = False,
    name: str | None = None,
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    adapter_base: str | None = None,
    partial: str | PathLike[str] | None = None,
    progress: bool | None = None,
    loading: LoadingStatistics | None = None,
) -> LogLikelihoods:
    """The log-likelihood of every text under a causal language model.

    A dense model gives a text the same bits whatever else is scored with it, in any order, and
    after any restart, on one machine with one torch version and thread count. A mixture of experts
    runs one text a batch, so that no text's routing can touch another's. Threads of one process
    take turns.

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
        weights: "resident" loads all of a model before it is run; "paged" reads a layer at a time,
            and takes as many texts through it as memory holds; "auto" pages what does not fit. A
            model that runs one way or the other has the same bits.
        memory_budget: for weights and texts on their way, in bytes or as "8GiB"; without one, 80 %
            of the memory that is free.
        verify: compare the sha256 of every weight file with the one that the Hub's cache has for
            it, or a manifest (a file as `sha256sum` writes it); no result is given before.
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
        loading: filled in with what paging and verifying take, while it goes on.

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
    memory_bytes = check_budget(weights, memory_budget)
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

    loading = LoadingStatistics() if loading is None else loading
    verification = _verification(source, verify, loading)
    job = Job(
        source=source,
        tokens=tokens,
        ids=texts.ids,
        dtype=body_dtype,
        device=place,
        token_budget=budget,
        memory_bytes=memory_bytes,
        statistics=loading,
    )
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(open_engine(job, weights))
        _refuse_changes(source)  # before a text is kept on disk
        provenance = {
            "device": device_name(place),
            "instruction_set": instruction_set(place),
            "threads": torch.get_num_threads() if place.type == "cpu" else 0,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attention": getattr(engine.model.config, "_attn_implementation", None) or "",
            "mixture_of_experts": is_mixture_of_experts(engine.model),
            "adds_bos": adds_bos,
            "tokens_sha256": tokens.digest(),
            "linear": engine.linear,
        }
        # A commit names what files should hold, and these tell what they were.
        state = () if source.checkpoint is None else source.checkpoint.state
        key = repr((source.revision, state, texts.digest, convention, body_dtype, provenance))
        scores = stack.enter_context(
            PartialScores.open(tokens, partial, key=key, per_token=per_token)
        )
        advance = stack.enter_context(
            progress_bar(source.name, done=scores.done, total=len(texts), show=progress)
        )
        if verification is not None:
            stack.enter_context(_verified(verification, scores))
        for finished in engine.run(lambda batch: bool(scores.open_texts(batch))):
            for each in finished:
                done = scores.open_texts(each.batch)
                _keep(each, tokens, texts.ids, scores, body_dtype)
                advance(len(done), int(tokens.token_counts[done].sum()))
            if verification is not None:
                verification.check()
            scores.save() if engine.weights == "paged" else scores.save_now_and_then()
        if verification is not None:
            verification.check(wait=True)
        provenance["head"] = _head_name(engine)
        provenance["weights"] = engine.weights
    _refuse_changes(source)
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


def _keep(
    finished: Finished,
    tokens: TokenizedTexts,
    ids: Sequence[str],
    scores: PartialScores,
    dtype: torch.dtype,
) -> None:
    """Sum a batch's logprobs by text, rounded once, to fp64; refuse what is not finite."""
    batch = finished.batch
    ends = np.cumsum(tokens.token_counts[list(batch.texts)])
    parts = np.split(finished.logprobs.numpy(), ends[:-1])
    unscored = scores.open_texts(batch)
    for text, part in zip(batch.texts, parts, strict=True):
        if text not in unscored:
            continue
        total = math.fsum(part)
        if not math.isfinite(total):
            hint = "; score it with dtype bfloat16 or float32" if dtype == torch.float16 else ""
            raise ScoringError(
                f"logprobs must be finite, got {total} for text {ids[text]!r} in "
                f"{str(dtype).removeprefix('torch.')}{hint}"
            )
        scores.keep(text, total, part, finished.token_budget)


def _verification(
    source: ModelSource, verify: bool | str | PathLike[str], loading: LoadingStatistics
) -> Verification | None:
    if verify is False:
        return None
    if source.checkpoint is None:
        raise ValueError(f"verify must be False for a loaded model, got {verify!r}")
    return Verification(source.checkpoint, None if verify is True else Path(verify), loading)


@contextlib.contextmanager
def _verified(verification: Verification, scores: PartialScores) -> Iterator[None]:
    """Verify meanwhile; what was scored with wrong bytes is not kept."""
    try:
        with verification:
            yield
    except CheckpointError:
        if verification.failed:
            scores.discard()
        raise


def _head_name(engine: Engine) -> str:
    if engine.head is not None:
        return str(engine.head)
    return "own logits" if engine.weights == "resident" else "not asked: nothing was left to run"


def _refuse_changes(source: ModelSource) -> None:
    if source.checkpoint is not None:
        source.checkpoint.refuse_changes()


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

"""Score texts with causal language models: the hot path.

score ── open_model (models.py) ── tokenize (batches.py) ── open_engine (engines.py)
  ├─ resident    find_head (head.py), then batch after batch (batchwise.py)
  ├─ paged       layer after layer, under many batches at once, of several models (paging/)
  │    either:   ids (B, S) ─▶ model body, its matrix products by linear.py ─▶ hidden (B, S, D)
  │              ─▶ real positions, packed (T, D) ─▶ fused head (kernels/) ─▶ (T,)
  └─ Run (runs.py)   sums by text; partial.py keeps them on disk, results.py is what is returned
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .engines import find_relatives
from .models import open_model
from .paging import LoadingStatistics
from .results import LogLikelihoods
from .runs import carry_out, carry_out_together, prepare
from .texts import TextSet


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
        tokenizer: a loaded one for a loaded model; for any other, the folder of one.
        token_ids: N lists or arrays of token ids, scored as they are, tokens 2..n of each. A store
            keeps the newest such result of a model and text set; the ids' sha256 goes with it.
        convention: which tokens are fed and scored, see `batches.tokenize`.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own, except that a CPU
            runs fp16 (and bf16, where it is slower) in fp32.
        device: "cpu", "cuda", "cuda:1", ..., or "auto": a CUDA device if there is one.
        token_budget: the most tokens in a batch; halved when memory runs out. With another one,
            batches have other shapes, in which torch may round otherwise.
        weights: "resident" loads all of a model before it is run; "paged" reads a layer at a time,
            and takes as many texts through it as memory holds; "auto" pages what does not fit. A
            model that runs one way or the other has the same bits.
        memory_budget: for weights and texts on their way, in bytes or as "8GiB"; without one, 80 %
            of the memory that is free. It must hold all weights of a model that cannot be paged,
            and is not for a loaded one, whose weights are there already.
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
        TypeError: for metadata that is not JSON, or a `verify` that is no path.
    """
    source = open_model(
        model,
        tokenizer=tokenizer,
        revision=revision,
        name=name,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        adapter_base=adapter_base,
    )
    run = prepare(
        source,
        texts,
        token_ids=token_ids,
        convention=convention,
        dtype=dtype,
        device=device,
        token_budget=token_budget,
        memory_budget=memory_budget,
        weights=weights,
        verify=verify,
        per_token=per_token,
        metadata=metadata,
        partial=partial,
        loading=loading,
    )
    return carry_out(run, weights, progress)


def score_many(
    models: Sequence[Any],
    texts: TextSet | Iterable[str] | None = None,
    *,
    token_ids: Sequence[Any] | None = None,
    convention: str = "paper",
    dtype: str = "auto",
    device: str = "auto",
    token_budget: int | None = None,
    weights: str = "auto",
    memory_budget: int | str | None = None,
    verify: bool | str | PathLike[str] = False,
    per_token: bool = False,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    partials: Sequence[str | PathLike[str]] | None = None,
    progress: bool | None = None,
    loading: LoadingStatistics | None = None,
) -> list[LogLikelihoods]:
    """The log-likelihood of every text under several models, of which relatives go together.

    Fine-tunes, merges and steps of a training that share weights are paged as one: what is the same
    in several is read once. Their numbers are those of `score`, to the bit. Who is related is found
    out by comparing stored bytes, which takes a read of what may be equal; it is remembered. Models
    without relatives, and those that cannot be paged, are scored one after the other.

    Args:
        models: each is what `score` takes; for a name, revision or adapter of its own, what
            `models.open_model` returns.
        texts: as for `score`, and so are:
        token_ids: of all texts, the same for every model.
        convention: which tokens are fed and scored.
        dtype: "auto" or a dtype.
        device: "auto" or a device.
        token_budget: the most tokens in a batch.
        weights: with "resident" nothing goes together.
        memory_budget: for weights and texts on their way.
        verify: compare sha256 digests of weights.
        per_token: keep the logprob of every token, too.
        metadata: columns to keep with each result, a mapping a model.
        trust_remote_code: let checkpoints bring code of their own.
        allow_pickle: let weights be pickles.
        partials: a file for each model, in which finished texts are kept.
        progress: show a bar.
        loading: filled in with what paging took, all models together.

    Returns:
        A result for each model, in their order.

    Raises:
        LlfastError: as `score`; nothing is returned then, and `partials` have what was finished.
        ValueError: for arguments that make no sense.
        TypeError: if `models`, `metadata` or `partials` is what one model takes, and no list.
    """
    if isinstance(models, str | PathLike):
        raise TypeError("models must be a list, got one path; wrap it in a list, or use score")
    sources = [
        open_model(each, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        for each in models
    ]
    for name, given in (("metadata", metadata), ("partials", partials)):
        if isinstance(given, Mapping | str | PathLike):
            raise TypeError(f"{name} must be a list, one a model, got {given!r}; wrap it in a list")
    if partials is not None and len({Path(each).resolve() for each in partials}) < len(partials):
        raise ValueError("partials must be different files, got one twice")
    for name, given in (("metadata", metadata), ("partials", partials)):
        if given is not None and len(given) != len(sources):
            raise ValueError(f"{name} must be one a model ({len(sources)}), got {len(given)}")
    if texts is not None and not isinstance(texts, TextSet):
        texts = TextSet.from_texts(texts)
    loading = LoadingStatistics() if loading is None else loading
    runs = [
        prepare(
            source,
            texts,
            token_ids=token_ids,
            convention=convention,
            dtype=dtype,
            device=device,
            token_budget=token_budget,
            memory_budget=memory_budget,
            weights=weights,
            verify=verify,
            per_token=per_token,
            metadata=None if metadata is None else metadata[number],
            partial=None if partials is None else partials[number],
            loading=loading,
        )
        for number, source in enumerate(sources)
    ]
    results: dict[int, LogLikelihoods] = {}
    kinds = [(run.job.source, run.job.dtype, run.job.device) for run in runs]
    for group in find_relatives(kinds, weights, loading):
        members = [runs[number] for number in group.numbers]
        found = None
        if len(members) > 1:
            found = carry_out_together(members, group.equals, weights, progress)
        if found is None:
            found = [carry_out(each, weights, progress) for each in members]
        results |= dict(zip(group.numbers, found, strict=True))
    return [results[number] for number in range(len(runs))]

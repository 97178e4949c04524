"""A model's run over texts: what it needs, what it has scored so far, and its result."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Int64

from .batches import (
    GIVEN_TOKENS,
    Batch,
    TokenizedTexts,
    added_bos,
    given_tokens,
    model_max_length,
    tokenize,
)
from .devices import check_token_budget, default_token_budget, device_name, resolve_device
from .dtypes import dtype_name
from .engines import Engine, Finished, Job, Ready, check_budget, open_engine
from .errors import CannotPageError, CheckpointError, LlfastError, LlfastWarning, ScoringError
from .kernels import instruction_set
from .loading import one_line
from .models import ModelSource
from .paging import Equals, LoadingStatistics
from .partial import PartialScores
from .progress import progress_bar
from .results import LogLikelihoods, ResultKey
from .texts import TextSet
from .traits import is_mixture_of_experts
from .verify import Verification, manifest_path

SCORING_VERSION = 1  # part of every stored key: raised when a release changes numbers


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """A model that is to be run over texts.

    Attributes:
        job: what is run.
        texts: N texts.
        text_bytes: (N,) UTF-8 bytes of each, 0 where nobody says.
        convention: which tokens are scored.
        adds_bos: whether a token is put before each text; None for given tokens.
        per_token: keep the logprob of every token, too.
        metadata: columns to keep with the result.
        partial: where finished texts are kept meanwhile.
        verification: of its weights, if they are to be verified.
        layer: the hidden state that is read out; None for the model's output.
        scores: what is there so far, once `begun`.
    """

    job: Job
    texts: TextSet
    text_bytes: Int64[np.ndarray, " N"]
    convention: str
    adds_bos: bool | None
    per_token: bool
    metadata: dict[str, Any]
    partial: str | PathLike[str] | None
    verification: Verification | None
    layer: int | None = None
    scores: PartialScores = field(init=False)
    _provenance: dict[str, Any] = field(init=False)

    @contextlib.contextmanager
    def begun(self, ready: Ready) -> Iterator[None]:
        """Go on from what an earlier run has kept; keep what is finished, however this one ends."""
        self.refuse_changes()  # before a text is kept on disk
        job = self.job
        self._provenance = {
            "device": device_name(job.device),
            "instruction_set": instruction_set(job.device),
            "threads": torch.get_num_threads() if job.device.type == "cpu" else 0,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attention": getattr(ready.model.config, "_attn_implementation", None) or "",
            "mixture_of_experts": is_mixture_of_experts(ready.model),
            "adds_bos": self.adds_bos,
            "tokens_sha256": job.tokens.digest(),
            "linear": ready.linear,
        }
        # A commit names what files should hold, and these tell what they were.
        state = () if job.source.checkpoint is None else job.source.checkpoint.state
        digest = self.texts.digest
        parts = (job.source.revision, state, digest, self.convention, job.dtype, self._provenance)
        with contextlib.ExitStack() as stack:
            self.scores = stack.enter_context(
                PartialScores.open(
                    job.tokens, self.partial, key=repr(parts), per_token=self.per_token
                )
            )
            if self.verification is not None:
                stack.enter_context(_verified(self.verification, self.scores))
            yield

    def keep(self, finished: Finished) -> tuple[int, int]:
        """Sum a batch's logprobs by text, rounded once, to fp64; refuse what is not finite.

        Returns: how many texts were not known before, and the tokens of all of the batch.
        """
        tokens, texts = self.job.tokens, finished.batch.texts
        ends = np.cumsum(tokens.token_counts[list(texts)])
        parts = np.split(finished.logprobs.numpy(), ends[:-1])
        unscored = self.scores.open_texts(finished.batch)
        is_open = set(unscored)
        for text, part in zip(texts, parts, strict=True):
            if text not in is_open:
                continue
            total = math.fsum(part.tolist())  # much faster than of numpy's own numbers
            if not math.isfinite(total):
                dtype = dtype_name(self.job.dtype)
                hint = "; score it with dtype bfloat16 or float32" if dtype == "float16" else ""
                layer = "" if self.layer is None else f" at layer {self.layer}"
                raise ScoringError(
                    f"logprobs must be finite, got {total} for text {self.job.ids[text]!r}{layer} "
                    f"in {dtype}{hint}"
                )
            self.scores.keep(text, total, part, finished.token_budget)
        return len(unscored), int(tokens.token_counts[unscored].sum())

    def save(self, *, at_once: bool) -> None:
        """Write what is finished to disk, now or soon; not if the weights are known to be wrong."""
        if self.verification is not None:
            self.verification.check()
        self.scores.save() if at_once else self.scores.save_now_and_then()

    def end(self, ready: Ready, weights: str) -> None:
        """Wait for what is still verified, and note how the model ran."""
        if self.verification is not None:
            self.verification.check(wait=True)
        own = "own logits" if weights == "resident" else "not asked: nothing was left to run"
        self._provenance["head"] = own if ready.head is None else str(ready.head)
        self._provenance["weights"] = weights

    def refuse_changes(self) -> None:
        """Refuse weights that were changed meanwhile.

        Raises:
            CheckpointError: if they were.
        """
        if self.job.source.checkpoint is not None:
            self.job.source.checkpoint.refuse_changes()

    @property
    def result(self) -> LogLikelihoods:
        """The result, once the run has ended."""
        source, tokens = self.job.source, self.job.tokens
        return LogLikelihoods(
            model=source.name,
            revision=source.revision,
            textset_digest=self.texts.digest,
            convention=self.convention,
            dtype=dtype_name(self.job.dtype),
            layer=self.layer,
            scoring_version=SCORING_VERSION,
            ids=self.texts.ids,
            loglikelihoods=self.scores.loglikelihoods,
            token_counts=tokens.token_counts,
            text_bytes=self.text_bytes,
            truncated=tokens.truncated,
            token_budgets=self.scores.token_budgets,
            groups=self.texts.groups,
            logprobs=self.scores.logprobs,
            provenance=self._provenance,
            metadata=self.metadata,
        )


def prepare(
    source: ModelSource,
    texts: TextSet | Iterable[str] | None,
    *,
    convention: str,
    dtype: str,
    device: str,
    token_budget: int | None,
    weights: str,
    memory_budget: int | str | None = None,
    token_ids: Sequence[Any] | None = None,
    verify: bool | str | PathLike[str] = False,
    per_token: bool = False,
    metadata: Mapping[str, Any] | None = None,
    partial: str | PathLike[str] | None = None,
    loading: LoadingStatistics | None = None,
) -> Run:
    """Check all that `score` was given, and tokenise.

    Raises:
        ValueError: for arguments that make no sense.
        TypeError: for metadata that is not JSON, or a `verify` that is no path.
        CheckpointError: if there is no tokenizer, or no digest to verify with.
    """
    if partial is not None and not source.revision:
        raise ValueError(
            "partial must go with weights that have a name, got a loaded model without a revision; "
            "pass revision, or the checkpoint's folder"
        )
    loading = LoadingStatistics() if loading is None else loading
    place = resolve_device(device, source)
    body_dtype = source.dtype(dtype, place)
    check_token_budget(token_budget)
    budget = default_token_budget(place, source.config) if token_budget is None else token_budget
    memory_bytes = check_budget(weights, memory_budget)
    if memory_bytes is not None and source.checkpoint is None:
        raise ValueError(
            f"memory_budget must be left out for a loaded model, got {memory_budget!r}; its "
            "weights are there already"
        )
    if not isinstance(metadata, Mapping | None):
        raise TypeError(f"metadata must be a mapping, got {metadata!r}; name its columns")
    json.dumps(dict(metadata or {}))  # what a store could not keep is refused before the work
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
    job = Job(
        source=source,
        tokens=tokens,
        ids=texts.ids,
        dtype=body_dtype,
        device=place,
        token_budget=int(budget),
        memory_bytes=memory_bytes,
        statistics=loading,
    )
    return Run(
        job=job,
        texts=texts,
        text_bytes=text_bytes,
        convention=convention,
        adds_bos=adds_bos,
        per_token=per_token,
        metadata=dict(metadata or {}),
        partial=partial,
        verification=_verification(source, verify, loading),
    )


def result_key(
    source: ModelSource, texts: TextSet, *, convention: str, dtype: str, device: str
) -> ResultKey:
    """What the result of a run will be stored under.

    Raises:
        ValueError: for a dtype or device that there is not.
    """
    own = dtype_name(source.dtype(dtype, resolve_device(device, source)))
    return ResultKey(
        source.name, source.revision, texts.digest, convention, own, None, SCORING_VERSION
    )


def carry_out(run: Run, weights: str, progress: bool | None) -> LogLikelihoods:
    """Run a model.

    Raises:
        LlfastError: for whatever is wrong with it or its numbers.
    """
    return _carry_out([run], ({},), weights, progress)[0]


def carry_out_together(
    runs: Sequence[Run], equals: Sequence[Equals], weights: str, progress: bool | None
) -> list[LogLikelihoods] | None:
    """Run several of `find_relatives` as one.

    Args:
        runs: of each model.
        equals: what they share.
        weights: one of `WEIGHTS`.
        progress: show a bar.

    Returns: their results; None, with a warning, if they have to be run one after the other.

    Raises:
        LlfastError: for whatever is wrong with a model or its numbers.
    """
    try:
        return _carry_out(runs, equals, weights, progress)
    except Exception as error:
        # What may be right alone: memory, and what pages alone cannot do.
        if isinstance(error, LlfastError) and not isinstance(error, CannotPageError):
            raise
        message = f"{len(runs)} relatives are scored one after the other, for {one_line(error)}"
        warnings.warn(message, LlfastWarning, stacklevel=3)
        return None


def _carry_out(
    runs: Sequence[Run], equals: Sequence[Equals], weights: str, progress: bool | None
) -> list[LogLikelihoods]:
    with open_engine([run.job for run in runs], weights, equals) as engine:
        return carry_out_with(engine, runs, progress)


def carry_out_with(
    engine: Engine, runs: Sequence[Run], progress: bool | None
) -> list[LogLikelihoods]:
    """Let an engine do a run for each of its members.

    Raises:
        LlfastError: for whatever is wrong with a model or its numbers.
    """
    with contextlib.ExitStack() as stack:
        for run, ready in zip(runs, engine.ready, strict=True):
            stack.enter_context(run.begun(ready))
        advance = stack.enter_context(_bar(runs, progress))
        _run(runs, engine, advance)
        for run, ready in zip(runs, engine.ready, strict=True):
            run.end(ready, engine.weights)
    for run in runs:
        run.refuse_changes()
    return [run.result for run in runs]


def _run(runs: Sequence[Run], engine: Engine, advance: Callable[[int, int], None]) -> None:
    def is_open(member: int, batch: Batch) -> bool:
        return bool(runs[member].scores.open_texts(batch))

    for finished in engine.run(is_open):
        for each in finished:
            advance(*runs[each.member].keep(each))
        for member in {each.member for each in finished}:
            runs[member].save(at_once=engine.weights == "paged")


def _bar(
    runs: Sequence[Run], show: bool | None
) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """One bar for all."""
    name = runs[0].job.source.name
    if len(runs) > 1:
        name += f" + {len(runs) - 1}"
    done, total = sum(run.scores.done for run in runs), sum(len(run.texts) for run in runs)
    return progress_bar(name, done=done, total=total, show=show)


def _verification(
    source: ModelSource, verify: bool | str | PathLike[str], loading: LoadingStatistics
) -> Verification | None:
    manifest = manifest_path(verify)
    if verify is False:
        return None
    if source.checkpoint is None:
        raise ValueError(f"verify must be False for a loaded model, got {verify!r}")
    return Verification(source.checkpoint, manifest, loading)


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

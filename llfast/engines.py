"""The two ways of running a model over texts: all of it there, or a page at a time."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor

from . import memory
from .batches import Batch, TokenizedTexts
from .batchwise import Batchwise, is_out_of_memory, plan_for, too_long
from .borrowing import borrowed
from .errors import CheckpointError, LlfastWarning, ScoringError, UnsupportedModelError
from .head import Head, find_head
from .linear import linear_layers, linear_path
from .loading import one_line
from .models import FolderSource, ModelSource
from .paging import CannotPageError, LoadingStatistics, PagedModel
from .traits import check_fit, probe_tokens

WEIGHTS = ("auto", "resident", "paged")
# transformers sets torch's default dtype, and more, for all threads while it loads a model.
_ONE_AT_A_TIME = threading.RLock()
_SHARE_OF_FREE_MEMORY = 0.8
_UNKNOWN_MEMORY_BYTES = 1 << 62  # where nothing says how much there is


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """What is to be run, and with what means.

    Attributes:
        source: the model.
        tokens: of all texts.
        ids: their names, for errors.
        dtype: of the model's body.
        device: where it runs.
        token_budget: the most tokens in a batch.
        memory_bytes: for weights and suspended forwards; None for most of what is free.
        statistics: filled in while weights are paged.
    """

    source: ModelSource
    tokens: TokenizedTexts
    ids: Sequence[str]
    dtype: torch.dtype
    device: torch.device
    token_budget: int
    memory_bytes: int | None
    statistics: LoadingStatistics


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch with the log-probabilities of its scored tokens, text after text, on the host."""

    batch: Batch
    logprobs: Float32[Tensor, " T"]
    token_budget: int


@runtime_checkable
class Engine(Protocol):
    """A model that is ready to run.

    Attributes:
        weights: "resident", "paged", or "kept" if they were read as pages and then stayed.
        model: its transformers model.
        linear: the path of its linear layers.
        head: its output head; None where its own logits are used, or before `run`.
    """

    weights: str
    model: Any
    linear: str
    head: Head | None

    def run(self, is_open: Callable[[Batch], bool]) -> Iterator[list[Finished]]:
        """What is open, as it gets done; after each list, all of it may be kept."""


@contextlib.contextmanager
def open_engine(job: Job, weights: str) -> Iterator[Engine]:
    """The way asked for.

    "auto" reads a model as it pages one, so that it computes while it reads, and keeps what it has
    read if that fits into memory. What cannot be paged is loaded whole.

    Raises:
        CheckpointError: if the model cannot be loaded.
        UnsupportedModelError: if it cannot be scored, or not be paged where that is asked for.
    """
    with _ONE_AT_A_TIME:
        if weights == "paged":
            yield _Paged(job, _skeleton(job), auto=False)
            return
        # Pages have not been tried on a GPU yet, so there only what does not fit is paged.
        is_first_choice = job.device.type == "cpu" or not _fits(job)
        if weights == "auto" and is_first_choice and _why_whole(job.source) is None:
            try:
                skeleton = _skeleton(job)
            except UnsupportedModelError as error:
                if not _fits(job):
                    _warn_of_loading(error, fits=False)
            else:
                yield _Paged(job, skeleton, auto=True)
                return
        with _Resident.open(job) as engine:
            yield engine


def _memory_bytes(job: Job) -> int:
    if job.memory_bytes is not None:
        return job.memory_bytes
    free = memory.available_bytes(job.device)
    return int(_SHARE_OF_FREE_MEMORY * free) if free else _UNKNOWN_MEMORY_BYTES


def _why_whole(source: ModelSource) -> str | None:
    """What keeps a model from being paged, as far as its kind tells."""
    if not isinstance(source, FolderSource):
        return "a loaded model"
    if source.checkpoint.pickled:
        return "pickled weights"
    if source.adapter is not None:
        return "a LoRA adapter"
    brings_code = source.trust_remote_code and "auto_map" in source.checkpoint.config
    return "one with code of its own" if brings_code else None


def _skeleton(job: Job) -> PagedModel:
    source = job.source
    if (kind := _why_whole(source)) is not None:
        raise UnsupportedModelError(
            f"{source.name} must be a checkpoint in safetensors, of a model that transformers has, "
            f"to be paged, got {kind}; use weights='resident'"
        )
    assert isinstance(source, FolderSource)
    return PagedModel(
        source.checkpoint, source.config, dtype=job.dtype, device=job.device, name=source.name
    )


def _fits(job: Job) -> bool:
    """Whether all weights have room in memory."""
    checkpoint = job.source.checkpoint
    return checkpoint is None or checkpoint.parameters * job.dtype.itemsize <= _memory_bytes(job)


def _warn_of_loading(error: Exception, *, fits: bool) -> None:
    what = "a model" if fits else "a model that may not fit into memory"
    message = f"{what} is loaded whole, for {one_line(error)}"
    warnings.warn(message, LlfastWarning, stacklevel=6)


class _Resident:
    def __init__(self, job: Job, model: Any, head: Head | None, linear: str) -> None:
        self.weights = "resident"
        self._job, self.model, self.head, self.linear = job, model, head, linear

    @classmethod
    @contextlib.contextmanager
    def open(cls, job: Job) -> Iterator[_Resident]:
        model = job.source.load(job.dtype, job.device)
        with borrowed(model):
            check_fit(model, job.tokens, job.ids)
            head = find_head(model, probe_tokens(model))
            output = None if head is None else head.module
            linear = linear_path(job.device, job.dtype, model=model, leave_out=output)
            with linear_layers(model, linear, rows=job.token_budget, leave_out=output):
                yield cls(job, model, head, linear)

    def run(self, is_open: Callable[[Batch], bool]) -> Iterator[list[Finished]]:
        batchwise = Batchwise(self.model, self.head, self._job.tokens, self._job.ids)
        for batch, logprobs, token_budget in batchwise.run(self._job.token_budget, is_open):
            yield [Finished(batch, logprobs, token_budget)]


class _Paged:
    def __init__(self, job: Job, paged: PagedModel, *, auto: bool) -> None:
        self._job, self._paged, self._auto = job, paged, auto
        self.weights = "paged"
        self.model, self.linear = paged.model, paged.linear
        self.head: Head | None = None
        check_fit(self.model, job.tokens, job.ids)

    def run(self, is_open: Callable[[Batch], bool]) -> Iterator[list[Finished]]:
        finished = False
        try:
            for wave in self._waves(is_open):
                finished = True
                yield wave
        except Exception as error:
            if finished or not self._may_load_after(error):
                raise
        else:
            return
        with _Resident.open(self._job) as resident:
            self.weights, self.head, self.linear = resident.weights, resident.head, resident.linear
            yield from resident.run(is_open)

    def _may_load_after(self, error: Exception) -> bool:
        """Whether to load the model whole after all; warns if that may matter."""
        if not self._auto:
            return False
        if isinstance(error, CheckpointError) and not isinstance(error, CannotPageError):
            return False
        if isinstance(error, ValueError) and self._job.memory_bytes is not None:
            return False
        fits = self.weights == "kept"
        if isinstance(error, ScoringError):  # memory ran out, or a text is too long
            return fits
        if not (fits and isinstance(error, CannotPageError)):
            _warn_of_loading(error, fits=fits)
        return True

    def _waves(self, is_open: Callable[[Batch], bool]) -> Iterator[list[Finished]]:
        job = self._job
        plan = plan_for(self.model, job.tokens, job.token_budget)
        batches = [batch for batch in plan if is_open(batch)]
        try:
            with (
                borrowed(self.model),
                self._paged.waves(
                    job.tokens,
                    memory_bytes=_memory_bytes(job),
                    may_keep=self._auto,
                    rows=job.token_budget,
                    probe=probe_tokens(self.model),
                    statistics=job.statistics,
                ) as waves,
            ):
                self.weights = "kept" if waves.keeps_weights else "paged"
                for wave in waves.run(batches):
                    self.head = waves.head
                    yield [Finished(batch, found, job.token_budget) for batch, found in wave]
        except IndexError as error:
            longest = max(batches, key=lambda batch: batch.shape[1])
            raise too_long(longest, job.ids[longest.texts[0]], error) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ScoringError(
                "memory must hold two pages of weights and a wave of texts, got too little; use a "
                "smaller memory_budget, or token_budget"
            ) from error

"""The two ways of running a model over texts: all of it there, or a page at a time.

By pages, several models can be gone through at once.
"""

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
from .batches import Batch, TokenizedTexts, plan_batches
from .batchwise import Batchwise, is_out_of_memory, plan_for, too_long
from .borrowing import borrowed
from .errors import (
    CannotPageError,
    CheckpointError,
    LlfastWarning,
    ScoringError,
    UnsupportedModelError,
)
from .head import Head, find_head
from .linear import linear_layers, linear_path
from .loading import count_parameters, one_line
from .models import FolderSource, ModelSource
from .paging import (
    Equals,
    LoadingStatistics,
    PagedModel,
    Relatives,
    Task,
    open_waves,
    relatives,
)
from .traits import check_fit, probe_tokens, rope_limits

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
    """A batch with the log-probabilities of its scored tokens, text after text, on the host.

    `member` is the number of the model.
    """

    member: int
    batch: Batch
    logprobs: Float32[Tensor, " T"]
    token_budget: int


@dataclass(slots=True, kw_only=True, eq=False)
class Ready:
    """A model that is ready to run.

    Attributes:
        model: transformers' own.
        linear: the path of its linear layers.
        head: its output head; None where its own logits are used, or before `run`.
    """

    model: Any
    linear: str
    head: Head | None = None


@runtime_checkable
class Engine(Protocol):
    """Models that are ready to run.

    Attributes:
        weights: "resident", "paged", or "kept" if they were read as pages and then stayed.
        ready: the models, in the order of their jobs.
    """

    weights: str
    ready: list[Ready]

    def run(self, is_open: Callable[[int, Batch], bool]) -> Iterator[list[Finished]]:
        """Batches that are open, as they get done; after each list, all of it may be kept."""


def check_budget(weights: str, memory_budget: int | str | None) -> int | None:
    """The budget in bytes.

    Raises:
        ValueError: if there is no such way of running a model, or it has no budget.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be {', '.join(WEIGHTS)}, got {weights!r}")
    if memory_budget is not None and weights == "resident":
        raise ValueError(
            f"memory_budget must be left out with resident weights, got {memory_budget}"
        )
    return None if memory_budget is None else memory.parse_bytes(memory_budget)


@contextlib.contextmanager
def open_engine(
    jobs: Sequence[Job], weights: str, equals: Sequence[Equals] = ({},)
) -> Iterator[Engine]:
    """Open models in the way asked for.

    "auto" reads a model as it pages one, so that it computes while it reads, and keeps what it has
    read if that fits into memory. What cannot be paged is loaded whole.

    Args:
        jobs: one; or several of `find_relatives`, which are paged together. What is not the
            model's own must be the same for all.
        weights: one of `WEIGHTS`.
        equals: what relatives share.

    Raises:
        CheckpointError: if a model cannot be loaded.
        UnsupportedModelError: if it cannot be scored, or not be paged where that is asked for.
        ValueError: if a memory budget is too small for it.
    """
    with _ONE_AT_A_TIME:
        if len(jobs) > 1:
            paged = [_skeleton(job) for job in jobs]
            yield _Paged(jobs, paged, equals, auto=weights == "auto")
            return
        (job,) = jobs
        skeleton = as_pages(job, weights)
        if skeleton is not None:
            yield _Paged([job], [skeleton], equals, auto=weights == "auto")
            return
        with _Resident.open(job) as engine:
            yield engine


def find_relatives(
    models: Sequence[tuple[ModelSource, torch.dtype, torch.device]],
    weights: str,
    statistics: LoadingStatistics,
) -> list[Relatives]:
    """Models in groups that can be opened, and are worth being opened, together.

    Args:
        models: what they are, what they run in, and where.
        weights: one of `WEIGHTS`.
        statistics: told what was read to find out.

    Raises:
        CheckpointError: if weights cannot be read.
    """
    groups: list[Relatives] = []
    pageable: dict[object, list[int]] = {}
    for number, (source, dtype, device) in enumerate(models):
        is_paged = weights == "paged" or (weights == "auto" and device.type == "cpu")
        if is_paged and _why_whole(source) is None:
            pageable.setdefault((dtype, device), []).append(number)
        else:
            groups.append(Relatives.alone(number))
    for numbers in pageable.values():
        checkpoints = (models[number][0].checkpoint for number in numbers)
        found = relatives([each for each in checkpoints if each is not None], statistics)
        groups += [group.among(numbers) for group in found]
    return sorted(groups, key=lambda group: group.numbers)


def as_pages(job: Job, weights: str) -> PagedModel | None:
    """The model without its weights if they are read as pages, None if it is loaded whole.

    Raises:
        CheckpointError: if the checkpoint does not fill it.
        UnsupportedModelError: if it cannot be paged where that is asked for.
        ValueError: if it has to be loaded whole, and its memory budget does not hold it.
    """
    with _ONE_AT_A_TIME:
        if weights == "paged":
            return _skeleton(job)
        size = _whole_bytes(job)
        fits = size <= memory_bytes(job)
        # Pages have not been tried on a GPU yet, so there only what does not fit is paged.
        is_first_choice = job.device.type == "cpu" or not fits
        if weights == "auto" and is_first_choice:
            try:
                return _skeleton(job)
            except UnsupportedModelError as error:
                if not fits and job.memory_bytes is not None:
                    raise ValueError(
                        f"memory_budget must hold all of {job.source.name}, {size:,} bytes, got "
                        f"{job.memory_bytes:,}: {error}"
                    ) from error
                if not fits:
                    _warn_of_loading(error, fits=False)
        return None


def plan_unread(job: Job, paged: PagedModel | None) -> list[Batch]:
    """The batches that a run plans, before any weight is read; `paged` is what `as_pages` found."""
    with _ONE_AT_A_TIME:
        model = job.source.outline() if paged is None else paged.model
    if model is None:
        limits = [limit for _, limit in rope_limits(job.source.config)]
        return plan_batches(job.tokens, job.token_budget, limits=limits)
    return plan_for(model, job.tokens, job.token_budget)


def memory_bytes(job: Job) -> int:
    """What weights and suspended forwards may take."""
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


def _whole_bytes(job: Job) -> int:
    """What all weights take of memory that is not taken yet."""
    checkpoint, config = job.source.checkpoint, job.source.config
    return count_parameters(checkpoint, config) * job.dtype.itemsize if checkpoint else 0


def _warn_of_loading(error: Exception, *, fits: bool) -> None:
    what = "a model" if fits else "a model that may not fit into memory"
    message = f"{what} is loaded whole, for {one_line(error)}"
    warnings.warn(message, LlfastWarning, stacklevel=7)


class _Resident:
    weights = "resident"

    def __init__(self, job: Job, ready: Ready) -> None:
        self._job, self.ready = job, [ready]

    @classmethod
    @contextlib.contextmanager
    def open(cls, job: Job) -> Iterator[_Resident]:
        model = job.source.load(job.dtype, job.device)
        with borrowed(model):
            check_fit(model, job.tokens, job.ids)
            head = find_head(model, probe_tokens(model))
            output = None if head is None else head.module
            linear = linear_path(job.device, job.dtype, model=model, leave_out=output)
            with linear_layers(model, linear, leave_out=output):
                yield cls(job, Ready(model=model, linear=linear, head=head))

    def run(self, is_open: Callable[[int, Batch], bool]) -> Iterator[list[Finished]]:
        (ready,) = self.ready
        batchwise = Batchwise(ready.model, ready.head, self._job.tokens, self._job.ids)
        for batch, logprobs, token_budget in batchwise.run(
            self._job.token_budget, lambda batch: is_open(0, batch)
        ):
            yield [Finished(0, batch, logprobs, token_budget)]


class _Paged:
    def __init__(
        self,
        jobs: Sequence[Job],
        paged: Sequence[PagedModel],
        equals: Sequence[Equals],
        *,
        auto: bool,
    ) -> None:
        self._jobs, self._paged, self._equals, self._auto = jobs, paged, equals, auto
        self.weights = "paged"
        self.ready = [Ready(model=each.model, linear=each.linear) for each in paged]
        for job, each in zip(jobs, paged, strict=True):
            check_fit(each.model, job.tokens, job.ids)

    def run(self, is_open: Callable[[int, Batch], bool]) -> Iterator[list[Finished]]:
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
        with _Resident.open(self._jobs[0]) as resident:
            self.weights, self.ready[:] = resident.weights, resident.ready
            yield from resident.run(is_open)

    def _may_load_after(self, error: Exception) -> bool:
        """Whether to load the model whole after all; warns if that may matter."""
        if not self._auto or len(self._jobs) > 1:
            return False
        if isinstance(error, CheckpointError) and not isinstance(error, CannotPageError):
            return False
        if isinstance(error, ValueError) and self._jobs[0].memory_bytes is not None:
            return False
        fits = self.weights == "kept"
        if isinstance(error, ScoringError):  # memory ran out, or a text is too long
            return fits
        if not (fits and isinstance(error, CannotPageError)):
            _warn_of_loading(error, fits=fits)
        return True

    def _waves(self, is_open: Callable[[int, Batch], bool]) -> Iterator[list[Finished]]:
        first = self._jobs[0]  # of what is the same for all
        tasks = [
            Task(member, batch)
            for member, job in enumerate(self._jobs)
            for batch in plan_for(self.ready[member].model, job.tokens, job.token_budget)
            if is_open(member, batch)
        ]
        try:
            with contextlib.ExitStack() as stack:
                for ready in self.ready:
                    stack.enter_context(borrowed(ready.model))
                waves = stack.enter_context(
                    open_waves(
                        self._paged,
                        [job.tokens for job in self._jobs],
                        self._equals,
                        memory_bytes=memory_bytes(first),
                        may_keep=self._auto,
                        statistics=first.statistics,
                    )
                )
                self.weights = "kept" if waves.keeps_weights else "paged"
                for wave in waves.run(tasks):
                    for ready, subject in zip(self.ready, waves.subjects, strict=True):
                        ready.head = subject.head
                    yield [
                        Finished(each.member, each.batch, each.logprobs, first.token_budget)
                        for each in wave
                    ]
        except IndexError as error:
            longest = max(tasks, key=lambda task: task.batch.shape[1])
            name = self._jobs[longest.member].ids[longest.batch.texts[0]]
            raise too_long(longest.batch, name, error) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(self._jobs) > 1:
                raise CannotPageError("memory must hold several models, got too little") from error
            raise ScoringError(
                "memory must hold two pages of weights and a wave of texts, got too little; use a "
                "smaller memory_budget, or token_budget"
            ) from error

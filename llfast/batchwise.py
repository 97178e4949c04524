"""Batch after batch through a model that is all there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from .batches import Batch, TokenizedTexts, plan_batches
from .errors import LlfastWarning, ScoringError
from .forward import BatchInputs, ToHost
from .head import Head, hidden_states, run_model
from .pointwise import TextByText
from .traits import is_mixture_of_experts, rope_limits, vocabulary_rows

Item = TypeVar("Item")

_OWN_LOGITS_BYTES = 256 << 20  # the most that a model's own logits may take where they are needed
_NO_MEMORY = (  # as torch, CUDA, cuBLAS and Triton say it in errors of no kind of their own
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "[CUDA]: out of memory",
)


class Batchwise:
    """Runs a model on a plan of batches, and on smaller ones when memory runs out.

    On a GPU, a batch is launched before the one before it has come back, so that the device has
    something to do while the host sums and lays out. What is made of a batch is for `logprobs` to
    say, which other classes may do in another way.
    """

    def __init__(
        self, model: Any, head: Head | None, tokens: TokenizedTexts, ids: Sequence[str]
    ) -> None:
        self._model, self._head, self._tokens, self._ids = model, head, tokens, ids
        self._by_text = TextByText()

    def run(
        self, token_budget: int, is_open: Callable[[Batch], bool]
    ) -> Iterator[tuple[Batch, Float32[Tensor, "*states T"], int]]:
        """Batches that are open, log-probabilities on the host, and the budget they ran with.

        Raises:
            ScoringError: if a text does not fit into the model, or into memory.
        """
        while True:
            launched = self._launch(token_budget, is_open)
            if runs_ahead(self._model.device):
                launched = one_ahead(launched)
            try:
                for batch, coming in launched:
                    yield batch, coming.wait(), token_budget
            except _TooMuchAtOnceError:
                token_budget //= 2
            else:
                return
            warnings.warn(
                f"out of memory: token_budget halved to {token_budget}", LlfastWarning, stacklevel=4
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _launch(
        self, token_budget: int, is_open: Callable[[Batch], bool]
    ) -> Iterator[tuple[Batch, ToHost]]:
        for batch in self._plan(token_budget):
            if not is_open(batch):
                continue
            name = self._ids[batch.texts[0]]
            try:
                coming = ToHost(self.logprobs(batch))
            except IndexError as error:  # some models have fewer positions than they say
                raise too_long(batch, name, error) from error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if batch.shape[0] > 1:
                    raise _TooMuchAtOnceError from None
                raise ScoringError(
                    f"memory must hold one text of {batch.shape[1]} tokens, got too little for "
                    f"text {name!r}; use a smaller dtype or another device"
                ) from error
            yield batch, coming

    def logprobs(self, batch: Batch) -> Float32[Tensor, "*states T"]:
        """Of all scored tokens of a batch, text after text, where the model is."""
        inputs = BatchInputs.of(self._tokens, batch, self._model.device)
        if self._head is None:
            return _own_logprobs(self.run_model(inputs), inputs)
        with hidden_states(self._head) as collected:
            self.run_model(inputs)
        return self._head.token_logprobs(inputs.scored(collected[0]), inputs.targets)

    def run_model(self, inputs: BatchInputs) -> Float[Tensor, "B S V"]:
        """The logits of a batch, or what stands for them; the same bits in every row."""
        with self._by_text.during(inputs.input_ids) as mode:
            logits = run_model(self._model, inputs.input_ids)
        self._by_text.learn(inputs.input_ids, mode)
        return logits

    def _plan(self, token_budget: int) -> list[Batch]:
        if self._head is None:
            vocabulary = vocabulary_rows(self._model) or 1
            token_budget = min(token_budget, _OWN_LOGITS_BYTES // (4 * vocabulary))
        return plan_for(self._model, self._tokens, token_budget)


class _TooMuchAtOnceError(Exception):
    """Memory does not hold a batch, but may hold a smaller one."""


def runs_ahead(device: torch.device) -> bool:
    """Whether what is launched there is done later."""
    return device.type != "cpu"


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Take each item before the one before it is given; on an error, what was taken is given."""
    taken: list[Item] = []
    try:
        for item in items:
            taken.append(item)
            if len(taken) > 1:
                yield taken.pop(0)
    except Exception:
        yield from taken
        raise
    yield from taken


def plan_for(model: Any, tokens: TokenizedTexts, token_budget: int) -> list[Batch]:
    """The batches of all texts; of one text each for a mixture of experts."""
    rows = 1 if is_mixture_of_experts(model) else None
    limits = [limit for _, limit in rope_limits(model.config)]
    return plan_batches(tokens, token_budget, rows_per_batch=rows, limits=limits)


def too_long(batch: Batch, name: str, error: IndexError) -> ScoringError:
    """What is wrong where a model has no position for a token."""
    return ScoringError(
        f"{batch.shape[1]} tokens must fit the model's embeddings, got {error} for text {name!r}; "
        "leave out the longest texts"
    )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether torch says so, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        each in str(error) for each in _NO_MEMORY
    )


def _own_logprobs(logits: Tensor, inputs: BatchInputs) -> Float32[Tensor, " T"]:
    """From the model's own logits (B, S, V), a bounded number of rows at a time."""
    step = max(1, (_OWN_LOGITS_BYTES // 4) // (4 * logits.shape[-1]))
    parts = []
    for start in range(0, len(inputs.targets), step):
        part = slice(start, start + step)
        scored = logits[inputs.rows[part], inputs.columns[part]]
        chosen = torch.log_softmax(scored.float(), dim=-1)
        parts.append(chosen.gather(1, inputs.targets[part, None])[:, 0])
    return torch.cat(parts)

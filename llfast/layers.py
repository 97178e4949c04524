"""The logit lens: score texts at every hidden state of a model, in one pass over them.

ids (B, S) ─▶ model, which shows its states ─▶ each read out (lens.py) ─▶ real positions (T, D)
─▶ the rows of all states through the fused head at once ─▶ (L + 1, T) ─▶ a `Run` a layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .batches import Batch
from .batchwise import Batchwise
from .engines import Finished, Job, Ready, open_engine
from .errors import UnsupportedModelError
from .forward import BatchInputs
from .head import Head, hidden_states
from .lens import Lens, find_lens, refuse_not_finite
from .models import open_model
from .results import LogLikelihoods
from .runs import carry_out_with, prepare
from .texts import TextSet
from .traits import probe_tokens

_WAITING_BYTES = 256 << 20  # of rows that wait for the head; twice that while they are joined


def score_layers(
    model: Any,
    texts: TextSet | Iterable[str],
    *,
    tokenizer: Any = None,
    convention: str = "paper",
    dtype: str = "auto",
    device: str = "auto",
    token_budget: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    adapter_base: str | None = None,
    progress: bool | None = None,
) -> list[LogLikelihoods]:
    """The log-likelihood of every text at every hidden state of a causal language model.

    Each state is read as the model reads its last one: through its final norm, then its head. All
    of the model's weights are held in memory meanwhile. Bits are those of `score`, and depend on as
    little: the last layer is the plain score.

    Args:
        model: as for `score`, and so are:
        texts: N texts.
        tokenizer: a loaded one for a loaded model; for any other, the folder of one.
        convention: which tokens are fed and scored.
        dtype: "auto" or a dtype.
        device: "auto" or a device.
        token_budget: the most tokens in a batch.
        name: what to call the model.
        revision: branch, tag or commit of a Hub id; for a loaded model, what names its weights.
        metadata: columns to keep with each result.
        trust_remote_code: let the checkpoint bring code of its own.
        allow_pickle: let weights be pickles.
        adapter_base: the model that a LoRA adapter belongs to.
        progress: show a bar.

    Returns:
        L + 1 results, which say of which `layer` they are: 0 is what enters the first layer (the
        embeddings), i what the i-th puts out. A layer that is called twice counts twice.

    Raises:
        CheckpointError: if the model cannot be found or loaded.
        UnsupportedModelError: if there is nothing between its layers and its head that its other
            states could be read through, or if its head is not one of those that are fused.
        ScoringError: if the numbers are not finite, with the first layer at which they are not; or
            if memory does not do for one text.
        ValueError: for arguments that make no sense.
        TypeError: for metadata that is not JSON.
    Source: logit lens as in Kishino et al., arXiv 2505.15353.
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
        convention=convention,
        dtype=dtype,
        device=device,
        token_budget=token_budget,
        weights="resident",
        metadata=metadata,
    )
    with open_engine([run.job], "resident") as engine:
        layers = _Layers(run.job, engine.ready[0])
        runs = [replace(run, layer=number) for number in range(len(layers.ready))]
        return carry_out_with(layers, runs, progress)


class _Layers:
    """An engine for which a model at each of its layers is a model of its own."""

    weights = "resident"

    def __init__(self, job: Job, ready: Ready) -> None:
        model, head, probe = ready.model, ready.head, probe_tokens(ready.model)
        if head is None:
            refuse_not_finite(model, probe)
            raise UnsupportedModelError(
                "model must have a head that is fused to be read out at its layers, got a "
                f"{type(model).__name__} that is scored by its own logits"
            )
        lens = find_lens(model, head, probe)
        self._token_budget = job.token_budget
        self._batchwise = _ByLayer(model, head, lens, job)
        self.ready = [ready] * (lens.calls + 1)

    def run(self, is_open: Callable[[int, Batch], bool]) -> Iterator[list[Finished]]:
        for batch, logprobs, token_budget in self._batchwise.run(
            self._token_budget, lambda batch: is_open(0, batch)
        ):
            yield [
                Finished(layer, batch, found, token_budget) for layer, found in enumerate(logprobs)
            ]


class _ByLayer(Batchwise):
    """Batch after batch, read out at every layer."""

    def __init__(self, model: Any, head: Head, lens: Lens, job: Job) -> None:
        super().__init__(model, head, job.tokens, job.ids)
        self._linear, self._lens = head, lens

    def logprobs(self, batch: Batch) -> Float32[Tensor, "states T"]:
        inputs = BatchInputs.of(self._tokens, batch, self._model.device)
        rows = _Rows(self._linear, inputs.targets)

        def see(layer: int, state: Tensor) -> None:
            # The last one is taken as it enters the head.
            if layer < self._lens.calls:
                rows.add(inputs.scored(self._lens.read(state)))

        with self._lens.watch(see), hidden_states(self._linear) as entered:
            self.run_model(inputs)
        rows.add(inputs.scored(entered[0]))
        return rows.logprobs()


class _Rows:
    """Rows of one state after the other, which go through the head together.

    So the head's weight is read once for all of them, or at least for as many as memory should
    hold.
    """

    def __init__(self, head: Head, targets: Int64[Tensor, " T"]) -> None:
        self._head, self._targets = head, targets
        self._waiting: list[Tensor] = []
        self._found: list[Tensor] = []

    def add(self, hidden: Float[Tensor, "T D"]) -> None:
        """Take in the rows of the next state."""
        self._waiting.append(hidden)
        if len(self._waiting) * hidden.nbytes >= _WAITING_BYTES:
            self._flush()

    def logprobs(self) -> Float32[Tensor, "states T"]:
        """Of all states, where the model is."""
        self._flush()
        return torch.cat(self._found)

    def _flush(self) -> None:
        if self._waiting:
            count, hidden = len(self._waiting), torch.cat(self._waiting)
            self._waiting.clear()
            found = self._head.token_logprobs(hidden, self._targets.repeat(count))
            self._found.append(found.view(count, -1))

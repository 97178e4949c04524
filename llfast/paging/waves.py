"""Scoring by waves: many batches go through one layer before any goes through the next.

A wave is as many batches as fit into memory while they are suspended, which the first one is
measured for. What a wave needs of the model is read once, so the weights are read as often as there
are waves, whatever the number of batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from llfast.batches import Batch, TokenizedTexts
from llfast.errors import CannotPageError
from llfast.forward import BatchInputs
from llfast.head import (
    Head,
    agrees,
    changed_probe,
    describe_head,
    ramp_of,
    refuse_acausal,
    run_model,
)
from llfast.kernels import PartialLogprobs, TokenStatistics

from .skeleton import Skeleton
from .states import StateMeter
from .statistics import LoadingStatistics
from .suspended import HEAD, Forward
from .units import StoredHead
from .weights import Weights

_MOST_FORWARDS = 4096  # in a wave; each has a stack
# Where weights stay, the first wave computes while they are read; more waves cost no reading, and
# a batch alone leaves its states in the processor's cache.
_FORWARDS_WHILE_READING = 16


@dataclass(slots=True, eq=False)
class _Scored:
    """A batch that is through with the model's body."""

    batch: Batch
    hidden: Float[Tensor, "T D"]
    targets: Int64[Tensor, " T"]


class Waves:
    """Gives the log-probabilities of batches, a wave at a time.

    Attributes:
        head: what was found out about the model's head in the first wave.
        keeps_weights: whether they stay once they are there.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        weights: Weights,
        stored_head: StoredHead,
        tokens: TokenizedTexts,
        statistics: LoadingStatistics,
        *,
        room_bytes: int,
        probe: Int64[Tensor, " S"],
    ) -> None:
        """Args: room_bytes: for what suspended forwards hold. probe: see `find_head`."""
        self.head: Head | None = None
        self.keeps_weights = weights.keep
        self._model = skeleton.model
        self._weights, self._stored_head, self._tokens = weights, stored_head, tokens
        self._statistics, self._probe = statistics, probe
        self._meter = StateMeter(skeleton.model, room_bytes, statistics)

    def run(self, batches: Sequence[Batch]) -> Iterator[list[tuple[Batch, Float32[Tensor, " T"]]]]:
        """What each wave scored, on the host.

        Raises:
            CannotPageError: if a model's forwards do not go through its layers alike.
            UnsupportedModelError: if it is not causal, or its head is not a linear one.
        """
        pending = deque(batches)
        while pending:
            forwards: list[Forward] = []
            try:
                yield self._wave(pending, forwards)
            finally:
                with ExitStack() as stack:  # all of them, whatever one does
                    for forward in forwards:
                        stack.callback(forward.end)

    def _wave(
        self, pending: deque[Batch], forwards: list[Forward]
    ) -> list[tuple[Batch, Float32[Tensor, " T"]]]:
        """Take batches off `pending`, as many as have room, and score them."""
        self._weights.begin_wave()
        questions = None
        if self.head is None:
            questions = _Questions(self._model, self._stored_head, self._probe)
        if questions is not None:
            self._meter.begin(_tokens(pending))
        batches = [pending.popleft()]
        forwards.append(self._forward(batches[0]))
        passed = self._lead(forwards[0])
        if questions is not None:
            forwards += questions.forwards
            self._meter.measure(1, _tokens(batches))
        self._admit(pending, batches, forwards)
        followers = forwards[1:]
        for forward in followers:
            forward.resume()
        for name in passed:
            if followers and self._common_stop(followers) != name:
                raise self._other_order({name, followers[0].stopped_at})
            self._weights.need(name)
            for forward in followers:
                forward.resume()
        while stop := self._common_stop(forwards):
            self._weights.need(stop)
            for forward in forwards:
                forward.resume()
            passed.append(stop)
            if questions is not None and self._meter.measure(len(passed), _tokens(batches)):
                self._shed(pending, batches, forwards)
        self._statistics.wave_tokens = max(self._statistics.wave_tokens, _tokens(batches))
        self._weights.more_waves = bool(pending)
        scored = [f.result for f in forwards if isinstance(f.result, _Scored)]
        assert len(scored) == len(batches), "every forward must end with its hidden states"
        return self._score(scored, questions)

    def _forward(self, batch: Batch) -> Forward:
        """A suspended call of the model on a batch; its result is what is scored of it."""
        inputs = BatchInputs.of(self._tokens, batch, self._model.device)
        seen: list[Tensor] = []

        def at_head(hidden: Tensor) -> Tensor:
            seen.append(inputs.scored(hidden))
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        def call() -> _Scored:
            run_model(self._model, inputs.input_ids)
            return _Scored(batch, seen[0], inputs.targets)

        return Forward(call, at_head)

    def _lead(self, forward: Forward) -> list[str]:
        """Take one forward through the first layer; the names of what it went through."""
        passed: list[str] = []
        forward.resume()
        if forward.stopped_at not in (None, HEAD):
            passed.append(str(forward.stopped_at))
            self._weights.need(passed[0])
            forward.resume()
        return passed

    def _admit(self, pending: deque[Batch], batches: list[Batch], forwards: list[Forward]) -> None:
        """Take batches off `pending` while there is room for them."""
        most = _MOST_FORWARDS
        if self.keeps_weights:
            most = _FORWARDS_WHILE_READING if self.head is None else 1
        tokens = _tokens(batches)
        while pending and len(forwards) < most:
            tokens += _tokens([pending[0]])
            if not self._meter.has_room(tokens):
                return
            batches.append(pending.popleft())
            forwards.append(self._forward(batches[-1]))

    def _shed(self, pending: deque[Batch], batches: list[Batch], forwards: list[Forward]) -> None:
        """Put the last batches back if the wave grew beyond its room; a later wave takes them."""
        while len(batches) > 1 and self._meter.overflows(_tokens(batches)):
            forwards.pop().end()
            pending.appendleft(batches.pop())

    def _common_stop(self, forwards: Sequence[Forward]) -> str | None:
        """The layer that all forwards wait for; None once all are at the head, or through."""
        stops = {forward.stopped_at for forward in forwards}
        layers = stops - {None, HEAD}
        if len(layers) > 1 or (layers and len(stops) > 1):
            raise self._other_order(stops)
        return layers.pop() if layers else None

    def _other_order(self, stops: set[str | None]) -> CannotPageError:
        return CannotPageError(
            f"a {type(self._model).__name__} must go through its layers alike for all texts to be "
            f"paged, got {sorted(map(str, stops))[:3]} at a time; use weights='resident'"
        )

    def _score(
        self, scored: Sequence[_Scored], questions: _Questions | None
    ) -> list[tuple[Batch, Float32[Tensor, " T"]]]:
        """Go through the head's tiles, with what is scored and what is asked of the head."""
        head = self.head if questions is None else questions.describe()
        assert head is not None
        asked = [(each.hidden, each.targets) for each in scored]
        if questions is not None:
            asked.append((questions.hidden, head.probe_targets(self._probe)))
        partials: list[PartialLogprobs | None] = [None] * len(asked)
        for first, weight, bias in self._weights.head_tiles():
            words = max(min(head.vocabulary - first, len(weight)), 0)
            for number, (hidden, targets) in enumerate(asked if words else ()):
                part = PartialLogprobs.of_slice(
                    hidden,
                    weight[:words],
                    targets,
                    first_word=first,
                    bias=None if bias is None else bias[:words],
                    scale=head.scale,
                    softcap=head.softcap,
                )
                before = partials[number]
                partials[number] = part if before is None else before.merge(part)
            if questions is not None:
                questions.add_logits(weight, bias)
        statistics = [part.statistics() for part in partials if part is not None]
        if questions is not None:
            questions.judge(head, statistics.pop())
            self.head = head
        return [
            (each.batch, found.logprobs.cpu())
            for each, found in zip(scored, statistics, strict=True)
        ]


class _Questions:
    """The forwards of `find_head`, suspended among those of the first wave."""

    def __init__(self, model: Any, stored: StoredHead, probe: Int64[Tensor, " S"]) -> None:
        self._model, self._stored, self._probe = model, stored, probe
        rows = stored.weight.shape[0]
        self._ramp = ramp_of(rows, self._probe.device)
        self._own = self._ask(torch.stack((probe, changed_probe(probe))))
        self._ramped = self._ask(probe[None])
        ramp = self._ramp
        self._ramped.at_head = lambda hidden: ramp.expand(*hidden.shape[:-1], rows)
        self._tiles: list[Tensor] = []
        self.forwards = [self._own, self._ramped]

    @property
    def hidden(self) -> Float[Tensor, "S D"]:
        """What the probe's forward brought to the head."""
        assert self._own.hidden is not None
        return self._own.hidden[0]

    def describe(self) -> Head:
        """The head by what the ramp became."""
        head = None
        if self._own.stopped_at == HEAD:
            head = describe_head(self._stored.module, self._ramp, self._ramped.result[0])
        if head is None:
            raise self._unusual_head()
        return head

    def add_logits(self, weight: Float[Tensor, "W D"], bias: Float[Tensor, " W"] | None) -> None:
        """The model's own logits of a tile."""
        assert self._own.hidden is not None
        self._tiles.append(torch.nn.functional.linear(self._own.hidden, weight, bias))

    def judge(self, head: Head, fused: TokenStatistics) -> None:
        """Let the forward end with its logits, and compare."""
        self._own.resume(torch.cat(self._tiles, dim=-1))
        logits, changed = self._own.result
        refuse_acausal(self._model, logits, changed)
        if not agrees(logits, fused, head.probe_targets(self._probe)):
            raise self._unusual_head()

    def _ask(self, input_ids: Int64[Tensor, "B S"]) -> Forward:
        model = self._model
        return Forward(lambda: run_model(model, input_ids))

    def _unusual_head(self) -> CannotPageError:
        return CannotPageError(
            f"model must have a linear head to be paged, got a {type(self._model).__name__} that "
            "does more; use weights='resident'"
        )


def _tokens(batches: Iterable[Batch]) -> int:
    return sum(batch.shape[0] * batch.shape[1] for batch in batches)

"""What is asked of a model before its head is trusted, while texts go through its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llfast.batches import TokenizedTexts
from llfast.errors import CannotPageError, ScoringError
from llfast.head import (
    Head,
    agrees,
    changed_probe,
    describe_head,
    ramp_of,
    refuse_acausal,
    run_model,
)
from llfast.kernels import TokenStatistics

from .suspended import HEAD, Forward
from .units import StoredHead


@dataclass(slots=True, kw_only=True, eq=False)
class Subject:
    """A model that is to be run over texts.

    Attributes:
        model: the skeleton's.
        stored_head: its head.
        tokens: of all texts.
        probe: see `find_head`.
        head: what was found out about its head, once it is.
    """

    model: Any
    stored_head: StoredHead
    tokens: TokenizedTexts
    probe: Int64[Tensor, " S"]
    head: Head | None = None


class Questions:
    """The forwards of `find_head`, suspended among those of a model's first wave."""

    def __init__(self, subject: Subject, member: int) -> None:
        self._model, self._stored, probe = subject.model, subject.stored_head, subject.probe
        self._member = member
        rows = self._stored.weight.shape[0]
        self._ramp = ramp_of(rows, probe.device)
        self._probe = probe
        self._own = self._ask(torch.stack((probe, changed_probe(probe))))
        self._ramped = self._ask(probe[None])
        ramp = self._ramp
        self._ramped.at_head = lambda hidden: ramp.expand(*hidden.shape[:-1], rows)
        self._logits: Tensor | None = None
        self._words = 0  # of these, so many are known
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
        hidden = self._own.hidden
        assert hidden is not None
        tile = torch.nn.functional.linear(hidden, weight, bias)
        if self._logits is None:
            rows = self._stored.weight.shape[0]
            self._logits = tile.new_empty(*hidden.shape[:-1], rows)
        first, self._words = self._words, self._words + len(weight)
        self._logits[..., first : self._words] = tile

    def judge(self, head: Head, fused: TokenStatistics) -> None:
        """Let the forward end with its logits, and compare."""
        assert self._logits is not None
        assert self._words == self._logits.shape[-1], "every word must have its logits"
        self._own.resume(self._logits)
        self._logits = None
        logits, changed = self._own.result
        if logits.isnan().any():
            name = type(self._model).__name__
            raise ScoringError(f"logits must be numbers, got NaN from a {name} on a few tokens")
        refuse_acausal(self._model, logits, changed)
        if not agrees(logits, fused, head.probe_targets(self._probe)):
            raise self._unusual_head()

    def _ask(self, input_ids: Int64[Tensor, "B S"]) -> Forward:
        model = self._model
        return Forward(lambda: run_model(model, input_ids), member=self._member)

    def _unusual_head(self) -> CannotPageError:
        return CannotPageError(
            f"model must have a linear head to be paged, got a {type(self._model).__name__} that "
            "does more; use weights='resident'"
        )

"""The operator `llfast::token_statistics`, which torch.compile and fake tensors can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .dispatch import folded_sums, kernels_of, statistics
from .inputs import HeadInputs
from .sums import TokenStatistics

_LIBRARY = torch.library.Library("llfast", "DEF")
_LIBRARY.define(
    "token_statistics(Tensor hidden, Tensor lm_head, Tensor targets, Tensor? bias, float scale, "
    "float? softcap) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_NAMES = [field.name for field in fields(TokenStatistics)]
_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _inputs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> HeadInputs:
    """What the operator is given, checked as far as that needs no data."""
    return HeadInputs(
        hidden=hidden, lm_head=lm_head, targets=targets, bias=bias, scale=scale, softcap=softcap
    )


@torch.library.impl(_LIBRARY, "token_statistics", "CompositeExplicitAutograd")
def _compute(*arguments: Any) -> _Five:
    inputs = _inputs(*arguments)
    inputs.check_targets()
    kernels = kernels_of(inputs.hidden.device)
    return _as_tuple(statistics(kernels, folded_sums(kernels, inputs)))


@torch.library.register_fake("llfast::token_statistics", lib=_LIBRARY)
def _describe(*arguments: Any) -> _Five:
    hidden = _inputs(*arguments).hidden
    return _as_tuple(TokenStatistics.empty(hidden.shape[0], hidden.device))


def as_statistics(found: Sequence[Tensor]) -> TokenStatistics:
    """What the operator returns, by name."""
    return TokenStatistics(**dict(zip(_NAMES, found, strict=True)))


def _as_tuple(found: TokenStatistics) -> _Five:
    return found.logprobs, found.lse, found.target_logits, found.entropy, found.argmax

"""The operators of `torch.ops.llfast`, which torch.compile and fake tensors can see."""

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
_ARGUMENTS = (
    "Tensor hidden, Tensor lm_head, Tensor targets, Tensor? bias, float scale, float? softcap"
)
_LIBRARY.define(f"token_logprobs({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"token_statistics({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_NAMES = [field.name for field in fields(TokenStatistics)]
_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _inputs(arguments: Sequence[Any], *, only_logprobs: bool) -> HeadInputs:
    """What an operator is given, checked as far as that needs no data."""
    hidden, lm_head, targets, bias, scale, softcap = arguments
    return HeadInputs(
        hidden=hidden,
        lm_head=lm_head,
        targets=targets,
        bias=bias,
        scale=scale,
        softcap=softcap,
        only_logprobs=only_logprobs,
    )


def _compute(*arguments: Any, only_logprobs: bool) -> TokenStatistics:
    inputs = _inputs(arguments, only_logprobs=only_logprobs)
    inputs.check_targets()
    kernels = kernels_of(inputs.hidden.device)
    return statistics(kernels, folded_sums(kernels, inputs))


def _describe(*arguments: Any, only_logprobs: bool) -> TokenStatistics:
    hidden = _inputs(arguments, only_logprobs=only_logprobs).hidden
    return TokenStatistics.empty(hidden.shape[0], hidden.device)


@torch.library.impl(_LIBRARY, "token_logprobs", "CompositeExplicitAutograd")
def _token_logprobs(*arguments: Any) -> Tensor:
    return _compute(*arguments, only_logprobs=True).logprobs


@torch.library.register_fake("llfast::token_logprobs", lib=_LIBRARY)
def _fake_token_logprobs(*arguments: Any) -> Tensor:
    return _describe(*arguments, only_logprobs=True).logprobs


@torch.library.impl(_LIBRARY, "token_statistics", "CompositeExplicitAutograd")
def _token_statistics(*arguments: Any) -> _Five:
    return _as_tuple(_compute(*arguments, only_logprobs=False))


@torch.library.register_fake("llfast::token_statistics", lib=_LIBRARY)
def _fake_token_statistics(*arguments: Any) -> _Five:
    return _as_tuple(_describe(*arguments, only_logprobs=False))


def as_statistics(found: Sequence[Tensor]) -> TokenStatistics:
    """What the operator returns, by name."""
    return TokenStatistics(**dict(zip(_NAMES, found, strict=True)))


def _as_tuple(found: TokenStatistics) -> _Five:
    return found.logprobs, found.lse, found.target_logits, found.entropy, found.argmax

"""A model's output head: find it, describe it as numbers, and step in front of it.

A logit is `z = scale * (h @ w.T + bias)`, then `softcap * tanh(z / softcap)`. Weight and bias are
those of the head's linear layer. What the model does after its head is found by asking it: the head
is made to return a ramp of known values, and what comes out says which function lies between.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .kernels import TokenStatistics, token_logprobs, token_statistics

_RAMP_FIT_ERROR = 1e-5  # relative; the functions fitted are exact in fp32 to a few 1e-7


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """A linear output head and what follows it.

    Attributes:
        module: the layer that the model calls.
        vocabulary: how many of its rows the model keeps, V.
        scale: factor on the logits.
        softcap: bound of the logits, None if there is none.
    """

    module: nn.Linear
    vocabulary: int
    scale: float
    softcap: float | None

    def token_logprobs(
        self, hidden: Float[Tensor, "T D"], targets: Int64[Tensor, " T"]
    ) -> Float32[Tensor, " T"]:
        """Log-probability of each target in nats, without the (T, V) logits."""
        return token_logprobs(hidden, targets=targets, **self._arguments())

    def token_statistics(
        self, hidden: Float[Tensor, "T D"], targets: Int64[Tensor, " T"]
    ) -> TokenStatistics:
        """What the fused kernel says of each token."""
        return token_statistics(hidden, targets=targets, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        bias: Tensor | None = self.module.bias
        return {
            "lm_head": self.module.weight[: self.vocabulary],
            "bias": None if bias is None else bias[: self.vocabulary],
            "scale": self.scale,
            "softcap": self.softcap,
        }

    def probe_targets(self, probe: Int64[Tensor, " S"]) -> Int64[Tensor, " S"]:
        """For each token of a probe, the next one; for the last, the first."""
        return probe.roll(-1).clamp_max(self.vocabulary - 1)

    def __str__(self) -> str:
        parts = ["fused"]
        if self.module.bias is not None:
            parts.append("bias")
        if self.scale != 1.0:
            parts.append(f"scale={self.scale:g}")
        if self.softcap is not None:
            parts.append(f"softcap={self.softcap:g}")
        return " ".join(parts)


def run_model(model: Any, input_ids: Int64[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
    """The logits of a forward pass: no cache, and no mask.

    Under causal attention nothing to the right of a token can touch it, so right padding needs no
    mask, and attention takes its causal path.

    Raises:
        UnsupportedModelError: if the model gives none.
    """
    logits = getattr(model(input_ids=input_ids, use_cache=False), "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise UnsupportedModelError(
            f"model must give logits of every token, got a {type(model).__name__}, whose output "
            "has none; load it with AutoModelForCausalLM"
        )
    return logits


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let a module compute something else for a while."""
    missing = object()
    before = module.__dict__.get("forward", missing)
    module.forward = forward
    try:
        yield
    finally:
        if before is missing:
            del module.forward
        else:
            module.forward = before


@contextlib.contextmanager
def hidden_states(head: Head) -> Iterator[list[Float[Tensor, "B S D"]]]:
    """Collect what goes into the head, and spare the model the work behind it."""
    collected: list[Tensor] = []

    def intercept(hidden: Tensor) -> Tensor:
        collected.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with replaced_forward(head.module, intercept):
        yield collected


def find_head(model: Any, probe: Int64[Tensor, " S"]) -> Head | None:
    """Describe a model's head, or return None where only the model's own logits will do.

    The description is trusted after both ways were compared on the hidden states of one forward
    pass over `probe` (two passes may route a mixture of experts differently).

    Args:
        model: a transformers causal language model.
        probe: a few valid token ids, at least two.

    Raises:
        UnsupportedModelError: if the model's attention is not causal, or it has no logits of words.
    """
    module = linear_head(model)
    seen: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if module is not None:
            forward = module.forward

            def watch(hidden: Tensor) -> Tensor:
                seen.append(hidden)
                logits: Tensor = forward(hidden)
                return logits

            stack.enter_context(replaced_forward(module, watch))
        logits = run_model(model, probe[None])[0]
    if logits.shape[-1] <= int(probe.max()):
        raise UnsupportedModelError(
            f"model must give a logit of every word, got a {type(model).__name__}, which gives "
            f"{logits.shape[-1]}; load it with AutoModelForCausalLM"
        )
    refuse_acausal(model, logits, run_model(model, changed_probe(probe)[None])[0])
    if module is None or len(seen) != 1 or seen[0].shape[:-1] != (1, len(probe)):
        return None
    ramp = ramp_of(module.weight.shape[0], probe.device)

    def answer(hidden: Tensor) -> Tensor:
        return ramp.expand(*hidden.shape[:-1], len(ramp))

    with replaced_forward(module, answer):
        head = describe_head(module, ramp, run_model(model, probe[None])[0])
    if head is None:
        return None
    targets = head.probe_targets(probe)
    fused = head.token_statistics(seen[0][0], targets)
    return head if agrees(logits, fused, targets) else None


def linear_head(model: Any) -> nn.Linear | None:
    """The layer that makes a model's logits, if it is a plain linear one."""
    module = model.get_output_embeddings()
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return module if plain else None


def changed_probe(probe: Int64[Tensor, " S"]) -> Int64[Tensor, " S"]:
    """The probe with another second half."""
    half = len(probe) // 2
    return torch.cat((probe[:half], probe.flip(0)[: len(probe) - half]))


def refuse_acausal(model: Any, logits: Float[Tensor, "S V"], changed: Float[Tensor, "S V"]) -> None:
    """Compare logits of the probe with those of the changed one: the first half must be the same.

    Raises:
        UnsupportedModelError: if it is not.
    """
    half = len(logits) // 2
    size = _largest(logits[:half])
    pairs = zip(logits[:half], changed[:half], strict=True)
    error = _largest(before.double() - after.double() for before, after in pairs)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if error > tolerance * size:
        raise UnsupportedModelError(
            f"model must be causal, got a {type(model).__name__} in which later tokens change "
            f"earlier logits (by {error:.2g} of {size:.2g}); its sums are no likelihoods"
        )


def describe_head(
    module: nn.Linear, ramp: Float32[Tensor, " W"], out: Float[Tensor, "S V"]
) -> Head | None:
    """Name the function that makes `out` of the ramp, which the head returned for its logits."""
    vocabulary = out.shape[-1]
    fitted = _fit(ramp[:vocabulary].double(), out) if vocabulary <= len(ramp) else None
    if fitted is None:
        return None
    scale, softcap = fitted
    return Head(module=module, vocabulary=vocabulary, scale=scale, softcap=softcap)


def agrees(
    logits: Float[Tensor, "S V"], fused: TokenStatistics, targets: Int64[Tensor, " S"]
) -> bool:
    """Whether own logits say the same of the targets, and of the whole softmax, as fused ones.

    Args:
        logits: the model's own, in its dtype.
        fused: of the same hidden states and targets.
        targets: word ids.
    """
    lse = torch.stack([row.double().logsumexp(-1) for row in logits])
    logprobs = logits.gather(1, targets[:, None])[:, 0].double() - lse
    errors = torch.stack((fused.logprobs - logprobs, fused.lse - lse))
    # The model's own logits are rounded to its dtype; the fused ones are not.
    rounding = torch.finfo(logits.dtype).eps * _largest(logits)
    return errors.abs().mean().item() <= 2 * rounding + 1e-5


def ramp_of(rows: int, device: torch.device) -> Float32[Tensor, " V"]:
    """What a head of V rows is made to return in place of logits.

    Values of both signs from 0.01 to 1,000, in an order that no monotonic mask survives.
    """
    size = torch.logspace(-2, 3, rows, dtype=torch.float32, device=device)
    sign = 1.0 - 2.0 * (torch.arange(rows, device=device) % 2)
    return size * sign


def _fit(
    ramp: Float64[Tensor, " V"], out: Float[Tensor, "S V"]
) -> tuple[float, float | None] | None:
    """Scale and softcap that turn the ramp into every row of `out`, or None."""
    if not all(torch.isfinite(row).all() for row in out):
        return None
    x, y = ramp, out[0].double()
    scale, softcap = (y[:1] / x[:1]).item(), None  # |x[0]| is smallest: all but linear there
    if scale <= 0:
        return None
    if y.abs().max() < 0.999 * scale * x.abs().max():
        for _ in range(3):  # each of the two is found from the other, and converges at once
            softcap = _bound(scale * x.abs().max().item(), y.abs().max().item())
            linear = y.abs() <= max(0.01 * softcap, y.abs().min().item())
            scale = (softcap * torch.atanh(y[linear] / softcap) / x[linear]).median().item()
    else:
        scale = (y / x).median().item()
    if abs(scale - 1.0) < 1e-6:
        scale = 1.0
    expected = scale * x
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    error = _largest((row.double() - expected) / expected for row in out)
    return (scale, softcap) if error < _RAMP_FIT_ERROR else None


def _largest(rows: Iterable[Tensor]) -> float:
    """By absolute value, NaN if there is one. One row after the other: a copy of all is large."""
    return torch.stack([row.abs().max() for row in rows]).max().item()


def _bound(x: float, y: float) -> float:
    """The c with `c * tanh(x / c) = y`, for y below x; a whole number if it is that near."""
    low, high = y * (1 - 1e-7), 1e9
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
    return float(round(high)) if abs(high / max(round(high), 1) - 1) < 1e-5 else high

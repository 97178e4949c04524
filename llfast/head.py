"""A model's output head: find it, describe it as numbers, and step in front of it.

A logit is `z = scale * (h @ w.T + bias)`, then `softcap * tanh(z / softcap)`. Weight and bias are
those of the head's linear layer. What the model does after its head is found by asking it: the head
is made to return a ramp of known values, and what comes out says which function lies between.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .kernels import token_logprobs

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
        bias: Tensor | None = self.module.bias
        logprobs: Tensor = token_logprobs(
            hidden,
            self.module.weight[: self.vocabulary],
            targets,
            bias=None if bias is None else bias[: self.vocabulary],
            scale=self.scale,
            softcap=self.softcap,
        )
        return logprobs

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
    """
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
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
        UnsupportedModelError: if the model's attention is not causal.
    """
    _refuse_acausal(model, probe)
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    head = _ask(model, module, probe)
    return head if head is not None and _agrees(model, head, probe) else None


def _refuse_acausal(model: Any, probe: Tensor) -> None:
    """Change the second half of a text; the logits of the first half must stay."""
    half = len(probe) // 2
    changed = torch.cat((probe[:half], probe.flip(0)[: len(probe) - half]))
    before, after = (run_model(model, ids[None])[0, :half].double() for ids in (probe, changed))
    size = before.abs().max().item()
    error = (before - after).abs().max().item()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if error > tolerance * size:
        raise UnsupportedModelError(
            f"model must be causal, got a {type(model).__name__} in which later tokens change "
            f"earlier logits (by {error:.2g} of {size:.2g}); its sums are no likelihoods"
        )


def _ask(model: Any, module: nn.Linear, probe: Tensor) -> Head | None:
    """Let the head return a ramp, and name the function that comes out."""
    rows = module.weight.shape[0]
    ramp = _ramp(rows, probe.device)
    calls = 0

    def answer(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return ramp.expand(*hidden.shape[:-1], rows)

    with replaced_forward(module, answer):
        out = run_model(model, probe[None])
    vocabulary = out.shape[-1]
    if calls != 1 or out.shape != (1, len(probe), vocabulary) or vocabulary > rows:
        return None
    fitted = _fit(ramp[:vocabulary].double(), out[0].double())
    if fitted is None:
        return None
    scale, softcap = fitted
    return Head(module=module, vocabulary=vocabulary, scale=scale, softcap=softcap)


def _ramp(rows: int, device: torch.device) -> Float32[Tensor, " V"]:
    """Values of both signs from 0.01 to 1,000, in an order that no monotonic mask survives."""
    size = torch.logspace(-2, 3, rows, dtype=torch.float32, device=device)
    sign = 1.0 - 2.0 * (torch.arange(rows, device=device) % 2)
    return size * sign


def _fit(
    ramp: Float64[Tensor, " V"], out: Float64[Tensor, "S V"]
) -> tuple[float, float | None] | None:
    """Scale and softcap that turn the ramp into every row of `out`, or None."""
    if not torch.isfinite(out).all():
        return None
    x, y = ramp, out[0]
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
    error = ((out - expected).abs() / expected.abs()).max().item()
    return (scale, softcap) if error < _RAMP_FIT_ERROR else None


def _bound(x: float, y: float) -> float:
    """The c with `c * tanh(x / c) = y`, for y below x; a whole number if it is that near."""
    low, high = y * (1 - 1e-7), 1e9
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
    return float(round(high)) if abs(high / max(round(high), 1) - 1) < 1e-5 else high


def _agrees(model: Any, head: Head, probe: Tensor) -> bool:
    """Whether fused and own log-probabilities agree on the hidden states of one forward pass."""
    seen: list[Tensor] = []
    forward = head.module.forward

    def watch(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        logits: Tensor = forward(hidden)
        return logits

    with replaced_forward(head.module, watch):
        logits = run_model(model, probe[None])[0].float()
    own = torch.log_softmax(logits, dim=-1)
    # Three targets a position: the next token, the likeliest, and one far from both.
    targets = torch.stack((probe.roll(-1), own.argmax(-1), own.argmin(-1))).clamp_max(
        head.vocabulary - 1
    )
    hidden = seen[0][0].repeat(len(targets), 1)
    fused = head.token_logprobs(hidden, targets.flatten()).view_as(targets)
    error = (fused - own.gather(1, targets.T).T).abs().mean().item()
    # The model's own logits are rounded to its dtype; the fused ones are not.
    rounding = torch.finfo(seen[0].dtype).eps * logits.abs().max().item()
    return error <= 2 * rounding + 1e-5

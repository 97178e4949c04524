"""How fast this machine multiplies matrices of given sizes: the ceiling of a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from llfast.linear import PACKED, linear_layers

from .timing import seconds_a_call

TORCH_MM, PACKED_PRODUCT = "torch.mm", "packed products"
_LEAST_SECONDS = 0.03  # that a product is timed for
_MOST_CALLS = 50
_MOST_OUTPUT_BYTES = 1 << 30


@torch.inference_mode()
def product_rates(
    linear: Mapping[tuple[int, int], int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packed: bool,
) -> dict[str, float]:
    """FLOP/s of the products of linear layers, each size as often as it is there.

    Args:
        linear: (inputs, outputs) of layers, and how many there are of each.
        rows: of what is multiplied; fewer if a product would take more than 1 GiB.
        dtype: of both sides.
        device: where.
        packed: measure oneDNN's products of packed weights, too, which `linear.py` takes.

    Returns: of `torch.mm` into memory that is there, and of packed products.
    """
    flops = 0
    seconds = dict.fromkeys((TORCH_MM, *([PACKED_PRODUCT] if packed else [])), 0.0)
    for (inputs, outputs), count in linear.items():
        height = max(1, min(rows, _MOST_OUTPUT_BYTES // (outputs * dtype.itemsize)))
        hidden = torch.randn(height, inputs, dtype=dtype, device=device)
        layer = nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device)
        nn.init.normal_(layer.weight, std=inputs**-0.5)
        out = torch.empty(height, outputs, dtype=dtype, device=device)
        flops += count * 2 * height * inputs * outputs
        product = partial(torch.mm, hidden, layer.weight.T, out=out)
        seconds[TORCH_MM] += count * _seconds(product, device)
        if packed:
            with linear_layers(layer, PACKED, leave_out=None):
                seconds[PACKED_PRODUCT] += count * _seconds(partial(layer, hidden), device)
    return {name: flops / each for name, each in seconds.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    once = seconds_a_call(call, 1, device)
    calls = max(1, min(_MOST_CALLS, int(_LEAST_SECONDS / max(once, 1e-9))))
    return seconds_a_call(call, calls, device)

"""A model's linear layers on a CPU: torch's own, or oneDNN with weights that were packed once.

Which of the two is a table's choice, never a timing's, so that a model gets the same bits in every
run. torch has no public way to pack weights (`to_mkldnn` only changes who holds them); the two
operators used here are those that its compiler emits, and they are tried out before they are used.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from . import memory
from .errors import LlfastWarning, ScoringError
from .head import replaced_forward
from .processor import Processor, this_processor

TORCH = "torch"
PACKED = "packed"

# Where packed weights pay. GFLOP/s on two threads of torch 2.13, packed against torch's own (MKL),
# at the layers of GPT-2:
#   Zen 5, AVX-512, fp32   420 against 175
#   Zen 4, AVX-512, fp32   205 to 225 against 142 to 199; its body takes 505 ms instead of 588
# Packed fp32 rounds 1.5 to 2.2 times as coarsely (rms), for its sums are one chain. Left out:
#   Zen 4, AVX-512, bf16   413 to 449 against 355 to 433
#   Zen 4, AVX2, fp32      165 against 146, which is 2 to 5 % of a model's time
#   Intel, AMX, bf16       1.0 to 1.4 times as fast, 1.0 to 1.1 at widths above 1,536; to pack takes
#                          as long as to multiply 500 rows, and paged layers are packed every wave
_PACKED_PAYS = frozenset(
    (Processor(chip, instructions), torch.float32)
    for chip in ("AuthenticAMD 25", "AuthenticAMD 26")
    for instructions in ("avx512", "avx512_bf16")
)
# Packed weights may take so much of the machine's memory: all of it, not what is free, or a restart
# could find another path, and other bits.
_MEMORY_SHARE = 0.25
# Packed for calls of so many rows, whatever they have: oneDNN 3.10 (torch 2.11) packs some weights
# differently for 64 rows than for 100, which changes bits; 3.12 (torch 2.13) does not.
_PACKED_FOR_ROWS = 512


def linear_path(
    device: torch.device,
    dtype: torch.dtype,
    *,
    model: nn.Module | None = None,
    leave_out: nn.Module | None = None,
) -> str:
    """Which path linear layers take: "torch" or "packed".

    Packed where the table says so, if the machine has four times the memory that packed weights
    take. Plain, with a warning, where torch's operators fail.

    Args:
        device: where the model runs.
        dtype: the dtype that it runs in.
        model: whose packed weights have to fit in memory; None asks for the table alone.
        leave_out: the layer that `linear_layers` will leave out.
    """
    pays = device.type == "cpu" and (this_processor(), dtype) in _PACKED_PAYS
    if not pays or not _packing_works():
        return TORCH
    weights = set() if model is None else {weight for _, weight in _packable(model, leave_out)}
    if sum(weight.nbytes for weight in weights) > _MEMORY_SHARE * memory.total_bytes():
        return TORCH
    return PACKED


@contextlib.contextmanager
def linear_layers(model: nn.Module, path: str, *, leave_out: nn.Module | None) -> Iterator[None]:
    """Let a model's linear layers take a path for a while, then give them back as they were.

    Packed weights are a copy: a change of a weight in the meantime is not seen. Layers whose weight
    is anything but a plain fp32 parameter in memory stay with torch, as do calls with gradients.

    Args:
        model: it may hold `nn.Linear` and transformers' `Conv1D`; all else is left alone.
        path: what `linear_path` returned.
        leave_out: a layer that is not packed.

    Raises: ScoringError if oneDNN cannot pack a weight, for want of memory.
    """
    with contextlib.ExitStack() as stack:
        if path == PACKED:
            packed: dict[tuple[nn.Parameter, bool], Tensor] = {}  # a shared weight is packed once
            for layer, weight in _packable(model, leave_out):
                if weight.is_meta:  # it is not there yet
                    continue
                transposed = isinstance(layer, Conv1D)
                if (weight, transposed) not in packed:
                    packed[weight, transposed] = _pack(weight.T if transposed else weight)
                forward = _packed_forward(layer, packed[weight, transposed])
                stack.enter_context(replaced_forward(layer, forward))
        yield


def _packable(
    model: nn.Module, leave_out: nn.Module | None
) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Layers that compute a plain linear map, with their weights."""
    for module in model.modules():
        if (
            module is leave_out
            or type(module).forward not in (nn.Linear.forward, Conv1D.forward)
            or "forward" in vars(module)  # somebody stepped in front of it
            or vars(module)["_forward_pre_hooks"]  # which may bring or change the weight
        ):
            continue
        # Weights that are computed are attributes, but no parameters.
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or weight is not module.weight or bias is not module.bias:
            continue
        if _is_plain(weight) and weight.ndim == 2 and (bias is None or _is_plain(bias)):
            yield module, weight


def _is_plain(parameter: nn.Parameter) -> bool:
    """Numbers in memory: not quantised, sharded, offloaded or not yet there."""
    return (
        type(parameter) is nn.Parameter
        and parameter.layout == torch.strided
        and parameter.device.type in ("cpu", "meta")  # the latter: of a model that is paged
        and parameter.dtype == torch.float32
        and parameter.numel() > 0
    )


def _packed_forward(layer: Any, packed: Tensor) -> Callable[..., Tensor]:
    """What a layer computes, through its packed weight; unusual calls go to torch's own code."""
    plain, bias = layer.forward, layer.bias
    width = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]

    def forward(*given: Tensor, **named: Tensor) -> Tensor:
        if len(given) == 1 and not named and not torch.is_grad_enabled():
            hidden = given[0]
            if hidden.dtype == torch.float32 and hidden.is_cpu and hidden.shape[-1:] == (width,):
                return _packed_linear(hidden, packed, bias)
        out: Tensor = plain(*given, **named)
        return out

    return forward


# The two operators have no public names.
def _pack(weight: Float32[Tensor, "out in"]) -> Tensor:
    pack = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001
    try:
        packed: Tensor = pack(weight.detach().contiguous(), _PACKED_FOR_ROWS)
    except RuntimeError as error:
        raise ScoringError(
            f"memory must hold the packed weights of linear layers, got {error}; free some of it"
        ) from error
    return packed


def _packed_linear(
    hidden: Float32[Tensor, "*B in"], packed: Tensor, bias: Float32[Tensor, " out"] | None
) -> Float32[Tensor, "*B out"]:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")  # noqa: SLF001
    return out


@functools.cache
def _packing_works() -> bool:
    """Whether this torch has the operators, and they compute a linear layer; warns if not."""
    # Neither dtype nor device may follow torch's defaults.
    numbers = torch.linspace(-1, 1, 56 * 40, dtype=torch.float32, device="cpu")
    hidden, weight, bias = numbers[: 16 * 40].view(16, 40), numbers.view(56, 40), numbers[:56]
    problem = "they compute something else"
    with torch.inference_mode():
        expected = functional.linear(hidden, weight, bias)
        try:
            out = _packed_linear(hidden, _pack(weight), bias)
            if (out - expected).abs().max().item() < 1e-4:
                return True
        except (AttributeError, TypeError, RuntimeError, ScoringError) as error:
            problem = str(error).partition("\n")[0]
    warnings.warn(
        f"linear layers run slower, as the operators of torch {torch.__version__} for packed "
        f"weights are not usable ({problem})",
        LlfastWarning,
        stacklevel=3,
    )
    return False

"""Where a model runs, and how much of a text set at a time."""

from __future__ import annotations

import torch

from .models import MemorySource, ModelSource
from .processor import processor_name

_CUDA_TOKEN_BUDGET = 32768
# On a CPU a batch of 256 tokens runs as fast as one of 2,048 (GPT-2's body, one thread), and small
# batches need fewer dummy rows; a thread more is given as many tokens more.
_CPU_TOKENS_PER_THREAD = 256
_CPU_TOKEN_BUDGETS = (512, 8192)  # the least and the most


def default_token_budget(device: torch.device) -> int:
    """Tokens in a batch: enough to keep the matrix units of a device of this type busy."""
    if device.type != "cpu":
        return _CUDA_TOKEN_BUDGET
    least, most = _CPU_TOKEN_BUDGETS
    return min(max(torch.get_num_threads() * _CPU_TOKENS_PER_THREAD, least), most)


def resolve_device(name: str, source: ModelSource) -> torch.device:
    """The device to run on; ValueError if it is not there, or not where a loaded model is."""
    own = source.model.device if isinstance(source, MemorySource) else None
    if name == "auto":
        return own or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be there, got {name!r} where torch sees no CUDA device; use 'cpu'"
        )
    if own is not None and device.type != own.type:
        raise ValueError(f"device must be 'auto' for a loaded model on {own}, got {name!r}")
    return device


def device_name(device: torch.device) -> str:
    """The chip's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()

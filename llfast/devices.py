"""Where a model runs, and how much of a text set at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .models import MemorySource, ModelSource
from .processor import processor_name

# On a GPU, products of the model's width should have some 256 tiles of 128 x 256, which is two for
# each multiprocessor of an H200. More tokens only mean more dummy rows: with 1,000 texts of 275
# tokens (standard deviation 60), 1.19 times the tokens run at 4,096 in a batch, 1.40 at 8,192, 2.57
# at 32,768. A narrow model gets as many as should take a GPU longer than Python takes to launch its
# forward pass. `benchmarks/scoring_on_gpu.py` measures these and other budgets.
_CUDA_PRODUCT = 256 * 128 * 256
_CUDA_TOKEN_BUDGETS = (4096, 8192)  # the least and the most
# On a CPU a batch of 256 tokens runs as fast as one of 2,048 (GPT-2's body, one thread), and small
# batches need fewer dummy rows; a thread more is given as many tokens more.
_CPU_TOKENS_PER_THREAD = 256
_CPU_TOKEN_BUDGETS = (512, 8192)  # the least and the most
# Beyond what any chip needs; short batches are filled up to it with dummy rows.
_LARGEST_TOKEN_BUDGET = 1 << 20


def check_token_budget(token_budget: int | None) -> None:
    """Refuse a budget that no model could be run with; None stands for the default.

    Raises:
        ValueError: if it is no whole number, or too small or large.
    """
    is_whole = isinstance(token_budget, int | np.integer)
    if token_budget is not None and not (is_whole and 1 <= token_budget <= _LARGEST_TOKEN_BUDGET):
        raise ValueError(
            f"token_budget must be a whole number from 1 to {_LARGEST_TOKEN_BUDGET:,}, got "
            f"{token_budget!r}; leave it out for the default"
        )


def default_token_budget(device: torch.device, config: Any) -> int:
    """Tokens in a batch: enough to keep the matrix units of a device of this type busy.

    A model always gets the same on one device, whatever the texts, or they would get other bits.

    Args:
        device: where the model runs.
        config: the model's, for its width.
    """
    if device.type == "cpu":
        (least, most), wanted = _CPU_TOKEN_BUDGETS, torch.get_num_threads() * _CPU_TOKENS_PER_THREAD
    else:
        width = getattr(config.get_text_config(), "hidden_size", None)
        (least, most), wanted = _CUDA_TOKEN_BUDGETS, _CUDA_PRODUCT // (width or 1)
    return min(max(wanted, least), most)


def resolve_device(name: str, source: ModelSource) -> torch.device:
    """The device to run on, of a loaded model its own.

    Raises:
        ValueError: if it is not there, or not the one that a loaded model is on.
    """
    if not isinstance(source, MemorySource):
        return parse_device(name)
    own: torch.device = source.model.device
    if name == "auto":
        return own
    device = parse_device(name)
    # Without a number, any device of this type is meant; a device that has none is the first.
    if device.type != own.type or device.index not in (None, own.index or 0):
        raise ValueError(f"device must be 'auto' for a loaded model on {own}, got {name!r}")
    return own


def parse_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", or "auto" for CUDA where it is there.

    Raises:
        ValueError: for another name, or a device that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, colon, number = str(name).partition(":")
    if kind not in ("cpu", "cuda") or (colon and not number.isdecimal()):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}; take one of them")
    # torch keeps a number in a byte, and takes 256 for 0.
    if int(number or 0) >= (1 if kind == "cpu" else count):
        seen = ", ".join(f"cuda:{each}" for each in range(count)) or "no CUDA device"
        raise ValueError(f"device must be there, got {name!r} where torch sees {seen}; use 'cpu'")
    return torch.device(kind, int(number)) if colon else torch.device(kind)


def device_name(device: torch.device) -> str:
    """The chip's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()

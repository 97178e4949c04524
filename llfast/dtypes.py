"""Which dtype a model runs in."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by name; ValueError for any but float32, bfloat16 and float16."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run a checkpoint in: its own, except where a CPU is slow in it.

    fp16 runs at a tenth of fp32's speed on a CPU, and bf16 needs instructions for it; fp32 holds
    every number of both. Decided by what the processor is, never by a timing.
    """
    if device.type != "cpu" or stored == torch.float32:
        return stored
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return stored if stored == torch.bfloat16 and has_bf16 else torch.float32

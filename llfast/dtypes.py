"""Which dtype a model runs in."""

from __future__ import annotations

import torch

from .processor import Processor, this_processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What safetensors calls what torch has.
STORED_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# Where bf16 is at least as fast as fp32; everywhere else bf16 checkpoints run in fp32. GFLOP/s of a
# linear layer, torch 2.13, bf16 against fp32:
#   Zen 5            800 against 175 (420 packed), two threads
#   Zen 4            426 against 196, two threads
#   Intel with AMX   1,200 to 1,900 against 240 to 300, two threads
# Left out: Xeons with AVX512-BF16 but without AMX, 82 against 162 a thread.
_BF16_PAYS = frozenset(
    {
        Processor("AuthenticAMD 25", "avx512_bf16"),
        Processor("AuthenticAMD 26", "avx512_bf16"),
        Processor("GenuineIntel 6", "amx_bf16"),
    }
)


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by name; ValueError for any but float32, bfloat16 and float16."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which a dtype is asked for and stored: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run a checkpoint in: its own, except where a CPU is slow in it.

    fp16 runs at a tenth of fp32's speed on a CPU, and bf16 needs instructions for it that are fast;
    fp32 holds every number of both. Decided by a table, never by a timing.

    Args:
        stored: the checkpoint's dtype.
        device: where it will run.
    """
    if device.type != "cpu" or stored == torch.float32:
        return stored
    fast = stored == torch.bfloat16 and this_processor() in _BF16_PAYS
    return stored if fast else torch.float32

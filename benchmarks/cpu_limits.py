"""What the processor can do at most: cpu_limits.cpp, built and called."""

from __future__ import annotations

import ctypes
import math
import subprocess
import tempfile
from pathlib import Path

import torch

FMA_SECONDS = 0.3
# Which instructions multiply fastest where llfast computes with a set. Without a bf16 dot product
# bf16 weights are converted, and multiplied in fp32.
FASTEST_MULTIPLY_ADD = {
    ("amx_bf16", torch.float32): "avx512",
    ("amx_bf16", torch.bfloat16): "amx_bf16",
    ("avx512_bf16", torch.float32): "avx512",
    ("avx512_bf16", torch.bfloat16): "avx512_bf16",
}


class Limits:
    """The rates of multiply-adds and of reading memory, measured when asked, on torch's threads."""

    def __init__(self) -> None:
        source = Path(__file__).with_suffix(".cpp")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "cpu_limits.so")
            command = ["c++", "-O3", "-std=c++17", "-pthread", "-shared", "-fPIC"]
            subprocess.run([*command, str(source), "-o", str(library)], check=True)
            loaded = ctypes.CDLL(str(library))
        self._fma_gflops = loaded.fma_gflops
        self._fma_gflops.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_double]
        self._fma_gflops.restype = ctypes.c_double
        self._read_seconds = loaded.read_seconds
        self._read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._read_seconds.restype = ctypes.c_double

    def gflops(self, multiply_add: str) -> float:
        """Multiply-adds without memory, as 2 FLOP each, in GFLOP/s.

        Raises: ValueError if this processor does not have the instructions.
        """
        found = self._fma_gflops(multiply_add.encode(), torch.get_num_threads(), FMA_SECONDS)
        if not found > 0:
            raise ValueError(
                f"multiply_add must be one of this processor's instruction sets, got {multiply_add}"
            )
        return float(found)

    def read_seconds(self, array: torch.Tensor) -> float:
        """How long it takes to read all of a contiguous tensor."""
        assert array.is_contiguous()
        size_bytes = math.prod(array.shape) * array.element_size()
        return float(self._read_seconds(array.data_ptr(), size_bytes, torch.get_num_threads()))


def fastest_multiply_add(instruction_set: str, dtype: torch.dtype) -> str:
    """The name that `Limits.gflops` has for the fastest way of that set to multiply that dtype."""
    return FASTEST_MULTIPLY_ADD.get((instruction_set, dtype), instruction_set)

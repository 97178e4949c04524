"""Let the launcher's own calls compile, with a driver that knows a chip but has none.

Run by test_triton_compiles.py, in a process where Triton does not interpret.
"""

import contextlib
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llfast.kernels import cuda, dispatch, token_statistics, triton_head

CAPABILITY = tuple(int(number) for number in sys.argv[1].split("."))
SHAPES = ((1, 1, 1), (70, 3000, 64), (70, 3000, 37))
compiled = []


class Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)


class Kernels:
    """The kernels, compiled where they would be launched."""

    TensorDescriptor = triton_head.TensorDescriptor

    def __getattr__(self, name):
        return Grids(getattr(triton_head, name))


class Grids:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **options: compiled.append(
            self.kernel.warmup(*arguments, grid=grid, **options)
        )


driver.set_active(Driver())
dispatch.cpu.native = lambda: None
dispatch.reference = cuda
cuda._kernels = Kernels
cuda.chip_of = lambda _: cuda.Chip(capability=CAPABILITY, multiprocessors=132)
cuda.on_device = lambda _: contextlib.nullcontext()

for dtype in (torch.bfloat16, torch.float32):
    for tokens, vocabulary, width in SHAPES:
        hidden = torch.zeros(tokens, width, dtype=dtype)
        lm_head = torch.zeros(vocabulary, width, dtype=dtype)
        targets = torch.zeros(tokens, dtype=torch.int64)
        token_statistics(hidden, lm_head, targets)
        bias = torch.zeros(vocabulary)
        token_statistics(hidden, lm_head, targets.int(), bias=bias, scale=0.5, softcap=3.0)
assert {kernel.metadata.target.arch for kernel in compiled} == {10 * CAPABILITY[0] + CAPABILITY[1]}
print(len(compiled))

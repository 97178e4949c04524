"""A process whose CUDA device is a name: the launcher's calls compile for it, and go elsewhere.

For processes of their own, where Triton does not interpret.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llfast.kernels import cuda, dispatch, gluon_head, triton_head

Launched = Callable[[Any, dict[str, Any], int], None]  # a compiled kernel, arguments, programs


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)


class _Kernels:
    """The kernels, compiled where they would be launched."""

    def __init__(self, module, launched: Launched):
        self.module, self.launched = module, launched

    def __getattr__(self, name):
        found = getattr(self.module, name)
        return _Grids(found, self.launched) if hasattr(found, "warmup") else found


class _Grids:
    def __init__(self, kernel, launched: Launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            named = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
            self.launched(compiled, named, grid[0])

        return launch


def pretend(capability: tuple[int, int], multiprocessors: int, launched: Launched) -> None:
    """Let tensors of the CPU go to a device of this compute capability."""
    kernels, specialised = (_Kernels(module, launched) for module in (triton_head, gluon_head))
    driver.set_active(_Driver(10 * capability[0] + capability[1]))
    dispatch.cpu.native = lambda: None
    dispatch.reference = cuda
    cuda._kernels = lambda: kernels
    cuda._specialised_kernels = lambda: specialised
    chip = cuda.Chip(capability=capability, multiprocessors=multiprocessors)
    cuda.chip_of = lambda _: chip
    cuda.on_device = lambda _: contextlib.nullcontext()

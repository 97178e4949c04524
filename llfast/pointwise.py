"""Pointwise operations of a batch, a text at a time, so that its place does not show in its bits.

On a CPU torch cuts a tensor into pieces for its threads, without regard to texts, and computes what
is left of a piece beyond whole vectors by other code. There, sigmoid, silu, gelu, softplus and
powers round differently, and rsqrt in half precision (torch 2.13; by one unit in the last place).
With 2 or 8 threads the pieces of most models' tensors are whole vectors; with 3, 6 or 48 they are
not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# IEEE 754 says what these return, by whatever code.
_EXACT = frozenset(
    "abs add bitwise_and bitwise_not bitwise_or ceil clamp clamp_max clamp_min div eq floor ge gt "
    "isfinite isinf isnan le logical_and logical_not logical_or lt masked_fill maximum minimum mul "
    "ne neg relu remainder round rsub sign sqrt sub threshold trunc where".split()
)
_SUMS = frozenset(["add", "sub", "rsub"])  # exact, unless a term is scaled
# Which torch does not call pointwise. What else it puts together itself is seen as one operation
# here: a norm, a softmax or attention takes each row for itself.
_UNTAGGED = frozenset(["glu", "hardswish", "log_sigmoid", "special_expit"])
_AT_ONCE_BYTES = 128  # what torch computes in one go: two vectors of AVX-512
_PIECE = 32_768  # numbers in a thread's piece, at least: at::internal::GRAIN_SIZE
_LEAST_PIECE = 2_048  # for the few operations that have a limit of their own


class TextByText:
    """For the batches of one model: which shapes are computed text by text is found as they come.

    What is computed in which way depends on shapes and on the number of threads alone.
    """

    def __init__(self) -> None:
        self._whole: set[tuple[int, ...]] = set()  # shapes for which nothing had to be cut

    def during(self, input_ids: Int64[Tensor, "B S"]) -> contextlib.AbstractContextManager[Any]:
        """While it lasts, operations on what a model makes of a batch are computed so.

        It may be entered again and again. Nothing changes for a single text, and on other devices
        than a CPU.
        """
        shape = tuple(input_ids.shape)
        if shape[0] == 1 or input_ids.device.type != "cpu" or shape in self._whole:
            return contextlib.nullcontext()
        return _Mode(shape[0])

    def learn(
        self, input_ids: Int64[Tensor, "B S"], during: contextlib.AbstractContextManager[Any]
    ) -> None:
        """Say that a model has been through a batch while `during` lasted."""
        if isinstance(during, _Mode) and not during.has_cut:
            self._whole.add(tuple(input_ids.shape))


# torch has no types for its modes, and no public name for what an operator says of itself.
class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Attributes: has_cut: whether any operation has been computed text by text."""

    def __init__(self, texts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._texts = texts
        self._threads = torch.get_num_threads()
        self.has_cut = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_scaled = kwargs.get("alpha", 1) != 1 and _name(func) in _SUMS
        if not (is_scaled or _depends_on_place(func)) or self._is_whole(args):
            return func(*args, **kwargs)
        rows, rank = _shape(args)
        has_out = any(isinstance(each, Tensor) for each in kwargs.values())
        if rows == 0 or rows % self._texts or has_out:
            return func(*args, **kwargs)
        self.has_cut = True
        step = rows // self._texts
        out = None
        for start in range(0, rows, step):
            part = func(*(_part(each, start, step, rows, rank) for each in args), **kwargs)
            if func._schema.is_mutable:  # noqa: SLF001
                continue
            if out is None:
                out = _empty(args, part, rows)
            out[start : start + step] = part
        return args[0] if out is None else out

    def _is_whole(self, args: Sequence[Any]) -> bool:
        """Whether all of the pieces that threads take are whole vectors."""
        tensors = [each for each in args if isinstance(each, Tensor)]
        if len(tensors) != 1 or tensors[0].ndim == 0:
            return False
        (tensor,) = tensors
        at_once, size = _AT_ONCE_BYTES // tensor.itemsize, tensor.numel()
        if not tensor.is_contiguous() and (tensor.stride(-1) != 1 or tensor.shape[-1] % at_once):
            return False
        most = max(1, min(self._threads, -(-size // _LEAST_PIECE)))
        least = most if size >= most * _PIECE else 1
        return size % at_once == 0 and all(
            -(-size // pieces) % at_once == 0 for pieces in range(least, most + 1)
        )


def _shape(args: Sequence[Any]) -> tuple[int, int]:
    """Rows and dimensions of what an operation makes of tensors, which it broadcasts."""
    shapes = [each.shape for each in args if isinstance(each, Tensor)]
    rank = max(map(len, shapes), default=0)
    rows = [shape[0] for shape in shapes if len(shape) == rank] if rank else [0]
    return max(rows), rank


def _part(value: Any, start: int, step: int, rows: int, rank: int) -> Any:
    """Some rows of an argument, if it has them, and is not the same for all."""
    if isinstance(value, Tensor) and value.ndim == rank and len(value) == rows:
        return value[start : start + step]
    return value


def _empty(args: Sequence[Any], part: Tensor, rows: int) -> Tensor:
    """A result as the operation would lay it out: some models take views that need its strides."""
    shape = (rows, *part.shape[1:])
    for each in args:
        if isinstance(each, Tensor) and each.shape == shape:
            return torch.empty_like(each, dtype=part.dtype)
    return part.new_empty(shape)


@functools.cache
def _depends_on_place(func: Any) -> bool:
    """Whether an element's bits may depend on where in a tensor it is."""
    is_pointwise = torch.Tag.pointwise in func.tags and len(func._schema.returns) == 1  # noqa: SLF001
    return _name(func) in _UNTAGGED or (is_pointwise and _name(func) not in _EXACT)


@functools.cache
def _name(func: Any) -> str:
    name: str = func._schema.name  # noqa: SLF001
    return name.removeprefix("aten::").removesuffix("_")

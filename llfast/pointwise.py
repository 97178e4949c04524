"""Pointwise operations of a batch, a text at a time, so that its place does not show in its bits.

On a CPU torch cuts a tensor into pieces for its threads, without regard to texts, and computes what
is left of a piece beyond whole vectors by other code: sigmoid, silu, gelu, softplus and rsqrt round
differently there (torch 2.13; by one unit in the last place). With two threads, cuts between the
rows of most models fall on whole vectors; with three, or thirty, they do not.
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
_UNTAGGED = frozenset(["glu", "hardswish", "log_sigmoid"])  # which torch does not call pointwise


def text_by_text(input_ids: Int64[Tensor, "B S"]) -> contextlib.AbstractContextManager[Any]:
    """While it lasts, pointwise operations on what a model makes of a batch are computed so.

    What is returned may be entered again and again. It changes nothing for a single text, and
    nothing on other devices than a CPU.
    """
    if len(input_ids) == 1 or input_ids.device.type != "cpu":
        return contextlib.nullcontext()
    return _TextByText(len(input_ids))


class _TextByText(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, texts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._texts = texts

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_apart = _depends_on_place(func) or kwargs.get("alpha", 1) != 1  # a sum that is scaled
        rows, rank = _shape(args) if is_apart else (0, 0)
        has_out = any(isinstance(each, Tensor) for each in kwargs.values())
        if rows == 0 or rows % self._texts or has_out:
            return func(*args, **kwargs)
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
    schema = func._schema  # noqa: SLF001
    name = schema.name.removeprefix("aten::").removesuffix("_")
    is_pointwise = torch.Tag.pointwise in func.tags and len(schema.returns) == 1
    return name in _UNTAGGED or (is_pointwise and name not in _EXACT)

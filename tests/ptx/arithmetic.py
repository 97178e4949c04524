"""What arithmetic instructions compute, on numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _kind(text: str) -> str:
    """A PTX type as a numpy one."""
    return (
        "?"
        if text == "pred"
        else {"b": "u", "f": "f"}.get(text[0], text[0].replace("s", "i")) + str(int(text[1:]) // 8)
    )


def _binary(compute: Callable[..., Any], count: int = 2) -> Callable[[list[str]], Any]:
    """Operands and result of one type, the last part of the name."""
    return lambda parts: (compute, [_kind(parts[-1])] * count, _kind(parts[-1]))


def _multiply(parts: list[str]) -> Any:
    kind = _kind(parts[-1])
    if parts[0] == "wide":
        wide = f"{kind[0]}{2 * int(kind[1])}"
        return (lambda a, b: a.astype(wide) * b.astype(wide)), [kind, kind], wide
    return np.multiply, [kind, kind], kind


def _multiply_add(parts: list[str]) -> Any:
    kind = _kind(parts[-1])
    wide = f"{kind[0]}{2 * int(kind[1])}" if parts[0] == "wide" else kind
    return (lambda a, b, c: a.astype(wide) * b.astype(wide) + c), [kind, kind, wide], wide


def _fused(parts: list[str]) -> Any:
    kind = _kind(parts[-1])
    exact = np.float64 if kind == "f4" else np.longdouble
    return (
        lambda a, b, c: (a.astype(exact) * b.astype(exact) + c.astype(exact)).astype(kind),
        [kind] * 3,
        kind,
    )


def _shift(parts: list[str], compute: Callable[..., Any]) -> Any:
    kind = _kind(parts[-1])
    bits = 8 * int(kind[1])

    def shifted(value: np.ndarray, count: np.ndarray) -> np.ndarray:
        assert (count < bits).all()
        return compute(value, count.astype(kind))

    return shifted, [kind, "u4"], kind


def _divide(parts: list[str]) -> Any:
    kind = _kind(parts[-1])
    if kind[0] == "f":
        return np.divide, [kind, kind], kind

    def truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
        return np.where((a < 0) != (b < 0), -quotient, quotient).astype(kind)

    return truncated, [kind, kind], kind


def _maximum(parts: list[str]) -> Any:
    kind = _kind(parts[-1])
    ignores_nan = kind[0] == "f" and "NaN" not in parts
    return (np.fmax if ignores_nan else np.maximum), [kind, kind], kind


def _minimum(parts: list[str]) -> Any:
    kind = _kind(parts[-1])
    ignores_nan = kind[0] == "f" and "NaN" not in parts
    return (np.fmin if ignores_nan else np.minimum), [kind, kind], kind


_COMPARE = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "neu": np.not_equal,  # true of NaN
}


def _compare(parts: list[str]) -> Any:
    kind = _kind(parts[-1])
    return _COMPARE[parts[0]], [kind, kind], "?"


def _convert(parts: list[str]) -> Any:
    to, given = _kind(parts[-2]), _kind(parts[-1])
    return (lambda a: a.astype(to)), [given], to


def _reciprocal(value: np.ndarray) -> np.ndarray:
    """Of fp64, approximately: the lower half of the bits is not computed."""
    return ((1 / value).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _exp2(value: np.ndarray) -> np.ndarray:
    found = np.exp2(value)
    return np.where(np.abs(found) < np.float32(2**-126), np.float32(0), found)


def _field(value: np.ndarray, first: np.ndarray, bits: np.ndarray) -> np.ndarray:
    return value >> first & ((np.uint32(1) << bits) - np.uint32(1))


_INSTRUCTIONS: dict[str, Callable[[list[str]], Any]] = {
    "abs": _binary(np.abs, 1),
    "add": _binary(np.add),
    "and": _binary(lambda a, b: a & b),
    "bfe": _binary(_field, 3),
    "cvt": _convert,
    "cvta": lambda _: (lambda a: a, ["u8"], "u8"),
    "div": _divide,
    "ex2": _binary(_exp2, 1),
    "fma": _fused,
    "mad": _multiply_add,
    "max": _maximum,
    "min": _minimum,
    "mov": _binary(lambda a: a, 1),
    "mul": _multiply,
    "neg": _binary(np.negative, 1),
    "not": _binary(np.invert, 1),
    "or": _binary(lambda a, b: a | b),
    "rcp": _binary(_reciprocal, 1),
    "selp": lambda parts: (
        lambda a, b, chosen: np.where(chosen, a, b),
        [_kind(parts[-1])] * 2 + ["?"],
        _kind(parts[-1]),
    ),
    "setp": _compare,
    "shl": lambda parts: _shift(parts, np.left_shift),
    "shr": lambda parts: _shift(parts, np.right_shift),
    "sub": _binary(np.subtract),
    "xor": _binary(lambda a, b: a ^ b),
}


# Qualifiers that change a result in ways that nothing here computes.
_UNKNOWN = {"hi", "sat", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"}


def arithmetic(name: str, count: int) -> tuple[Callable[..., Any], list[str], str] | None:
    """What an instruction of `count` operands computes, and the dtypes of operands and result."""
    operation, *parts = name.split(".")
    if operation not in _INSTRUCTIONS or not _UNKNOWN.isdisjoint(parts):
        return None
    if ("ftz" in parts) != (operation in ("ex2", "rcp")):  # what is too small for fp32 becomes 0
        return None
    if parts[-1] == "f32x2":  # two numbers a register
        compute, read, _ = _INSTRUCTIONS[operation]([*parts[:-1], "f32"])
        return _of_pairs(compute), ["u8"] * len(read), "u8"
    compute, read, written = _INSTRUCTIONS[operation](parts)
    if operation in ("max", "min") and count == 3:
        return (lambda a, b, c: compute(compute(a, b), c)), [*read, read[0]], written
    return compute, read, written


def _of_pairs(compute: Callable[..., Any]) -> Callable[..., Any]:
    def run(*pairs: np.ndarray) -> np.ndarray:
        given = [np.ascontiguousarray(each).view(np.float32) for each in pairs]
        return np.asarray(compute(*given), np.float32).view(np.uint64)

    return run

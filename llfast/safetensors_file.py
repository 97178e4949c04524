"""The header of a safetensors file: what is stored where, checked before any byte is trusted.

All that the format's own reader (https://github.com/huggingface/safetensors, 0.8) refuses is
refused here, and so is what it reads in a way of its own: a key that is there twice, shapes that
overflow once they are multiplied in another order, tensors and dtypes that are not written as the
format says.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # as the format's own reader has it
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
_DEEPEST = 100  # of what is beside those fields; the format's own reader goes down to 125
_SPACE = re.compile(r"[ \t\n\r]*")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: where its bytes are.

    Attributes:
        name: what it is called.
        path: the file.
        dtype: safetensors' own name of it ("BF16").
        shape: its sizes; () for a scalar.
        begin: where its first byte is, counted from the beginning of the file. It need not be a
            multiple of anything.
        end: where its last byte has ended.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def parameters(self) -> int:
        """Stored numbers."""
        return math.prod(self.shape)


class _HeaderError(Exception):
    """What a file must do, and what it does."""


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file by name, in the order of their bytes.

    They follow one another without a gap from the end of the header to the end of the file.
    Time and memory grow with their number n as n log n and n: 8.5 us and 490 bytes each for the
    1.8 million that fit into the longest header. An entry is refused as soon as it is read.

    Raises:
        CheckpointError: if header and file do not fit one another, or not the format.
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        refuse_pointer(path, start)
        length = int.from_bytes(start, "little")
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} must begin with a safetensors header, got a length of {length} bytes in "
                f"a file of {size}; is the download complete?"
            )
        header = file.read(length)
    try:
        tensors = _tensors(path, header)
        end = _end(tensors, 8 + length)
    except _HeaderError as error:
        reason = str(error)
    except (ValueError, RecursionError) as error:
        reason = f"have a header of JSON in UTF-8, got {error}"
    else:
        if end != size:
            raise CheckpointError(
                f"{path} must be {end} bytes long by its header, got {size}; is the download "
                "complete?"
            )
        return {tensor.name: tensor for tensor in tensors}
    # Raised here, it does not keep the other error, and with it the whole header, alive.
    raise CheckpointError(f"{path} must {reason}; download or save it again")


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse what git leaves in place of a large file.

    Raises:
        CheckpointError: if the file's first bytes are those of a git-lfs pointer.
    """
    if start.startswith(b"version "):
        raise CheckpointError(
            f"{path} must be a whole file, got a git-lfs pointer; run `git lfs pull`"
        )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (an `object_pairs_hook`) that says nothing twice.

    Raises:
        ValueError: if a key is there twice; `json` would take the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {short(twice)} twice")
    return found


def short(value: object) -> str:
    """What a message shows of something that may be very long: one line, on any terminal."""
    return _SHORT.repr(value)


def _tensors(path: Path, header: bytes) -> list[StoredTensor]:
    """The tensors of a header, in the order of their bytes; not yet whether those are apart."""
    tensors: dict[str, StoredTensor | None] = {}
    for name, value in _entries(header.decode("utf-8")):
        if name in tensors:
            raise ValueError(f"the key {short(name)} twice")
        if name == _METADATA:
            _check_metadata(value)
            tensors[name] = None
        else:
            name.encode()  # JSON can name a lone surrogate, which is no text
            tensors[name] = _tensor(name, value, path, 8 + len(header))
    tensors.pop(_METADATA, None)
    return sorted(filter(None, tensors.values()), key=attrgetter("begin", "end"))


def _entries(text: str) -> Iterator[tuple[str, Any]]:
    """The names and values of a JSON object, one at a time.

    `json.loads` would build all of them, whatever they are, before the first can be refused.
    """
    if text[0] != "{":
        raise _HeaderError(f"begin its header with '{{', got {short(text[0])}")
    decoder = json.JSONDecoder(
        object_pairs_hook=unique_keys,
        parse_int=_integer,
        parse_float=_fraction,
        parse_constant=_constant,
    )

    def after_space(place: int) -> int:
        found = _SPACE.match(text, place)
        assert found
        return found.end()

    def after(character: str, place: int) -> int:
        if text[place : place + 1] != character:
            raise json.JSONDecodeError(f"Expecting {character!r}", text, place)
        return after_space(place + 1)

    place = after("{", 0)
    more = text[place : place + 1] != "}"
    while more:
        if text[place : place + 1] != '"':
            raise json.JSONDecodeError("Expecting a name in double quotes", text, place)
        name, place = decoder.raw_decode(text, place)
        place = after(":", after_space(place))
        value, place = decoder.raw_decode(text, place)
        yield name, value
        place = after_space(place)
        more = text[place : place + 1] == ","
        if more:
            place = after(",", place)
    place = after("}", place)
    if place != len(text):
        raise json.JSONDecodeError("Extra data", text, place)


def _tensor(name: str, value: Any, path: Path, data: int) -> StoredTensor:
    """A tensor by its entry in the header; `data` is where the file's header ends."""
    if not isinstance(value, dict) or not value.keys() >= _FIELDS:
        raise _HeaderError(
            f"give {short(name)} a dtype, shape and data_offsets, got {short(value)}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _HeaderError(f"give {short(name)} a dtype of safetensors, got {short(dtype)}")
    if not _are_natural(shape):
        raise _HeaderError(f"give {short(name)} a shape of natural numbers, got {short(shape)}")
    if not _are_natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _HeaderError(
            f"give {short(name)} data_offsets of two natural numbers, the first no larger than the "
            f"second, got {short(offsets)}"
        )
    begin, end = offsets
    if (end - begin) * 8 != _count(name, shape) * DTYPE_BITS[dtype]:
        raise _HeaderError(
            f"give {short(name)} as many bytes as {short(shape)} in {dtype} has, got {end - begin}"
        )
    if len(value) > len(_FIELDS):
        _check_extra(name, {key: value[key] for key in value.keys() - _FIELDS})
    return StoredTensor(name, path, dtype, tuple(shape), data + begin, data + end)


def _are_natural(numbers: Any) -> bool:
    # `type`, for a bool is an int by `isinstance`.
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _count(name: str, shape: list[int]) -> int:
    """How many numbers a shape has.

    Its sizes other than 0 must have a product below 2**63 in any order. safetensors multiplies
    from the left with 64 bits, so that it takes [0, 2**62, 4] and not [2**62, 4, 0]; the first of
    these, torch cannot hold.
    """
    product = 1
    for size in shape:
        product *= size or 1
        if product >= 2**63:  # before it grows: a product of millions of them takes minutes
            raise _HeaderError(
                f"give {short(name)} sizes with a product below 2**63, zeros left out, got "
                f"{short(shape)}"
            )
    return 0 if 0 in shape else product


def _check_metadata(value: Any) -> None:
    """Metadata is null or from text to text."""
    if value is None:
        return
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _HeaderError(f"have metadata of texts by name, got {short(value)}")
    _check_text(value)


def _check_extra(name: str, fields: dict[str, Any]) -> None:
    """What safetensors does not know, it skips, and so do we: later formats may add to theirs."""
    if not _is_shallow(fields, _DEEPEST):
        raise _HeaderError(f"give {short(name)} fields of few levels, got {short(fields)}")
    _check_text(fields)


def _is_shallow(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return True
    return levels > 0 and all(_is_shallow(each, levels - 1) for each in value)


def _check_text(value: Any) -> None:
    json.dumps(value, ensure_ascii=False).encode()  # raises if there is a lone surrogate


def _end(tensors: list[StoredTensor], begin: int) -> int:
    """Where the last of them ends, each of which must begin where the one before it ends."""
    end = begin
    for tensor in tensors:
        if tensor.begin != end:
            raise _HeaderError(
                f"place {short(tensor.name)} at {end - begin}, where the tensor before it ends, "
                f"got {tensor.begin - begin}"
            )
        end = tensor.end
    return end


def _integer(text: str) -> int | float:
    if len(text) > 20:  # 2**64 has 20 digits; the time to convert more grows with their square
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text) if text != "-0" else -0.0  # as safetensors reads it


def _fraction(text: str) -> float:
    value = float(text)
    if abs(value) > 1e300:  # infinity, to safetensors at the latest where it is to us
        raise ValueError("a number out of range")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(text)  # NaN and Infinity are Python's, not JSON's

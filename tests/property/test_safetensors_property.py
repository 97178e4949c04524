"""Whatever a safetensors file is, it is read as the format's own reader has it, or refused."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import deserialize, safe_open
from safetensors.numpy import save, save_file

from llfast import CheckpointError
from llfast.safetensors_file import DTYPE_BITS, read_header

NAMES = {
    np.dtype(dtype): name
    for dtype, name in [
        ("?", "BOOL"), ("u1", "U8"), ("i1", "I8"), ("<u2", "U16"), ("<i2", "I16"), ("<f2", "F16"),
        ("<u4", "U32"), ("<i4", "I32"), ("<f4", "F32"), ("<u8", "U64"), ("<i8", "I64"),
        ("<f8", "F64"), ("<c8", "C64"),
    ]
}  # fmt: skip
# JSON cannot carry a lone surrogate, and safetensors keeps its metadata under a name.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = texts.filter(lambda name: name != "__metadata__")
arrays = st.sampled_from(sorted(NAMES, key=str)).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    )
)
tensors = st.dictionaries(names, arrays, max_size=6)
metadata = st.none() | st.dictionaries(texts, texts, max_size=3)


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "m.safetensors"


@settings(deadline=None, max_examples=150)
@given(tensors=tensors, metadata=metadata)
def test_what_safetensors_writes_is_found(path, tensors, metadata):
    # Of neither, safetensors 0.8 writes `{},"__metadata__":{}}`, which it refuses itself.
    assume(tensors or metadata != {})
    save_file(tensors, path, metadata=metadata)
    content = path.read_bytes()
    found = read_header(path)
    assert found.keys() == tensors.keys()
    places = [(tensor.begin, tensor.end) for tensor in found.values()]
    assert places == sorted(places)
    for name, array in tensors.items():
        tensor = found[name]
        assert (tensor.name, tensor.path) == (name, path)
        assert (tensor.dtype, tensor.shape) == (NAMES[array.dtype], array.shape)
        assert tensor.parameters == array.size
        assert content[tensor.begin : tensor.end] == array.tobytes()


# ------------------------------------------------------------------------------ damage

numbers = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]),
    st.sampled_from([0.0, -0.0, 1.5, 8.0, 1e300, True, False, float("nan"), float("inf")]),
)
leaves = st.none() | numbers | st.sampled_from(["", "F32", "a", "\ud800", *DTYPE_BITS])
values = st.recursive(
    leaves | st.lists(numbers, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | leaves.map(str), inner),
    max_leaves=6,
)
keys = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a", "b", "x", "\ud800"])
characters = st.sampled_from(list(b'0123456789-.eE,:[]{}"\\u tfn\x00\x1f\x80\xff'))
WHOLE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "scalar": np.array(1.0),
    "empty": np.zeros((0, 3), np.int8),
}


def split(content: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def damage_bytes(draw, content):
    """Other bytes, more of them or fewer, anywhere or in the header."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(found)) if draw(st.booleans()) else st.integers(8, 250))
        kind = draw(st.sampled_from(["flip", "put", "cut", "extend", "remove"]))
        if kind == "flip" and place < len(found):
            found[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "put":
            found[place : place + 1] = bytes([draw(characters)])
        elif kind == "cut":
            del found[place:]
        elif kind == "extend":
            found += draw(st.binary(max_size=9))
        else:
            del found[place : place + 1]
    return bytes(found)


def damage_header(draw, content):
    """JSON that says something else, of the right length."""
    header, data = split(content)
    found = json.loads(header)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(WHOLE)))
        other = draw(st.sampled_from(sorted(WHOLE)))
        entry = found.get(name)
        kind = draw(
            st.sampled_from(["field", "number", "swap", "same", "remove", "entry", "order"])
        )
        if kind == "entry" or not isinstance(entry, dict):
            found[draw(keys)] = draw(values)
        elif kind == "field":
            entry[draw(keys)] = draw(values)
        elif kind == "remove":
            entry.pop(draw(keys), None)
        elif kind == "number":
            where = entry.get(draw(st.sampled_from(["shape", "data_offsets"])))
            if isinstance(where, list):
                place = draw(st.integers(0, len(where)))
                where[place : place + draw(st.integers(0, 1))] = [draw(numbers)]
        elif kind == "order":
            found = dict(draw(st.permutations(list(found.items()))))
        elif isinstance(found.get(other), dict):
            swapped = found[other].get("data_offsets")
            if kind == "swap":
                found[other]["data_offsets"] = entry.get("data_offsets")
            entry["data_offsets"] = swapped
    data = draw(st.sampled_from([*[data] * 6, data[:-8], data + bytes(8)]))
    text = json.dumps(found, ensure_ascii=draw(st.booleans()))
    return join(text.encode("utf-8", "surrogatepass") + b" " * draw(st.integers(0, 3)), data)


def damage_text(draw, content):
    """A header in which a piece of text is there twice, or is another."""
    header, data = split(content)
    for _ in range(draw(st.integers(1, 2))):
        spans = [found.span() for found in re.finditer(rb"\d+|\w+", header)]
        begin, end = draw(st.sampled_from(spans)) if spans and draw(st.booleans()) else (0, 0)
        if begin == end:
            begin = draw(st.integers(0, len(header)))
            end = draw(st.integers(begin, min(len(header), begin + 80)))
        put = draw(st.sampled_from([header[begin:end] * 2, b"-0", b"1e2", b"\\ud800", b"0", b" "]))
        header = header[:begin] + put + header[end:]
    return join(header, data)


@settings(deadline=None, max_examples=1000)
@given(data=st.data(), damage=st.sampled_from([damage_bytes, damage_header, damage_text]))
def test_what_is_read_of_a_damaged_file_is_what_safetensors_reads(path, data, damage):
    content = damage(data.draw, save(WHOLE, {"format": "pt"}))
    path.write_bytes(content)
    try:
        found = read_header(path)
    except CheckpointError as error:
        found, line = None, str(error)
    if found is None:
        event("refused")
        assert line.isprintable()
        return
    event("read")
    with safe_open(path, "np") as file:  # raises if safetensors refuses
        assert set(file.keys()) == found.keys()
        for name, tensor in found.items():
            part = file.get_slice(name)
            assert (part.get_dtype(), part.get_shape()) == (tensor.dtype, list(tensor.shape))
    for name, part in deserialize(content):
        assert content[found[name].begin : found[name].end] == part["data"]

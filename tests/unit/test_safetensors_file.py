"""Which safetensors headers are read: none that the format's own reader refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from llfast import CheckpointError
from llfast.safetensors_file import DTYPE_BITS, MAX_HEADER_BYTES, StoredTensor, read_header


def pack(header, data=b"\0" * 24, length=None):
    """A file; `length` is what it says of the length of its header."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def f32(begin, end, shape=None, **fields):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]} | fields


def one(data=b"\0" * 24, **fields):
    """A file with one tensor."""
    return pack({"a": f32(0, 24) | fields}, data)


def beside(text):
    """A file whose only tensor has `text` after its fields."""
    return pack(b'{"a":' + json.dumps(f32(0, 24)).encode()[:-1] + b"," + text + b"}}")


def refused(path, content):
    """The one line with which a file is refused."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    line = str(caught.value)
    assert line.startswith(f"{path} must ")
    assert line.isprintable()
    assert len(line) < len(str(path)) + 500
    return line.removeprefix(f"{path} must ")


def others_refuse(path, content):
    """Whether safetensors itself refuses a file, on either of its ways."""
    path.write_bytes(content)
    for read in (lambda: safe_open(path, "np"), lambda: deserialize(content)):
        try:
            read()
        except (SafetensorError, OSError, ValueError):
            continue
        return False
    return True


WHOLE = {"a": f32(0, 8), "b": f32(8, 24)}
TENSOR = json.dumps(f32(0, 24)).encode()
START = "begin with a safetensors header, got a length of"
HEADER = "have a header of JSON in UTF-8, got "
FIELDS = "give 'a' a dtype, shape and data_offsets, got "
OFFSETS = "'a' data_offsets of two natural numbers, the first no larger than the second, got "
SHAPE = "give 'a' a shape of natural numbers, got "
PRODUCT = "give 'a' sizes with a product below 2**63, zeros left out, got "
METADATA = "have metadata of texts by name, got "
SURROGATE = HEADER + "'utf-8' codec can't encode character '\\ud800'"
BROKEN = {
    # The length and the file.
    "empty file": (b"", START + " 0 bytes in a file of 0; is the download complete?"),
    "cut in the length": (pack(WHOLE)[:5], START),
    "cut in the header": (pack(WHOLE)[:50], START),
    "cut in the data": (pack(WHOLE)[:-1], "bytes long by its header, got"),
    "data behind the end": (pack(WHOLE) + b"\0", "bytes long by its header, got"),
    "no header": (pack(b"", b""), START + " 0 bytes"),
    "a huge length": (pack(WHOLE, length=2**63), START + f" {2**63} bytes"),
    "a length that overflows": (pack(WHOLE, length=2**64 - 1), START),
    "a length past the end": (pack(WHOLE, length=1000), START),
    "a length one past the end": (pack({}, b"", length=3), START + " 3 bytes in a file of 10"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "be a whole file, got a git-lfs pointer; run `git lfs pull`",
    ),
    # JSON.
    "no JSON": (pack(b"{" * 20), HEADER + "Expecting a name in double quotes: line 1 column 2"),
    "no UTF-8": (pack(b'{"\xff": 1}'), HEADER + "'utf-8' codec can't decode byte 0xff"),
    "UTF-16": (pack(json.dumps(WHOLE).encode("utf-16")), HEADER),
    "a byte order mark": (pack(b"\xef\xbb\xbf" + json.dumps(WHOLE).encode()), "begin its header"),
    "nested lists": (pack(b"[" * 100_000), "begin its header with '{', got '['"),
    "deep nesting": (pack(b'{"a":' * 100_000), HEADER + "maximum recursion depth exceeded"),
    "deep nesting that ends": (beside(b'"x":' + b"[" * 500 + b"]" * 500), "of few levels"),
    "only spaces": (pack(b"    "), "begin its header with '{', got ' '"),
    "a list": (pack([]), "begin its header with '{', got '['"),
    "a text": (pack('"a"'), "begin its header with '{', got"),
    "null": (pack(None), "begin its header with '{', got 'n'"),
    "no colon": (pack(b'{"a" {}}'), HEADER + "Expecting ':': line 1 column 6"),
    "no value": (pack(b'{"a": }'), HEADER + "Expecting value"),
    "no comma": (pack(b'{"__metadata__":{} "a":1}'), HEADER + "Expecting '}'"),
    "a comma at the end": (pack(b'{"__metadata__":{},}', b""), HEADER + "Expecting a name in"),
    "a comma at the beginning": (pack(b"{,}", b""), HEADER + "Expecting a name in"),
    "single quotes": (pack(str(WHOLE).encode()), HEADER + "Expecting a name in double quotes"),
    "no end": (pack(b'{"a":' + TENSOR), HEADER + "Expecting '}'"),
    "two objects": (pack(b"{}{}", b""), HEADER + "Extra data"),
    "padding of NUL": (pack(b"{}\0\0", b""), HEADER + "Extra data"),
    "other spaces": (pack("{}\u00a0".encode(), b""), HEADER + "Extra data"),
    "a control character": (pack(b'{"a\x01":%b}' % TENSOR), HEADER + "Invalid control character"),
    "half a character": (pack(b'{"\\ud800":%b}' % TENSOR), SURROGATE),
    "half a character beside": (beside(b'"x":["\\ud800"]'), SURROGATE),
    "half a character in metadata": (
        pack(b'{"__metadata__":{"a":"\\ud800"},"a":%b}' % TENSOR),
        SURROGATE,
    ),
    "not a number": (beside(b'"x":NaN'), HEADER + "NaN"),
    "infinity": (beside(b'"x":-Infinity'), HEADER + "-Infinity"),
    "a fraction out of range": (beside(b'"x":1e999'), HEADER + "a number out of range"),
    "and below": (beside(b'"x":-1e999'), HEADER + "a number out of range"),
    "an integer out of range": (beside(b'"x":' + b"9" * 400), "an integer of 400 digits"),
    "an integer of many digits": (
        pack(b'{"a":{"dtype":"F32","shape":[1%b],"data_offsets":[0,24]}}' % (b"0" * 9999)),
        HEADER + "an integer of 10000 digits",
    ),
    # What a tensor is.
    "a number for a tensor": (pack({"a": 3}), FIELDS + "3"),
    "null for a tensor": (pack({"a": None}), FIELDS + "None"),
    "a list for a tensor": (pack({"a": []}), FIELDS + "[]"),
    "no dtype": (pack({"a": {"shape": [6], "data_offsets": [0, 24]}}), FIELDS + "{"),
    "no shape": (pack({"a": {"dtype": "F32", "data_offsets": [0, 24]}}), FIELDS + "{"),
    "no offsets": (pack({"a": {"dtype": "F32", "shape": [6]}}), FIELDS + "{'dtype': 'F32', "),
    "no fields": (pack({"a": {}}), FIELDS + "{}"),
    "unknown dtype": (one(dtype="F31"), "a dtype of safetensors, got 'F31'"),
    "dtype in small letters": (one(dtype="f32"), "safetensors, got 'f32'"),
    "a number for a dtype": (one(dtype=32), "a dtype of safetensors, got 32"),
    "a list for a dtype": (one(dtype=["F32"]), "safetensors, got ['F32']"),
    "null for a dtype": (one(dtype=None), "a dtype of safetensors, got None"),
    "one offset": (one(data_offsets=[0]), OFFSETS + "[0]"),
    "no offset": (one(data_offsets=[]), OFFSETS + "[]"),
    "three offsets": (one(data_offsets=[0, 24, 24]), OFFSETS + "[0, 24, 24]"),
    "a number for offsets": (one(data_offsets=24), OFFSETS + "24"),
    "an object for offsets": (one(data_offsets={"0": 24}), OFFSETS + "{'0'"),
    "offsets that are text": (one(data_offsets=["0", "24"]), OFFSETS + "['0', '24']"),
    "flags for offsets": (pack({"a": f32(0, 1, dtype="U8", data_offsets=[False, True])}), OFFSETS),
    "fractions for offsets": (one(data_offsets=[0.0, 24.0]), OFFSETS + "[0.0"),
    "null for an offset": (one(data_offsets=[None, 24]), OFFSETS + "[None"),
    "negative offsets": (pack({"a": f32(-8, 24, [8])}), OFFSETS + "[-8, 24]"),
    "minus nought": (pack(json.dumps({"a": f32(0, 24)}).encode().replace(b"[0", b"[-0")), OFFSETS),
    "an end before its beginning": (pack({"a": f32(24, 0, [0])}), OFFSETS + "[24, 0]"),
    "offsets beyond 64 bits": (
        pack({"a": f32(0, 2**64, [2**62])}),
        "bytes long by its header, got 130;",
    ),
    "fractions for sizes": (one(shape=[6.0]), SHAPE + "[6.0]"),
    "flags for sizes": (pack({"a": f32(0, 4, [True])}), SHAPE + "[True]"),
    "negative sizes": (one(shape=[-2, -3]), SHAPE + "[-2, -3]"),
    "lists for sizes": (one(shape=[[6]]), SHAPE + "[[6]]"),
    "null for a shape": (one(shape=None), SHAPE + "None"),
    "a text for a shape": (pack({"a": f32(0, 4, "")}, b"\0" * 4), SHAPE + "''"),
    "an object for a shape": (pack({"a": f32(0, 4, {})}, b"\0" * 4), SHAPE + "{}"),
    "a number for a shape": (one(shape=6), SHAPE + "6"),
    # Shapes and bytes.
    "too few bytes": (one(shape=[2, 4]), "as many bytes as [2, 4] in F32 has, got 24"),
    "too many bytes": (one(shape=[5]), "as many bytes as [5] in F32 has, got 24"),
    "bytes for nothing": (one(shape=[6, 0]), "bytes as [6, 0] in F32 has, got 24"),
    "no bytes for a scalar": (pack({"a": f32(0, 0, [])}, b""), "as [] in F32 has, got 0"),
    "half a byte": (
        one(b"\0", dtype="F4", shape=[3], data_offsets=[0, 1]),
        "as many bytes as [3] in F4 has, got 1",
    ),
    "three quarters of a byte": (
        pack({"a": f32(0, 1, [1], dtype="F6_E2M3")}, b"\0"),
        "as many bytes as [1] in F6_E2M3 has, got 1",
    ),
    "a shape that overflows": (one(shape=[2**62, 4, 6]), PRODUCT),
    "a shape that overflows to its bytes": (one(shape=[2**61 + 6, 8]), PRODUCT),
    "bytes that overflow": (one(shape=[2**62 + 6]), "in F32 has, got 24"),
    "an overflow before a nought": (pack({"a": f32(0, 0, [2**62, 2**62, 0])}, b""), PRODUCT),
    "a size beyond 64 bits": (pack({"a": f32(0, 0, [2**64, 0])}, b""), PRODUCT),
    "a million sizes": (one(shape=[2] * 1_000_000), PRODUCT + "[2, 2, 2, 2, 2, 2, ..."),
    "overlap": (
        pack({"a": f32(0, 16), "b": f32(8, 24)}),
        "place 'b' at 16, where the tensor before",
    ),
    "one place for two": (pack({"a": f32(0, 24), "b": f32(0, 24)}), "place 'b' at 24, where"),
    "one inside another": (pack({"a": f32(0, 24), "b": f32(4, 8)}), "place 'b' at 24, where"),
    "nothing inside another": (pack({"a": f32(0, 24), "b": f32(8, 8)}), "place 'b' at 24, where"),
    "a hole": (pack({"a": f32(0, 8), "b": f32(16, 24)}), "'b' at 8, where the tensor before it"),
    "a hole at the beginning": (pack({"a": f32(8, 24)}), "place 'a' at 0, where"),
    "offsets past the end": (pack({"a": f32(0, 8), "b": f32(8, 2**40)}), "long by its header"),
    "nothing past the end": (pack({"a": f32(0, 24), "b": f32(32, 32)}), "place 'b' at 24, where"),
    # What is there twice, and metadata.
    "a field twice": (beside(b'"dtype":"F32"'), HEADER + "the key 'dtype' twice"),
    "metadata twice": (
        pack(b'{"__metadata__":{},"a":%b,"__metadata__":{}}' % TENSOR),
        HEADER + "the key '__metadata__' twice",
    ),
    "a list for metadata": (pack(WHOLE | {"__metadata__": []}), METADATA + "[]"),
    "a number for metadata": (pack(WHOLE | {"__metadata__": 0}), METADATA + "0"),
    "a tensor for metadata": (pack({"__metadata__": f32(0, 24)}), METADATA + "{'data_offsets': "),
    "a number in metadata": (pack(WHOLE | {"__metadata__": {"format": 3}}), METADATA + "{'format'"),
    "null in metadata": (pack(WHOLE | {"__metadata__": {"format": None}}), METADATA + "{'format'"),
    # What messages show of it stays short.
    "a long name": (pack({"a" * 10_000: 3}), "aaa...aaa"),
    "a name of lines": (pack({"a\nb\u2028\x1b[0m": 3}), r"give 'a\nb\u2028\x1b[0m' a dtype"),
}
STRICTER = {
    # Of two, safetensors takes the last; another reader may take the first.
    "a tensor twice": (pack(b'{"a":%b,"a":%b}' % (TENSOR, TENSOR)), "the key 'a' twice"),
    "escaped": (pack(b'{"a":%b,"\\u0061":%b}' % (TENSOR, TENSOR)), "the key 'a' twice"),
    "an unknown field twice": (beside(b'"x":1,"x":2'), "the key 'x' twice"),
    "in metadata": (pack(b'{"__metadata__":{"x":"1","x":"2"}}', b""), "the key 'x' twice"),
    # The format says that a header begins with {.
    "a space before the object": (
        pack(b' {"a":%b}' % TENSOR),
        "begin its header with '{', got ' '",
    ),
    # Other ways in which serde, with which safetensors parses, may write objects.
    "a list of fields": (pack({"a": ["F32", [6], [0, 24]]}), FIELDS + "['F32', [6], [0, 24]]"),
    "an object for a dtype": (
        one(dtype={"F32": None}),
        "a dtype of safetensors, got {'F32': None}",
    ),
    # numpy holds neither, and torch cannot count the strides of the second.
    "an overflow around a nought": (pack({"a": f32(0, 0, [2**62, 0, 2**62])}, b""), PRODUCT),
    "an overflow behind a nought": (pack({"a": f32(0, 0, [0, 2**62, 2**62])}, b""), PRODUCT),
    "an unsigned size": (pack({"a": f32(0, 0, [2**63, 0])}, b""), PRODUCT),
    # Python's time for a long one grows with its square.
    "a long integer beside": (beside(b'"x":' + b"9" * 300), HEADER + "an integer of 300 digits"),
    # safetensors goes down to 125; where Python ends depends on who calls.
    "few levels": (
        beside(b'"x":' + b"[" * 125 + b"]" * 125),
        "give 'a' fields of few levels, got ",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_safetensors_refuses_is_refused(tmp_path, name):
    content, message = BROKEN[name]
    assert message in refused(tmp_path / "m.safetensors", content)
    assert others_refuse(tmp_path / "m.safetensors", content)


@pytest.mark.parametrize("name", STRICTER)
def test_what_safetensors_reads_in_its_own_way_is_refused(tmp_path, name):
    content, message = STRICTER[name]
    assert message in refused(tmp_path / "m.safetensors", content)
    assert not others_refuse(tmp_path / "m.safetensors", content)


def test_a_header_beyond_the_longest(tmp_path):
    path = tmp_path / "m.safetensors"
    for length in (MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1):
        with path.open("wb") as file:  # with a hole for most of it, which takes no disk
            file.write(length.to_bytes(8, "little") + b"x")
            file.truncate(8 + length)
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        expected = "begin its header" if length == MAX_HEADER_BYTES else START + " 100000001 bytes"
        assert expected in str(caught.value)
        with pytest.raises(SafetensorError):
            safe_open(path, "np")


def test_cut_anywhere(tmp_path):
    path = tmp_path / "m.safetensors"
    whole = pack(WHOLE)
    for length in range(len(whole)):
        assert "is the download complete?" in refused(path, whole[:length])


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------ what is read

ACCEPTED = {
    "nothing": pack({}, b""),
    "nothing but metadata": pack({"__metadata__": {"format": "pt"}}, b""),
    "scalars": pack({"a": f32(0, 4, []), "b": f32(4, 8, [])}, b"\0" * 8),
    "zero-sized": pack({"a": f32(0, 0, [0, 5]), "b": f32(0, 24), "c": f32(24, 24, [3, 0])}),
    "large but for a nought": pack({"a": f32(0, 0, [2**62, 0])}, b""),
    "many sizes": one(shape=[1] * 1000 + [6]),
    "padded": pack(json.dumps(WHOLE).encode() + b" \t\r\n" * 9),
    "spaced": pack(json.dumps(WHOLE, indent=3).encode().replace(b":", b" \r\n\t: ")),
    "null for metadata": pack(WHOLE | {"__metadata__": None}),
    "no order": pack({"b": f32(8, 24), "a": f32(0, 8)}),
    "no order of nothing": pack({"b": f32(0, 24), "a": f32(0, 0)}),
    "odd places": pack({"a": f32(0, 1, [1], dtype="U8"), "b": f32(1, 9)}, b"\0" * 9),
    "odd names": pack({"": f32(0, 4), "\0": f32(4, 8), "é😀\n": f32(8, 24)}),
    "escaped names": pack(b'{"\\ud83d\\ude00\\u0000\\/":%b}' % TENSOR),
    "names in UTF-8": pack(json.dumps({"é😀": f32(0, 24)}, ensure_ascii=False).encode()),
    "unknown fields": one(x=1, y=[{"z": None}, "é", -0.5, True], strides=-1),
    "unknown fields of many levels": beside(b'"x":' + b"[" * 99 + b"]" * 99),
    "packed": pack(
        {"a": f32(0, 2, [2, 2], dtype="F4"), "b": f32(2, 5, [4], dtype="F6_E3M2")}, b"\0" * 5
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_read_is_what_safetensors_reads(tmp_path, name):
    path = tmp_path / "m.safetensors"
    path.write_bytes(ACCEPTED[name])
    tensors = read_header(path)
    with safe_open(path, "np") as file:
        assert sorted(tensors) == sorted(file.keys())
        for each, tensor in tensors.items():
            part = file.get_slice(each)
            assert (tensor.dtype, list(tensor.shape)) == (part.get_dtype(), part.get_shape())
    end = path.stat().st_size - sum(tensor.end - tensor.begin for tensor in tensors.values())
    for tensor in tensors.values():
        assert tensor.begin == end
        end = tensor.end
    assert not tensors or end == path.stat().st_size


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_is_as_large_as_safetensors_has_it(tmp_path, dtype):
    size = DTYPE_BITS[dtype]  # 8 numbers
    header = {"a": f32(0, size, [8], dtype=dtype)}
    path = tmp_path / "m.safetensors"
    path.write_bytes(pack(header, b"\0" * size))
    assert read_header(path)["a"].dtype == dtype
    safe_open(path, "np")


def test_no_dtype_of_safetensors_is_missing(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(one(dtype="F31"))
    with pytest.raises(SafetensorError, match="expected one of (.*) at line") as caught:
        safe_open(path, "np")
    known = str(caught.value).partition("expected one of ")[2].partition(" at line")[0]
    assert {name.strip(" `") for name in known.split(",")} == set(DTYPE_BITS)


def test_a_tensor_is_where_its_bytes_are(tmp_path):
    path = tmp_path / "m.safetensors"
    arrays = {"one": np.arange(6, dtype=np.float16).reshape(2, 3), "two": np.array(7.0)}
    save_file(arrays, path, metadata={"format": "pt"})
    content = path.read_bytes()
    tensors = read_header(path)
    assert list(tensors) == ["two", "one"]  # safetensors puts the wider dtypes first
    one = tensors["one"]
    assert one == StoredTensor("one", path, "F16", (2, 3), len(content) - 12, len(content))
    assert content[one.begin : one.end] == arrays["one"].tobytes()
    assert (one.parameters, tensors["two"].parameters) == (6, 1)
    assert not hasattr(one, "__dict__")


# ------------------------------------------------------------------------------ large ones


def entries(count, of='"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}', places=None):
    places = places or ((i, i + 1) for i in range(count))
    inside = ",".join(of % (i, *place) for i, place in enumerate(places))
    return f"{{{inside}}}".encode()


def test_many_tensors(tmp_path):
    path = tmp_path / "m.safetensors"
    count = 100_000
    header = entries(count)
    path.write_bytes(pack(header, bytes(count)))
    tensors = read_header(path)
    assert len(tensors) == count
    assert tensors["777"].begin == 8 + len(header) + 777
    # Each compared with all others, as some readers do it, these would take minutes.
    header = entries(20_000, places=[(0, 1)] * 20_000)
    assert "place '1' at 1, where" in refused(path, pack(header, bytes(20_000)))


@pytest.mark.slow
def test_as_many_as_fit(tmp_path):
    """1.76 million tensors, one of which is wrong in the end; and ten million of garbage."""
    path = tmp_path / "m.safetensors"
    count = 1_760_000
    header = entries(
        count, '"%x":{"dtype":"U8","shape":[0],"data_offsets":[%d,%d]}', [(0, 0)] * count
    )
    assert 0.99 * MAX_HEADER_BYTES < len(header) <= MAX_HEADER_BYTES
    path.write_bytes(pack(header, b""))
    code = (
        "import pathlib, sys; from llfast.safetensors_file import read_header; "
        "print(len(read_header(pathlib.Path(sys.argv[1])))); "
        "print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, path]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(found[0]) == count
    assert int(found[1]) < 1.5 * 2**20, "KiB, of which the header itself is 0.1 GiB as text"
    worse = header.replace(b'"1ad000":{"dtype":"U8"', b'"1ad000":{"dtype":"X8"')
    assert "give '1ad000' a dtype of safetensors" in refused(path, pack(worse, b""))
    garbage = b"{" + b",".join(b'"":0' for _ in range(10_000_000)) + b"}"
    assert "give '' a dtype, shape and data_offsets" in refused(path, pack(garbage, b""))

"""What a checkpoint folder must be like, found out without reading a weight."""

import json
import random

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llfast import CheckpointError, UnsupportedModelError
from llfast.checkpoint import Checkpoint, check_adapter, is_adapter

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "scalar": np.array(1.0, dtype=np.float32),
    "nothing": np.zeros((0, 5), dtype=np.float32),
}


def make(folder, **files):
    """A folder with a config and weights; `files` are put beside them, None removes one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def refused(folder, error=CheckpointError, **options):
    """The one line with which a folder is refused."""
    with pytest.raises(error) as caught:
        Checkpoint.open(folder, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert folder.name in str(caught.value)
    return str(caught.value)


def test_a_whole_checkpoint_is_described(tmp_path):
    checkpoint = Checkpoint.open(make(tmp_path / "m"))
    path = tmp_path / "m" / "model.safetensors"
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.weights == (path,)
    assert checkpoint.parameters == 6 + 4 + 1
    assert checkpoint.weight_bytes == path.stat().st_size
    assert (checkpoint.stored_dtype, checkpoint.pickled) == ("F32", False)


def test_shards_are_counted_together(tmp_path):
    folder = make(tmp_path / "m", **{"model.safetensors": None})
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": np.zeros(50, np.float16)}, folder / "two.safetensors")
    save_file({"c": np.zeros(50, np.float16)}, folder / "not-in-the-index.safetensors")
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    checkpoint = Checkpoint.open(folder)
    assert [path.name for path in checkpoint.weights] == ["one.safetensors", "two.safetensors"]
    assert (checkpoint.parameters, checkpoint.stored_dtype) == (56, "F16")


# ------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "must be a checkpoint folder, got one without config.json"),
        ("", "config.json must be JSON, got Expecting value"),
        ('{"model_type": "llama"', "config.json must be JSON"),
        (b"\xff\xfe{\x00}\x00", "config.json must be JSON, got 'utf-8' codec"),
        ("[" * 100_000, "config.json must be JSON, got maximum recursion"),
        ("[1, 2]", "config.json must be a JSON object, got list"),
        ("version https://git-lfs", "config.json must be a whole file, got a git-lfs pointer"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path, config, message):
    assert message in refused(make(tmp_path / "m", **{"config.json": config}))


def test_folders_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "got one without config.json" in refused(tmp_path / "empty")
    assert "got one without config.json" in refused(tmp_path / "missing")
    folder = make(tmp_path / "m", **{"model.safetensors": None})
    assert refused(folder).endswith(".safetensors weights, got none; is the download complete?")


# ------------------------------------------------------------------------------ safetensors


def pack(header, data=b"\0" * 24, length=None):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def f32(begin, end, shape=None):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


WHOLE = {"a": f32(0, 8), "b": f32(8, 24)}
HEADER = "must begin with a safetensors header, got a length of"
BROKEN = {
    "empty file": (b"", HEADER + " 0 bytes in a file of 0; is the download complete?"),
    "cut in the length": (pack(WHOLE)[:5], HEADER),
    "cut in the header": (pack(WHOLE)[:50], HEADER),
    "cut in the data": (pack(WHOLE)[:-1], "bytes long by its header, got"),
    "data behind the end": (pack(WHOLE) + b"\0", "bytes long by its header, got"),
    "no header": (pack(b"", b""), HEADER + " 0 bytes"),
    "a huge length": (pack(WHOLE, length=2**63), HEADER + f" {2**63} bytes"),
    "a length that overflows": (pack(WHOLE, length=2**64 - 1), HEADER),
    "a length past the end": (pack(WHOLE, length=1000), HEADER),
    "no JSON": (pack(b"{" * 20), "must have a safetensors header, got: Expecting"),
    "no UTF-8": (pack(b'{"\xff": 1}'), "must have a safetensors header, got: 'utf-8'"),
    "UTF-16": (pack(json.dumps(WHOLE).encode("utf-16")), "must have a safetensors header"),
    "deep nesting": (pack(b"[" * 100_000), "must have a safetensors header, got: Rec"),
    "a list": (pack([]), "must have a safetensors header, got: "),
    "no tensor": (pack({"a": 3}), "must have a safetensors header, got: TypeError"),
    "no offsets": (pack({"a": {"dtype": "F32", "shape": [6]}}), "got: KeyError('data_offsets')"),
    "unknown dtype": (pack({"a": f32(0, 24) | {"dtype": "F31"}}), "got: KeyError('F31')"),
    "one offset": (pack({"a": f32(0, 24) | {"data_offsets": [0]}}), "header, got: not enough"),
    "offsets that are text": (
        pack({"a": f32(0, 24) | {"data_offsets": ["0", "24"]}}),
        "a size that is no natural number for 'a'",
    ),
    "fractions": (pack({"a": f32(0, 24) | {"shape": [6.0]}}), "no natural number for 'a'"),
    "negative offsets": (pack({"a": f32(-8, 24, [8])}), "no natural number for 'a'"),
    "negative sizes": (pack({"a": f32(0, 24, [-2, -3])}), "no natural number for 'a'"),
    "an end before its beginning": (pack({"a": f32(24, 0, [0])}), "-24 bytes for 'a'"),
    "too few bytes for a shape": (pack({"a": f32(0, 24, [2, 4])}), "24 bytes for 'a', [2, 4]"),
    "a shape that overflows": (pack({"a": f32(0, 24, [2**62, 4, 6])}), "24 bytes for 'a'"),
    "overlap": (pack({"a": f32(0, 16), "b": f32(8, 24)}), "'b' at 8, where the tensor before"),
    "one place for two": (pack({"a": f32(0, 24), "b": f32(0, 24)}), "'b' at 0, where the tensor"),
    "a hole": (pack({"a": f32(0, 8), "b": f32(16, 24)}), "ends at 8"),
    "a hole at the beginning": (pack({"a": f32(8, 24)}), "'a' at 8, where"),
    "offsets past the end": (pack({"a": f32(0, 8), "b": f32(8, 2**40)}), "long by its header"),
    "two of one name": (
        pack(b'{"a":%b,"a":%b}' % ((json.dumps(f32(0, 24)).encode(),) * 2)),
        "one name for two things",
    ),
    "metadata that is no text": (pack(WHOLE | {"__metadata__": {"format": 3}}), "metadata that"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer; run `git lfs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_safetensors_that_are_damaged(tmp_path, name):
    content, message = BROKEN[name]
    folder = make(tmp_path / "m", **{"model.safetensors": content})
    line = refused(folder)
    assert message in line
    assert str(folder / "model.safetensors") in line
    if name == "two of one name":
        return  # the format's own reader takes the last one
    with pytest.raises((SafetensorError, OSError)):
        safe_open(folder / "model.safetensors", "np")


def test_safetensors_cut_anywhere(tmp_path):
    folder = make(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:length])
        refused(folder)


def test_whatever_happens_to_a_header_the_formats_own_reader_refuses_no_more(tmp_path):
    folder = make(tmp_path / "m", **{"model.safetensors": pack(WHOLE)})
    path, whole = folder / "model.safetensors", pack(WHOLE)
    header = len(whole) - 24
    rng = random.Random(0)
    agreed = {True: 0, False: 0}
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 2)):
            content[rng.randrange(8, header)] = rng.choice(b'0123456789-.eE,:[]{}"\\ abF\x00\xff')
        path.write_bytes(content)
        try:
            Checkpoint.open(folder)
        except CheckpointError:
            agreed[False] += 1
            continue
        agreed[True] += 1
        with safe_open(path, "np") as file:
            assert sum(file.get_tensor(name).size for name in file.keys()) == 6  # noqa: SIM118
    assert agreed[True] > 5
    assert agreed[False] > 300


# ------------------------------------------------------------------------------ the index


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "every shard, got none named gone.safetens"),
        ({"weight_map": {"a": "../other/model.safetensors"}}, "must name files of its own folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "own folder, got '/etc/passwd'"),
        ({"weight_map": {"a": ".."}}, "own folder, got '..'"),
        ({"weight_map": {"a": ""}}, "must hold every shard, got none named "),
        ({"weight_map": {"a": 3}}, "own folder, got 3"),
        ({"weight_map": {"a": 3, "b": "x"}}, "must hold a weight_map, got something else"),
        ({"weight_map": ["x"]}, "must hold a weight_map, got something else"),
        ({"map": {}}, "must hold a weight_map, got something else"),
        ({"weight_map": {}}, "got none; is the download complete?"),
        ("{", "model.safetensors.index.json must be JSON"),
        ("version https://git-lfs", "got a git-lfs pointer; run `git lfs pull`"),
    ],
)
def test_an_index_that_cannot_be_followed(tmp_path, index, message):
    make(tmp_path / "other")
    content = index if isinstance(index, str) else json.dumps(index)
    files = {"model.safetensors": None, "model.safetensors.index.json": content}
    assert message in refused(make(tmp_path / "m", **files))


# ------------------------------------------------------------------------------ other formats


def test_other_formats_are_refused_by_name(tmp_path):
    none = {"model.safetensors": None}
    gguf = make(tmp_path / "gguf", **none, **{"m-Q4_K_M.gguf": b"GGUF"})
    line = refused(gguf, UnsupportedModelError)
    assert "got GGUF files; use the checkpoint that they were converted from" in line
    (gguf / "config.json").unlink()
    assert refused(gguf, UnsupportedModelError) == line
    for name in ("consolidated.00.pth", "training_args.bin", "model-00001-of-2.safetensors"):
        odd = make(tmp_path / f"with {name}", **none, **{name: b"\x80"})
        for options in ({}, {"allow_pickle": True}):
            line = refused(odd, **options)
            assert f"got none by the names that transformers knows, but {name}" in line


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "nonsense"])
def test_quantised_weights_are_refused_by_name(tmp_path, method):
    config = json.dumps({"model_type": "llama", "quantization_config": {"quant_method": method}})
    line = refused(make(tmp_path / "small", **{"config.json": config}), UnsupportedModelError)
    assert f"got quantised ones ({method}); use the checkpoint" in line


def test_pickles_are_refused_unless_allowed(tmp_path):
    none = {"model.safetensors": None}
    folder = make(tmp_path / "m", **none, **{"pytorch_model.bin": b"\x80\x04."})
    line = refused(folder, UnsupportedModelError)
    assert "(pytorch_model.bin), which can run code when loaded; pass --allow-pickle" in line
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert (checkpoint.pickled, checkpoint.parameters, checkpoint.weight_bytes) == (True, 0, 3)
    assert [path.name for path in checkpoint.weights] == ["pytorch_model.bin"]
    (folder / "pytorch_model.bin").write_bytes(b"version https://git-lfs")
    assert "got a git-lfs pointer" in refused(folder, allow_pickle=True)
    (folder / "pytorch_model.bin").unlink()
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    assert "own folder, got '../x.bin'" in refused(folder, allow_pickle=True)
    # Where there are both, only the safe ones are looked at.
    assert not Checkpoint.open(make(folder), allow_pickle=True).pickled


ADAPTER = {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.safetensors": pack(WHOLE)}


def test_adapters_are_told_from_models(tmp_path):
    bare = make(tmp_path / "bare", **ADAPTER, **{"model.safetensors": None, "config.json": None})
    with_config = make(tmp_path / "with config", **ADAPTER, **{"model.safetensors": None})
    for folder in (bare, with_config):
        assert is_adapter(folder)
        check_adapter(folder)
        line = refused(folder, UnsupportedModelError)
        assert "got a LoRA adapter; pass the model it was trained on with --adapter-base" in line
    both = make(tmp_path / "both", **ADAPTER)
    assert not is_adapter(both)
    assert "got both; move adapter_config.json away" in refused(both, UnsupportedModelError)
    assert not is_adapter(make(tmp_path / "model"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": "{"}, r"adapter_config\.json must be JSON"),
        ({"adapter_config.json": "{}"}, "must hold a LoRA adapter, got one of type None"),
        ({"adapter_config.json": '{"peft_type": "IA3"}'}, "got one of type IA3"),
        ({"adapter_model.safetensors": None}, r"must hold adapter_model\.safetensors, got none"),
        ({"adapter_model.safetensors": pack(WHOLE)[:-1]}, "long by its header"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path, files, message):
    with pytest.raises(CheckpointError, match=message):
        check_adapter(make(tmp_path / "m", **ADAPTER | files))

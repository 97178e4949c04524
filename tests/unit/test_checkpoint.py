"""What a checkpoint folder must be like, found out without reading a weight."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from llfast import CheckpointError, UnsupportedModelError
from llfast.checkpoint import Checkpoint, check_adapter, is_adapter
from llfast.safetensors_file import read_header

INDEX = "model.safetensors.index.json"

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
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
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


def test_what_is_stored_where(tmp_path):
    folder = make(tmp_path / "m")
    path = folder / "model.safetensors"
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors == read_header(path)
    assert checkpoint.tensors.keys() == TENSORS.keys()
    content = path.read_bytes()
    for name, tensor in checkpoint.tensors.items():
        assert content[tensor.begin : tensor.end] == TENSORS[name].tobytes()
    # A million of them are not to be printed or compared.
    assert "StoredTensor" not in repr(checkpoint)
    assert replace(checkpoint, tensors={}) == checkpoint


def test_safetensors_that_are_damaged(tmp_path):
    """What can be wrong with one is in test_safetensors_file.py."""
    folder = make(tmp_path / "m")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert refused(folder).endswith(f"got {len(whole) - 1}; is the download complete?")
    path.write_bytes(whole.replace(b'"F16"', b'"F61"'))
    line = refused(folder)
    assert (
        line == f"{path} must give 'b' a dtype of safetensors, got 'F61'; download or save it again"
    )
    (folder / INDEX).write_text("{}")
    assert refused(folder) == line, "an index counts only where there is no whole file"


# ------------------------------------------------------------------------------ the index


OWN = "must name files of its own folder, got "


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "every shard, got none named gone.safetensors"),
        ({"weight_map": {"a": "folder.safetensors"}}, "every shard, got none named folder.safet"),
        ({"weight_map": {"a": "../other/model.safetensors"}}, OWN + "'../other/model.safetensors'"),
        ({"weight_map": {"a": "sub/one.safetensors"}}, OWN + "'sub/one.safetensors' for 'a'"),
        ({"weight_map": {"a": "./one.safetensors"}}, OWN + "'./one.safetensors' for 'a'"),
        ({"weight_map": {"a": "one.safetensors/"}}, OWN + "'one.safetensors/' for 'a'"),
        ({"weight_map": {"a": "/etc/passwd"}}, OWN + "'/etc/passwd' for 'a'"),
        ({"weight_map": {"a": "..\\one.safetensors"}}, OWN + r"'..\\one.safetensors' for 'a'"),
        ({"weight_map": {"a": "one\0.safetensors"}}, OWN + r"'one\x00.safetensors' for 'a'"),
        ({"weight_map": {"a": "one\n.safetensors"}}, OWN + r"'one\n.safetensors' for 'a'"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, OWN + r"'\ud800.safetensors' for 'a'"),
        ({"weight_map": {"a": "é" * 130 + ".safetensors"}}, OWN + "'ééé"),
        ({"weight_map": {"a": ".."}}, OWN + "'..' for 'a'"),
        ({"weight_map": {"a": "."}}, OWN + "'.' for 'a'"),
        ({"weight_map": {"a": ""}}, OWN + "'' for 'a'"),
        ({"weight_map": {"a": 3}}, OWN + "3 for 'a'"),
        ({"weight_map": {"a": None}}, OWN + "None for 'a'"),
        ({"weight_map": {"a": ["one.safetensors"]}}, OWN + "['one.safetensors'] for 'a'"),
        ({"weight_map": {"a": "one.safetensors", "b": 3}}, OWN + "3 for 'b'"),
        ({"weight_map": {"a\nb": 3}}, OWN + r"3 for 'a\nb'"),
        ({"weight_map": {"a": "one.bin"}}, "must name .safetensors files, got 'one.bin' for 'a'"),
        ({"weight_map": ["x"]}, "must hold a weight_map, got ['x'] for it"),
        ({"map": {}}, "must hold a weight_map, got None for it"),
        ({"weight_map": {}}, "must hold .safetensors weights, got none"),
        ('{"weight_map": {}, "weight_map": {}}', "must be JSON, got the key 'weight_map' twice"),
        (
            '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
            "must be JSON, got the key 'a' twice",
        ),
        ("[]", "must be a JSON object, got list"),
        ("{", "model.safetensors.index.json must be JSON"),
        ("version https://git-lfs", "got a git-lfs pointer; run `git lfs pull`"),
    ],
)
def test_an_index_that_cannot_be_followed(tmp_path, index, message):
    make(tmp_path / "other")
    content = index if isinstance(index, str) else json.dumps(index)
    folder = make(tmp_path / "m", **{"model.safetensors": None, INDEX: content})
    (folder / "sub").mkdir()
    (folder / "folder.safetensors").mkdir()
    for name in ("one.safetensors", "sub/one.safetensors", "..\\one.safetensors", "one.bin"):
        save_file({"a": TENSORS["a"]}, folder / name)
    assert message in refused(folder)


def sharded(folder, weight_map, **shards):
    """A checkpoint whose index says `weight_map`; `shards` have the tensors of those names."""
    make(folder, **{"model.safetensors": None, INDEX: json.dumps({"weight_map": weight_map})})
    for shard, names in shards.items():
        save_file(dict.fromkeys(names, TENSORS["a"]), folder / f"{shard}.safetensors")
    return folder


ONE, TWO = "one.safetensors", "two.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        # One shard lacks it, another has it, or both do, whichever of them the index names.
        ({"a": ONE, "b": TWO, "d": TWO}, "two.safetensors must hold 'd' by its index, got none;"),
        ({"a": TWO, "e": ONE}, "two.safetensors must hold 'a' by its index, got it in one.safet"),
        ({"a": ONE, "b": TWO, "both": TWO}, "got 'both', which is in one.safetensors, too; remove"),
        ({"a": ONE, "b": TWO}, "two.safetensors must hold tensors that no other shard holds, got"),
    ],
)
def test_shards_that_are_not_as_their_index_says(tmp_path, weight_map, message):
    both = ["both"] if "both" in message or "no other" in message else []
    shards = {"one": ["a", *both], "two": ["b", "c", *both]}
    assert message in refused(sharded(tmp_path / "m", weight_map, **shards))


def test_a_tensor_that_the_index_forgets_belongs_to_the_checkpoint(tmp_path):
    """As it does for transformers, which loads all that is in the shards."""
    folder = sharded(tmp_path / "m", {"a": ONE, "b": TWO}, one=["a"], two=["b", "c"], three=["z"])
    checkpoint = Checkpoint.open(folder)
    assert {name: tensor.path.name for name, tensor in checkpoint.tensors.items()} == {
        "a": ONE, "b": TWO, "c": TWO
    }  # fmt: skip
    assert checkpoint.parameters == 3 * 6
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-1])
    assert "two.safetensors must be" in refused(folder)


# ------------------------------------------------------------------------------ other formats


@pytest.mark.parametrize("named", ["other.safetensors", INDEX, "sub/model.safetensors", ["x"]])
def test_weights_that_the_config_has_elsewhere(tmp_path, named):
    """transformers would load those; they are not what is looked at, paged and verified."""
    folder = make(tmp_path / "m", **{"config.json": json.dumps({"transformers_weights": named})})
    message = refused(folder, UnsupportedModelError)
    assert "must hold its weights as model.safetensors, got" in message
    assert "for transformers_weights in config.json; " in message
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refused(folder, UnsupportedModelError, allow_pickle=True)
    assert "must hold its weights as pytorch_model.bin, got" in message


def test_weights_that_the_config_has_where_they_are(tmp_path):
    for named in ("model.safetensors", None):
        config = {"config.json": json.dumps({"transformers_weights": named})}
        assert Checkpoint.open(make(tmp_path / "m", **config)).weights
    folder = sharded(tmp_path / "n", {"a": ONE}, one=["a"])
    (folder / "config.json").write_text(json.dumps({"transformers_weights": INDEX}))
    assert Checkpoint.open(folder).weights


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
            assert line.endswith("is the download complete, and saved by transformers?")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("consolidated.safetensors", b"weights"),
        ("consolidated-00001-of-00002.safetensors", b"weights"),
        ("consolidated.safetensors.index.json", b"{}"),
        # All that is downloaded from the Hub where the weights are no others.
        ("params.json", b'{"dim": 5120, "n_layers": 40}'),
    ],
)
def test_the_format_that_models_are_converted_from_is_refused_by_name(tmp_path, name, content):
    folder = make(tmp_path / "m", **{"model.safetensors": None, name: content})
    line = refused(folder, UnsupportedModelError)
    whose = "Mistral's or Meta's" if name == "params.json" else "Mistral's"
    assert line.endswith(
        f"m must hold a model as transformers saves it, got {name}, of {whose} own format; use a "
        "checkpoint that was converted"
    )
    for options in ({}, {"allow_pickle": True}):
        assert refused(folder, UnsupportedModelError, **options) == line
    (folder / "config.json").unlink()
    assert refused(folder, UnsupportedModelError) == line
    with_both = make(tmp_path / "both", **{name: content})
    assert Checkpoint.open(with_both).weights == (with_both / "model.safetensors",)


def test_parameters_of_something_else_are_no_format(tmp_path):
    for content in ("{}", "[1]", '{"lr": 0.1}', "torn", b"\xff"):
        folder = make(tmp_path / "m", **{"model.safetensors": None, "params.json": content})
        assert refused(folder).endswith("got none; is the download complete?")
    (folder / "consolidated.safetensors").symlink_to("not-there")
    assert refused(folder).endswith("got none; is the download complete?")


METHODS = (
    "gptq awq bitsandbytes aqlm quanto quark fouroversix fp_quant eetq higgs hqq fbgemm_fp8 "
    "torchao bitnet vptq spqr gguf nvfp4 mxfp4 mxfp8 auto-round metal sinq gemma modelopt nonsense"
).split()


@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config"])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_are_refused_by_name(tmp_path, method, where):
    settings = {"quant_method": method}
    if where == "text_config":
        settings = {"quantization_config": settings}
    config = json.dumps({"model_type": "llama", where: settings})
    folder = make(tmp_path / "small", **{"config.json": config})
    (folder / "model.safetensors").write_bytes(b"not looked at")
    line = refused(folder, UnsupportedModelError)
    assert f"got quantised ones ('{method}'); use the checkpoint that they were made" in line


@pytest.mark.parametrize("settings", ["int4", {"bits": 4}, ["gptq"], {"load_in_4bit": True}])
def test_quantised_in_a_way_that_has_no_name(tmp_path, settings):
    config = json.dumps({"model_type": "llama", "quantization_config": settings})
    line = refused(make(tmp_path / "m", **{"config.json": config}), UnsupportedModelError)
    assert "got quantised ones (" in line


@pytest.mark.parametrize("block", [128, [128], [0, 128], [128.0, 128], ["128", 1], [True, 1], {}])
def test_blocks_that_are_none(tmp_path, block):
    settings = {"quant_method": "fp8", "weight_block_size": block}
    config = json.dumps({"model_type": "llama", "quantization_config": settings})
    line = refused(make(tmp_path / "m", **{"config.json": config}))
    assert "config.json must give weight_block_size as two sizes, got " in line


def test_quantised_pickles_are_refused_even_if_allowed(tmp_path):
    """Their scales cannot be told from weights unread."""
    config = json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}})
    files = {"model.safetensors": None, "pytorch_model.bin": b"\x80\x04.", "config.json": config}
    folder = make(tmp_path / "m", **files)
    line = refused(folder, UnsupportedModelError, allow_pickle=True)
    assert "must hold .safetensors weights, for they are quantised (fp8), got pickled ones" in line


def test_pickles_are_refused_unless_allowed(tmp_path):
    none = {"model.safetensors": None}
    folder = make(tmp_path / "m", **none, **{"pytorch_model.bin": b"\x80\x04."})
    line = refused(folder, UnsupportedModelError)
    assert "(pytorch_model.bin), which can run code when loaded; pass --allow-pickle" in line
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert (checkpoint.pickled, checkpoint.parameters, checkpoint.weight_bytes) == (True, 0, 3)
    assert checkpoint.tensors == {}
    assert [path.name for path in checkpoint.weights] == ["pytorch_model.bin"]
    (folder / "pytorch_model.bin").write_bytes(b"version https://git-lfs")
    assert "got a git-lfs pointer" in refused(folder, allow_pickle=True)
    (folder / "pytorch_model.bin").unlink()
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    assert "own folder, got '../x.bin'" in refused(folder, allow_pickle=True)
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert "must name .bin files, got 'x.safetensors'" in refused(folder, allow_pickle=True)
    index.write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    (folder / "x.bin").write_bytes(b"\x80\x04.")
    assert "must hold metadata, which transformers asks for, got None" in refused(
        folder, allow_pickle=True
    )
    # Where there are both, only the safe ones are looked at.
    assert not Checkpoint.open(make(folder), allow_pickle=True).pickled


WEIGHTS = save(TENSORS)
ADAPTER = {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.safetensors": WEIGHTS}


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
        ({"adapter_model.safetensors": WEIGHTS[:-1]}, "long by its header"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path, files, message):
    with pytest.raises(CheckpointError, match=message):
        check_adapter(make(tmp_path / "m", **ADAPTER | files))

"""Which checkpoints are loaded, which are refused, and that what is loaded is what was saved."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import llfast
from llfast import CheckpointError, TextSet, UnsupportedModelError
from llfast.errors import LlfastWarning
from llfast.models import FolderSource, open_model
from tests.opening import same_weights
from tests.paging import score_paged
from tests.tiny import (
    COMMON,
    TEXTS,
    make_model,
    make_tokenizer,
    one_thread,
    plain_loglikelihood,
    save,
)

CPU = torch.device("cpu")


def load(folder, **options):
    source = open_model(folder, **options)
    source.tokenizer()
    return source.load(torch.float32, CPU)


def refused(folder, error=CheckpointError, **options):
    """The one line with which a folder is refused, wherever on the way that is."""
    with pytest.raises(error) as caught:
        load(folder, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def llama(checkpoints, tmp_path):
    return shutil.copytree(checkpoints / "llama", tmp_path / "llama")


@pytest.fixture
def gpt2(checkpoints, tmp_path):
    return shutil.copytree(checkpoints / "gpt2", tmp_path / "gpt2")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------ weights


def test_what_was_saved_is_loaded(llama):
    assert same_weights(load(llama), make_model("llama"))


def test_weights_that_are_missing_are_never_made_up(llama, gpt2):
    edit_weights(llama, lambda weights: weights.pop("lm_head.weight"))
    line = refused(llama)
    assert line.endswith("every weight of LlamaForCausalLM, got 1 missing keys: lm_head.weight")
    assert "lm_head.weight" not in load_file(gpt2 / "model.safetensors")
    load(gpt2)  # its head is its embedding, and is not stored


def test_a_config_of_more_layers_than_there_are_is_refused(llama):
    edit(llama / "config.json", num_hidden_layers=3)
    assert "got 9 missing keys: model.layers.2.input_layernorm.weight, " in refused(llama)


def test_a_config_of_fewer_layers_than_there_are_is_warned_of(llama):
    edit(llama / "config.json", num_hidden_layers=1)
    with pytest.warns(LlfastWarning, match="9 unexpected keys: model.layers.1.input_layer") as told:
        model = load(llama)
    assert str(llama) in str(told[0].message)
    assert len(model.model.layers) == 1


def test_buffers_of_old_checkpoints_are_no_loss(gpt2):
    buffers = {
        f"transformer.h.0.attn.{name}": torch.ones(4, dtype=torch.uint8)
        for name in ("bias", "masked_bias")
    }
    edit_weights(gpt2, lambda weights: weights.update(buffers))
    assert same_weights(load(gpt2), make_model("gpt2"))


def test_weights_of_another_shape_are_refused_with_both_shapes(llama):
    edit(llama / "config.json", vocab_size=400)
    line = refused(llama)
    assert "2 mismatched keys: lm_head.weight [304, 32] not [400, 32], model.embed_tok" in line


def test_files_without_metadata_are_loaded(llama):
    path = llama / "model.safetensors"
    save_file(load_file(path), path)
    assert same_weights(load(llama), make_model("llama"))


def test_the_dtype_is_that_of_the_weights_where_the_device_is_fast_in_it(llama):
    cuda = torch.device("cuda")
    for dtype, on_cpu in ((torch.float32, torch.float32), (torch.float16, torch.float32)):
        path = llama / "model.safetensors"
        halves = {name: weight.to(dtype) for name, weight in load_file(path).items()}
        save_file(halves, path, metadata={"format": "pt"})
        edit(llama / "config.json", dtype="float64")  # what the config says does not count
        source = open_model(llama)
        assert source.dtype("auto", CPU) == on_cpu
        assert source.dtype("auto", cuda) == dtype
        assert source.dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be auto, float32, .*got 'half'"):
        source.dtype("half", CPU)


# ------------------------------------------------------------------------------ pickles


@pytest.fixture
def pickled(llama):
    (llama / "model.safetensors").unlink()
    torch.save(make_model("llama").state_dict(), llama / "pytorch_model.bin")
    return llama


def test_pickled_weights_are_loaded_with_the_flag_only(pickled):
    assert "pass --allow-pickle if you trust them" in refused(pickled, UnsupportedModelError)
    assert same_weights(load(pickled, allow_pickle=True), make_model("llama"))


class _Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("dump", [torch.save, lambda trap, path: path.write_bytes(trap)])
def test_a_pickle_that_runs_code_is_not_run_even_with_the_flag(pickled, tmp_path, dump):
    trap = {"lm_head.weight": _Trap(tmp_path / "trapped")}
    if dump is not torch.save:
        trap = pickle.dumps(trap)
    dump(trap, pickled / "pytorch_model.bin")
    refused(pickled, UnsupportedModelError)
    assert "must be a checkpoint that transformers loads" in refused(pickled, allow_pickle=True)
    assert not (tmp_path / "trapped").exists()


# ------------------------------------------------------------------------------ kinds of models

SMALL = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
T5 = {"vocab_size": 304, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        ("AutoModelForMaskedLM", ("bert", SMALL), "causal language model, got BertForMaskedLM"),
        ("AutoModel", ("bert", SMALL), "every weight of BertLMHeadModel, got .* cls.predictions"),
        ("AutoModelForSeq2SeqLM", ("t5", T5), "got an encoder-decoder: T5ForConditionalGen"),
        ("AutoModelForSequenceClassification", ("llama", COMMON | {"vocab_size": 304}),
         "must be a causal language model, got LlamaForSequenceClassification"),
        ("AutoModel", ("llama", COMMON | {"vocab_size": 304}), "1 missing keys: lm_head.weight"),
    ],
)  # fmt: skip
def test_models_that_are_no_causal_language_models_are_refused(tmp_path, make, config, message):
    kind, sizes = config
    model = getattr(transformers, make).from_config(
        transformers.AutoConfig.for_model(kind, pad_token_id=0, **sizes)
    )
    folder = save(model, make_tokenizer(adds_bos=False), tmp_path / "m")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    unsupported = "missing keys" not in message and "every weight" not in message
    assert isinstance(caught.value, UnsupportedModelError) == unsupported


def test_a_model_whose_attention_looks_ahead_is_refused_when_it_is_scored(tmp_path):
    config = transformers.AutoConfig.for_model("bert", initializer_range=0.5, **SMALL)
    bert = transformers.AutoModelForCausalLM.from_config(config)
    folder = save(bert, make_tokenizer(adds_bos=False), tmp_path / "m")
    with pytest.raises(UnsupportedModelError, match="later tokens change earlier logits"):
        llfast.score(folder, TEXTS)


def test_a_body_saved_without_its_tied_head_is_the_whole_model(tmp_path):
    whole, tokenizer = make_model("gpt2"), make_tokenizer(adds_bos=False)
    folder = save(whole.transformer, tokenizer, tmp_path / "m")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2Model"]
    texts = TextSet.from_texts(TEXTS)
    expected = [plain_loglikelihood(whole, tokenizer(text)["input_ids"]) for text in texts.texts]
    np.testing.assert_allclose(llfast.score(folder, texts).values, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nosuch"}, "has model type `nosuch` but Transformers does not recognize"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
    ],
)
def test_configs_that_transformers_does_not_take(llama, config, message):
    edit(llama / "config.json", **config)
    line = refused(llama, UnsupportedModelError)
    assert "must have a config that transformers understands, got: " in line
    assert message in line


@pytest.mark.parametrize(
    ("setting", "least"),
    [({"vocab_size": 0}, 1), ({"num_experts_per_tok": -1}, 0), ({"num_hidden_layers": -2}, 0)],
)
def test_configs_with_counts_that_are_none(llama, setting, least):
    """Of these, transformers builds a model; the last it would run without any layer."""
    edit(llama / "config.json", **setting)
    ((key, count),) = setting.items()
    line = refused(llama, UnsupportedModelError)
    assert line.endswith(f"must have a config with {key} of at least {least}, got {count}")


@pytest.mark.parametrize("weights", ["resident", "paged"])
def test_a_config_that_asks_for_results_without_names(llama, weights):
    expected = llfast.score(llama, TEXTS).values
    edit(llama / "config.json", return_dict=False)
    assert llfast.score(llama, TEXTS, weights=weights).values.tobytes() == expected.tobytes()


# ------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_missing_tokenizer_is_refused_and_another_can_be_given(checkpoints, tmp_path, kind):
    # Of gpt2 transformers makes a tokenizer without a vocabulary, to which every text is empty.
    folder = shutil.copytree(checkpoints / kind, tmp_path / "m")
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for path in folder.glob("tokenizer*"):
        path.rename(tokens / path.name)
    line = refused(folder)
    assert "must hold a tokenizer, got none" in line
    assert line.endswith("pass one with --tokenizer")
    result = llfast.score(folder, TEXTS, tokenizer=tokens)
    np.testing.assert_array_equal(result.values, llfast.score(checkpoints / kind, TEXTS).values)


def test_a_tokenizer_that_cannot_be_read_is_refused(llama):
    (llama / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "must hold a tokenizer, got none that loads (Expecting value" in refused(llama)


def test_a_loaded_tokenizer_does_not_go_with_a_folder(llama):
    with pytest.raises(TypeError, match="tokenizer must be a folder .* got a TokenizersBackend"):
        open_model(llama, tokenizer=make_tokenizer(adds_bos=True))


# ------------------------------------------------------------------------------ code of its own

CONFIG = """
from pathlib import Path
Path({trap!r}, "config").touch()
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = "mine"
"""
MODEL = """
from pathlib import Path
Path({trap!r}, "model").touch()
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
class MineModel(LlamaForCausalLM):
    config_class = MineConfig
"""
TOKENIZER = """
from pathlib import Path
Path({trap!r}, "tokenizer").touch()
from transformers import PreTrainedTokenizerFast
class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def trap(tmp_path):
    """A folder in which code leaves a file when it is run."""
    (tmp_path / "ran").mkdir()
    return tmp_path / "ran"


def test_code_of_a_checkpoint_is_run_with_the_flag_only(llama, trap):
    names = {"AutoConfig": "configuration_mine.MineConfig"}
    names["AutoModelForCausalLM"] = "modeling_mine.MineModel"
    edit(llama / "config.json", model_type="mine", auto_map=names, architectures=["MineModel"])
    (llama / "configuration_mine.py").write_text(CONFIG.format(trap=str(trap)))
    (llama / "modeling_mine.py").write_text(MODEL.format(trap=str(trap)))
    line = refused(llama, UnsupportedModelError)
    assert "brings its own code; pass --trust-remote-code if you trust it" in line
    assert not list(trap.iterdir())
    model = load(llama, trust_remote_code=True)
    assert {path.name for path in trap.iterdir()} == {"config", "model"}
    assert type(model).__name__ == "MineModel"
    assert torch.equal(model.lm_head.weight, make_model("llama").lm_head.weight)


def test_code_of_a_tokenizer_is_run_with_the_flag_only(llama, trap):
    names = {"AutoTokenizer": ["tokens_mine.MineTokenizer", "tokens_mine.MineTokenizer"]}
    edit(llama / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=names)
    (llama / "tokens_mine.py").write_text(TOKENIZER.format(trap=str(trap)))
    line = refused(llama, UnsupportedModelError)
    assert "brings its own code; pass --trust-remote-code if you trust it" in line
    assert not list(trap.iterdir())
    source = open_model(llama, trust_remote_code=True)
    assert type(source.tokenizer()).__name__ == "MineTokenizer"
    assert {path.name for path in trap.iterdir()} == {"tokenizer"}


def test_code_beside_a_known_architecture_is_left_alone(llama, trap):
    edit(llama / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.MineModel"})
    (llama / "modeling_mine.py").write_text(MODEL.format(trap=str(trap)))
    assert isinstance(open_model(llama), FolderSource)
    assert same_weights(load(llama), make_model("llama"))
    score_paged(llama, ["one two three"])
    assert not list(trap.iterdir())


@pytest.mark.parametrize("metadata", ["left out", None, []])
def test_shards_whose_index_has_no_metadata_are_loaded_all_the_same(llama, metadata):
    """transformers wants some, and looks at nothing in them."""
    whole = load(llama)
    expected = llfast.score(llama, TEXTS).values
    (llama / "model.safetensors").unlink()
    whole.save_pretrained(llama, max_shard_size="30KB")
    path = llama / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert len(set(index["weight_map"].values())) > 2
    del index["metadata"]
    path.write_text(json.dumps(index if metadata == "left out" else index | {"metadata": metadata}))
    assert same_weights(load(llama), whole)
    for weights in ("resident", "paged"):
        found = llfast.score(llama, TEXTS, weights=weights).values
        assert found.tobytes() == expected.tobytes()
    shard = next(llama.glob("model-*.safetensors"))
    weights = load_file(shard)
    del index["weight_map"][(gone := min(weights))], weights[gone]
    save_file(weights, shard, metadata={"format": "pt"})
    path.write_text(json.dumps(index))
    assert f"must hold every weight of LlamaForCausalLM, got 1 missing keys: {gone}" in refused(
        llama
    )

"""What an estimate says of weights and memory is what the run then does, or refuses."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llfast
from llfast import LlfastError, LlfastWarning, TextSet, batchwise, engines, estimate
from llfast.models import open_model
from llfast.paging import model as paged_model
from llfast.paging import pages, units
from llfast.paging.pages import Pages
from tests.architectures import build
from tests.paging import LIMITS, least_budget, score_paged
from tests.tiny import (
    SIZES,
    TEXTS,
    copy_checkpoint,
    make_adapter,
    make_model,
    make_tokenizer,
    one_thread,
    save,
)

FEW = TextSet.from_texts(TEXTS[1::5])
DTYPE = {"dtype": "float32"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(estimate, "_matmul_flops", lambda dtype, device: 1e9)
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of every kind."""
    folder = tmp_path_factory.mktemp("estimates")
    tokenizer = make_tokenizer(adds_bos=False)
    return {kind: save(make_model(kind), tokenizer, folder / kind) for kind in SIZES}


def outcome(call):
    """What is returned, or the error that is raised instead."""
    try:
        return call()
    except (ValueError, LlfastError) as error:
        return type(error), str(error)


def planned(folder, **options):
    return estimate.estimate(open_model(folder), FEW, **DTYPE, **options).weights


def whole(source):
    return source.load(torch.float32, torch.device("cpu")).parameters()


def done(folder, **options):
    return llfast.score(folder, FEW, **DTYPE, **options).provenance["weights"]


def check_same(folder, **options):
    """The same way, or the same refusal, which is returned."""
    expected = outcome(lambda: done(folder, **options))
    assert outcome(lambda: planned(folder, **options)) == expected
    return expected if isinstance(expected, str) else expected[1]


@pytest.mark.parametrize("path", ["torch", "packed"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_a_budget_is_taken_as_the_run_takes_it(folders, monkeypatch, kind, path):
    for place in (engines, paged_model):
        monkeypatch.setattr(place, "linear_path", lambda *_, **__: path)
    least = least_budget(folders[kind], FEW, **DTYPE)
    found = estimate.estimate(open_model(folders[kind]), FEW, **DTYPE, weights="auto")
    assert found.weights == "kept"
    stays = int(np.ceil(1.1 * found.weights_bytes))
    ways = {}
    for budget in (1, least - 1, least, stays - 1, stays, 4 * stays):
        for weights in ("auto", "paged"):
            options = {"weights": weights, "memory_budget": budget}
            ways[budget, weights] = check_same(folders[kind], **options)
    for weights in ("auto", "paged"):
        assert "got 1; it takes more than" in ways[1, weights]
        assert f"it takes more than {least - 1:,}" in ways[least - 1, weights]
        assert ways[least, weights] == "paged"
    assert (ways[stays - 1, "auto"], ways[stays, "auto"]) == ("paged", "kept")
    assert ways[4 * stays, "paged"] == "paged"


@pytest.mark.parametrize("seed", range(4))
def test_layers_that_lie_in_several_files(tmp_path, seed):
    """In whatever order: what lies between them in memory is counted alike."""
    random = np.random.default_rng(seed)
    folder = save(make_model("llama", hidden_size=40), make_tokenizer(adds_bos=False), tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-{random.integers(4)}.safetensors" for name in sorted(weights)}
    for shard in set(shards.values()):
        own = {name: weight for name, weight in weights.items() if shards[name] == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "got 1; it takes more than" in check_same(folder, weights="paged", memory_budget=1)


@pytest.mark.parametrize("weights", ["auto", "paged", "resident"])
def test_without_a_budget(folders, weights):
    expected = {"auto": "kept"}.get(weights, weights)
    assert check_same(folders["llama"], weights=weights) == expected


def test_what_is_no_way_and_no_budget(folders):
    for options, message in (
        ({"weights": "lazy"}, "weights must be auto, resident, paged, got 'lazy'"),
        ({"weights": "resident", "memory_budget": "1GiB"}, "must be left out with resident"),
        ({"memory_budget": "much"}, "memory_budget must be a size like '8GiB', got 'much'"),
    ):
        assert message in check_same(folders["gpt2"], **options)


def changing(_, tmp_path):
    return save(build("rwkv"), make_tokenizer(adds_bos=False), tmp_path / "rwkv")


def pickled(folder, copy):
    copy_checkpoint(folder, copy)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return open_model(copy, allow_pickle=True)


def adapted(folder, copy):
    pytest.importorskip("peft", reason="peft is an extra: pip install 'llfast[lora]'")
    return open_model(make_adapter(copy), adapter_base=str(folder))


def with_code(folder, copy):
    config = copy_checkpoint(folder, copy) / "config.json"
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    content = json.loads(config.read_text()) | {"model_type": "own", "auto_map": names}
    config.write_text(json.dumps(content))
    (copy / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return open_model(copy, trust_remote_code=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (pickled, "to be paged, got pickled weights; use weights='resident'"),
        (adapted, "to be paged, got a LoRA adapter; use weights='resident'"),
        (with_code, "to be paged, got one with code of its own; use weights='resident'"),
        (changing, "must leave its weights as they are to be paged, got a rwkv"),
    ],
)
def test_a_budget_must_hold_what_is_loaded_whole(folders, tmp_path, make, reason):
    source = open_model(make(folders["llama"], tmp_path / "m"))
    refused = check_same(source, memory_budget=1000)
    found = re.match(r"memory_budget must hold all of \S+, ([\d,]+) bytes, got 1,000: ", refused)
    assert refused.endswith(reason)
    size = int(found[1].replace(",", ""))
    assert size == pytest.approx(4 * sum(p.numel() for p in whole(source)), rel=0.05)
    assert check_same(source, memory_budget=size) == "resident"
    assert f"got {size - 1:,}: " in check_same(source, memory_budget=size - 1)


def test_a_budget_is_not_for_what_is_loaded_already():
    pair = make_model("llama"), make_tokenizer(adds_bos=True)
    message = "memory_budget must be left out for a loaded model, got '1GiB'; its weights are there"
    with pytest.raises(ValueError, match=message):
        llfast.score(pair, FEW, memory_budget="1GiB")


def test_what_is_not_paged_is_loaded_whole_if_the_budget_holds_it(folders, tmp_path):
    folder = changing(folders["llama"], tmp_path)
    assert check_same(folder) == check_same(folder, memory_budget="1GiB") == "resident"
    assert "to be paged" in check_same(folder, weights="paged")
    assert estimate.estimate(open_model(folder), FEW, **DTYPE).weights_bytes > 4 * 10_000


@pytest.mark.filterwarnings("ignore::llfast.LlfastWarning")
def test_memory_that_holds_no_two_pages(folders, monkeypatch):
    """Nobody asked for that little, so the model is loaded after all."""
    monkeypatch.setattr(engines.memory, "available_bytes", lambda _: 1000)
    assert check_same(folders["llama"]) == "resident"
    assert "got 800; it takes more than" in check_same(folders["llama"], weights="paged")


@pytest.mark.filterwarnings("ignore::llfast.LlfastWarning")
def test_an_llfast_without_its_reader(folders, monkeypatch):
    monkeypatch.setattr(pages, "FileReader", None)
    assert check_same(folders["llama"], memory_budget="1GiB") == "resident"
    assert "C++ module" in check_same(folders["llama"], weights="paged")


@pytest.mark.parametrize(("make", "reason"), [(changing, "rwkv"), (pickled, "pickled weights")])
def test_one_that_may_not_fit_is_warned_of(folders, tmp_path, monkeypatch, make, reason):
    """Nobody said that so little may be used."""
    source = make(folders["llama"], tmp_path / "m")
    monkeypatch.setattr(engines.memory, "available_bytes", lambda _: 1000)
    message = f"may not fit into memory is loaded whole, for .*{reason}"
    for way in (planned, done):
        with pytest.warns(LlfastWarning, match=message):
            assert way(source) == "resident"


def test_checkpoints_that_are_refused(folders, tmp_path):
    larger = make_tokenizer(adds_bos=False)
    larger.add_tokens([TEXTS[1][:7]] + [f"new{number}" for number in range(20)])
    larger.add_tokens([TEXTS[1][:9]])
    other = save(make_model("llama"), larger, tmp_path / "other")
    assert "the tokenizer does not belong" in check_same(other)
    lacking = copy_checkpoint(folders["gpt2"], tmp_path / "lacking")
    config = (lacking / "config.json").read_text()
    (lacking / "config.json").write_text(config.replace('"n_layer": 2', '"n_layer": 3'))
    assert "must hold every weight" in check_same(lacking, weights="paged")


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("everything_pages", [False, True])
def test_weights_take_what_was_said(folders, monkeypatch, kind, everything_pages):
    if everything_pages:
        for limit in LIMITS:
            monkeypatch.setattr(units, limit, 0)
    least = least_budget(folders[kind], FEW, **DTYPE)
    options = {"weights": "paged", "memory_budget": least, **DTYPE}
    found = estimate.estimate(open_model(folders[kind]), FEW, **options)
    assert found.weights_bytes == least - 1
    for place in (engines, paged_model):
        monkeypatch.setattr(place, "linear_path", lambda *_, **__: "torch")
    found = estimate.estimate(open_model(folders[kind]), FEW, **options | {"memory_budget": None})
    _, statistics = score_paged(folders[kind], FEW, **DTYPE)
    taken = statistics.slot_bytes + statistics.kept_bytes
    assert 0.5 * found.weights_bytes < taken <= found.weights_bytes


@pytest.fixture
def rope_folder(folders, tmp_path):
    """A model whose rotary embeddings change at a length that is on no ladder."""
    folder = copy_checkpoint(folders["llama"], tmp_path / "rope")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = open_model(folder).tokenizer()
    longest = max(len(tokenizer(text)["input_ids"]) for text in FEW.texts)
    assert longest % 16
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config["rope_parameters"] = rope | {"original_max_position_embeddings": longest}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("weights", ["auto", "resident"])
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "rope"])
def test_padded_tokens_are_those_that_run(folders, rope_folder, monkeypatch, kind, weights):
    """A mixture of experts runs a text at a time, and padding crosses no change of embeddings."""
    folder = rope_folder if kind == "rope" else folders[kind]
    found = estimate.estimate(open_model(folder), FEW, **DTYPE, weights=weights)
    ran = []

    def plan_for(*arguments):
        batches = own(*arguments)
        ran.extend(batch.shape for batch in batches)
        return batches

    own = engines.plan_for
    for place in (engines, batchwise):
        monkeypatch.setattr(place, "plan_for", plan_for)
    llfast.score(folder, FEW, **DTYPE, weights=weights)
    assert found.padded_tokens == sum(rows * length for rows, length in ran)


def test_no_weights_are_read(folders, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights are not to be read")

    source = open_model(folders["llama"])
    monkeypatch.setattr(Pages, "_read_extents", refuse)
    monkeypatch.setattr(type(source), "load", refuse)
    for weights in ("auto", "paged", "resident"):
        found = estimate.estimate(source, FEW, weights=weights)
        assert found.weights_bytes > 0
    assert torch.get_default_dtype() == torch.float32

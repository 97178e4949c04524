"""Checkpoints that cannot be scored: the reason in a line, kept in the store, and nothing lost."""

import json
import os
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import llfast
from llfast import ScoringError, Store
from tests.quantised import edit, save_fp8
from tests.tiny import TEXTS, copy_checkpoint, make_model, make_tokenizer, save


def truncated(checkpoints, folder):
    copy_checkpoint(checkpoints / "gpt2", folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1000)


def a_shard_short(checkpoints, folder):
    copy_checkpoint(checkpoints / "gpt2", folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def a_weight_short(checkpoints, folder):
    path = copy_checkpoint(checkpoints / "gpt2", folder) / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def a_weight_of_codes(checkpoints, folder):
    path = copy_checkpoint(checkpoints / "gpt2", folder) / "model.safetensors"
    weights = load_file(path)
    weights["transformer.h.1.mlp.c_fc.weight"] = torch.ones(32, 128, dtype=torch.uint8)
    save_file(weights, path, metadata={"format": "pt"})


def too_many_layers(checkpoints, folder):
    copy_checkpoint(checkpoints / "llama", folder)
    edit(folder, num_hidden_layers=2_147_483_648)


def encoder(checkpoints, folder):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    save(transformers.BertForMaskedLM(config), make_tokenizer(adds_bos=False), folder)


def encoder_decoder(checkpoints, folder):
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    save(model, make_tokenizer(adds_bos=False), folder)


def no_tokenizer(checkpoints, folder, of="llama"):
    copy_checkpoint(checkpoints / of, folder)
    for path in folder.glob("*token*"):
        path.unlink()


def no_tokenizer_gpt2(checkpoints, folder):
    no_tokenizer(checkpoints, folder, of="gpt2")


def other_tokenizer(checkpoints, folder):
    copy_checkpoint(checkpoints / "gpt2", folder)
    config = json.loads((folder / "config.json").read_text())
    save(make_model("gpt2", vocabulary=200), None, folder)
    assert config["vocab_size"] > 200


def no_weights(checkpoints, folder):
    copy_checkpoint(checkpoints / "gpt2", folder)
    (folder / "model.safetensors").unlink()


def broken_config(checkpoints, folder):
    copy_checkpoint(checkpoints / "gpt2", folder)
    (folder / "config.json").write_text('{"model_type": "gpt2", ')


def gguf(checkpoints, folder):
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")


def mistral(checkpoints, folder):
    folder.mkdir()
    (folder / "consolidated.safetensors").write_bytes(b"weights")


def adapter(checkpoints, folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def gptq(checkpoints, folder):
    copy_checkpoint(checkpoints / "llama", folder)
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def a_scale_short(checkpoints, folder):
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    save_fp8(checkpoints / "llama", folder, change=lambda tensors: tensors.pop(name))


def empty(checkpoints, folder):
    folder.mkdir()


def missing(checkpoints, folder):
    pass


# What `info`, which reads no weights and no tokenizer, cannot see is told apart by the third.
BROKEN = [
    (missing, "got .*: no folder", True),
    (empty, "must be a checkpoint folder, got one without config.json", True),
    (no_weights, "must hold .safetensors weights, got none", True),
    (truncated, "must be 1.* bytes long by its header, got 1.*; is the download complete", True),
    (a_shard_short, "must hold every shard, got none named model-00002-of-00002", True),
    (a_weight_short, "1 missing keys: transformer.h.1.mlp.c_fc.weight", False),
    (a_weight_of_codes, "quantization_config, for '.*c_fc.weight' is stored as U8, got none", True),
    (too_many_layers, "a num_hidden_layers of at most 1,000, .* got 2,147,483,648", True),
    (broken_config, "config.json must be JSON", True),
    (encoder, "must be a causal language model, got BertForMaskedLM", True),
    (encoder_decoder, "must be a causal decoder, got an encoder-decoder: T5", True),
    (gptq, r"got quantised ones \('gptq'\); use the checkpoint that they were made from", True),
    (a_scale_short, "'model.layers.1.mlp.up_proj.weight' must come with scales .*, got none", True),
    (gguf, "got GGUF files; use the checkpoint that they were converted from", True),
    (mistral, "got consolidated.safetensors, of Mistral's own format; use a checkpoint", True),
    (adapter, "got a LoRA adapter; pass the model .* with --adapter-base", True),
    (no_tokenizer, "must hold a tokenizer, got none", False),
    (no_tokenizer_gpt2, "must hold a tokenizer, got none", False),
    (other_tokenizer, "the tokenizer does not belong to this model", False),
]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("damage", "message", "seen_by_info"),
    BROKEN,
    ids=[each[0].__name__ for each in BROKEN],
)
def test_a_checkpoint_that_cannot_be_used(
    command, checkpoints, store, texts_file, tmp_path, damage, message, seen_by_info
):
    folder = tmp_path / "model"
    damage(checkpoints, folder)
    run = command("score", folder, "--texts", texts_file, "--store", store)
    assert run.code == 1
    (line,) = run.out.splitlines()
    assert line.startswith(f"failed   {folder}: ")
    reason = line.partition(": ")[2]
    assert re.search(message, reason)
    with pytest.raises(llfast.CheckpointError, match=message):
        llfast.score(folder, TEXTS)
    assert run.err == "llfast: 1 of 1 models failed; the store has why\n"
    rows = {row.label: row for row in Store(store).rows()}
    assert rows.pop(str(folder)).error == reason
    assert [row.error for row in rows.values()] == [None] * 3
    found = command("search", folder, "--texts", texts_file, "--store", store)
    assert found.code == 1
    told = reason
    if damage is adapter:  # `search` cannot be told what it belongs to
        told = (
            f"model must be in the store, got {str(folder)!r}; it has gpt2, gpt2-finetune, llama. "
            "Score an adapter first, with `llfast score --adapter-base`"
        )
    assert found.err.splitlines()[-1] == f"llfast: error: {told}"
    if damage is not empty:  # which may be a store
        shown = command("info", folder)
        assert shown.code == int(seen_by_info)
        assert not seen_by_info or shown.error == f"llfast: error: {reason}"


def overflow(name, weight):
    # The block's output is beyond fp16's 65,504; the norm behind it brings it back in fp32.
    return weight * 30_000 if name.endswith("mlp.c_proj.weight") else weight


@pytest.mark.usefixtures("unharmed")
def test_logits_that_overflow_in_half_precision(command, checkpoints, store, texts_file, tmp_path):
    folder = copy_checkpoint(checkpoints / "gpt2", tmp_path / "loud", overflow)
    arguments = ("score", folder, "--texts", texts_file, "--store", store)
    run = command(*arguments, "--dtype", "float16")
    assert run.code == 1
    assert "logprobs must be finite, got nan for text '" in run.out
    assert "' in float16; score it with dtype bfloat16 or float32\n" in run.out
    assert command(*arguments, "--dtype", "float32").code == 0
    assert {row.error for row in Store(store).rows()} == {None}, "a success ends the failure"


@pytest.mark.usefixtures("unharmed")
def test_weights_with_a_nan(command, nan_checkpoint, store, texts_file):
    run = command("score", nan_checkpoint, "--texts", texts_file, "--store", store)
    assert run.code == 1
    assert re.search(r": logprobs must be finite, got nan for text '\d+' in float32\n", run.out)
    with pytest.raises(ScoringError, match=r"got nan for text '\d+' in float32$"):
        llfast.score(nan_checkpoint, TEXTS)


@pytest.fixture
def hub(checkpoints, tmp_path, monkeypatch):
    """A cache of the Hub in which `org/tiny` has a branch `main` and a tag `v1`."""
    from huggingface_hub import constants

    root = tmp_path / "hub" / "models--org--tiny"
    for ref, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        shutil.copytree(
            checkpoints / ("gpt2" if ref == "main" else "llama"), root / "snapshots" / commit
        )
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("unharmed", "hub")
def test_a_revision_names_weights_and_a_wrong_one_is_refused(
    command, checkpoints, store, texts, texts_file
):
    where = ("--texts", texts_file, "--store", store)
    for revision, commit, kind in ((None, "a" * 40, "gpt2"), ("v1", "b" * 40, "llama")):
        options = () if revision is None else ("--revision", revision)
        (facts,) = command("score", "org/tiny", *options, *where, "--json").json
        assert (facts["status"], facts["model"]) == ("scored", "org/tiny")
        assert facts["revision"] == commit
        expected = llfast.score(checkpoints / kind, texts).mean_bits_per_byte
        assert facts["bits_per_byte"] == expected
    run = command("score", "org/tiny", "--revision", "v2", *where)
    assert run.code == 1
    assert "got org/tiny at revision 'v2'" in run.out
    run = command("score", "org/absent", *where)
    assert "model must be a checkpoint folder or Hub id, got org/absent" in run.out
    run = command("score", checkpoints / "gpt2", "--revision", "v1", *where)
    assert "revision is for Hub ids, got 'v1' for the folder" in run.out

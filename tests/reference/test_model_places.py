"""Folders and adapters: where a model is found, and under which revision."""

import hashlib
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import llfast
from llfast import CheckpointError, UnsupportedModelError, batchwise, engines, models
from llfast.models import open_model
from tests.opening import CPU, load, refused, same_weights
from tests.tiny import copy_checkpoint, make_adapter, make_model, make_tokenizer, save

# Of peft's, where it asks transformers for something that has got another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# ------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "./org/model", "../up", "/no/such/folder"])
def test_what_is_neither_folder_nor_hub_id_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    line = refused(name)
    assert name in line
    assert "folder" in line


def test_what_is_no_model_at_all_is_refused():
    with pytest.raises(TypeError, match="must be a folder, a Hub id or a loaded model, got a int"):
        open_model(5)


def test_files_are_refused_by_kind(checkpoints, tmp_path):
    gguf = tmp_path / "model-Q4_K_M.gguf"
    gguf.write_bytes(b"GGUF")
    line = refused(gguf, UnsupportedModelError)
    assert line == f"model must be a checkpoint folder or Hub id, got a GGUF file: {gguf}"
    weights = checkpoints / "llama" / "model.safetensors"
    assert refused(weights, UnsupportedModelError).endswith(f"got a file: {weights}")


def test_a_folder_has_no_revisions(checkpoints):
    folder = checkpoints / "llama"
    line = refused(folder, ValueError, revision="main")
    assert line == f"revision is for Hub ids, got 'main' for the folder {folder}"


def test_a_folder_is_named_by_its_path_or_as_one_likes(checkpoints):
    folder = checkpoints / "llama"
    assert open_model(f"{folder}/").name == str(folder)
    assert open_model(folder, name="mine").name == "mine"


# ------------------------------------------------------------------------------ revisions


def change_weight(folder):
    def change(name, weight):
        if name == "model.norm.weight":
            weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
        return weight

    path = folder / "model.safetensors"
    before = path.read_bytes()
    weights = {name: change(name, weight) for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    after = path.read_bytes()
    assert len(after) == len(before)
    assert sum(a != b for a, b in zip(after, before, strict=True)) == 1


def change_json(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "matters"),
    [
        (change_weight, True),
        (change_json("config.json", rms_norm_eps=1e-5), True),
        (change_json("tokenizer.json", version="1.1"), True),
        (change_json("tokenizer_config.json", add_bos_token=False), True),
        (lambda folder: (folder / "added_tokens.json").write_text("{}"), True),
        (change_json("generation_config.json", temperature=0.5), False),
        (lambda folder: (folder / "README.md").write_text("about"), False),
        (lambda folder: (folder / "convert.py").write_text("pass"), False),
        (lambda folder: (folder / "config.json").touch(), False),
    ],
)
def test_a_folder_is_another_model_when_what_is_scored_changes(
    checkpoints, tmp_path, change, matters
):
    folder = shutil.copytree(checkpoints / "llama", tmp_path / "copy")
    before = open_model(folder).revision
    assert before == open_model(checkpoints / "llama").revision, "a copy is the same model"
    change(folder)
    assert (open_model(folder).revision != before) == matters


@pytest.mark.parametrize(
    ("when", "weights"),
    [
        ("load", "resident"),
        ("run_model", "resident"),
        ("open_waves", "auto"),
        ("open_waves", "paged"),
    ],
)
def test_a_folder_that_changes_while_it_is_scored_is_refused(
    checkpoints, tmp_path, monkeypatch, when, weights
):
    """As a training run writes its next checkpoint over the last one."""
    folder = copy_checkpoint(checkpoints / "gpt2", tmp_path / "m")
    newer = (checkpoints / "gpt2-finetune" / "model.safetensors").read_bytes()
    places = {"load": models.FolderSource, "run_model": batchwise, "open_waves": engines}
    owner = places[when]
    own = getattr(owner, when)

    def write_first(*arguments, **options):
        (folder / "model.safetensors").write_bytes(newer)
        return own(*arguments, **options)

    monkeypatch.setattr(owner, when, write_first)
    with pytest.raises(CheckpointError, match="m must stay as it is while it is scored"):
        llfast.score(folder, ["some text"], weights=weights)


def test_a_revision_is_a_digest_of_names_and_contents(checkpoints):
    folder = checkpoints / "llama"
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        digest.update(name.encode() + b"\0")
        digest.update(hashlib.sha256((folder / name).read_bytes()).hexdigest().encode())
    assert open_model(folder).revision == digest.hexdigest()


def test_code_of_a_model_is_part_of_it(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "llama", tmp_path / "copy")
    change_json("config.json", auto_map={"AutoModelForCausalLM": "mine.Model"})(folder)
    (folder / "mine.py").write_text("x = 1")
    before = open_model(folder).revision
    (folder / "mine.py").write_text("x = 2")
    assert open_model(folder).revision != before


def test_another_tokenizer_makes_another_model(checkpoints, tmp_path):
    folder = checkpoints / "gpt2"
    own = open_model(folder).revision
    other = open_model(folder, tokenizer=str(checkpoints / "llama")).revision
    assert other != own
    copy = shutil.copytree(checkpoints / "llama", tmp_path / "copy")
    assert open_model(folder, tokenizer=str(copy)).revision == other
    change_json("tokenizer.json", version="1.1")(copy)
    assert open_model(folder, tokenizer=str(copy)).revision not in (own, other)


# ------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapters") / "adapter")


def test_an_adapter_is_merged_into_its_base(checkpoints, adapter):
    base = checkpoints / "llama"
    source = open_model(adapter, adapter_base=str(base))
    assert source.name == str(adapter)
    merged = source.load(torch.float32, CPU)
    by_peft = peft.PeftModel.from_pretrained(make_model("llama"), adapter).merge_and_unload()
    assert same_weights(merged, by_peft)
    # And by hand: W + alpha / r · B A.
    weights = load_file(adapter / "adapter_model.safetensors")
    expected = make_model("llama").state_dict()
    for layer in range(2):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            place = f"model.layers.{layer}.{name}"
            down, up = (weights[f"base_model.model.{place}.lora_{m}.weight"] for m in "AB")
            expected[f"{place}.weight"] += 4.0 * up @ down
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
    original = make_model("llama").model.layers[0].mlp.down_proj.weight
    assert (merged.model.layers[0].mlp.down_proj.weight - original).abs().max() > 0.1
    assert len(source.tokenizer()) == len(make_tokenizer(adds_bos=True)), "the base's own"


def test_an_adapter_without_its_base_is_refused(checkpoints, adapter, tmp_path):
    line = refused(adapter, UnsupportedModelError)
    assert "got a LoRA adapter; pass the model it was trained on with --adapter-base" in line
    # Nor is one put on a model that lies in the same folder, which transformers would do.
    both = shutil.copytree(checkpoints / "llama", tmp_path / "both")
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, both)
    line = refused(both, UnsupportedModelError)
    assert "got both; move adapter_config.json away to score the model alone" in line
    (both / "model.safetensors").unlink()
    assert "got a LoRA adapter; pass the model" in refused(both, UnsupportedModelError)
    base = str(checkpoints / "llama")
    assert same_weights(load(both, adapter_base=base), load(adapter, adapter_base=base))
    line = refused(checkpoints / "gpt2", ValueError, adapter_base=base)
    assert line.startswith("adapter_base must go with a LoRA adapter, got ")


def test_a_merged_model_goes_by_adapter_and_base(checkpoints, adapter, tmp_path):
    base = copy_checkpoint(checkpoints / "llama", tmp_path / "base")
    revision = open_model(adapter, adapter_base=str(base)).revision
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert open_model(copy, adapter_base=str(base)).revision == revision
    assert revision != open_model(base).revision
    change_weight(base)
    other = open_model(adapter, adapter_base=str(base)).revision
    assert other != revision
    change_json("adapter_config.json", lora_alpha=9)(copy)
    assert open_model(copy, adapter_base=str(base)).revision not in (revision, other)


def test_an_adapters_own_tokenizer_is_a_part_of_it(checkpoints, adapter, tmp_path):
    copy, base = shutil.copytree(adapter, tmp_path / "copy"), str(checkpoints / "llama")
    revisions = [open_model(copy, adapter_base=base).revision]
    make_tokenizer(adds_bos=False).save_pretrained(copy)
    revisions.append(open_model(copy, adapter_base=base).revision)
    change_json("tokenizer.json", version="1.1")(copy)
    revisions.append(open_model(copy, adapter_base=base).revision)
    assert len(set(revisions)) == 3


def drop_a_weight(folder):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, path)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        ("gpt2", None, "must be an adapter of GPT2LMHeadModel, got: Target modules"),
        ("wide", None, "must be an adapter of LlamaForCausalLM, got: .*size mismatch"),
        ("deep", None, "must be an adapter of this LlamaForCausalLM, got 4 missing keys: .*s.2.m"),
        ("flat", None, "must be an adapter of this LlamaForCausalLM, got 4 unexpected keys: "),
        ("llama", drop_a_weight, "got 1 missing keys: .*lora_B.weight"),
        (
            "llama",
            change_json("adapter_config.json", peft_type="PROMPT_TUNING"),
            "must hold a LoRA adapter, got one of type PROMPT_TUNING",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    checkpoints, adapter, tmp_path, base, change, message
):
    changes = {
        "wide": {"hidden_size": 64},
        "deep": {"num_hidden_layers": 3},
        "flat": {"num_hidden_layers": 1},
    }
    folder = checkpoints / base
    if base in changes:
        folder = save(make_model("llama", **changes[base]), None, tmp_path / base)
    copy = shutil.copytree(adapter, tmp_path / "copy")
    if change is not None:
        change(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(copy, adapter_base=str(folder))
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)

"""`score_many` gives each of several relatives the bits that `score` gives it alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaAttention

import llfast
from llfast import engines, models
from llfast.checkpoint import Checkpoint
from llfast.errors import CheckpointError, ScoringError
from llfast.paging import LoadingStatistics, units
from llfast.paging import model as paged_model
from llfast.paging import waves as waves_module
from llfast.paging.pages import Pages
from tests.families import (
    CHANGES,
    FEW,
    OPTIONS,
    age,
    alone,
    check_together,
    fine_tune,
    make_family,
    second_layer,
    second_norm,
    together,
)
from tests.paging import LIMITS, check_same
from tests.quantised import KINDS, save_fp8
from tests.tiny import make_model, make_tokenizer, quiet, save

pytestmark = pytest.mark.usefixtures("on_one_thread")  # models are tiny


@pytest.fixture
def tokenizer():
    return make_tokenizer(adds_bos=False)


@pytest.fixture(params=["as ever", "all pages"])
def limits(request, monkeypatch):
    for limit in LIMITS if request.param == "all pages" else ():
        monkeypatch.setattr(units, limit, 0)


def distinct_bytes(folders):
    """Of all different tensors of a family, found by comparing them."""
    found = {}
    for folder in folders:
        for name, weight in load_file(folder / "model.safetensors").items():
            found[name, weight.contiguous().view(torch.uint8).numpy().tobytes()] = weight.nbytes
    return sum(found.values())


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "mixtral"])
def test_together_is_alone_to_the_bit(kind, dtype, tmp_path, tokenizer):
    folders = make_family(tmp_path, kind, tokenizer, CHANGES)
    loading = check_together(folders, dtype=dtype)
    assert loading.waves == 1
    assert loading.shared_bytes > 0


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("most", [1, 2, 5, 7])
def test_waves_of_some_members(most, tmp_path, tokenizer, monkeypatch):
    """Wherever a wave ends: in a member, between two, or after several."""
    folders = make_family(tmp_path, "llama", tokenizer, CHANGES)
    monkeypatch.setattr(waves_module, "_MOST_FORWARDS", most)
    loading = check_together(folders, dtype="float32")
    batches = sum(page.name == "rows 0 of the head" for page in loading.pages)
    assert loading.waves > 3
    assert batches >= loading.waves


def test_every_different_byte_is_read_once(tmp_path, tokenizer):
    folders = make_family(tmp_path, "llama", tokenizer, CHANGES)
    _, loading = together(folders)
    total = sum(Checkpoint.open(each).weight_bytes for each in folders)
    assert loading.nbytes == distinct_bytes(folders) < 0.6 * total
    separate = LoadingStatistics()
    for folder in folders:
        llfast.score(folder, FEW, memory_budget="1GiB", loading=separate, **OPTIONS)
    assert loading.nbytes + loading.shared_bytes == separate.nbytes


def test_eight_that_share_three_quarters(tmp_path, tokenizer, monkeypatch):
    """They take at most 0.35 of the bytes of eight runs, rows of embeddings among them."""
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)
    changes = [(seed, lambda name: "layers.3." in name) for seed in range(8)]
    sizes = {"num_hidden_layers": 4, "vocabulary": 304, "intermediate_size": 3000}
    folders = make_family(tmp_path, "llama", tokenizer, changes, **sizes)[1:]
    results, loading = together(folders)
    separate, expected = [], []
    for folder in folders:
        separate.append(LoadingStatistics())
        expected.append(
            llfast.score(folder, FEW, memory_budget="1GiB", loading=separate[-1], **OPTIONS)
        )
    for one, other in zip(results, expected, strict=True):
        check_same(one, other)
    assert loading.nbytes <= 0.35 * sum(each.nbytes for each in separate)


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_that_lie_differently(dtype, tmp_path, tokenizer, monkeypatch):
    """Longer headers, and shards: weights are where each one's own file would have them."""
    for place in (engines, paged_model):
        monkeypatch.setattr(place, "linear_path", lambda *_, **__: "torch")
    monkeypatch.setattr(models, "fast_dtype", lambda stored, _: stored)  # not in another dtype
    (base,) = make_family(tmp_path, "llama", tokenizer, [], dtype=dtype, hidden_size=64)
    folders = [base]
    for number in range(1, 5):
        note = {"note": "x" * (8 * number + 1)}
        folders.append(fine_tune(base, tmp_path / str(number), 1, second_layer, metadata=note))
    with quiet():
        model = models.open_model(folders[-1]).load(dtype, torch.device("cpu"))
        model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    age(tmp_path / "shards")
    folders.append(tmp_path / "shards")
    places, own = [], LlamaAttention.forward

    def watch(self, *arguments, **options):
        places.append((self.layer_idx, self.q_proj.weight.data_ptr() % 64))
        return own(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", watch)
        together(folders)
    expected = {
        (layer, Checkpoint.open(folder).tensors[name].begin % 64)
        for folder in folders
        for layer in (0, 1)
        for name in [f"model.layers.{layer}.self_attn.q_proj.weight"]
    }
    assert set(places) == expected
    assert len(expected) > 6
    loading = check_together(folders)
    assert loading.shared_bytes > loading.nbytes


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_packed_linear_layers(kind, tmp_path, tokenizer, monkeypatch):
    for place in (engines, paged_model):
        monkeypatch.setattr(place, "linear_path", lambda *_, **__: "packed")
    wide = {"opt": {"hidden_size": 768, "word_embed_proj_dim": 1000, "ffn_dim": 64}}.get(kind, {})
    folders = make_family(tmp_path, kind, tokenizer, CHANGES[:3], **wide)
    check_together(folders, dtype="float32")


def test_another_vocabulary(tmp_path, tokenizer):
    """As fine-tunes have that add words."""
    base, tuned = make_family(tmp_path, "llama", tokenizer, [(1, second_layer)])
    weights = load_file(tuned / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat((weights[name], torch.ones(8, 32)))
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"vocab_size": 312}))
    loading = check_together([base, tuned], dtype="float32")
    assert loading.waves == 1
    assert loading.shared_bytes > 0


def test_another_tokenizer(tmp_path, tokenizer):
    base, tuned = make_family(tmp_path, "llama", tokenizer, [(1, second_layer)])
    make_tokenizer(adds_bos=True).save_pretrained(tuned)
    assert check_together([base, tuned]).waves == 1


def test_strangers_go_their_own_ways(tmp_path, tokenizer):
    family = make_family(tmp_path, "llama", tokenizer, [(1, second_layer)])
    stranger = save(make_model("llama", seed=5), tokenizer, tmp_path / "stranger")
    other = save(make_model("gpt2"), tokenizer, tmp_path / "gpt2")
    pair = make_model("phi"), tokenizer
    folders = [stranger, family[0], other, family[1]]
    loading = check_together(folders)
    assert loading.waves == 3
    with_pair = llfast.score_many([pair, *folders], FEW, token_budget=64)
    assert [each.provenance["weights"] for each in with_pair] == [
        "resident", "kept", "paged", "kept", "paged",
    ]  # fmt: skip


def test_resident_ones_are_not_paged(tmp_path, tokenizer):
    folders = make_family(tmp_path, "llama", tokenizer, [(1, second_layer)])
    results = llfast.score_many(folders, FEW, **OPTIONS | {"weights": "resident"})
    assert {each.provenance["weights"] for each in results} == {"resident"}
    for result, expected in zip(results, alone(folders), strict=True):
        check_same(result, expected)


def test_names_metadata_and_no_models(tmp_path, tokenizer):
    folders = make_family(tmp_path, "llama", tokenizer, [(1, second_layer)])
    sources = [models.open_model(each, name=f"m{n}") for n, each in enumerate(folders)]
    results = llfast.score_many(sources, FEW, metadata=[{"step": 0}, {"step": 1}])
    assert [(each.model, each.metadata) for each in results] == [
        ("m0", {"step": 0}),
        ("m1", {"step": 1}),
    ]
    assert llfast.score_many([], FEW) == []
    with pytest.raises(ValueError, match=r"metadata must be one a model \(2\), got 1"):
        llfast.score_many(sources, FEW, metadata=[{}])
    with pytest.raises(TypeError, match="models must be a list, got one path"):
        llfast.score_many(str(folders[0]), FEW)
    with pytest.raises(ValueError, match="partials must be different files, got one twice"):
        llfast.score_many(sources, FEW, partials=["a", "./a"])
    with pytest.raises(ValueError, match=r"partials must be one a model \(2\), got 3"):
        llfast.score_many(sources, FEW, partials=["a", "b", "c"])


@pytest.mark.usefixtures("untyped")
def test_what_one_model_takes_is_not_taken_for_a_list(tmp_path, tokenizer):
    """With one model, an index into it is the first thing that would fail, if anything does."""
    (folder,) = make_family(tmp_path, "llama", tokenizer, [])
    for name, given in (("metadata", {"a": 1}), ("metadata", "a"), ("partials", str(tmp_path))):
        with pytest.raises(TypeError, match=f"{name} must be a list, one a model, got .*; wrap it"):
            llfast.score_many([folder], FEW, **{name: given})
    for given in (5, "ab", [("a", 1)]):
        for score, metadata in ((llfast.score, given), (llfast.score_many, [given])):
            with pytest.raises(TypeError, match="metadata must be a mapping, got .*; name its col"):
                score(folder if score is llfast.score else [folder], FEW, metadata=metadata)


def test_a_run_goes_on_where_it_was(tmp_path, tokenizer, monkeypatch):
    folders = make_family(tmp_path, "llama", tokenizer, CHANGES[:2])
    partials = [tmp_path / f"{n}.npz" for n in range(3)]
    monkeypatch.setattr(waves_module, "_MOST_FORWARDS", 3)
    taken, own = [], Pages.take

    def stop(self, page, **options):
        taken.append(page.name)
        if taken.count("model.layers.0") == 4:
            raise KeyboardInterrupt
        return own(self, page, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pages, "take", stop)
        together(folders, partials=partials)
    done = []
    for partial in partials:
        with np.load(partial) as kept:
            done.append(int(np.isfinite(kept["loglikelihoods"]).sum()))
    assert done[0] == len(FEW)
    assert 0 < sum(done[1:]) < 2 * len(FEW)
    _, whole = together(folders)
    results, rest = together(folders, partials=partials)
    assert rest.waves < whole.waves
    for result, expected in zip(results, alone(folders), strict=True):
        assert result.values.tobytes() == expected.values.tobytes()
        assert result.logprobs.values.tobytes() == expected.logprobs.values.tobytes()


def test_numbers_that_are_not_finite(tmp_path, tokenizer):
    base, poisoned = make_family(tmp_path, "llama", tokenizer, [(1, second_layer)])
    weights = load_file(poisoned / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][:] = np.nan
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ScoringError, match="logits must be numbers, got NaN from a Llama"):
        together([base, poisoned])


@pytest.mark.parametrize("number", [0, 1])
def test_a_file_that_changes_meanwhile(number, tmp_path, tokenizer, monkeypatch):
    folders = make_family(tmp_path, "llama", tokenizer, [(1, second_layer)])
    own = Pages.take

    def change(self, page, **options):
        if page.name == "model.layers.1":
            path = folders[number] / "model.safetensors"
            shutil.copy(path, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        return own(self, page, **options)

    monkeypatch.setattr(Pages, "take", change)
    with pytest.raises(CheckpointError, match="must stay as (it is|they are)"):
        together(folders)


def test_verified_together(tmp_path, tokenizer):
    from tests.unit.test_verify import manifest_of

    folders = make_family(tmp_path, "llama", tokenizer, [(1, second_layer)])
    manifest = tmp_path / "sums"
    manifest.write_text(manifest_of(folders[0]).read_text())
    with pytest.raises(CheckpointError, match="must have the sha256"):
        together(folders, verify=manifest)


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_quantised_ones(kind, tmp_path, tokenizer):
    """Small numbers and scales are shared as they are stored."""
    plain = save(make_model(kind, **KINDS[kind]).bfloat16(), tokenizer, tmp_path / "plain")
    folders = [save_fp8(plain, tmp_path / "base")]
    age(folders[0])
    for seed in (1, 2):
        folders.append(fine_tune(folders[0], tmp_path / str(seed), seed, second_norm))
    loading = check_together(folders, dtype="float32")
    assert loading.shared_bytes > 1.9 * loading.nbytes

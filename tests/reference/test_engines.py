"""Which way a model is run, and what happens where the first choice does not do."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import llfast
from llfast import CheckpointError, LlfastWarning
from llfast.errors import CannotPageError, UnsupportedModelError
from llfast.models import open_model
from llfast.paging import model as paged_model
from llfast.paging import skeleton
from llfast.paging.pages import Pages
from llfast.paging.weights import Weights
from tests.architectures import TOKENS, build
from tests.paging import check_same
from tests.tiny import TEXTS, make_model, make_tokenizer, save

OPTIONS = {"token_budget": 64, "per_token": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "llama"
    return save(make_model("llama"), make_tokenizer(adds_bos=True), folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["zamba", "jamba"])
def test_half_precision_has_the_same_bits(tmp_path, kind, dtype):
    """Mixers multiply what lies across in memory, which torch does in more than one way."""
    folder = save(build(kind).to(torch.bfloat16), None, tmp_path / kind)
    random = np.random.default_rng(7)
    sizes = (37, 1, 16, 2, 60, 13)
    tokens = [random.integers(TOKENS.start, TOKENS.stop, size).tolist() for size in sizes]
    options = {"token_ids": tokens, "dtype": dtype, **OPTIONS}
    expected = llfast.score(folder, weights="resident", **options)
    for weights in ("auto", "paged"):
        check_same(llfast.score(folder, weights=weights, **options), expected)


def test_a_loaded_model_gets_its_gradients_back():
    model = make_model("llama")
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(requires_grad=False)
    llfast.score((model, make_tokenizer(adds_bos=True)), TEXTS[:2])
    wanted = [each for each in model.parameters() if not each.requires_grad]
    assert len(wanted) == 1
    assert wanted[0] is frozen


@pytest.mark.parametrize("error", [RuntimeError, IndexError, KeyError])
def test_what_goes_wrong_with_pages_is_loaded_whole(folder, monkeypatch, error):
    expected = llfast.score(folder, TEXTS, weights="resident", **OPTIONS)

    def need(*_):
        raise error("of a kind that nobody thought of")

    monkeypatch.setattr(Weights, "need", need)
    if error is IndexError:  # which is also how models say that a text is too long
        result = llfast.score(folder, TEXTS, **OPTIONS)
    else:
        with pytest.warns(LlfastWarning, match="is loaded whole, .* nobody thought of"):
            result = llfast.score(folder, TEXTS, **OPTIONS)
    check_same(result, expected)
    assert result.provenance["weights"] == "resident"
    with pytest.raises(Exception, match="nobody thought of"):
        llfast.score(folder, TEXTS, weights="paged", **OPTIONS)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("pickled weights", {"checkpoint": {"pickled": True}}),
        ("a LoRA adapter", {"adapter": Path("adapter")}),
        (
            "one with code of its own",
            {"trust_remote_code": True, "checkpoint": {"config": {"auto_map": {}}}},
        ),
    ],
)
def test_what_is_never_paged_is_refused_by_name(folder, what, changes):
    source = open_model(folder)
    if "checkpoint" in changes:
        changes = {**changes, "checkpoint": replace(source.checkpoint, **changes["checkpoint"])}
    with pytest.raises(UnsupportedModelError, match=f"to be paged, got {what}; use weights='resi"):
        llfast.score(replace(source, **changes), TEXTS, weights="paged")


@pytest.fixture
def merged(tmp_path):
    """A checkpoint whose tensors transformers puts together while it loads them."""
    return save(make_model("mixtral"), make_tokenizer(adds_bos=True), tmp_path / "mixtral")


def test_a_transformers_that_loads_in_another_way_loads_models_whole(merged, monkeypatch):
    monkeypatch.setattr(paged_model, "why_not", lambda: "layers come out differently")
    result = llfast.score(merged, TEXTS, **OPTIONS)
    assert result.provenance["weights"] == "resident"
    check_same(result, llfast.score(merged, TEXTS, weights="resident", **OPTIONS))
    with pytest.raises(ValueError, match=r"must hold all of .*: .* layers come out differently"):
        llfast.score(merged, TEXTS, memory_budget=1000, **OPTIONS)
    with pytest.raises(CannotPageError, match=r"m\w*tral must be loaded whole .* differently"):
        llfast.score(merged, TEXTS, weights="paged", **OPTIONS)


def test_errors_that_transformers_only_logs_are_raised(merged, monkeypatch):
    internals = skeleton._internals()
    own = internals.convert_and_load_state_dict_in_model
    assert skeleton.why_not() is None, "which tries it as it is, once"

    def convert(*arguments):
        report, others = own(*arguments)
        report.conversion_errors["the experts"] = "could not be put together"
        return report, others

    monkeypatch.setattr(internals, "convert_and_load_state_dict_in_model", convert)
    for weights in ("paged", "auto"):
        with pytest.raises(CheckpointError, match="must fill .*, got 1 problems: the experts"):
            llfast.score(merged, TEXTS, weights=weights, **OPTIONS)


def without(name):
    return lambda weights: weights.pop(name)


EXPERT = "model.layers.1.block_sparse_moe.experts.2"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without(f"{EXPERT}.w1.weight"), f"1 missing keys: {EXPERT}.w1.weight"),
        (without(f"{EXPERT}.w2.weight"), f"1 missing keys: {EXPERT}.w2.weight"),
        (
            lambda weights: weights.update({f"{EXPERT}.w3.weight": torch.zeros(3, 32)}),
            f"1 mismatched keys: {EXPERT}.w3.weight [3, 32] not [64, 32]",
        ),
    ],
    ids=["gate", "down", "shape"],
)
@pytest.mark.parametrize("weights", ["resident", "paged", "auto"])
def test_tensors_that_are_put_together_are_named_as_they_are_stored(
    merged, change, problem, weights
):
    path = merged / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="must hold every weight of Mixtral") as caught:
        llfast.score(merged, TEXTS, weights=weights, **OPTIONS)
    assert str(caught.value).endswith(f"ForCausalLM, got {problem}")


@pytest.mark.parametrize("weights", ["paged", "auto"])
def test_scoring_begins_while_weights_are_read(folder, monkeypatch, weights):
    """The next layer is on its way when one computes, and one computes before the last is there."""
    begun, computed = threading.Event(), threading.Event()
    read, forward = Pages._read, LlamaDecoderLayer.forward

    def begin(self, page, slot):
        if page.name == "model.layers.1":
            begun.set()
        if page.name.endswith("of the head"):
            assert computed.wait(60), "it must not be waited for"
        return read(self, page, slot)

    def compute(self, *arguments, **options):
        assert begun.wait(60), "it must not wait for this one"
        computed.set()
        return forward(self, *arguments, **options)

    expected = llfast.score(folder, TEXTS, weights="resident", **OPTIONS)
    monkeypatch.setattr(Pages, "_read", begin)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", compute)
    result = llfast.score(folder, TEXTS, weights=weights, **OPTIONS)
    assert result.provenance["weights"] == ("kept" if weights == "auto" else "paged")
    check_same(result, expected)


def test_nothing_left_to_run(folder, tmp_path):
    partial = tmp_path / "partial.npz"
    options = {**OPTIONS, "partial": partial, "weights": "paged"}
    expected = llfast.score(folder, TEXTS, **options)
    again = llfast.score(folder, TEXTS, **options)
    assert again.values.tobytes() == expected.values.tobytes()
    assert again.provenance["head"] == "not asked: nothing was left to run"


def test_threads_take_turns(folder, tmp_path):
    tied = make_model("gpt2").to(torch.bfloat16)
    other = save(tied, make_tokenizer(adds_bos=False), tmp_path / "gpt2")
    expected = {each: llfast.score(each, TEXTS, **OPTIONS).values for each in (folder, other)}
    found, errors = [], []

    def work(each):
        try:
            found.append((each, llfast.score(each, TEXTS, **OPTIONS).values))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(each,)) for each in (folder, other) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(found) == 6
    for each, values in found:
        assert values.tobytes() == expected[each].tobytes()


def test_a_budget_goes_with_pages(folder):
    with pytest.raises(ValueError, match="memory_budget must be left out with resident weights"):
        llfast.score(folder, TEXTS, weights="resident", memory_budget="1GiB")

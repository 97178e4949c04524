"""Which way a model is run, and what happens where the first choice does not do."""

import threading

import numpy as np
import pytest
import torch

import llfast
from llfast import LlfastWarning
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

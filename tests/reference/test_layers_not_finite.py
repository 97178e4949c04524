"""Models whose numbers are not finite, read out at their layers: where that begins is said."""

import pytest
import torch

import llfast
from llfast import ScoringError, TextSet
from llfast.traits import probe_tokens
from tests.tiny import TEXTS, make_model, make_tokenizer

pytestmark = pytest.mark.usefixtures("on_one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(adds_bos=False, vocabulary=290)


def test_numbers_that_are_not_finite_are_refused_by_text_and_layer(tokenizer):
    model = make_model("llama")
    token = tokenizer(" fox")["input_ids"][-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.inf
    texts = TextSet.from_texts(["a lazy dog", "the quick brown fox jumps"], ids=["fine", "bad"])
    with pytest.raises(ScoringError, match="got nan for text 'bad' at layer 0 in float32"):
        llfast.score_layers((model, tokenizer), texts)


def spoil_embedding(model):
    model.get_input_embeddings().weight[:, 3] = torch.nan


def spoil_words(model):
    """Those that the model is not tried with."""
    weight = model.get_input_embeddings().weight
    others = torch.ones(len(weight), dtype=torch.bool)
    others[probe_tokens(model)] = False
    weight[others] = torch.nan


def spoil_layer(number, value=torch.nan):
    def spoil(model):
        layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        next(layers[number - 1].parameters()).fill_(value)

    return spoil


def spoil_norm(model):
    (model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm).weight[0] = (
        torch.nan
    )


def spoil_head(model):
    model.lm_head.weight[7] = torch.nan


@pytest.mark.parametrize(
    ("kind", "spoil", "place"),
    [
        ("gpt2", spoil_embedding, "nan from the embedding (layer 0) on"),
        ("gpt2", spoil_words, "nan from the embedding, which is the head, too, on"),
        ("gpt2", spoil_layer(1), "nan from layer 1 on"),
        ("gpt2", spoil_layer(2), "nan from layer 2 on"),
        ("gpt2", spoil_norm, "nan from behind layer 2 on"),
        ("llama", spoil_embedding, "nan from the embedding (layer 0) on"),
        ("llama", spoil_layer(1, torch.inf), "nan from layer 1 on"),
        ("llama", spoil_layer(2), "nan from layer 2 on"),
        ("llama", spoil_norm, "nan from behind layer 2 on"),
        ("llama", spoil_head, "nan from the head on"),
    ],
)
def test_the_first_place_is_named_where_numbers_are_not_finite(tokenizer, kind, spoil, place):
    model = make_model(kind)
    with torch.no_grad():
        spoil(model)
    with pytest.raises(ScoringError) as caught:
        llfast.score_layers((model, tokenizer), TEXTS)
    wanted = f"model must give finite numbers, got {place}, in float32; look for NaN and inf in "
    assert str(caught.value).startswith(wanted)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_another_dtype_is_advised_where_fp16_has_overflowed(tokenizer):
    model = make_model("llama").to(torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(ScoringError, match="layer 2 on, in float16; .* bfloat16 or float32"):
        llfast.score_layers((model, tokenizer), TEXTS)

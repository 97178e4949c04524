"""The logit lens against transformers' own hidden states, norms and heads, in fp64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import llfast
from llfast import TextSet, UnsupportedModelError, batchwise, head, layers
from llfast.errors import LlfastWarning
from llfast.lens import find_lens
from llfast.models import open_model
from llfast.stored_layers import compare_layers
from llfast.traits import probe_tokens
from tests.architectures import architectures, build
from tests.architectures.names import COVERED
from tests.tiny import TEXTS, make_model, make_tokenizer, save

pytestmark = pytest.mark.usefixtures("on_one_thread")  # models are tiny

_TOLERANCE = 1e-4  # nats a text, as for the output of these models

# What lies between layers and head, and behind the head.
KNOWN = {
    "bloom": (lambda model: [model.transformer.ln_f], lambda z: z),
    "cohere": (lambda model: [model.model.norm], lambda z: 0.5 * z),
    "gemma2": (lambda model: [model.model.norm], lambda z: 30 * torch.tanh(z / 30)),
    "gpt2": (lambda model: [model.transformer.ln_f], lambda z: z),
    "gpt_neox": (lambda model: [model.gpt_neox.final_layer_norm], lambda z: z),
    "llama": (lambda model: [model.model.norm], lambda z: z),
    "minicpm3": (lambda model: [model.model.norm, lambda state: state / 2], lambda z: z),
    "mixtral": (lambda model: [model.model.norm], lambda z: z),
    "modernbert-decoder": (
        lambda model: [model.model.final_norm, model.lm_head],
        lambda z: z,
    ),
    "opt": (
        lambda model: [model.model.decoder.final_layer_norm, model.model.decoder.project_out],
        lambda z: z,
    ),
    "phi": (lambda model: [model.model.final_layernorm], lambda z: z),
}
# What cannot be read out, and a part of what is said of it.
REFUSED = {
    # A local decoder behind the layers attends to bytes, and they to patches.
    "blt": r"hidden states have the shapes \(1, 24, 64\) and \(1, \d, 64\)",
    # Its norm takes the mean of four streams, which are weighed by one another.
    "gemma3n_text": "no module alone makes what enters model.norm",
    # Its norm takes a mixture of several layers.
    "inkling2_text": "no module alone makes what enters model.norm",
    # They have no final norm.
    "git": "last layer's output enters the head as it is",
    "openai-gpt": "last layer's output enters the head as it is",
}
# Where transformers records a state behind each layer alone, and what it has divided it by then.
RECORDED_LATER = {"falcon_mamba": 1, "mamba": 1, "mamba2": 1, "rwkv": 2}


@pytest.fixture(scope="module")
def tokenizer():
    """Its tokens are words of every model here."""
    return make_tokenizer(adds_bos=False, vocabulary=290)


@torch.inference_mode()
def true_loglikelihoods(model, ids, read_out, after):
    """Of one text at each layer but the last: (L,) nats, by transformers and fp64 alone."""
    output = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    linear, found = model.get_output_embeddings(), []
    for state in output.hidden_states[:-1]:
        for module in read_out(model):
            state = module(state)
        bias = None if linear.bias is None else linear.bias.double()
        logits = functional.linear(state[0, :-1].double(), linear.weight.double(), bias)
        targets = torch.tensor(ids)[1:, None]
        found.append(after(logits).log_softmax(-1).gather(1, targets).sum().item())
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_every_layer_is_read_as_transformers_would(name, tokenizer):
    model = build(name)
    results = llfast.score_layers((build(name), tokenizer), TEXTS)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    truth = np.array([true_loglikelihoods(model, each, *KNOWN[name]) for each in ids]).T
    assert [result.layer for result in results] == list(range(len(truth) + 1))
    assert len(truth) >= 2
    for result, expected in zip(results, truth, strict=False):
        np.testing.assert_allclose(result.values, expected, rtol=0, atol=_TOLERANCE)
    steps = np.diff([result.values for result in results], axis=0)
    assert (np.abs(steps).max(axis=1) > 1).all(), "each layer says something of its own"


@pytest.mark.parametrize("name", architectures())
def test_the_last_layer_is_the_plain_score_to_the_bit(name, tokenizer):
    texts = TextSet.from_texts(TEXTS[3:9:2])
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
            llfast.score_layers((build(name), tokenizer), texts)
        return
    plain = llfast.score((build(name), tokenizer), texts, name=name)
    *hidden, last = llfast.score_layers((build(name), tokenizer), texts, name=name)
    np.testing.assert_array_equal(last.values, plain.values)
    for result in (*hidden, last):
        assert result.key._replace(layer=None) == plain.key
        assert result.provenance == plain.provenance
        assert result.token_counts.tolist() == plain.token_counts.tolist()
        assert result.token_budgets.tolist() == plain.token_budgets.tolist()
    assert len({tuple(result.values) for result in hidden}) == len(hidden) >= 2


@pytest.mark.parametrize("name", [each for each in architectures() if each not in REFUSED])
@torch.inference_mode()
def test_states_are_those_that_transformers_records(name):
    model, other, found = build(name), build(name), []
    probe = probe_tokens(model)
    lens = find_lens(model, head.find_head(model, probe), probe)
    with lens.watch(lambda _, state: found.append(state.clone())):
        head.run_model(model, probe[None])
    output = other(input_ids=probe[None], use_cache=False, output_hidden_states=True)
    *recorded, _ = output.hidden_states  # the last is behind the norm
    assert len(found) == lens.calls + 1 == len(recorded) + 1
    if name in RECORDED_LATER:
        found = [state / RECORDED_LATER[name] for state in found[1:]]
    for ours, theirs in zip(found, recorded, strict=False):
        assert torch.equal(ours, theirs)


def test_every_special_case_is_an_architecture():
    assert REFUSED.keys() | RECORDED_LATER.keys() <= set(COVERED)
    assert len(set(architectures()) - REFUSED.keys()) >= 100


def test_a_folder_reads_as_it_scores(checkpoints):
    for folder in ("gpt2", "llama", "mixtral"):
        plain = llfast.score(checkpoints / folder, TEXTS)
        results = llfast.score_layers(checkpoints / folder, TEXTS, metadata={"family": "f"})
        np.testing.assert_array_equal(results[-1].values, plain.values)
        assert results[0].provenance.keys() == plain.provenance.keys()
        assert [result.metadata for result in results] == [{"family": "f"}] * 3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bf16_is_rounded_in_the_body_alone(kind, tokenizer):
    model = make_model(kind).to(torch.bfloat16)
    results = llfast.score_layers((model, tokenizer), TEXTS)
    plain = llfast.score((model, tokenizer), TEXTS)
    np.testing.assert_array_equal(results[-1].values, plain.values)
    assert {result.dtype for result in results} == {"bfloat16"}
    read_out, after = KNOWN[kind]
    if kind == "gemma2":

        def after(z):
            return 3 * torch.tanh(z / 3)

    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    half, truth = (
        np.array([true_loglikelihoods(each, text, read_out, after) for text in ids]).T
        for each in (model, copy.deepcopy(model).float())
    )
    for result, rounded, expected in zip(results, half, truth, strict=False):
        error = np.abs(rounded - expected).max()
        assert np.abs(result.values - expected).max() <= 2 * error + _TOLERANCE


def test_a_state_in_fp32_is_rounded_where_the_model_rounds_it(tokenizer):
    model = build("zaya").to(torch.bfloat16)
    results = llfast.score_layers((model, tokenizer), TEXTS)
    plain = llfast.score((model, tokenizer), TEXTS)
    np.testing.assert_array_equal(results[-1].values, plain.values)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_text_has_the_same_bits_whatever_else_is_scored(kind, tokenizer):
    model = make_model(kind)
    together = llfast.score_layers((model, tokenizer), TEXTS)
    for number in (0, 5, 11):
        alone = llfast.score_layers((model, tokenizer), [TEXTS[number]])
        for one, all_of_them in zip(alone, together, strict=True):
            assert one.values[0] == all_of_them.values[number]


def test_the_head_is_read_once_a_batch(tokenizer, monkeypatch):
    model, rows = make_model("llama"), []
    whole = head.token_logprobs

    def count(hidden, *given, **options):
        rows.append(len(hidden))
        return whole(hidden, *given, **options)

    monkeypatch.setattr(head, "token_logprobs", count)
    results = llfast.score_layers((model, tokenizer), TEXTS, token_budget=64)
    batches = list(rows)
    assert len(batches) > 3
    assert sum(batches) == 3 * results[0].token_counts.sum()
    # Where memory does not hold all states, some go first.
    rows.clear()
    monkeypatch.setattr(layers, "_WAITING_BYTES", 1)
    again = llfast.score_layers((model, tokenizer), TEXTS, token_budget=64)
    assert len(rows) == 3 * len(batches)
    for one, other in zip(results, again, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_too_little_memory_halves_the_token_budget(tokenizer, monkeypatch):
    model, run = make_model("llama"), batchwise.run_model
    expected = llfast.score_layers((model, tokenizer), TEXTS, token_budget=256)

    def small_machine(model, ids):
        if ids.numel() > 256:
            raise torch.OutOfMemoryError("no room")
        return run(model, ids)

    monkeypatch.setattr(batchwise, "run_model", small_machine)
    with pytest.warns(LlfastWarning, match="token_budget halved to 256"):
        results = llfast.score_layers((model, tokenizer), TEXTS, token_budget=512)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        assert set(one.token_budgets.tolist()) == {256}


def test_a_state_is_read_before_a_later_layer_writes_over_it(tokenizer):
    model = make_model("llama")
    expected = llfast.score_layers((model, tokenizer), TEXTS)
    forward = model.model.layers[1].forward

    def careless(hidden, *given, **named):
        out = forward(hidden, *given, **named)
        hidden.zero_()
        return out

    model.model.layers[1].forward = careless
    results = llfast.score_layers((model, tokenizer), TEXTS)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_nothing_stays_behind_in_the_model(tokenizer):
    model = make_model("llama")
    llfast.score_layers((model, tokenizer), TEXTS)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_a_layer_that_is_called_twice_counts_twice(tokenizer):
    model = make_model("llama")
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 3
    results = llfast.score_layers((model, tokenizer), TEXTS)
    plain = llfast.score((model, tokenizer), TEXTS)
    assert [result.layer for result in results] == [0, 1, 2, 3]
    np.testing.assert_array_equal(results[-1].values, plain.values)


class Chain(nn.Module):
    """Modules one after the other, in a list of their own."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden):
        for part in self.parts:
            hidden = part(hidden)
        return hidden


def test_a_list_of_small_modules_is_not_that_of_layers(tokenizer):
    model = make_model("llama")
    expected = llfast.score_layers((model, tokenizer), TEXTS)
    model.model.norm = Chain(model.model.norm, nn.Dropout())
    results = llfast.score_layers((model, tokenizer), TEXTS)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


# ------------------------------------------------------------------ what is refused


def refused(model, tokenizer):
    with pytest.raises(UnsupportedModelError) as caught:
        llfast.score_layers((model, tokenizer), TEXTS)
    message = str(caught.value)
    assert "\n" not in message
    assert type(model).__name__ in message
    return message


def test_a_norm_that_does_not_say_all_is_not_trusted(tokenizer):
    model = make_model("llama")
    forward = model.model.forward

    def loud(*given, **named):
        out = forward(*given, **named)
        out.last_hidden_state.mul_(2)
        return out

    model.model.forward = loud
    assert "they alone do not make what enters the head" in refused(model, tokenizer)


@pytest.mark.parametrize("module", [nn.Identity(), nn.Dropout()])
def test_what_changes_nothing_is_no_norm(tokenizer, module):
    model = make_model("llama")
    model.model.norm = module
    assert "last layer's output enters the head as it is" in refused(model, tokenizer)


def test_what_no_module_makes_is_named(tokenizer):
    model = make_model("llama")
    forward = model.model.forward

    def loud(*given, **named):
        out = forward(*given, **named)
        out.last_hidden_state = out.last_hidden_state + 1
        return out

    model.model.forward = loud
    assert "no module alone makes what enters lm_head" in refused(model, tokenizer)


def test_a_head_of_another_kind_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(head, "describe_head", lambda *_: None)
    assert "head that is fused to be read out" in refused(make_model("llama"), tokenizer)


def test_layers_that_are_called_more_often_are_refused(tokenizer):
    model = make_model("llama")
    lens = find_lens(model, head.find_head(model, probe_tokens(model)), probe_tokens(model))
    with (
        pytest.raises(UnsupportedModelError, match="called 2 times .* got one with 4 calls"),
        lens.watch(lambda *_: None),
    ):
        for _ in range(2):
            model(probe_tokens(model)[None])


# ------------------------------------------------------------------ the table


def test_layers_are_compared_in_a_space_of_their_own(tokenizer):
    results = llfast.score_layers((make_model("llama"), tokenizer), TEXTS)
    values = np.array([result.values for result in results])
    clipped = np.maximum(values, np.quantile(values, 0.02))
    mean_bytes = np.mean([len(text) for text in TEXTS])

    def kl(a, b):
        return (clipped[a] - clipped[b]).var() / 2 / (mean_bytes * np.log(2))

    first, second, output = compare_layers(results)
    assert [each.layer for each in (first, second, output)] == [0, 1, 2]
    assert float(first.kl_to_next) == pytest.approx(kl(0, 1), rel=1e-9)
    assert float(first.kl_to_output) == pytest.approx(kl(0, 2), rel=1e-9)
    assert float(second.kl_to_next) == float(second.kl_to_output)
    assert float(second.kl_to_next) == pytest.approx(kl(1, 2), rel=1e-9)
    assert (output.kl_to_next, output.kl_to_output) == (None, None)
    assert output.bits_per_byte == results[2].mean_bits_per_byte


def test_all_ways_to_hand_over_a_model_are_those_of_score(tokenizer, tmp_path):
    model = make_model("llama")
    folder = save(model, tokenizer, tmp_path / "m")
    for given in ((model, tokenizer), folder, open_model(folder)):
        results = llfast.score_layers(given, TEXTS, convention="always-bos")
        assert {result.convention for result in results} == {"always-bos"}
    with pytest.raises(ValueError, match="convention must be one of"):
        llfast.score_layers(folder, TEXTS, convention="papers")

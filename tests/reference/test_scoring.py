"""score() against a plain transformers forward of one text at a time, with fp64 log-softmax."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import llfast
from llfast import CheckpointError, ScoringError, TextSet, UnsupportedModelError, batchwise
from llfast import head as head_module
from llfast.errors import LlfastWarning
from llfast.runs import Run
from tests.tiny import (
    TEXTS,
    make_model,
    make_tokenizer,
    plain_loglikelihood,
    plain_logprobs,
    save,
)

KINDS = {
    "llama": "fused",
    "gpt2": "fused",
    "gemma2": "fused softcap=3",
    "granite": "fused scale=0.25",
    "phi": "fused bias",
    "mixtral": "fused",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds_bos", [False, True], ids=["no-bos", "bos"])
def test_a_saved_checkpoint_scores_as_a_plain_forward(tmp_path, kind, adds_bos):
    model, tokenizer = make_model(kind), make_tokenizer(adds_bos=adds_bos)
    folder = save(model, tokenizer, tmp_path / kind)
    texts = TextSet.from_texts([*TEXTS, "", "a"])
    result = llfast.score(folder, texts, per_token=True)
    ids = [tokenizer(text)["input_ids"] for text in texts.texts]
    expected = np.array([plain_loglikelihood(model, each) for each in ids])
    assert expected.std() > 10, "the truth must tell texts apart"
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        result.logprobs[3], plain_logprobs(model, ids[3]).numpy(), rtol=0, atol=2e-5
    )
    assert result.provenance["head"] == KINDS[kind]
    assert result.token_counts.tolist() == [max(len(each) - 1, 0) for each in ids]
    assert result.unscored_ids == (("12",) if adds_bos else ("12", "13"))
    assert result.values[12] == 0.0
    bits = -expected[:12] / (np.log(2) * np.array([len(text.encode()) for text in TEXTS]))
    np.testing.assert_allclose(result.bits_per_byte[:12], bits, rtol=1e-5)
    assert result.provenance["mixture_of_experts"] == (kind == "mixtral")


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(adds_bos=True)


def truth(model, tokenizer, texts=TEXTS):
    return np.array([plain_loglikelihood(model, tokenizer(t)["input_ids"]) for t in texts])


def test_all_ways_to_hand_over_a_model_agree(llama, tokenizer, tmp_path):
    folder = save(llama, tokenizer, tmp_path / "m")
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    texts = TextSet.from_texts(TEXTS)
    results = [
        llfast.score((llama, tokenizer), texts),
        llfast.score(llama, texts, tokenizer=tokenizer),
        llfast.score(str(folder), texts),
        llfast.score(folder, TEXTS),
        llfast.score(llama, texts, token_ids=ids),
        llfast.score(llama, token_ids=ids),
        llfast.score(llama, token_ids=[np.array(each) for each in ids]),
    ]
    for result in results[1:]:
        # Not to the bit: weights read from a file may lie at other addresses.
        np.testing.assert_allclose(result.values, results[0].values, rtol=0, atol=1e-4)
    assert results[4].convention == "token-ids"
    assert results[4].textset_digest == texts.digest
    assert np.isnan(results[5].bits_per_byte).all()


def test_the_callers_model_is_left_as_it_was(llama, tokenizer):
    llama.train()
    try:
        llfast.score((llama, tokenizer), TEXTS)
        assert llama.training
        assert "forward" not in llama.lm_head.__dict__
        assert llama(torch.tensor([[1, 2]])).logits.requires_grad
    finally:
        llama.eval()


def test_bf16_agrees_within_the_rounding_of_its_body(llama, tokenizer, tmp_path):
    result = llfast.score(save(llama, tokenizer, tmp_path / "m"), TEXTS, dtype="bfloat16")
    assert result.dtype == "bfloat16"
    own = make_model("llama").to(torch.bfloat16)
    expected = truth(own, tokenizer)
    # The truth rounds every logit to bf16, llfast does not: they differ by that rounding.
    assert np.abs(result.values - expected).max() < 0.05 * result.token_counts.max()
    assert np.abs(result.values - expected).max() > 0, "logits are not rounded to bf16"


class _Biased(nn.Module):
    """A model that adds a number of its own to each vocabulary row, after its head."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.shift = nn.Parameter(torch.linspace(-2, 2, 304))

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, use_cache):
        out = self.model(input_ids, use_cache=use_cache)
        out.logits = out.logits + self.shift
        return out


def test_an_unknown_function_after_the_head_falls_back_to_the_models_logits(llama, tokenizer):
    biased = _Biased(llama)
    result = llfast.score((biased, tokenizer), TEXTS)
    assert result.provenance["head"] == "own logits"
    np.testing.assert_allclose(result.values, truth(biased, tokenizer), rtol=0, atol=1e-4)
    assert np.abs(result.values - truth(llama, tokenizer)).max() > 1


def test_own_logits_are_read_in_chunks(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(batchwise, "_OWN_LOGITS_BYTES", 4 * 304 * 40)
    biased = _Biased(llama)
    result = llfast.score((biased, tokenizer), TEXTS)
    np.testing.assert_allclose(result.values, truth(biased, tokenizer), rtol=0, atol=1e-4)
    assert max(result.token_budgets) <= 2048


def test_a_wrong_description_of_the_head_is_not_trusted(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(head_module, "_fit", lambda *_: (0.9, None))
    result = llfast.score((llama, tokenizer), TEXTS)
    assert result.provenance["head"] == "own logits"
    np.testing.assert_allclose(result.values, truth(llama, tokenizer), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "softcap"),
    [(1.0, None), (0.0625, None), (1 / 3, None), (1.0, 30.0), (0.5, 50.0), (2.0, 3.7)],
)
def test_the_ramp_tells_scale_and_softcap(scale, softcap):
    ramp = head_module.ramp_of(5000, torch.device("cpu"))
    out = ramp * scale
    if softcap:
        out = softcap * torch.tanh(out / softcap)
    found = head_module._fit(ramp.double(), out.double()[None])
    assert found is not None
    assert found[0] == pytest.approx(scale, rel=1e-6)
    assert found[1] == (softcap and pytest.approx(softcap, rel=1e-6))


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda x: x + 1,
        lambda x: -x,
        lambda x: x.clamp(-50, 50),
        lambda x: torch.where(torch.arange(len(x)) < 5, torch.finfo(x.dtype).min, x),
        lambda x: torch.where(torch.arange(len(x)) < 5, -torch.inf, x),
        lambda x: x.to(torch.bfloat16).float(),
    ],
)
def test_the_ramp_recognises_what_it_cannot_describe(function):
    ramp = head_module.ramp_of(5000, torch.device("cpu"))
    assert head_module._fit(ramp.double(), function(ramp).double()[None]) is None


def test_long_texts_are_cut_counted_and_named(llama, tokenizer):
    long = " ".join(TEXTS[-1] for _ in range(10))
    result = llfast.score((llama, tokenizer), TextSet.from_texts([TEXTS[0], long], ids=["s", "l"]))
    ids = tokenizer(long)["input_ids"]
    assert len(ids) > 256
    assert result.truncated_ids == ("l",)
    assert result.token_counts[1] == 255
    assert result.values[1] == pytest.approx(plain_loglikelihood(llama, ids[:256]), abs=1e-4)


def test_later_tokens_must_not_touch_earlier_ones(tokenizer):
    bert = AutoModelForCausalLM.from_config(
        make_config("bert", is_decoder=False), dtype=torch.float32
    ).eval()
    with pytest.raises(UnsupportedModelError, match="later tokens change earlier logits"):
        llfast.score((bert, tokenizer), TEXTS)
    decoder = AutoModelForCausalLM.from_config(
        make_config("bert", is_decoder=True), dtype=torch.float32
    ).eval()
    result = llfast.score((decoder, tokenizer), TEXTS)
    np.testing.assert_allclose(result.values, truth(decoder, tokenizer), rtol=0, atol=1e-4)


def make_config(kind, **changes):
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind,
        vocab_size=304,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        **changes,
    )


def rope_model(kind):
    half = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if kind == "longrope" else {}
    parameters = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 41,
        **half,
    }
    return make_model("llama", rope_parameters=parameters)


def test_padding_does_not_cross_the_length_at_which_positions_change(tokenizer):
    model = rope_model("longrope")
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 300, n).tolist() for n in (39, 40, 41, 42, 43, 60, 12)]
    expected = np.array([plain_loglikelihood(model, each) for each in ids])
    other = make_model("llama")
    assert abs(plain_loglikelihood(other, ids[3]) - expected[3]) > 0.1, "long factors matter"
    result = llfast.score((model, tokenizer), token_ids=ids)
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-4)


def test_dynamic_rope_is_scored_up_to_its_limit_and_refused_beyond(tokenizer):
    model = rope_model("dynamic")
    ids = [list(range(2, 2 + n)) for n in (40, 41, 12)]
    expected = np.array([plain_loglikelihood(model, each) for each in ids])
    result = llfast.score((model, tokenizer), token_ids=ids)
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="at most 41 tokens .* got 42 for '3'"):
        llfast.score((model, tokenizer), token_ids=[*ids, list(range(2, 44))])


def test_numbers_that_are_not_finite_are_refused_by_text(tokenizer):
    broken = make_model("llama")
    token = tokenizer(" fox")["input_ids"][-1]
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = torch.inf
    texts = TextSet.from_texts(["a lazy dog", "the quick brown fox jumps"], ids=["fine", "bad"])
    with pytest.raises(ScoringError, match=r"must be finite, got nan for text 'bad' in float32"):
        llfast.score((broken, tokenizer), texts)


def test_fp16_overflow_says_what_to_do(tokenizer):
    model = make_model("llama").to(torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 3e4
        model.model.layers[0].mlp.up_proj.weight *= 100
    with pytest.raises(ScoringError, match="in float16; score it with dtype bfloat16 or float32"):
        llfast.score((model, tokenizer), TEXTS)


@pytest.fixture(params=[False, True], ids=["as on a CPU", "as on a GPU"])
def ahead(request, monkeypatch):
    """Whether a batch is launched before the one before it has come back."""
    monkeypatch.setattr(batchwise, "runs_ahead", lambda _: request.param)
    return request.param


@pytest.mark.usefixtures("ahead")
def test_too_little_memory_halves_the_token_budget(llama, tokenizer, monkeypatch):
    run = batchwise.run_model
    shapes = []

    def small_machine(model, ids):
        shapes.append(ids.numel())
        if ids.numel() > 256:
            raise torch.OutOfMemoryError("no room")
        return run(model, ids)

    monkeypatch.setattr(batchwise, "run_model", small_machine)
    with pytest.warns(LlfastWarning, match="token_budget halved to 256"):
        result = llfast.score((llama, tokenizer), TEXTS, token_budget=512)
    np.testing.assert_allclose(result.values, truth(llama, tokenizer), rtol=0, atol=1e-4)
    assert set(result.token_budgets.tolist()) == {256}
    assert max(shapes) > 256
    monkeypatch.setattr(
        batchwise, "run_model", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with (
        pytest.warns(LlfastWarning),
        pytest.raises(ScoringError, match="memory must hold one text of .* tokens"),
    ):
        llfast.score((llama, tokenizer), TEXTS)


def test_what_came_back_before_an_error_is_kept(llama, tokenizer, ahead, monkeypatch, tmp_path):
    run, launched, kept = batchwise.run_model, [], []
    texts = [f"text {number}" for number in range(5)]
    options = {"token_budget": 1, "revision": "a", "partial": tmp_path / "partial"}
    expected = llfast.score((llama, tokenizer), texts, token_budget=1).values
    keep = Run.keep

    def breaks(model, ids):
        launched.append(len(kept))  # how many had come back by then
        if broken and len(launched) == 4:
            raise RuntimeError("shape mismatch")
        return run(model, ids)

    monkeypatch.setattr(batchwise, "run_model", breaks)
    monkeypatch.setattr(Run, "keep", lambda self, found: kept.append(1) or keep(self, found))
    broken = True
    with pytest.raises(RuntimeError, match="shape mismatch"):
        llfast.score((llama, tokenizer), texts, **options)
    assert launched == ([0, 0, 1, 2] if ahead else [0, 1, 2, 3])
    assert len(kept) == 3
    broken = False
    launched.clear()
    result = llfast.score((llama, tokenizer), texts, **options)
    assert len(launched) == 2
    assert result.values.tolist() == expected.tolist()


def test_errors_that_are_no_lack_of_memory_come_through(llama, tokenizer, monkeypatch):
    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(batchwise, "run_model", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        llfast.score((llama, tokenizer), TEXTS)


def test_wrong_arguments_are_refused(llama, tokenizer):
    with pytest.raises(CheckpointError, match="below the model's 304 words, got 999"):
        llfast.score(llama, token_ids=[[1, 999]])
    with pytest.raises(ValueError, match="tokenizer must be given"):
        llfast.score(llama, TEXTS)
    with pytest.raises(TypeError, match="tokenizer must be a loaded one for .* got 'x'"):
        llfast.score(llama, TEXTS, tokenizer="x")
    with pytest.raises(ValueError, match="tokenizer must be given once, .*; leave out one"):
        llfast.score((llama, tokenizer), TEXTS, tokenizer=make_tokenizer(adds_bos=False))
    with pytest.raises(ValueError, match="adapter_base must go with .* got a loaded model; load"):
        llfast.score((llama, tokenizer), TEXTS, adapter_base="x")
    with pytest.raises(ValueError, match="dtype must be 'auto' for a loaded model"):
        llfast.score((llama, tokenizer), TEXTS, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype must be auto, float32"):
        llfast.score((llama, tokenizer), TEXTS, dtype="float8")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda"):
        llfast.score((llama, tokenizer), TEXTS, device="gpu")
    with pytest.raises(ValueError, match="one a text"):
        llfast.score(llama, TEXTS, token_ids=[[1, 2]])
    for budget in (0, 20_000_000):
        with pytest.raises(
            ValueError, match="token_budget must be a whole number from 1 to 1,048,576"
        ):
            llfast.score((llama, tokenizer), TEXTS, token_budget=budget)
    with pytest.raises(TypeError, match="not JSON serializable"):
        llfast.score((llama, tokenizer), TEXTS, metadata={"a": object()})
    with pytest.raises(TypeError, match="conventions"):
        llfast.score((llama, tokenizer), TEXTS, conventions="paper")

"""A text's bits do not depend on what else is scored, on the order, or on the batch."""

import numpy as np
import pytest
import torch

import llfast
from llfast import TextSet, batchwise, engines
from llfast.dtypes import fast_dtype
from tests.tiny import make_model, make_tokenizer

# Layers and heads as wide as real models': tiny matrices hide what large ones do.
WIDE = {
    "gpt2": {"n_embd": 768, "n_head": 12, "n_layer": 2, "n_positions": 256},
    "llama": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 256,
    },
}


def random_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghij klmnop qrst uvwxyz"))
    return {f"t{row}": "".join(rng.choice(letters, rng.integers(2, 160))) for row in range(count)}


def scored(model, tokenizer, texts, **options):
    ids = list(texts)
    result = llfast.score(
        (model, tokenizer), TextSet.from_texts([texts[i] for i in ids], ids), **options
    )
    return dict(zip(ids, result.values.tolist(), strict=True))


def check(model, tokenizer, count):
    texts = random_texts(count)
    whole = scored(model, tokenizer, texts, token_budget=1024)
    assert len(set(whole.values())) == count
    rng = np.random.default_rng(1)
    shuffled = {i: texts[i] for i in rng.permutation(list(texts))}
    assert scored(model, tokenizer, shuffled, token_budget=1024) == whole
    few = {i: texts[i] for i in list(texts)[:: max(1, count // 5)]}
    assert scored(model, tokenizer, few, token_budget=1024) == {i: whole[i] for i in few}
    extra = {f"extra{i}": text for i, text in random_texts(count, seed=2).items()} | texts
    more = scored(model, tokenizer, extra, token_budget=1024)
    assert {i: more[i] for i in texts} == whole
    return whole


# Where a processor is slow in bf16 this takes twenty minutes.
IS_SLOW = fast_dtype(torch.bfloat16, torch.device("cpu")) != torch.bfloat16
BF16 = pytest.param(torch.bfloat16, id="bf16", marks=[pytest.mark.slow] if IS_SLOW else [])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), BF16])
@pytest.mark.parametrize("kind", WIDE)
def test_dense_models_of_real_width(kind, dtype):
    model = make_model(kind, vocabulary=8003, **WIDE[kind]).to(dtype)
    check(model, make_tokenizer(adds_bos=True), 20)


@pytest.mark.parametrize("kind", WIDE)
def test_packed_linear_layers_of_real_width(kind, monkeypatch):
    model = make_model(kind, vocabulary=8003, **WIDE[kind])
    plain = scored(model, make_tokenizer(adds_bos=True), random_texts(40), token_budget=1024)
    monkeypatch.setattr(engines, "linear_path", lambda *_, **__: "packed")
    packed = check(model, make_tokenizer(adds_bos=True), 40)
    assert packed == {text: pytest.approx(value, abs=1e-2) for text, value in plain.items()}


@pytest.fixture
def seven_threads():
    """Tensors are cut for them inside of rows, and inside of vectors."""
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


def test_threads_that_cut_tensors_anywhere(seven_threads, tmp_path):
    sizes = WIDE["llama"] | {"hidden_size": 256, "num_attention_heads": 4}
    model, tokenizer = make_model("llama", **sizes), make_tokenizer(adds_bos=True)
    whole = check(model, tokenizer, 30)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = random_texts(30)
    backwards = TextSet.from_texts(list(texts.values())[::-1], list(texts)[::-1])
    paged = llfast.score(tmp_path, backwards, token_budget=1024, weights="paged")
    assert dict(zip(backwards.ids, paged.values.tolist(), strict=True)) == whole


def test_a_mixture_of_experts_runs_one_text_a_batch():
    model = make_model(
        "mixtral",
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    check(model, make_tokenizer(adds_bos=False), 12)


@pytest.mark.parametrize("kind", WIDE)
def test_two_runs_of_one_batch_plan_are_equal_in_every_token(kind):
    model = make_model(kind, vocabulary=8003, **WIDE[kind])
    texts = list(random_texts(20).values())
    pair = (model, make_tokenizer(adds_bos=True))
    first, second = (llfast.score(pair, texts, per_token=True) for _ in range(2))
    assert first.logprobs.values.tobytes() == second.logprobs.values.tobytes()


def test_the_budget_of_each_text_is_kept_with_it():
    model = make_model("gpt2")
    result = llfast.score((model, make_tokenizer(adds_bos=True)), ["a fox", ""], token_budget=64)
    assert result.token_budgets.tolist() == [64, 0]


@pytest.mark.parametrize("kind", WIDE)
def test_a_run_that_is_broken_off_again_and_again_ends_with_the_same_bits(
    kind, tmp_path, monkeypatch
):
    """Layers of real width; `tests/e2e/test_kill.py` really kills, but smaller models."""
    model = make_model(kind, vocabulary=8003, **WIDE[kind])
    pair, texts = (model, make_tokenizer(adds_bos=True)), list(random_texts(20).values())
    whole = llfast.score(pair, texts, per_token=True)
    options = {"partial": tmp_path / "partial.npz", "revision": "one", "per_token": True}
    run_model = batchwise.run_model
    breaks = 0
    for allowed in (1, 3, 2, 1, 10**9):
        left = iter(range(allowed))

        def run_some(*arguments, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return run_model(*arguments)

        monkeypatch.setattr(batchwise, "run_model", run_some)
        try:
            result = llfast.score(pair, texts, **options)
        except KeyboardInterrupt:
            breaks += 1
    assert breaks == 4
    assert result.values.tobytes() == whole.values.tobytes()
    assert result.logprobs.values.tobytes() == whole.logprobs.values.tobytes()

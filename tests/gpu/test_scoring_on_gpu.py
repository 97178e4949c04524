"""`score` on a GPU, through the Triton kernels, against plain forwards on the CPU."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import llfast
from llfast import TextSet
from tests.tiny import TEXTS, make_model, make_tokenizer, plain_loglikelihood, save

pytestmark = pytest.mark.gpu
KINDS = {
    "llama": "fused",
    "gemma2": "fused softcap=3",
    "granite": "fused scale=0.25",
    "phi": "fused bias",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_scores_as_a_plain_forward(tmp_path, kind):
    model, tokenizer = make_model(kind), make_tokenizer(adds_bos=True)
    folder = save(model, tokenizer, tmp_path / kind)
    texts = TextSet.from_texts(TEXTS)
    expected = [plain_loglikelihood(model, tokenizer(text)["input_ids"]) for text in TEXTS]
    result = llfast.score(folder, texts, device="cuda", dtype="float32")
    np.testing.assert_allclose(result.values, np.array(expected), rtol=0, atol=2e-3)
    assert result.provenance["head"] == KINDS[kind]
    assert result.provenance["instruction_set"].startswith("triton sm_")
    half = llfast.score(folder, texts, device="cuda", dtype="bfloat16")
    np.testing.assert_allclose(half.values, np.array(expected), rtol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_has_the_same_bits_in_every_company(tmp_path, dtype):
    model, tokenizer = make_model("llama", hidden_size=256), make_tokenizer(adds_bos=True)
    folder = save(model, tokenizer, tmp_path / "llama")
    texts = [f"{text} {extra}" for extra in range(8) for text in TEXTS]
    expected = llfast.score(folder, texts, device="cuda", dtype=dtype).values
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = llfast.score(folder, [texts[i] for i in order], device="cuda", dtype=dtype).values
    assert np.array_equal(shuffled, expected[order])
    some = llfast.score(folder, texts[5:40], device="cuda", dtype=dtype).values
    assert np.array_equal(some, expected[5:40])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_layer_is_the_plain_score_to_the_bit(tmp_path, dtype):
    model, tokenizer = make_model("llama", hidden_size=256), make_tokenizer(adds_bos=True)
    folder = save(model, tokenizer, tmp_path / "llama")
    expected = llfast.score(folder, TEXTS, device="cuda", dtype=dtype, weights="resident")
    results = llfast.score_layers(folder, TEXTS, device="cuda", dtype=dtype)
    assert np.array_equal(results[-1].values, expected.values)
    on_cpu = llfast.score_layers(folder, TEXTS, device="cpu", dtype="float32")
    for result, other in zip(results, on_cpu, strict=True):
        limit = {"atol": 2e-3} if dtype == "float32" else {"rtol": 0.05}
        np.testing.assert_allclose(result.values, other.values, **limit)


def test_the_host_waits_for_the_device_at_most_once_a_batch(tmp_path):
    """Transformers looks at the positions of every batch; nothing else may wait."""
    model, tokenizer = make_model("llama"), make_tokenizer(adds_bos=True)
    folder = save(model, tokenizer, tmp_path / "llama")
    texts = [[1, 5, 9, 3]] * 20

    def waits(count):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                llfast.score(folder, token_ids=texts[:count], device="cuda", token_budget=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(each.message) for each in seen)

    waits(1)  # compiles
    assert waits(20) - waits(1) <= 19

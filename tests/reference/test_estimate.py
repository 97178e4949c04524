"""What scoring would take, for every architecture and for weights that cannot be counted unread."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llfast import TextSet, estimate
from llfast.models import open_model
from tests.architectures import architectures, tiny_config
from tests.tiny import TEXTS, copy_checkpoint, make_tokenizer, quiet


@pytest.fixture
def rate(monkeypatch):
    monkeypatch.setattr(estimate, "_matmul_flops", lambda dtype, device: 1e9)


@pytest.mark.usefixtures("rate")
def test_every_architecture_has_an_estimate(tmp_path):
    """From its config alone: there are 10,000 numbers under a name that no model knows."""
    tokenizer = make_tokenizer(adds_bos=False)
    texts = TextSet.from_texts(TEXTS)
    tokens = sum(len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS)
    failed = {}
    for name in architectures():
        folder = tmp_path / name
        with quiet():
            tiny_config(name).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        save_file({"w": torch.zeros(10_000)}, folder / "model.safetensors")
        try:
            found = estimate.estimate(open_model(folder), texts, weights="resident")
        except Exception as error:
            failed[name] = error
            continue
        assert found.tokens == tokens, name
        assert found.parameters == 10_000
        assert 40_000 <= found.memory_bytes < 50_000_000, name
        assert 0 <= found.seconds <= 2e-5 * found.padded_tokens, name
    assert not failed


@pytest.mark.usefixtures("rate")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pickled_weights_are_counted_by_their_size(checkpoints, tmp_path, dtype):
    def change(_, weight):
        return weight.to(getattr(torch, dtype))

    folder = copy_checkpoint(checkpoints / "gpt2", tmp_path / "m", change)
    config = (folder / "config.json").read_text().replace("float32", dtype)
    (folder / "config.json").write_text(config)
    plain = estimate.estimate(open_model(folder), TextSet.from_texts(TEXTS))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    pickled = open_model(folder, allow_pickle=True)
    found = estimate.estimate(pickled, TextSet.from_texts(TEXTS))
    assert plain.parameters == 43_392
    for name in ("parameters", "read_bytes", "memory_bytes", "seconds"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=0.1), name


@pytest.mark.usefixtures("rate")
def test_packed_weights_are_counted_where_they_are_used(checkpoints, monkeypatch):
    source, texts = open_model(checkpoints / "gpt2"), TextSet.from_texts(TEXTS)
    found = []
    for path in ("torch", "packed"):
        monkeypatch.setattr(estimate, "linear_path", lambda *_, path=path: path)
        found.append(estimate.estimate(source, texts).memory_bytes)
    embedding = source.config.vocab_size * source.config.n_embd  # and its head, which is tied
    assert found[1] - found[0] == (43_392 - embedding) * 4


def test_a_token_budget_that_the_run_refuses_is_refused(checkpoints):
    source, texts = open_model(checkpoints / "gpt2"), TextSet.from_texts(TEXTS)
    whole = "token_budget must be a whole number from 1 to 1,048,576, got "
    for budget in (20_000_000, 512.0, "512"):
        with pytest.raises(ValueError, match=f"{whole}{budget!r}"):
            estimate.estimate(source, texts, token_budget=budget)


@pytest.mark.usefixtures("rate")
def test_numpys_whole_numbers_are_budgets(checkpoints):
    source, texts = open_model(checkpoints / "gpt2"), TextSet.from_texts(TEXTS)
    expected = estimate.estimate(source, texts, token_budget=256, weights="resident")
    found = estimate.estimate(source, texts, token_budget=np.int64(256), weights="resident")
    assert found.padded_tokens == expected.padded_tokens


def test_an_estimate_takes_no_random_numbers(checkpoints):
    before = torch.get_rng_state()
    estimate.estimate(open_model(checkpoints / "gpt2"), TextSet.from_texts(TEXTS))
    assert torch.equal(torch.get_rng_state(), before)

"""The three conventions, against sums written out by hand, with and without BOS."""

import numpy as np
import pytest
from transformers import AutoTokenizer

import llfast
from tests.tiny import TEXTS, make_model, make_tokenizer, plain_logprobs

LIMIT = 24  # the models' maximum length: the last texts are longer


def by_hand(model, tokenizer, text, convention):
    """(sum, count, truncated), straight from the conventions' definitions."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if convention == "paper":
        ids = tokenizer(text)["input_ids"]
        cut = ids[:LIMIT]
        return plain_logprobs(model, cut).sum().item(), len(cut) - 1, len(ids) > LIMIT
    prefix = bos if bos is not None else eos
    ids = [prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    if convention == "always-bos":
        cut = ids[:LIMIT]
        return plain_logprobs(model, cut).sum().item(), len(cut) - 1, len(ids) > LIMIT
    # lm-eval feeds all but the last of the last LIMIT + 1 tokens: LIMIT tokens at most.
    cut = ids[-(LIMIT + 1) :]
    return plain_logprobs(model, cut).sum().item(), len(cut) - 1, len(ids) > LIMIT + 1


def check(tokenizer, vocabulary, convention, texts):
    # RoPE has no table of positions, so the truth may run one token over the limit.
    model = make_model("llama", vocabulary=vocabulary, max_position_embeddings=LIMIT)
    result = llfast.score((model, tokenizer), texts, convention=convention)
    expected = [by_hand(model, tokenizer, text, convention) for text in texts]
    np.testing.assert_allclose(result.values, [e[0] for e in expected], rtol=0, atol=2e-4)
    assert result.token_counts.tolist() == [e[1] for e in expected]
    assert result.truncated.tolist() == [e[2] for e in expected]
    assert any(result.truncated)
    assert not all(result.truncated)
    return result


CONVENTIONS = pytest.mark.parametrize("convention", ["paper", "always-bos", "lm-eval"])


@CONVENTIONS
@pytest.mark.parametrize("adds_bos", [False, True], ids=["no-bos", "bos"])
def test_home_made_tokenizers(adds_bos, convention):
    check(make_tokenizer(adds_bos=adds_bos), 304, convention, TEXTS)


@CONVENTIONS
@pytest.mark.parametrize(("name", "rows"), [("pythia", 50304), ("open_llama", 32000)])
def test_real_tokenizers(shared_data, name, rows, convention):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    texts = [*TEXTS, "naïve café — 漢字 🙂", "def f(x):\n    return x ** 2\n"]
    result = check(tokenizer, rows, convention, texts)
    adds_bos = name == "open_llama"
    assert result.provenance["adds_bos"] == (adds_bos or convention != "paper")


def test_with_bos_papers_convention_scores_every_token_of_the_text():
    text = TEXTS[3]
    counts = {}
    for adds_bos in (False, True):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        model = make_model("llama")
        own = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        scores = llfast.score((model, tokenizer), [text])
        counts[adds_bos] = scores.token_counts[0] - own
    assert counts == {False: -1, True: 0}

import contextlib
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llfast import TextSet
from llfast.batches import (
    given_tokens,
    ladder_length,
    ladder_rows,
    model_max_length,
    plan_batches,
    tokenize,
)
from llfast.batchwise import one_ahead
from llfast.devices import default_token_budget
from tests.tiny import make_tokenizer


def test_ladder_fits_tightly_and_crosses_no_limit():
    for length in range(1, 9000):
        rung = ladder_length(length)
        assert rung >= length
        assert rung % 16 == 0
        assert rung - length < max(16, length / 8 + 1)
        assert ladder_length(rung) == rung
    assert ladder_length(1000, [1000]) == 1000
    assert ladder_length(995, [1000, 999]) == 999
    assert ladder_length(1001, [1000]) == 1024


def test_rows_are_powers_of_two_within_the_budget():
    for budget in (1, 100, 2048, 32768):
        for length in (16, 48, 512, 4096):
            rows = ladder_rows(length, budget)
            assert rows & (rows - 1) == 0
            assert rows == 1 or rows * length <= budget
            assert 2 * rows * length > budget


def test_plan_holds_every_text_once_in_its_own_shape():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 300, 500)
    tokens = given_tokens([[1] * int(n) for n in lengths], None)
    batches = plan_batches(tokens, 1024)
    planned = [text for batch in batches for text in batch.texts]
    assert sorted(planned) == np.flatnonzero(lengths >= 2).tolist()
    for batch in batches:
        rows, length = batch.shape
        assert len(batch.texts) <= rows == ladder_rows(length, 1024)
        assert all(ladder_length(int(lengths[text])) == length for text in batch.texts)
    assert [b.shape[1] for b in batches] == sorted((b.shape[1] for b in batches), reverse=True)


def test_a_texts_shape_does_not_depend_on_the_others():
    def shape(texts, wanted):
        tokens = given_tokens(texts, None)
        (found,) = [b.shape for b in plan_batches(tokens, 512) if wanted in b.texts]
        return found

    alone = shape([[1] * 37], 0)
    assert shape([[1] * 99] * 50 + [[1] * 37] * 3, 51) == alone


@pytest.mark.parametrize(("width", "most"), [(768, 1.5), (2048, 1.25), (8192, 1.25)])
def test_a_gpu_runs_few_tokens_that_are_of_no_text(width, most):
    """Of 1,000 texts of 1,024 bytes; what is short of a batch is filled up with dummy rows."""
    lengths = np.random.default_rng(0).normal(275, 60, 1000).clip(16, 1024).astype(int)
    tokens = given_tokens([[1] * int(n) for n in lengths], None)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=width))
    batches = plan_batches(tokens, default_token_budget(torch.device("cuda"), config))
    assert sum(math.prod(batch.shape) for batch in batches) <= most * lengths.sum()


def test_one_item_is_taken_ahead_and_none_is_lost():
    def items():
        for number in range(3):
            log.append(f"take {number}")
            yield number
        if broken:
            raise OSError("no more")

    for broken in (False, True):
        log = []
        with pytest.raises(OSError, match="no more") if broken else contextlib.nullcontext():
            log.extend(f"give {number}" for number in one_ahead(items()))
        assert log == ["take 0", "take 1", "give 0", "take 2", "give 1", "give 2"]


@pytest.fixture(params=[False, True], ids=["no-bos", "bos"])
def tokenizer(request):
    return make_tokenizer(adds_bos=request.param)


def words(tokenizer, text):
    """The ids of a text's own characters."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


BOS, EOS = 0, 1


def test_paper_convention_is_the_tokenizers_own(tokenizer):
    texts = TextSet.from_texts(["the quick fox", "a", "", "<s>the fox"])
    tokens = tokenize(texts, tokenizer, "paper", None)
    has_bos = tokenizer.bos_token is not None
    first = [BOS] if has_bos else []
    fox = words(tokenizer, "the fox")
    assert tokens[0].tolist() == first + words(tokenizer, "the quick fox")
    assert tokens[1].tolist() == first + words(tokenizer, "a")
    assert tokens[2].tolist() == first
    assert tokens[3].tolist() == [BOS, *fox], "one BOS: not lost, not doubled"
    assert tokens.token_counts[:3].tolist() == [
        len(tokens[0]) - 1,
        len(first),
        0,
    ]


@pytest.mark.parametrize("convention", ["always-bos", "lm-eval"])
def test_one_bos_else_eos_before_the_text(tokenizer, convention):
    texts = TextSet.from_texts(["the quick fox", "", "<s>the fox", "</s>the fox"])
    tokens = tokenize(texts, tokenizer, convention, None)
    prefix = BOS if tokenizer.bos_token is not None else EOS
    fox = words(tokenizer, "the fox")
    assert tokens[0].tolist() == [prefix, *words(tokenizer, "the quick fox")]
    assert tokens[1].tolist() == [prefix]
    own = [BOS, *fox], [EOS, *fox]
    assert tokens[2].tolist() == (own[0] if prefix == BOS else [EOS, *own[0]])
    assert tokens[3].tolist() == (own[1] if prefix == EOS else [BOS, *own[1]])
    assert tokens.token_counts[0] == len(words(tokenizer, "the quick fox"))


def test_truncation_is_right_in_papers_and_left_in_lm_eval(tokenizer):
    texts = TextSet.from_texts(["the quick brown fox jumps over a lazy dog", "fox"])
    own = words(tokenizer, texts.texts[0])
    assert len(own) > 8
    first = [BOS] if tokenizer.bos_token is not None else []
    paper = tokenize(texts, tokenizer, "paper", 6)
    assert paper[0].tolist() == (first + own)[:6]
    assert paper.truncated.tolist() == [True, False]
    always = tokenize(texts, tokenizer, "always-bos", 6)
    assert always[0].tolist() == ([BOS if first else EOS, *own])[:6]
    window = tokenize(texts, tokenizer, "lm-eval", 6)
    assert window[0].tolist() == own[-7:], "7 tokens: 6 are fed, 6 are scored"
    assert window.input_lengths[0] == window.token_counts[0] == 6


def test_a_truncated_text_that_begins_with_bos_keeps_one_and_all_its_room():
    tokenizer = make_tokenizer(adds_bos=True)
    long = "the quick brown fox jumps over a lazy dog"
    texts = TextSet.from_texts([f"<s>{long}", long])
    for length in (1, 2, 6):
        tokens = tokenize(texts, tokenizer, "paper", length)
        assert tokens[0].tolist() == [BOS, *words(tokenizer, long)][:length]
        assert tokens[0].tolist() == tokens[1].tolist()
        assert tokens.truncated.all()


def test_truncating_keeps_the_tokenizers_closing_token():
    from tokenizers import processors

    tokenizer = make_tokenizer(adds_bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    texts = TextSet.from_texts(["the quick brown fox jumps over a lazy dog"])
    own = words(tokenizer, texts.texts[0])
    assert tokenize(texts, tokenizer, "paper", 5)[0].tolist() == [*own[:4], EOS]


def test_threads_do_not_tell_one_anothers_tokenizer_how_to_truncate(monkeypatch):
    """Models of different lengths may share a tokenizer, which is told before each call."""
    tokenizer = make_tokenizer(adds_bos=True)
    texts = TextSet.from_texts(["the quick brown fox jumps over a lazy dog"])
    expected = tokenize(texts, tokenizer, "paper", 5).ids.tolist()
    short = TextSet.from_texts(["a"])
    other = threading.Thread(target=tokenize, args=(short, tokenizer, "paper", None))
    tell = type(tokenizer).set_truncation_and_padding

    def tell_and_be_interrupted(self, *args, **kwargs):
        tell(self, *args, **kwargs)
        if self._tokenizer.truncation is not None and other.ident is None:
            other.start()
            other.join(0.2)  # it is through by then if nothing keeps it

    monkeypatch.setattr(type(tokenizer), "set_truncation_and_padding", tell_and_be_interrupted)
    found = tokenize(texts, tokenizer, "paper", 5).ids.tolist()
    other.join()
    assert found == expected


def test_cached_tokens_are_the_same_and_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LLFAST_CACHE", str(tmp_path))
    texts = TextSet.from_texts(["the quick", "brown fox"])
    tokenizer = make_tokenizer(adds_bos=True)
    fresh = tokenize(texts, tokenizer, "paper", None)
    (file,) = tmp_path.iterdir()
    encode = type(tokenizer).__call__

    def only_single_texts(self, text, **kwargs):
        assert isinstance(text, str), "the cache was not used"
        return encode(self, text, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", only_single_texts)
    assert tokenize(texts, tokenizer, "paper", None).ids.tolist() == fresh.ids.tolist()
    monkeypatch.undo()
    monkeypatch.setenv("LLFAST_CACHE", str(tmp_path))
    for damage in (b"", file.read_bytes()[:40], b"\0" * 100):
        file.write_bytes(damage)
        assert tokenize(texts, tokenizer, "paper", None).ids.tolist() == fresh.ids.tolist()
    other = make_tokenizer(adds_bos=False)
    assert tokenize(texts, other, "paper", None).ids.tolist() != fresh.ids.tolist()


def test_given_tokens_are_checked():
    assert given_tokens([[3, 4, 5], []], 2)[0].tolist() == [3, 4]
    for bad in ([[-1]], [[1.5]], [["a"]], [[2**31]]):
        with pytest.raises(ValueError, match=r"token_ids\[0\] must be"):
            given_tokens(bad, None)
    with pytest.raises(ValueError, match=f"got values from 7 to {2**31}"):
        given_tokens([[7, 2**31]], None)


def test_unknown_conventions_and_missing_bos_are_refused():
    texts = TextSet.from_texts(["a"])
    tokenizer = make_tokenizer(adds_bos=False)
    with pytest.raises(ValueError, match="convention must be one of paper, always-bos, lm-eval"):
        tokenize(texts, tokenizer, "papers", None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="BOS or EOS"):
        tokenize(texts, tokenizer, "always-bos", None)


def test_max_length_comes_from_the_text_model_first():
    class Config:
        pass

    config, nested = Config(), Config()
    config.max_position_embeddings = 1200
    nested.max_position_embeddings = 32768
    assert model_max_length(config, None, "paper") == 1200
    config.text_config = nested
    assert model_max_length(config, None, "paper") == 32768
    del nested.max_position_embeddings
    assert model_max_length(config, None, "paper") == 1200
    tokenizer = Config()
    tokenizer.model_max_length = 10**30
    assert model_max_length(Config(), tokenizer, "paper") is None
    assert model_max_length(Config(), tokenizer, "lm-eval") == 2048
    tokenizer.model_max_length = 512
    assert model_max_length(Config(), tokenizer, "paper") == 512

"""Models that the caller has loaded: given back as they were, and right whatever is around them."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import llfast
from llfast import CheckpointError, ScoringError, UnsupportedModelError
from llfast.borrowing import borrowed
from llfast.devices import parse_device, resolve_device
from llfast.models import open_model
from tests.tiny import TEXTS, make_model, make_tokenizer, plain_loglikelihood


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(adds_bos=True)


@pytest.fixture
def llama():
    return make_model("llama")


def truth(model, tokenizer):
    return np.array([plain_loglikelihood(model, tokenizer(text)["input_ids"]) for text in TEXTS])


def test_every_module_is_given_back_in_its_mode(llama, tokenizer):
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    llfast.score((llama, tokenizer), TEXTS)
    assert [module.training for module in llama.modules()] == before
    assert len(set(before)) == 2


def test_one_model_in_many_threads(llama, tokenizer):
    """Scoring steps in front of the head, where another thread's forward must not find it."""
    expected = llfast.score((llama, tokenizer), TEXTS).values
    found, start = {}, threading.Barrier(4)

    def work(number):
        start.wait()
        try:
            found[number] = llfast.score((llama, tokenizer), TEXTS).values
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for number, values in found.items():
        assert isinstance(values, np.ndarray), (number, values)
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)
    assert "forward" not in vars(llama.lm_head)


def test_the_callers_autocast_changes_nothing(llama, tokenizer):
    expected = llfast.score((llama, tokenizer), TEXTS).values
    with torch.autocast("cpu", torch.bfloat16):
        found = llfast.score((llama, tokenizer), TEXTS).values
        assert torch.is_autocast_enabled("cpu")
    assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(expected, truth(llama, tokenizer), rtol=0, atol=1e-4)


def test_attention_never_waits_for_plans_of_cudnn(llama, tokenizer):
    allowed, seen = torch.backends.cuda.cudnn_sdp_enabled, []
    assert allowed()
    llama.model.layers[0].register_forward_hook(lambda *_: seen.append(allowed()))
    with borrowed(make_model("gpt2")):
        llfast.score((llama, tokenizer), TEXTS)
        seen.append(allowed())
    assert len(seen) > 2
    assert not any(seen)
    assert allowed()


def test_fp32_is_not_rounded_where_the_caller_allows_it(llama, tokenizer):
    expected = llfast.score((llama, tokenizer), TEXTS).values
    kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv)
    seen = set()
    llama.model.layers[0].register_forward_hook(
        lambda *_: seen.update(each.fp32_precision for each in kinds)
    )
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("medium")  # TF32 on a GPU, bf16 on a CPU that has it
    try:
        found = llfast.score((llama, tokenizer), TEXTS).values
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert seen == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == before[1]
    assert found.tolist() == expected.tolist()


def test_splitting_special_tokens_is_part_of_what_is_remembered(llama):
    tokenizer = make_tokenizer(adds_bos=False)
    texts = ["a </s> b"]
    whole = llfast.score((llama, tokenizer), texts)
    tokenizer.split_special_tokens = True
    split = llfast.score((llama, tokenizer), texts)
    assert whole.token_counts.tolist() == [
        len(make_tokenizer(adds_bos=False)(texts[0]).input_ids) - 1
    ]
    assert split.token_counts.tolist() == [len(tokenizer(texts[0]).input_ids) - 1]
    assert split.token_counts[0] > whole.token_counts[0]


def test_token_ids_of_any_kind_are_one_text_set(llama):
    ids = [[5, 6, 7], [8, 9]]
    kinds = [ids, [np.array(row) for row in ids], [torch.tensor(row) for row in ids]]
    results = [llfast.score(llama, token_ids=kind) for kind in kinds]
    assert len({result.textset_digest for result in results}) == 1
    assert len({result.provenance["tokens_sha256"] for result in results}) == 1
    other = llfast.score(llama, token_ids=[[5, 6, 7], [8, 10]])
    assert other.textset_digest != results[0].textset_digest
    with pytest.raises(ValueError, match="convention must be left out with token_ids"):
        llfast.score(llama, token_ids=ids, convention="always-bos")
    same_texts = [
        llfast.score(llama, ["a", "b"], token_ids=each) for each in (ids, [[5, 6], [7, 8]])
    ]
    assert len({result.provenance["tokens_sha256"] for result in same_texts}) == 2


def test_partial_results_of_weights_without_a_name_are_refused(llama, tokenizer, tmp_path):
    """A second model in memory could otherwise go on from the numbers of a first."""
    path = tmp_path / "partial.npz"
    with pytest.raises(ValueError, match="partial must go with weights that have a name"):
        llfast.score((llama, tokenizer), TEXTS, partial=path)
    assert not path.exists()
    named = llfast.score((llama, tokenizer), TEXTS, partial=path, revision="first")
    assert named.revision == "first"


def test_models_without_their_weights_are_refused(llama, tokenizer):
    with pytest.raises(UnsupportedModelError, match="hold its weights, got a LlamaForCausalLM"):
        llfast.score((llama.to("meta"), tokenizer), TEXTS)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Model", "of every token, got a GPT2Model, whose output has none"),
        ("ForSequenceClassification", "of every token, got a .*, whose output has none"),
        ("ForTokenClassification", "of every word, got a .*, which gives 2;"),
    ],
)
def test_models_of_other_kinds_are_refused(kind, reason, tokenizer):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=304, pad_token_id=1)
    model = getattr(transformers, f"GPT2{kind}")(config)
    with pytest.raises(UnsupportedModelError, match=reason):
        llfast.score((model, tokenizer), TEXTS)


def test_logits_that_are_no_tensor_are_refused(llama, tokenizer, monkeypatch):
    own = llama.forward
    for output in (tuple, lambda found: SimpleNamespace(logits=[found.logits])):
        monkeypatch.setattr(llama, "forward", lambda output=output, **given: output(own(**given)))
        with pytest.raises(UnsupportedModelError, match="got a LlamaForCausalLM, whose output"):
            llfast.score((llama, tokenizer), TEXTS)


def test_encoder_decoders_are_refused(tokenizer):
    config = transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=304)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="got an encoder-decoder: T5ForConditional"):
        llfast.score((model, tokenizer), TEXTS)


def test_a_model_that_was_made_in_inference_mode(llama, tokenizer):
    with torch.inference_mode():
        made = make_model("llama")
    found = llfast.score((made, tokenizer), TEXTS).values
    assert found.tolist() == llfast.score((llama, tokenizer), TEXTS).values.tolist()
    for model in (made, llama):
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_of_few_positions_is_not_tried_with_more(tokenizer):
    model = make_model("gpt2", n_positions=8)
    result = llfast.score((model, tokenizer), TEXTS)
    ids = [tokenizer(text, truncation=True, max_length=8).input_ids for text in TEXTS]
    expected = [plain_loglikelihood(model, each) for each in ids]
    assert result.truncated.any()
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-4)


def test_a_dtype_that_is_not_scored_is_refused(llama, tokenizer):
    with pytest.raises(ValueError, match=r"float32, bfloat16, float16, got torch\.float64"):
        llfast.score((llama.double(), tokenizer), TEXTS)


def see_devices(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ("cuda:0", "cuda:1"),
        ("cuda:1", "cuda:0"),
        ("cuda", "cuda:1"),
        ("cuda:0", "cpu"),
        ("cpu", "cuda"),
        ("cpu", "cuda:0"),
    ],
)
def test_another_device_than_the_models_own_is_refused(own, asked, monkeypatch):
    see_devices(monkeypatch, 2)
    source = open_model(SimpleNamespace(config=None, device=torch.device(own)), name="stand-in")
    with pytest.raises(ValueError, match=f"'auto' for a loaded model on {own}, got '{asked}'"):
        resolve_device(asked, source)


@pytest.mark.parametrize(
    ("count", "asked", "seen"),
    [
        (0, "cuda", "no CUDA device"),
        (0, "cuda:128", "no CUDA device"),
        (1, "cuda:1", "cuda:0; use"),
        (2, "cuda:256", "cuda:0, cuda:1; use"),
        (2, "cuda:99999999999", "cuda:0, cuda:1; use"),
        (1, "cpu:1", "cuda:0; use"),
    ],
)
def test_a_device_that_is_not_there_is_refused(count, asked, seen, monkeypatch):
    see_devices(monkeypatch, count)
    with pytest.raises(ValueError, match=f"got '{asked}' where torch sees {seen}"):
        parse_device(asked)


@pytest.mark.parametrize(
    ("asked", "found"), [("cuda:01", "cuda:1"), ("cuda", "cuda"), ("cpu", "cpu")]
)
def test_a_device_by_name(asked, found, monkeypatch):
    see_devices(monkeypatch, 2)
    assert parse_device(asked) == torch.device(found)


def test_a_device_that_cannot_be_used_is_not_there(monkeypatch):
    """As torch counts it where the driver is too old."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="got 'cuda' where torch sees no CUDA device"):
        parse_device("cuda")


@pytest.mark.parametrize("name", ["CUDA", " cuda", "cuda:", "cuda:-1", "cuda:x", "mps", ""])
def test_other_names_are_no_devices(name, monkeypatch):
    see_devices(monkeypatch, 2)
    with pytest.raises(ValueError, match=f"device must be auto, cpu or cuda, got '{name}'"):
        parse_device(name)


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ("cuda:1", "auto"),
        ("cuda:1", "cuda:1"),
        ("cuda:1", "cuda"),
        ("cuda:0", "cuda"),
        ("cuda", "cuda:0"),
        ("cpu", "cpu"),
        ("cpu", "cpu:0"),
    ],
)
def test_a_model_runs_where_it_is(own, asked, monkeypatch):
    see_devices(monkeypatch, 2)
    source = open_model(SimpleNamespace(config=None, device=torch.device(own)), name="stand-in")
    assert resolve_device(asked, source) == torch.device(own)


def test_a_head_that_lacks_words_is_refused_before_a_text_runs(llama):
    llama.lm_head = torch.nn.Linear(32, 200, bias=False)
    with pytest.raises(CheckpointError, match="below the model's 200 words, got 250"):
        llfast.score(llama, token_ids=[[1, 250]])


def test_positions_that_run_out_are_said_with_the_text():
    model = make_model("gpt2")
    model.transformer.wpe = torch.nn.Embedding(40, 32)  # fewer than the config says
    with pytest.raises(ScoringError, match="tokens must fit the model's embeddings"):
        llfast.score(model, token_ids=[list(range(2, 12)), list(range(2, 100))])

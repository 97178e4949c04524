"""Paged is resident to the bit, on every architecture that transformers has, or it is refused."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

import llfast
from llfast.errors import CannotPageError, UnsupportedModelError
from llfast.paging import units
from tests.architectures import TOKENS, architectures, build, tiny_config
from tests.architectures.names import COVERED
from tests.paging import LIMITS, check_same, least_budget, score_paged
from tests.tiny import plain_loglikelihood, quiet

pytestmark = pytest.mark.usefixtures("on_one_thread")  # models are tiny

# One token has no predecessor; 16 is a whole block; the longest passes every window.
_LENGTHS = (37, 1, 16, 2, 60, 13)
_EVERYDAY = set(
    """
    bamba bloom cohere2 ctrl dbrx deepseek_v3 falcon falcon_h1 gemma3 gemma3n_text gemma4_text
    gpt2 gpt_bigcode gpt_neox gpt_oss hrm_text jamba llama4_text mamba mixtral mpt opt phi3
    qwen2_moe qwen3_next rwkv xlstm zamba2
    """.split()
)
# What cannot be paged, and a part of what is said of it.
_REFUSED = {
    "rwkv": "must leave its weights as they are to be paged",
    # They ask for numbers while they are built.
    "qwen4_exp": "must be a model that can be built without weights to be paged",
    "qwen4_exp_text": "must be a model that can be built without weights to be paged",
}
# In half precision they do more after their head than is known of, and are loaded whole.
_WHOLE_IN_HALF = set("beam blt falcon_mamba inkling2_text mamba mamba2 nemotron_h".split())
# They do not run in half precision, whoever runs them.
_ONLY_IN_FULL = {"xlstm"}
# Parts of larger models: transformers does not load a folder of them alone, whole or paged.
_PARTS = {"emu3", "mllama"}


def parameters():
    return [
        pytest.param(name, marks=() if name in _EVERYDAY else pytest.mark.slow)
        for name in architectures()
    ]


@pytest.fixture(autouse=True)
def _everything_pages(monkeypatch):
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)


@pytest.mark.parametrize("name", parameters())
def test_paged_is_resident_to_the_bit(name, tmp_path):
    if name == "doge" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("before transformers 5.18 its dynamic mask counted tokens to the right")
    random = np.random.default_rng(7)
    ids = [random.integers(TOKENS.start, TOKENS.stop, size).tolist() for size in _LENGTHS]
    model = build(name)
    with quiet():
        model.save_pretrained(tmp_path / name)
    options = {"token_ids": ids, "dtype": "float32", "token_budget": 64}
    if name in _PARTS:
        for weights in ("resident", "paged"):
            with pytest.raises(UnsupportedModelError, match="must be a causal language model"):
                llfast.score(tmp_path / name, weights=weights, **options)
        return
    expected = llfast.score(tmp_path / name, weights="resident", per_token=True, **options)
    assert np.std(expected.values) > 1
    if name in _REFUSED:
        with pytest.raises(CannotPageError, match=_REFUSED[name]):
            llfast.score(tmp_path / name, weights="paged", **options)
        return
    least = least_budget(tmp_path / name, **options)
    result, alone = score_paged(tmp_path / name, memory_budget=least, **options)
    check_same(result, expected)
    some_room = least + int(2.2 * alone.state_bytes)  # for two batches, or a little more
    result, some = score_paged(tmp_path / name, memory_budget=some_room, **options)
    check_same(result, expected)
    result, together = score_paged(tmp_path / name, **options)
    check_same(result, expected)
    assert alone.waves > some.waves >= together.waves == 1
    for statistics in (alone, some, together):
        assert statistics.order == layers_in_order(model, ids[0], set(statistics.order))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in {"gpt_oss", "jamba", "mamba"} else pytest.mark.slow)
        for name in architectures()
        if name not in _REFUSED.keys() | _PARTS | _ONLY_IN_FULL
    ],
)
def test_in_half_precision_too(name, tmp_path):
    """Where some weights stay in fp32, as their kinds say."""
    random = np.random.default_rng(7)
    ids = [random.integers(TOKENS.start, TOKENS.stop, size).tolist() for size in _LENGTHS]
    with quiet():
        build(name).bfloat16().save_pretrained(tmp_path / name)
    options = {"token_ids": ids, "dtype": "bfloat16", "token_budget": 64}
    expected = llfast.score(tmp_path / name, weights="resident", per_token=True, **options)
    if name in _WHOLE_IN_HALF:
        with pytest.raises(CannotPageError, match="that does more; use weights='resident'"):
            llfast.score(tmp_path / name, weights="paged", **options)
        return
    least = least_budget(tmp_path / name, **options)
    for budget in (least, "1GiB"):
        result, _ = score_paged(tmp_path / name, memory_budget=budget, **options)
        check_same(result, expected)


@pytest.mark.parametrize("name", ["llama4", "mllama", "qwen3_5", "qwen3_5_moe"])
@pytest.mark.filterwarnings("ignore:.* holds more than its config asks for:llfast.LlfastWarning")
def test_models_that_take_images_are_scored_as_they_take_text(name, tmp_path):
    """The part for text alone is built, which has a config of its own."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        tiny_config(name), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    with quiet():
        model.save_pretrained(tmp_path / name)
    random = np.random.default_rng(7)
    ids = [random.integers(TOKENS.start, TOKENS.stop, size).tolist() for size in _LENGTHS]
    options = {"token_ids": ids, "dtype": "float32", "token_budget": 64}
    expected = llfast.score(tmp_path / name, weights="resident", per_token=True, **options)
    truth = [plain_loglikelihood(model, each) for each in ids]
    np.testing.assert_allclose(expected.values, truth, rtol=0, atol=1e-4)
    assert np.std(truth) > 1
    for budget in (least_budget(tmp_path / name, **options), "1GiB"):
        result, _ = score_paged(tmp_path / name, memory_budget=budget, **options)
        check_same(result, expected)


def layers_in_order(model, ids, names):
    """As a plain forward goes through them; one that comes twice in a row is there once."""
    order = []
    for name, module in model.named_modules():
        if name in names:
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=False)
    return [name for name, _ in itertools.groupby(order)]


def test_every_name_is_one_of_the_catalogue():
    special = _REFUSED.keys() | _PARTS | _WHOLE_IN_HALF | _ONLY_IN_FULL
    assert special | _EVERYDAY <= set(COVERED)

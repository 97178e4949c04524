"""Paged is resident to the bit, on every architecture that transformers has, or it is refused."""

import numpy as np
import pytest
import transformers
from packaging.version import Version

import llfast
from llfast.errors import CannotPageError, UnsupportedModelError
from llfast.paging import units
from tests.architectures import TOKENS, architectures, build
from tests.paging import LIMITS, check_same, least_budget, score_paged
from tests.tiny import quiet

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
    with quiet():
        build(name).save_pretrained(tmp_path / name)
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
    result, statistics = score_paged(tmp_path / name, memory_budget=least, **options)
    check_same(result, expected)
    assert statistics.waves > 1
    result, statistics = score_paged(tmp_path / name, **options)
    check_same(result, expected)
    assert statistics.waves == 1


def test_every_name_is_one_of_the_catalogue():
    known = set(architectures())
    assert known >= _REFUSED.keys() | _PARTS
    assert known >= _EVERYDAY or not transformers.__version__.startswith("5.23.")

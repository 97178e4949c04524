"""`score` against a plain transformers forward of one text at a time, on every architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import llfast
from tests.architectures import EXCLUDED, TOKENS, architectures, build, is_mixture, unlisted

# One token has no predecessor; 16 is a whole block; the longest passes every window.
_LENGTHS = (37, 1, 16, 2, 60, 13)
# Nats a text. What padding does to the order of fp32 sums is below 4e-5 in all of them.
_TOLERANCE = 1e-4


def _token_ids() -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(TOKENS.start, TOKENS.stop, size).tolist() for size in _LENGTHS]


@torch.inference_mode()
def _logprobs_alone(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """fp64 log-probabilities of the next token, (tokens, vocabulary), the text by itself."""
    logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


def _loglikelihood_alone(model: PreTrainedModel, token_ids: list[int]) -> float:
    targets = torch.tensor(token_ids)[1:, None]
    return float(_logprobs_alone(model, token_ids)[:-1].gather(1, targets).sum())


@pytest.fixture(scope="module", params=architectures())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_score_equals_one_text_at_a_time(name: str) -> None:
    if name == "doge" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("before transformers 5.18 its dynamic mask counted tokens to the right")
    # Two equal models, because a forward may change its model (RWKV rescales its weights).
    untouched, model = build(name), build(name)
    token_ids = _token_ids()
    truth = [_loglikelihood_alone(untouched, ids) for ids in token_ids]

    result = llfast.score(model, None, token_ids=token_ids, dtype="float32", name=name)

    assert result.loglikelihoods.dtype == np.float64
    np.testing.assert_allclose(result.loglikelihoods, truth, rtol=0, atol=_TOLERANCE)
    np.testing.assert_array_equal(result.token_counts, np.array(_LENGTHS) - 1)
    # Nothing stays behind in the model: no hook, no changed weight.
    assert [_loglikelihood_alone(model, ids) for ids in token_ids] == truth


def test_model_says_something(name: str) -> None:
    """A model that ignored its input or its past would pass the comparison by saying nothing."""
    model = build(name)
    token_ids = max(_token_ids(), key=len)
    changed = token_ids.copy()
    position = 20
    changed[position] = token_ids[position] + 1
    before, after = _logprobs_alone(model, token_ids), _logprobs_alone(model, changed)

    scored = before[:-1].gather(1, torch.tensor(token_ids)[1:, None])
    assert scored.std() > 1.0
    moved = (before - after).abs().amax(-1)
    assert moved[:position].max() < 1e-4
    assert moved[position + 2 : position + 10].max() > 0.01


def test_every_type_is_covered_or_excluded() -> None:
    """Prints the catalogue; `pytest -s` shows it."""
    covered = architectures()
    mixtures = [name for name in covered if is_mixture(build(name))]
    excluded = {
        name: EXCLUDED[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & EXCLUDED
    }
    print(f"\ntransformers {transformers.__version__}: {len(covered)} covered: {' '.join(covered)}")
    print(f"of these {len(mixtures)} mixtures of experts: {' '.join(mixtures)}")
    for name, reason in sorted(excluded.items()):
        print(f"excluded: {name}: {reason}")
    for name in unlisted():
        print(f"not covered: {name}: unknown to this catalogue")

    assert not set(covered) & excluded.keys()
    assert len(covered) >= 100
    assert len(mixtures) >= 30
    if transformers.__version__.startswith("5.23."):
        assert not unlisted()

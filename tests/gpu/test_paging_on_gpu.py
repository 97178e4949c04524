"""Weights paged to a GPU: the bits of a model that is all there."""

from __future__ import annotations

import pytest
import torch

import llfast
from llfast.paging import units
from llfast.paging.slots import Slot
from llfast.paging.suspended import Forward
from tests.families import make_family
from tests.paging import LIMITS, check_same, least_budget, score_paged
from tests.tiny import TEXTS, make_model, make_tokenizer, save

pytestmark = pytest.mark.gpu
OPTIONS = {"device": "cuda", "token_budget": 64}
CYCLES = 10_000_000  # some 5 ms


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "phi", "mixtral"])
def test_paged_equals_resident(tmp_path, monkeypatch, kind, dtype):
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)
    folder = save(make_model(kind), make_tokenizer(adds_bos=True), tmp_path / kind)
    options = {**OPTIONS, "dtype": dtype}
    expected = llfast.score(folder, TEXTS, weights="resident", per_token=True, **options)
    for budget in (least_budget(folder, TEXTS, **options), "1GiB"):
        result, statistics = score_paged(folder, TEXTS, memory_budget=budget, **options)
        check_same(result, expected)
        assert statistics.nbytes > 0


def sleep_after(forward, answer=None):
    Forward.own_resume(forward, answer)
    torch.cuda._sleep(CYCLES)


def sleep_before(slot, layout):
    with torch.cuda.stream(slot._copies):
        torch.cuda._sleep(10 * CYCLES)
    Slot.own_send(slot, layout)


@pytest.mark.parametrize("slow", ["computing", "copying"])
def test_pages_wait_for_the_device(tmp_path, monkeypatch, slow):
    """The host runs far ahead of it; pages are neither used too early nor overwritten."""
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    folder = save(make_model("llama", **sizes), make_tokenizer(adds_bos=True), tmp_path / "m")
    expected = llfast.score(folder, TEXTS, weights="resident", per_token=True, **OPTIONS)
    monkeypatch.setattr(Forward, "own_resume", Forward.resume, raising=False)
    monkeypatch.setattr(Slot, "own_send", Slot.send, raising=False)
    if slow == "computing":
        monkeypatch.setattr(Forward, "resume", sleep_after)
    else:
        monkeypatch.setattr(Slot, "send", sleep_before)
    check_same(score_paged(folder, TEXTS, **OPTIONS)[0], expected)


def test_a_table_of_words_is_read_once(tmp_path, monkeypatch):
    """Where there are more tokens than words: its rows come one by one otherwise."""
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)
    model = make_model("llama")
    folder = save(model, make_tokenizer(adds_bos=True), tmp_path / "m")
    table = model.get_input_embeddings().weight
    for texts, is_whole in ((TEXTS * (1 + len(table) // 50), True), (TEXTS[:1], False)):
        result, statistics = score_paged(folder, texts, **OPTIONS)
        tokens = int(result.token_counts.sum())
        assert (tokens >= len(table)) == is_whole
        assert (statistics.rows_bytes == table.nbytes) == is_whole


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_relatives_together(tmp_path, monkeypatch, kind):
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)
    changes = [(seed, lambda name: "layers.1." in name) for seed in range(3)]
    folders = make_family(tmp_path, kind, make_tokenizer(adds_bos=True), changes)
    loading = llfast.LoadingStatistics()
    options = {**OPTIONS, "weights": "paged", "per_token": True}
    for result, folder in zip(
        llfast.score_many(folders, TEXTS, loading=loading, **options), folders, strict=True
    ):
        check_same(result, llfast.score(folder, TEXTS, **options))
    assert loading.shared_bytes > 0


def test_memory_is_given_back(tmp_path):
    """Slots on the device, and what is pinned for them, go with the run."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    folder = save(make_model("llama", **sizes), make_tokenizer(adds_bos=True), tmp_path / "m")
    score_paged(folder, TEXTS, **OPTIONS)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        score_paged(folder, TEXTS, **OPTIONS)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before

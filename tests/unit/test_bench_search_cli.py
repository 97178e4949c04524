"""`llfast bench search`: what it measures with, made-up models and a store's own."""

from __future__ import annotations

import json

import pytest

from llfast import StoreError
from llfast.bench import search
from llfast.search import listing
from tests.indexes import make_store

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(listing, "LEAST_ROWS", 200)
    monkeypatch.setattr(listing, "_HELD_OUT", 40)
    return search.measure(models=300, texts=60, questions=8, k=5)


def test_made_up_models_are_searched_in_every_way(found):
    assert json.loads(json.dumps(found)) == found
    assert set(found["searches"]) == {"certified", "exact", "approximate", search.FLAT}
    for name, each in found["searches"].items():
        assert each["questions"] == 8
        assert 0 < each["ms"]["min"] <= each["ms"]["median"] <= each["ms"]["max"]
        assert each["recall"] == 1.0 or name == "approximate"
    assert found["searches"]["certified"]["over_certified"]["median"] == 1.0
    assert 5 <= found["compared"]["median"] <= 299
    assert found["points_bytes"] == 4 * 300 * 60
    assert found["lists"]["count"] == round(4 * 300**0.5)


def test_people_are_told(found, capsys):
    search.show(found)
    printed = capsys.readouterr().out
    for words in ("300 made-up models on 60 texts", "of the 5 nearest", "lists, which held"):
        assert words in printed


def test_an_index_of_a_store_is_measured_and_left_for_searches(tmp_path):
    store = make_store(tmp_path / "store")
    found = search.measure(store.folder, questions=3)
    assert (found["models"], found["store"], found["lists"]) == (24, str(store.folder), None)
    assert set(found["searches"]) == {"certified", "exact", search.FLAT}
    assert list(store.folder.glob("_index/*/current"))
    with pytest.raises(StoreError):
        search.measure(tmp_path / "none")


def test_answers_that_differ_are_an_error(monkeypatch):
    right = search.KLIndex.search

    def wrong(self, name, k):
        hits = right(self, name, k)
        if self.mode == "exact":
            hits.pop()
        return hits

    monkeypatch.setattr(search.KLIndex, "search", wrong)
    with pytest.raises(ValueError, match="certified answers must be the exact ones"):
        search.measure(models=60, texts=30, questions=3)

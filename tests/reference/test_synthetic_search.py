"""Searches among the benchmark's synthetic collections: what a sort of all distances finds."""

from __future__ import annotations

import numpy as np
import pytest

from llfast import KLIndex, LogLikelihoodMatrix, ModelSpace
from tests.conftest import ROOT
from tests.reference.test_search import brute_force

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


@pytest.mark.parametrize("families", ["zipf", "half"])
def test_any_k_and_radius_gets_what_brute_force_gets(monkeypatch, families):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from synthetic import Recipe, blocks

    made = list(blocks(Recipe(models=400, texts=600, families=families)))
    names = [name for block, _, _ in made for name in block]
    values = np.concatenate([block for _, _, block in made]).astype(np.float64)
    space = ModelSpace.fit(LogLikelihoodMatrix(names, values, np.full(600, 972.0)))
    for mode in ("exact", "certified"):
        index = KLIndex.build(space, mode)
        for row in range(0, 400, 40):
            truth = brute_force(space, space.coordinates[row], names[row])
            for k in (1, 10, 100):
                found = [hit.model for hit in index.search(names[row], k)]
                assert found == [name for _, name in truth[:k]]
            for radius in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0):
                found = [hit.model for hit in index.range_search(names[row], radius)]
                assert found == [name for kl, name in truth if kl <= radius]

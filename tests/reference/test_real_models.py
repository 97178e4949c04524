"""90 real models on 263 real texts: every answer is that of a sort of all distances in fp64."""

import numpy as np
import pytest

from llfast import KLIndex, ModelSpace
from llfast.importing import import_matrix
from tests.reference.test_search import brute_force


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_searches_among_real_models_are_exact(shared_data, mode):
    """Where the data is absent, test_certified.py does the same with made-up models."""
    path = shared_data / "bpb_90x263" / "bits_per_byte.csv"
    space = ModelSpace.fit(import_matrix(path, unit="bits_per_byte", text_bytes="972.3188"))
    index = KLIndex.build(space, mode)
    for row, name in enumerate(space.models):
        truth = brute_force(space, space.coordinates[row], name)
        for k in (1, 10, 100):
            hits = index.search(name, k)
            assert [hit.model for hit in hits] == [other for _, other in truth[:k]]
            np.testing.assert_allclose([hit.kl for hit in hits], [kl for kl, _ in truth[:k]], 1e-9)
        for radius in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0):
            inside = [other for kl, other in truth if kl <= radius]
            assert [hit.model for hit in index.range_search(name, radius)] == inside

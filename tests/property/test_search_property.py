"""Whatever the data, search is what sorting all fp64 distances gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llfast import KLIndex, LogLikelihoodMatrix, ModelSpace
from llfast.intervals import kl_estimate

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")

# Few distinct values make ties and zero distances common; many magnitudes make fp32 lose them.
nats = st.one_of(
    st.sampled_from([-1000.0, -1.0, 0.0]),
    st.floats(-2000, 0),
    st.floats(-1e-6, 0).map(lambda small: -900.0 + small),
)
matrices = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 40), st.integers(1, 12)),
    elements=nats,
)


@settings(deadline=None, max_examples=150)
@given(values=matrices, data=st.data())
def test_search_is_a_sort_of_all_distances(values, data):
    k, n = values.shape
    names = data.draw(st.permutations([f"m{row}" for row in range(k)]))
    matrix = LogLikelihoodMatrix(names, values, np.full(n, 500.0))
    space = ModelSpace.fit(matrix)
    index = KLIndex.build(space)
    row = data.draw(st.integers(0, k - 1))
    wanted = data.draw(st.integers(1, k + 5))
    divergences = space.kl_matrix()[row]
    truth = sorted((divergences[other], names[other]) for other in range(k) if other != row)
    hits = index.search(names[row], wanted)
    assert [(hit.kl, hit.model) for hit in hits] == truth[:wanted]
    if truth:
        radius = data.draw(st.sampled_from([value for value, _ in truth]))
        inside = index.range_search(names[row], float(radius))
        assert [(hit.kl, hit.model) for hit in inside] == [
            pair for pair in truth if pair[0] <= radius
        ]


@settings(deadline=None, max_examples=300)
@given(
    values=hnp.arrays(np.float64, st.integers(1, 40), elements=nats),
    data=st.data(),
)
def test_an_interval_holds_its_estimate(values, data):
    documents = data.draw(st.integers(1, 40))
    drawn = data.draw(
        st.lists(st.integers(0, documents), min_size=len(values), max_size=len(values))
    )
    for groups in (None, np.array(drawn)):
        found = kl_estimate(values, groups)
        assert 0 <= found.interval[0] <= found.value <= found.interval[1]
        assert found.standard_error >= 0
        assert not np.isnan([*found.interval, found.standard_error]).any()

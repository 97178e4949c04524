"""Log-likelihoods of seven made-up models on 60 texts, and their space."""

import numpy as np
import pytest

from llfast import ModelSpace
from tests.spaces import make_matrix


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return -700 + 120 * rng.standard_normal(60) + 30 * rng.standard_t(5, (7, 60))


@pytest.fixture
def space(values):
    return ModelSpace.fit(make_matrix(values))

"""Made-up models and their space; dtypes, and every kernel that can run here."""

import numpy as np
import pytest

from llfast import ModelSpace
from tests.heads import DTYPES, INTERPRETED, SETS, force
from tests.spaces import make_matrix
from tests.tiny import one_thread


@pytest.fixture(scope="module")
def on_one_thread():
    with one_thread():
        yield


@pytest.fixture
def values():
    """Log-likelihoods of seven models on 60 texts."""
    rng = np.random.default_rng(0)
    return -700 + 120 * rng.standard_normal(60) + 30 * rng.standard_t(5, (7, 60))


@pytest.fixture
def space(values):
    return ModelSpace.fit(make_matrix(values))


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(params=SETS)
def forced_set(request, monkeypatch):
    """C++ on every instruction set of this machine."""
    force(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=[*SETS, *INTERPRETED])
def exact_kernels(request, monkeypatch):
    """All that promise bits: C++, and Triton in its interpreter."""
    force(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=[*SETS, *INTERPRETED, "torch"])
def any_kernels(request, monkeypatch):
    """Those, and the plain-torch twin."""
    force(request.param, monkeypatch)
    return request.param


def pytest_collection_modifyitems(items):
    """What Triton's interpreter cannot do: it computes in numpy, which warns of NaNs and of -inf.

    Its bf16 products are wrong; tests/gpu has those.
    """
    for item in list(items):
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if not INTERPRETED.keys() & {str(value) for value in parameters.values()}:
            continue
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        if parameters.get("dtype") == "bfloat16":
            items.remove(item)

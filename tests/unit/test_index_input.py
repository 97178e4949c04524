"""What an index is asked: answered, or refused before faiss sees it."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from llfast import KLIndex, SearchError
from llfast.search.writer import SegmentWriter
from tests.indexes import N, make_store
from tests.stores import ROOT

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


# ------------------------------------------------------------------ what is asked

UNTYPED = """
import math, sys
import numpy as np
from llfast import KLIndex, ModelSpace, Store
from tests.indexes import N, index_result, model_values
assert False, "python -O passes over this"
from llfast.search.flat import squares_to
store = Store(sys.argv[1])
spaces = KLIndex.build(ModelSpace.fit(store.matrix()), "certified")
class Odd:
    def __index__(self):
        return "3"
def result(n):
    return index_result(30, values=np.zeros(n))
fp32 = np.zeros((3, N), dtype=np.float32)
name = store.matrix().models[0]
counts = 0, -1, -2**70, 1.0, "1", None, math.nan, Odd()
radii = -1, math.nan, -math.inf, None, [], "x"
queries = (
    None, 3, 3.0, b"x", {name}, np.zeros(N), [name, None], [3], [[name]], "nobody", "",
    result(N - 1), result(N + 1), [name, result(1)],
)
for index in (KLIndex.build(store, "certified"), KLIndex.build(store, "exact"), spaces):
    for act in (
        *(lambda k=k: index.search(name, k) for k in counts),
        *(lambda r=r: index.range_search(name, r) for r in radii),
        *(lambda q=q: index.search(q) for q in queries),
        *(lambda q=q: index.range_search(q, 1.0) for q in ([name], None, (), result(N - 1))),
        lambda: index.search(index_result(30, textset_digest="others")),
        lambda: index.search(index_result(30, convention="always-bos")),
        lambda: index.search(index_result(30, ids=tuple(f"other {row}" for row in range(N)))),
        lambda: index.add(result(N - 1)),
        lambda: index.add(index_result(30, textset_digest="others")),
        lambda: index.add(index_result(30, convention="always-bos")),
        lambda: index.remove("nobody"),
        lambda: index.search(name, unit="bits"),
        lambda: squares_to(fp32[:, :-1], fp32),
        lambda: squares_to(fp32, fp32[:, :-1].copy()),
        lambda: squares_to(fp32.astype(np.float64), fp32),
        lambda: squares_to(fp32, fp32.astype(np.float64)),
        lambda: squares_to(fp32[0], fp32),
        lambda: squares_to(fp32, fp32[:, ::2]),
        lambda: squares_to(fp32[:, :0].copy(), fp32[:, :0].copy()),
        lambda: squares_to(fp32, np.asfortranarray(fp32)),
        lambda: squares_to(fp32, fp32.astype(">f4")),
    ):
        try:
            act()
        except Exception as error:
            print(type(error).__name__, str(error).replace("\\n", "NEWLINE"))
        else:
            raise SystemExit("was not refused")
    print(len(index), len(index.search(name, 2**80)), index.search([]), index.search(()))
    print(len(index.range_search(name, math.inf)), len(index.range_search(name, 1e308)))
print(store.matrix().values.shape)
"""


def test_whatever_is_asked_is_answered_or_refused_without_asserts(store):
    """`python -O`, and none of the run-time types of these tests."""
    words = [sys.executable, "-O", "-c", UNTYPED, str(store.folder)]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    kinds = {"ValueError", "TypeError", "SpaceError", "SearchError", "StoreError"}
    refused = [line for line in lines if line.partition(" ")[0] in kinds]
    answered = [line for line in lines if line and line not in refused]
    assert answered == ["24 23 [] []", "23 23"] * 3 + [f"(24, {N})"]
    assert len(refused) == 3 * 49
    assert not [line for line in refused if "NEWLINE" in line]


def test_points_that_are_not_finite_are_no_segment(tmp_path, store):
    basis = KLIndex.build(store).basis
    models = [KLIndex.build(store)._models[0]]
    for value in (math.nan, math.inf, 1e30):
        writer = SegmentWriter(tmp_path / f"segment {value}", basis, None)
        with writer, pytest.raises(SearchError, match=r"norms below 1e18"):
            writer.append(models, np.full((1, N), value))

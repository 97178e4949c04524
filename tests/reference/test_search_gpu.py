"""Searches by a GPU, in whose place an index errs as far as a GPU can; tests/gpu has a real one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from llfast import KLIndex, LlfastWarning, SearchError
from llfast.search import contents, gpu
from tests.indexes import assert_right, index_result, make_store
from tests.reference.test_certified import lineage
from tests.reference.test_search import assert_exact, make_result, make_space

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")

N = 200
MOST = 1.0  # as far as sums in fp32 can be off


class Stand:
    """Squares by matrix products, each wrong by a share of what fp32 sums can be, up or down."""

    def __init__(self, dimensions, share=0.0, seed=0):
        self.rows = np.empty((0, dimensions), dtype=np.float32)
        self.share, self.rng = share * dimensions * 2.0**-24, np.random.default_rng(seed)
        self.asked = []

    def add(self, rows):
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        self.rows = np.concatenate([self.rows, rows])

    def search(self, queries, count):
        assert count <= 2048
        self.asked.append(count)
        rows, points = self.rows.astype(np.float64), queries.astype(np.float64)
        norms = np.linalg.norm(points, axis=1), np.linalg.norm(rows, axis=1)
        squares = np.add.outer(norms[0] ** 2, norms[1] ** 2) - 2 * points @ rows.T
        errors = self.share * np.add.outer(*norms) ** 2
        squares += errors * self.rng.choice([-1, 1], squares.shape)
        numbers = np.argsort(squares, axis=1)[:, :count]
        return np.take_along_axis(squares, numbers, axis=1).astype(np.float32), numbers


@pytest.fixture
def stands(monkeypatch):
    """Makes GPUs err by this share; lists the indexes that are made."""
    made = []

    def use(share=0.0):
        def make(dimensions):
            made.append(Stand(dimensions, share))
            return made[-1], None

        monkeypatch.setattr(gpu, "_make_index", make)
        monkeypatch.setattr(contents, "has_room", lambda _nbytes: True)
        return made

    return use


@pytest.mark.parametrize("share", [0.0, MOST / 2, MOST])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_what_a_gpu_finds_is_made_exact(stands, share, k):
    made = stands(share)
    rng = np.random.default_rng(k)
    space = make_space(lineage(rng, 3000, N, share=0.3))
    index = KLIndex.build(space, "exact")
    assert len(made) == 1
    made[0].asked.clear()
    for row in rng.integers(0, 3000, 5):
        name = space.models[row]
        assert_exact(space, index, name, space.coordinates[row], name, k)
    assert made[0].asked
    assert index.search(space.models[0], k) == KLIndex.build(space, "certified").search("m0000", k)


def test_few_are_compared_where_a_gpu_is_right(stands):
    stands()
    space = make_space(lineage(np.random.default_rng(0), 3000, N))
    found = KLIndex.build(space, "exact").search("m0007").certificate
    assert found.closed_by == "bounds"
    assert found.compared < 60
    assert found.models == 2999


def test_where_a_gpu_cannot_tell_all_are_compared(stands):
    stands(MOST)
    # Far away from all: errors are as large as what tells the models apart.
    space = make_space(lineage(np.random.default_rng(1), 3000, N))
    index = KLIndex.build(space, "exact")
    result = make_result(1e6 * np.random.default_rng(2).standard_normal(N))
    assert index.search(result).certificate.closed_by == "scan"
    assert_exact(space, index, result, space.project(result), None, 10)


def test_more_answers_than_a_gpu_gives_come_from_the_cpu(stands):
    made = stands()
    space = make_space(lineage(np.random.default_rng(3), 3000, N))
    index = KLIndex.build(space, "exact")
    made[0].asked.clear()
    for k in (1016, 1017, 3000):
        assert_exact(space, index, "m0003", space.coordinates[3], "m0003", k)
    assert made[0].asked == [2 * 1016 + 15]
    radius = index.search("m0003", 5)[-1].kl
    made[0].asked.clear()
    assert len(index.range_search("m0003", radius)) == 5
    assert not made[0].asked


def test_models_that_come_and_go_are_no_matter_for_the_gpu(stands):
    made = stands(MOST)
    rng = np.random.default_rng(4)
    values = lineage(rng, 2600, N)
    space = make_space(values)
    index = KLIndex.build(space, "exact")
    twin = space.coordinates[5] + space.reference + 1e-3 * rng.standard_normal(N)
    index.add(make_result(twin, "twin"))
    hits = index.search("m0005", 6)
    assert hits[0].model == "twin"
    index.remove("twin")
    index.remove(hits[1].model)
    assert [hit.model for hit in index.search("m0005", 4)] == [hit.model for hit in hits[2:]]
    for number in range(400, 2500):  # more than a GPU's answers could leave out
        if f"m{number:04d}" in index.names:
            index.remove(f"m{number:04d}")
    made[0].asked.clear()
    assert {int(hit.model[1:]) for hit in index.search("m0005", 600)}.isdisjoint(range(400, 2500))
    assert not made[0].asked


def test_batches_are_asked_at_once_and_equal(stands):
    made = stands(MOST)
    space = make_space(lineage(np.random.default_rng(5), 1000, N))
    index = KLIndex.build(space, "exact")
    names = list(space.models[:70])
    made[0].asked.clear()
    several = index.search(names, 5)
    assert len(made[0].asked) == 3
    assert several == KLIndex.build(space, "certified").search(names, 5)


def test_a_gpu_that_is_wrong_is_noticed_and_not_used(stands):
    made = stands(1000.0)
    space = make_space(lineage(np.random.default_rng(6), 500, N))
    with pytest.warns(LlfastWarning, match="without the GPU: its distances are farther"):
        index = KLIndex.build(space, "exact")
    made[0].asked.clear()
    assert_exact(space, index, "m0003", space.coordinates[3], "m0003", 10)
    assert not made[0].asked


@pytest.mark.parametrize("call", ["add", "search"])
def test_a_gpu_without_memory_is_not_used(stands, monkeypatch, call):
    stands()

    def fail(*_):
        raise RuntimeError("cudaMalloc error out of memory\nand more")

    monkeypatch.setattr(Stand, call, fail)
    space = make_space(lineage(np.random.default_rng(6), 300, N))
    with pytest.warns(
        LlfastWarning, match="go on without the GPU: cudaMalloc error out of memory$"
    ):
        index = KLIndex.build(space, "exact")
    assert_exact(space, index, "m0003", space.coordinates[3], "m0003", 10)


def test_a_gpu_that_fails_later_is_not_asked_again(stands, monkeypatch):
    made = stands()
    space = make_space(lineage(np.random.default_rng(6), 300, N))
    index = KLIndex.build(space, "exact")

    def fail(self, *_):
        self.asked.append(0)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Stand, "search", fail)
    made[0].asked.clear()
    with pytest.warns(LlfastWarning, match="without the GPU: out of memory$"):
        assert_exact(space, index, "m0003", space.coordinates[3], "m0003", 10)
    assert_exact(space, index, "m0003", space.coordinates[3], "m0003", 10)
    assert made[0].asked == [0]


def test_another_process_searches_without_it(stands, monkeypatch):
    made = stands()
    space = make_space(lineage(np.random.default_rng(6), 300, N))
    index = KLIndex.build(space, "exact")
    made[0].asked.clear()
    monkeypatch.setattr(gpu.os, "getpid", lambda: -1)
    assert_exact(space, index, "m0003", space.coordinates[3], "m0003", 10)
    assert not made[0].asked


def test_a_damaged_segment_is_refused_before_a_gpu_has_it(stands, tmp_path):
    made = stands()
    store = make_store(tmp_path / "store", 40)
    path = KLIndex.build(store, "exact", device="cpu").segment.folder / "points.f32"
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(SearchError, match="refit=True"):
        KLIndex.build(store, "exact")
    assert not made


def test_a_condition_is_asked_of_the_gpu_while_it_leaves_enough(stands):
    pytest.importorskip("duckdb", reason="duckdb is an extra: pip install 'llfast[cpu]'")
    made = stands(MOST)
    space = make_space(lineage(np.random.default_rng(9), 3000, N))
    index, other = KLIndex.build(space, "exact"), KLIndex.build(space, "certified")
    made[0].asked.clear()
    for where, times in (("model > 'm0500'", 1), ("model > 'm2500'", 1), ("model like '%77'", 1)):
        hits = index.search("m2800", 10, where=where)
        assert hits == other.search("m2800", 10, where=where)
        assert len(made[0].asked) == times
    assert hits.certificate.compared == hits.certificate.models == 30


def test_it_is_used_where_it_is_asked_for_alone(stands):
    made = stands()
    space = make_space(lineage(np.random.default_rng(7), 300, N))
    KLIndex.build(space, "certified")
    KLIndex.build(space, "exact", device="cpu")
    assert not made
    with pytest.raises(ValueError, match="device must be auto or cpu, got 'cuda:1'"):
        KLIndex.build(space, "exact", device="cuda:1")


def test_an_index_of_a_store_on_a_gpu_follows_it(stands, tmp_path):
    made = stands(MOST)
    store = make_store(tmp_path / "store", 40)
    index = KLIndex.build(store, "exact")
    assert_right(index, store)
    index.add(index_result(40))
    store.remove(["model 003"])
    index.refresh()
    assert_right(index, store)
    assert len(made) == 1
    index.merge()
    assert len(made) == 2
    assert_right(index, store)


@pytest.mark.parametrize(
    ("gpus", "free", "tf32", "nbytes", "expected"),
    [
        (1, 10 << 30, None, 4 << 30, True),
        (0, 10 << 30, None, 4 << 30, False),
        (1, 4 << 30, None, 4 << 30, False),
        (1, 10 << 30, "1", 4 << 30, False),
        (1, 10 << 30, None, 1 << 20, False),
    ],
)
def test_a_gpu_has_room_or_not(monkeypatch, gpus, free, tf32, nbytes, expected):
    faiss = SimpleNamespace(StandardGpuResources=object, get_num_gpus=lambda: gpus)
    monkeypatch.setattr(gpu, "import_faiss", lambda: faiss)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (free, 80 << 30))
    if tf32 is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", tf32)
    assert gpu.has_room(nbytes) == expected
    del faiss.StandardGpuResources  # that of faiss-cpu
    assert not gpu.has_room(nbytes)


def test_reach_is_above_what_products_in_fp32_give():
    rng = np.random.default_rng(8)
    rows = (1000 * rng.standard_normal((300, 2000))).astype(np.float32)
    query = rows[0] + rng.standard_normal(2000).astype(np.float32)
    sums = [np.add.accumulate(each, axis=-1)[..., -1] for each in (query**2, rows**2, rows * query)]
    squares = sums[0] + sums[1] - 2 * sums[2]
    truth = np.linalg.norm(rows.astype(np.float64) - query, axis=1)
    norms = np.linalg.norm(query) + np.linalg.norm(rows, axis=1)
    assert abs(squares[0] / truth[0] ** 2 - 1) > 0.01, "the error must be there to be bounded"
    for square, distance, size in zip(squares.tolist(), truth, norms, strict=True):
        limit = gpu.gpu_reach(float(distance), 2000, float(size), 0.0)
        assert square <= limit
        assert square >= 2 * distance**2 - limit

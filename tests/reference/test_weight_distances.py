"""Distances between weights against safetensors' own loading of whole files."""

import json
import shutil
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llfast import CheckpointError, UnsupportedModelError, weight_distances
from llfast.checkpoint import Checkpoint
from llfast.weight_distances import squared_weight_distances

SHAPES = {"embed": (37, 8), "layer.0": (8, 8, 3), "norm": (8,), "scalar": (), "empty": (0, 8)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(folder, weights, *, shards=1, config=None):
    """An opened checkpoint that holds just these tensors, in their order."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {}))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return Checkpoint.open(folder)
    names = list(weights)
    index = {}
    for shard in range(shards):
        file = f"model-{shard}.safetensors"
        own = {name: weights[name] for name in names[shard::shards]}
        save_file(own, folder / file)
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return Checkpoint.open(folder)


def draw(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def truth(checkpoints):
    """By loading all of it, in fp64."""
    points = []
    for checkpoint in checkpoints:
        weights = {}
        for path in checkpoint.weights:
            weights |= load_file(path)
        kept = [weights[name] for name in sorted(weights) if weights[name].is_floating_point()]
        points.append(torch.cat([each.double().flatten() for each in kept]).numpy())
    return np.square(np.array(points)[:, None] - np.array(points)).sum(axis=2)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(weight_distances, "_PIECE_BYTES", 8 * 4 * 11)
    monkeypatch.setattr(weight_distances, "_BLOCK_VALUES", 15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_are_those_of_whole_files(tmp_path, dtype):
    checkpoints = [make(tmp_path / str(seed), draw(seed, dtype)) for seed in range(4)]
    found = squared_weight_distances(checkpoints)
    assert found[0, 1] > 100
    np.testing.assert_allclose(found, truth(checkpoints), rtol=1e-12)


@pytest.mark.usefixtures("small_pieces")
def test_dtypes_shards_and_orders_of_tensors_may_be_mixed(tmp_path):
    checkpoints = []
    for seed, dtype in enumerate(DTYPES):
        weights = draw(seed, dtype) | {"mask": torch.arange(5) * seed, "on": torch.tensor(seed > 1)}
        if seed == 1:
            weights = dict(reversed(weights.items()))
        checkpoints.append(make(tmp_path / str(seed), weights, shards=1 + seed % 2 * 2))
    found = squared_weight_distances(checkpoints)
    np.testing.assert_allclose(found, truth(checkpoints), rtol=1e-12)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_array_equal(np.diag(found), 0)


@pytest.mark.usefixtures("small_pieces")
def test_only_pairs_that_are_asked_for_are_compared(tmp_path):
    checkpoints = [make(tmp_path / str(seed), draw(seed)) for seed in range(4)]
    whole = squared_weight_distances(checkpoints)
    found = squared_weight_distances(checkpoints, [(0, 1), (3, 1), (1, 0), (2, 2)])
    asked = np.eye(4, dtype=bool)
    asked[[0, 1, 3, 1], [1, 0, 1, 3]] = True
    np.testing.assert_array_equal(np.isfinite(found), asked)
    np.testing.assert_allclose(found[asked], whole[asked], rtol=1e-12)
    np.testing.assert_array_equal(np.isfinite(squared_weight_distances(checkpoints, [])), np.eye(4))
    for pair in ((0, 4), (-1, 2)):
        with pytest.raises(ValueError, match="pairs must be of places in 4 checkpoints, got"):
            squared_weight_distances(checkpoints, [pair])


def test_close_checkpoints_do_not_cancel(tmp_path):
    weights = {"a": torch.full((1000,), 1e3, dtype=torch.float64)}
    near = {"a": weights["a"] + 1e-6}
    pair = [make(tmp_path / "a", weights), make(tmp_path / "b", near)]
    assert squared_weight_distances(pair)[0, 1] == pytest.approx(1000 * 1e-12, rel=1e-4)


def test_memory_is_that_of_a_piece_and_every_byte_is_read_once(tmp_path, monkeypatch):
    shapes = {"a": (1 << 20,), "b": (3, 1 << 18)}
    checkpoints = [
        make(tmp_path / str(seed), draw(seed, torch.bfloat16, shapes)) for seed in range(4)
    ]
    truly = truth(checkpoints)
    read, fromfile = [], np.fromfile

    def recorded(path, kind, count, *, offset):
        values = fromfile(path, kind, count, offset=offset)
        read.append((path, offset, offset + values.nbytes))
        return values

    monkeypatch.setattr(np, "fromfile", recorded)
    monkeypatch.setattr(weight_distances, "_PIECE_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        found = squared_weight_distances(checkpoints)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(found, truly, rtol=1e-12)
    assert peak < 4 << 20  # a piece, one row of it as it is stored, and a block; files are 14 MiB
    assert len(read) == len(set(read))
    for checkpoint in checkpoints:
        own = sorted((begin, end) for path, begin, end in read if path == checkpoint.weights[0])
        assert all(end == begin for (_, end), (begin, _) in pairwise(own))
        assert own[-1][1] - own[0][0] == sum(t.end - t.begin for t in checkpoint.tensors.values())


def test_the_same_infinity_everywhere_is_no_difference(tmp_path):
    weights = [draw(seed) for seed in range(3)]
    for each in weights:
        each["norm"][2] = -torch.inf
    checkpoints = [make(tmp_path / str(row), each) for row, each in enumerate(weights)]
    found = squared_weight_distances(checkpoints)
    for each in weights:
        each["norm"][2] = 0
    finite = [make(tmp_path / f"f{row}", each) for row, each in enumerate(weights)]
    np.testing.assert_allclose(found, truth(finite), rtol=1e-12)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_refused_by_name(tmp_path, value):
    spoilt = draw(1)
    spoilt["layer.0"][3, 2, 1] = value
    checkpoints = [make(tmp_path / "good", draw(0)), make(tmp_path / "bad", spoilt)]
    with pytest.raises(CheckpointError, match="bad/model.safetensors must hold finite .*'layer.0'"):
        squared_weight_distances(checkpoints)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": (9,)}, r"got \[9\] for 'norm', where that has \[8\]"),
        ({"norm": None}, r"got none for 'norm', where that has \[8\]"),
        ({"more": (2,)}, r"got \[2\] for 'more', where that has none"),
    ],
)
def test_other_names_and_shapes_are_refused_by_name(tmp_path, change, message):
    shapes = {name: shape for name, shape in (SHAPES | change).items() if shape is not None}
    checkpoints = [make(tmp_path / "a", draw(0)), make(tmp_path / "b", draw(1, shapes=shapes))]
    with pytest.raises(CheckpointError, match=f"/b must hold weights .* of .*/a .*{message}"):
        squared_weight_distances(checkpoints)


def test_what_is_not_plain_is_refused_by_name(tmp_path):
    plain = make(tmp_path / "plain", draw(0))
    weights = draw(1, shapes={"linear.weight": (4, 4)})
    weights["linear.weight"] = weights["linear.weight"].to(torch.float8_e4m3fn)
    settings = {"quant_method": "fp8", "weight_block_size": None}
    scaled = weights | {"linear.weight_scale_inv": torch.ones(())}
    fp8 = make(tmp_path / "fp8", scaled, config={"quantization_config": settings})
    assert fp8.quantised
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
    pickled = Checkpoint.open(tmp_path / "pickle", allow_pickle=True)
    for other, what in ((fp8, "fp8"), (pickled, "pickled")):
        with pytest.raises(UnsupportedModelError, match=f"{other.folder.name} .* got {what} ones"):
            squared_weight_distances([plain, other])
    bare = make(tmp_path / "bare", weights)
    with pytest.raises(UnsupportedModelError, match="got 'linear.weight' in F8_E4M3"):
        squared_weight_distances([bare, bare])


def test_fewer_than_two_and_files_that_have_changed_are_refused(tmp_path):
    one, two = (make(tmp_path / str(seed), draw(seed)) for seed in range(2))
    for few in ([], [one]):
        with pytest.raises(ValueError, match=f"checkpoints must be at least two, got {len(few)}"):
            squared_weight_distances(few)
    path = two.weights[0]
    (other,) = make(tmp_path / "2", draw(2)).weights
    shutil.copyfile(other, path)  # as long as it was
    with pytest.raises(CheckpointError, match="1 must stay as it is .* got other files"):
        squared_weight_distances([one, two])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="1/model.safetensors must hold '.*' whole, got"):
        squared_weight_distances([one, two])
    path.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        squared_weight_distances([one, two])

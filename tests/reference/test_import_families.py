"""From a file of bits per byte to nearest neighbours, against plain numpy on the file's numbers."""

import ast
import csv
import math

import numpy as np

from llfast import KLIndex, ModelSpace
from llfast.importing import import_matrix


def neighbours(nats):
    """By plain numpy: clip at the 2 % quantile, centre both ways, look at every difference."""
    clipped = np.maximum(nats, np.quantile(nats, 0.02))
    centred = clipped - clipped.mean(axis=1, keepdims=True)
    centred -= centred.mean(axis=0)
    distances = np.array([((centred - row) ** 2).sum(axis=1) for row in centred])
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(axis=1)


def check_neighbours(matrix, bits):
    """The index and the space find those that plain numpy finds in the file's own numbers."""
    expected = neighbours(-bits)
    space = ModelSpace.fit(matrix)
    distances = space.squared_distances()
    np.fill_diagonal(distances, np.inf)
    assert distances.argmin(axis=1).tolist() == expected.tolist()
    index = KLIndex.build(space)
    hits = [index.search(model, k=1)[0].model for model in matrix.models]
    assert hits == [matrix.models[row] for row in expected]
    return expected


def test_imported_models_are_nearest_to_their_families(tmp_path):
    # Five families of three: what a family has learnt, a little of each model's own, and how able
    # it is, which lifts or lowers all texts and says nothing of its family.
    rng = np.random.default_rng(1)
    families = np.repeat(["ash", "beech", "cedar", "date", "elm"], 3)
    bits = 0.8 + 0.1 * rng.standard_normal(60) + 0.08 * rng.standard_normal((5, 60)).repeat(3, 0)
    bits = np.abs(bits + 0.03 * rng.standard_normal((15, 60)) + 0.3 * rng.random((15, 1)))
    names = [str((str(family), f"{family}/{row}")) for row, family in enumerate(families)]
    columns = [[f"text {row}" for row in range(60)], *bits.tolist()]
    path = tmp_path / "m.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", *names], *zip(*columns, strict=True)])
    matrix = import_matrix(path, unit="bits_per_byte", text_bytes=972.3188)
    assert [each["family"] for each in matrix.metadata] == families.tolist()
    found = check_neighbours(matrix, bits)
    assert (families[found] == families).all()
    raw = np.array([((bits - row) ** 2).sum(axis=1) for row in bits]) + np.diag([np.inf] * 15)
    assert (families[raw.argmin(axis=1)] == families).mean() < 0.9, "the raw numbers say less"


def test_real_models_are_imported_as_they_are(shared_data):
    path = shared_data / "bpb_90x263" / "bits_per_byte.csv"
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    bits = np.array([[float(cell) for cell in row[1:]] for row in rows]).T
    pairs = [ast.literal_eval(name) for name in header[1:]]
    matrix = import_matrix(path, unit="bits_per_byte", text_bytes="972")
    assert matrix.values.shape == (90, 263)
    np.testing.assert_array_equal(matrix.values, -bits * 972.0 * math.log(2.0))
    names = [model for _, model in pairs]
    for row in (47, 64):
        assert names[row] == "LLM360/Amber", "it is there under two families"
        names[row] += f" ({pairs[row][0]})"
    assert matrix.models == tuple(names)
    assert [each["family"] for each in matrix.metadata] == [family for family, _ in pairs]
    assert matrix.ids == tuple(row[0] for row in rows)
    found = check_neighbours(matrix, bits)
    families = np.array([family for family, _ in pairs])
    kin = [row for row, family in enumerate(families) if (families == family).sum() > 1]
    assert len(kin) == 67
    assert sum(families[row] == families[found[row]] for row in kin) == 42
    names = [model.partition("/")[2] for model in matrix.models]
    for name in ("typhoon-7b", "Mistral_Pro_8B_v0.1"):
        assert names[found[names.index(name)]] == "Mistral-7B-v0.1"

"""Synthetic collections of models: who descends from whom, and how far apart they come to lie."""

import json
from itertools import chain

import numpy as np
import pytest

from tests.conftest import ROOT

MODELS, TEXTS = 1000, 1000


@pytest.fixture(scope="module")
def synthetic():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import synthetic

        yield synthetic


@pytest.fixture(scope="module")
def report(synthetic):
    import synthetic_report

    return synthetic_report


@pytest.fixture(scope="module", params=["zipf", "half"])
def described(request, synthetic, report):
    """(collection, its space, names by number, pairs by relation)."""
    recipe = synthetic.Recipe(models=MODELS, texts=TEXTS, families=request.param)
    collection = synthetic.Collection(recipe)
    space = report.fit(collection, np.arange(MODELS))
    names = dict(enumerate(space.models))
    return collection, space, names, report.make_pairs(collection.lineage)


def gather(synthetic, recipe, rows):
    names, metadata, values = zip(*synthetic.blocks(recipe, rows=rows), strict=True)
    return list(chain(*names)), list(chain(*metadata)), np.concatenate(values)


def test_values_depend_on_the_recipe_alone(synthetic):
    recipe = synthetic.Recipe(models=150, texts=301)
    names, metadata, values = gather(synthetic, recipe, 256)
    assert values.shape == (150, 301)
    for rows in (1, 7, 64):
        again = gather(synthetic, recipe, rows)
        assert (again[0], again[1]) == (names, metadata)
        assert np.array_equal(again[2], values), "to the last bit, in blocks of any size"
    one_by_one = synthetic.Collection(recipe)
    model = one_by_one.order()[17]
    assert np.array_equal(one_by_one.values([model])[0], values[17])
    other = gather(synthetic, synthetic.Recipe(models=150, texts=301, seed=1), 256)
    assert other[0] != names
    assert not np.isclose(other[2], values).any(axis=1).all()


def test_blocks_are_of_the_size_asked_for(synthetic):
    recipe = synthetic.Recipe(models=10, texts=20)
    assert [len(names) for names, _, _ in synthetic.blocks(recipe, rows=4)] == [4, 4, 2]
    assert [values.shape for _, _, values in synthetic.blocks(recipe, rows=20)] == [(10, 20)]
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        next(synthetic.blocks(recipe, rows=0))


def test_rows_are_not_sorted_by_family(synthetic):
    _, metadata, _ = gather(synthetic, synthetic.Recipe(models=400, texts=20), 256)
    families = [row["family"] for row in metadata]
    largest = max(families, key=families.count)
    places = [place for place, family in enumerate(families) if family == largest]
    assert 100 < np.mean(places) < 300
    assert max(places) - min(places) > 350


@pytest.mark.parametrize("families", ["zipf", "half"])
def test_names_are_unique_and_parents_exist(synthetic, families):
    recipe = synthetic.Recipe(models=5000, texts=20, families=families)
    names, metadata, _ = gather(synthetic, recipe, 256)
    assert len(set(names)) == 5000
    assert all(name.count("/") == 1 for name in names)
    of = dict(zip(names, metadata, strict=True))
    for name, row in of.items():
        assert set(row) == {"family", "parent", "relation", "parameters", "dtype", "step"}
        assert (row["parent"] is None) == (row["relation"] in ("base", "size", "seed"))
        assert (row["step"] is None) == (row["relation"] != "checkpoint")
        if row["parent"]:
            parent = of[row["parent"]]
            assert row["parent"] != name
            assert (parent["family"], parent["parameters"]) == (row["family"], row["parameters"])
            assert parent["relation"] not in ("checkpoint", "duplicate", "quantised")
    assert {row["relation"] for row in metadata} == set(
        "base size seed checkpoint fine-tune duplicate quantised".split()
    )
    assert depth_of_fine_tunes(of) == 4
    bases = [row["family"] for row in metadata if row["relation"] == "base"]
    assert sorted(bases) == sorted({row["family"] for row in metadata}), "one a family"


def depth_of_fine_tunes(of):
    def depth(row):
        return depth(of[row["parent"]]) + 1 if row["relation"] == "fine-tune" else 0

    return max(map(depth, of.values()))


def test_shares_of_families(synthetic):
    for models in (1, 2, 3, 10, 999, 100_000):
        for families in ("zipf", "half"):
            sizes = synthetic.family_sizes(synthetic.Recipe(models=models, families=families))
            assert sizes.sum() == models
            assert sizes.min() >= 1
    half = synthetic.family_sizes(synthetic.Recipe(models=1001, families="half"))
    assert half[0] == 500
    assert half[1] < 150
    sizes = synthetic.family_sizes(synthetic.Recipe(models=100_000))
    assert len(sizes) == round(100_000**0.75)
    assert (np.diff(sizes) <= 0).all()
    # One model a family is given ahead; what is left goes by the n-th's share of n^-1.1.
    assert (sizes[0] - 1) / (sizes[9] - 1) == pytest.approx(10**1.1, rel=0.01)
    _, metadata, _ = gather(synthetic, synthetic.Recipe(models=300, texts=20, families="half"), 256)
    families = [row["family"] for row in metadata]
    assert max(map(families.count, set(families))) == 150


def test_recipes_are_checked(synthetic):
    with pytest.raises(ValueError, match="families must be one of zipf, half, got 'flat'"):
        synthetic.Recipe(models=10, families="flat")
    for wrong in ({"models": 0}, {"models": 5, "texts": 19}, {"models": 5, "seed": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            synthetic.Recipe(**wrong)


def test_values_are_negative_and_finite(described):
    collection = described[0]
    values = collection.values(np.arange(MODELS))
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert values.max() < 0
    assert -900 < np.median(values) < -600


def test_values_of_easy_texts_are_negative_too(synthetic, monkeypatch):
    monkeypatch.setattr(synthetic, "LEVEL", -60.0)  # less than models differ by
    values = synthetic.Collection(synthetic.Recipe(models=50, texts=300)).values(range(50))
    assert values.max() < 0
    assert (values > -2).any()


def test_divergences_by_relation_are_as_published(described, report):
    _, space, names, pairs = described
    medians = {
        kind: np.median(report.divergences(space, names, pairs[kind][:120]))
        for kind in report.PUBLISHED
    }
    for kind, published in report.PUBLISHED.items():
        assert published / 1.5 < medians[kind] < published * 1.5, (kind, medians)


def test_duplicates_are_their_sources_to_the_bit(described):
    collection, _, _, pairs = described
    copies, sources = pairs["duplicate"].T
    assert len(copies) > 20
    assert np.array_equal(collection.values(copies), collection.values(sources))


def test_quantised_twins_are_in_their_range(described, report):
    _, space, names, pairs = described
    found = report.divergences(space, names, pairs["quantised twin"])
    assert len(found) > 30
    assert found.min() > 1e-5
    assert found.max() < 1e-3
    assert found.max() / found.min() > 10


def test_spectrum_and_tails_are_like_real_ones(described, report):
    _, space, names, pairs = described
    found = report.dimensions(space.coordinates)
    assert 42 / 1.25 < found[0.9] < 42 * 1.25, found
    assert found[0.99] > 3 * found[0.9], "what is left is spread over many directions"
    assert np.median(report.kurtosis(space, names, pairs["random pairs"])) > 4


def test_written_files_hold_what_blocks_give(synthetic, tmp_path):
    recipe = synthetic.Recipe(models=300, texts=21)
    synthetic.write(recipe, tmp_path / "c.npy")
    names, metadata, values = gather(synthetic, recipe, 50)
    written = np.load(tmp_path / "c.npy", mmap_mode="r")
    assert written.dtype == np.float32
    assert np.array_equal(written, values)
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    expected = [{"name": name, **row} for name, row in zip(names, metadata, strict=True)]
    assert rows == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "c.npy"]
    with pytest.raises(ValueError, match=r"path must end in \.npy, got .*c\.jsonl"):
        synthetic.write(recipe, tmp_path / "c.jsonl")


def test_files_are_whole_or_not_there(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "blocks", lambda recipe: iter([([], [], 1 / 0)]))
    with pytest.raises(ZeroDivisionError):
        synthetic.write(synthetic.Recipe(models=300, texts=21), tmp_path / "c.npy")
    assert list(tmp_path.iterdir()) == []


def test_report_prints_what_is_known_beside_what_was_published(synthetic, report):
    recipe = synthetic.Recipe(models=200, texts=100)
    lines = list(report.report(synthetic.Collection(recipe)))
    text = "\n".join(lines)
    assert lines[0] == "200 models x 100 texts, seed 0"
    assert "families: 53, of one model" in text
    assert "published 42" in text
    for kind, published in report.PUBLISHED.items():
        (line,) = (each for each in lines if each.startswith(kind))
        assert line.split()[-1] == f"{published:.3g}" or line.split()[-1] == "0"
    alone = synthetic.Collection(synthetic.Recipe(models=1, texts=20))
    assert list(report.report(alone))[1] == "families: 1, of one model 1; largest 1"

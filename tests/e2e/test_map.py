"""`llfast map` on stores of every kind, as one types it."""

import json

import numpy as np
import pytest

from llfast import LogLikelihoodMatrix, Store
from tests.stores import DIGEST, add_together, numbers

N = 8
MODELS = [f"m{row}" for row in range(12)]


@pytest.fixture
def made(tmp_path):
    store = Store(tmp_path / "made")
    add_together(store, MODELS)
    return store.folder


def store_of(folder, values, metadata=()):
    store = Store(folder)
    k = len(values)
    store.add_matrix(
        LogLikelihoodMatrix(
            [f"m{row}" for row in range(k)],
            np.array(values),
            np.full(N, 100.0),
            metadata,
            ids=[f"text {row}" for row in range(N)],
            textset_digest=DIGEST,
            convention="paper",
        )
    )
    return folder


def test_all_that_is_asked_for_is_written_and_told(command, made, tmp_path):
    files = [tmp_path / name for name in ("map.html", "map.png", "tree.svg", "places.json")]
    page, picture, tree, places = files
    options = ("--dendrogram", tree, "--places", places, "--title", "A <b>map", "--colour", "")
    run = command("map", "--store", made, "--out", page, "--out", picture, *options)
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith("12 models on 8 texts, by t-SNE of perplexity 3.67, seed 0.")
    assert all(str(path) in run.out and path.stat().st_size > 500 for path in files)
    assert "<title>A &lt;b&gt;map</title>" in page.read_text()
    stayed = command("map", "--store", made, "--out", page, "--places", places, "--json").json
    assert [each["model"] for each in stayed["models"]] == sorted(MODELS)
    kept = {each["model"]: each["place"] for each in json.loads(places.read_text())["models"]}
    assert {each["model"]: each["place"] for each in stayed["models"]} == kept


SAME = [numbers("one", N)] * 6


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([numbers("a", N)], "", "a map by tsne must have 4 models, got 1; score more of them"),
        (
            [numbers("a", N)],
            "--method pca",
            "a map by pca must have 2 models, got 1; score more of them",
        ),
        (
            [numbers("a", N), numbers("b", N)],
            "",
            "a map by tsne must have 4 models, got 2; score more of them",
        ),
        (SAME, "", "models must differ to have places, got 6 that are the same"),
        (SAME, "--method mds", "models must differ to have places, got 6 that are the same"),
    ],
)
def test_stores_without_a_map_are_told_so_in_one_line(command, tmp_path, values, options, message):
    store, out = store_of(tmp_path / "store", values), tmp_path / "map.html"
    run = command("map", "--store", store, "--out", out, *options.split())
    assert (run.code, run.out, run.error) == (1, "", f"llfast: error: {message}")
    assert not out.exists()


def test_two_models_have_a_map_by_pca(command, tmp_path):
    store = store_of(tmp_path / "store", [numbers("a", N), numbers("b", N)])
    run = command("map", "--store", store, "--out", tmp_path / "map.png", "--method", "pca")
    assert (run.code, run.err) == (0, "")
    assert "PCA, which keeps 100% of the variance" in run.out


def test_metadata_with_holes_and_of_every_kind_are_no_trouble(command, tmp_path):
    metadata = [
        {"family": "a", "step": float("nan"), "run": ["x"], "parents": {"m1": 2}},
        {},
        {"family": None, "huge": 10**400, "parents": "m0", "": 1},
        {"family": "unknown", "nested": {"a": [1, {"b": None}]}, "__proto__": "x", "flag": True},
        {"family": "_hidden", "step": 10**400, "run": "r", "constructor": "y"},
        {"family": "\ud800", "text": "y" * 100_000, "step": 1, "run": "r"},
    ]
    values = [numbers(f"{row}", N) for row in range(6)]
    store = store_of(tmp_path / "store", values, metadata)
    files = ("--out", tmp_path / "map.html", "--out", tmp_path / "map.png")
    run = command("map", "--store", store, *files, "--method", "pca")
    assert (run.code, run.err) == (0, "")
    assert all(path.stat().st_size > 1000 for path in tmp_path.glob("map.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--out {}/map.gif", "a map must be written as .html, .png, .svg or .pdf, got '"),
        ("--out {}/a.html --out {}/a.html", "files must be different, got '"),
        ("--out {}/no/map.html", "[Errno 2] There is no such folder: '"),
        ("--out {}", "a map must be written as .html, .png, .svg or .pdf, got '"),
        ("--out {}/a.png --colour nope", "colour must be a column of the models' metadata (none)"),
        ("--out {}/a.html --method umap", "method must be one of tsne, pca, mds, got 'umap'"),
        ("--out {}/a.html --perplexity 0", "perplexity must be at least 1, and finite, got 0.0"),
        ("--out {}/a.html --perplexity nan", "perplexity must be at least 1, and finite, got nan"),
        ("--out {}/a.html --seed 4294967296", "seed must be from 0 to 2^32 - 1, got 4294967296"),
        ("--out {}/a.html --places {}", "[Errno 21] A map is written to a file: '"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(command, made, tmp_path, options, message):
    before = set(tmp_path.rglob("*"))
    run = command("map", "--store", made, *options.replace("{}", str(tmp_path)).split())
    assert (run.code, run.out) == (1, "")
    assert run.error.startswith(f"llfast: error: {message}")
    assert set(tmp_path.rglob("*")) == before

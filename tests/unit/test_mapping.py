"""Maps of stores: what stays where it is, what is beside what, and lines."""

import json
import logging

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.image import imread

from llfast import KLIndex, LlfastWarning, ModelSpace, SpaceError, Store, map_plots
from llfast.drawing import PALETTE, REST
from llfast.map_files import map_store
from llfast.map_plots import draw_map
from llfast.mapping import lines_of, make_map
from llfast.places import Places
from tests.spaces import make_matrix, make_result

N = 50


def collection(count=24, seed=0, families=4):
    rng = np.random.default_rng(seed)
    family = rng.standard_normal((families, N))
    values = -700 + 30 * family[np.arange(count) % families] + 3 * rng.standard_normal((count, N))
    metadata = [{"family": f"f{row % families}"} for row in range(count)]
    revisions = [f"r{row}" for row in range(count)]
    return make_matrix(values, metadata=metadata, revisions=revisions)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    store.add_matrix(collection())
    return store


def test_the_nearest_five_are_those_of_a_search_with_their_intervals():
    matrix = collection()
    found = make_map(matrix, method="pca")
    index = KLIndex.build(ModelSpace.fit(matrix), "exact")
    for model, near in zip(found.models, found.nearest, strict=True):
        hits = index.search(model, 5)
        assert [found.models[row] for row, _ in near] == [hit.model for hit in hits]
        for (_, kl), hit in zip(near, hits, strict=True):
            assert kl.value == pytest.approx(hit.kl, rel=1e-6)
            assert kl.interval == pytest.approx(hit.interval, rel=1e-4)
    bits = -matrix.values.sum(axis=1) / (np.log(2) * matrix.text_bytes.sum())
    np.testing.assert_allclose(found.bits_per_byte, bits)


@pytest.mark.parametrize("method", ["pca", "mds"])
def test_squared_distances_on_a_plane_are_kl(method):
    rng = np.random.default_rng(1)
    plane = rng.standard_normal((9, 2)) @ rng.standard_normal((2, N))
    matrix = make_matrix(np.concatenate([plane - 700, plane[:1] - 700]))  # two are the same
    space = ModelSpace.fit(matrix)
    found = make_map(matrix, method=method)
    squared = ((found.places[:, None] - found.places) ** 2).sum(axis=2)
    kl = space.kl_matrix()
    assert (squared <= kl + 1e-9).all(), "never farther than they are"
    told = float(found.notes.partition("keeps ")[2].partition("%")[0]) / 100
    assert squared.sum() / kl.sum() == pytest.approx(told, abs=0.006)


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_models_of_an_earlier_map_stay_and_new_ones_come_to_their_family(tmp_path, store, method):
    places = tmp_path / "places.json"
    before = map_store(store.folder, [], places=places, method=method)
    store.add_matrix(make_matrix(
        collection(32).values[24:], models=[f"new {row}" for row in range(8)],
        metadata=[{"family": f"f{row % 4}"} for row in range(8)],
    ))  # fmt: skip
    after = map_store(store.folder, [], places=places, method="mds")  # the file's method counts
    assert after.method == method
    was = dict(zip(before.models, before.places.tolist(), strict=True))
    now = dict(zip(after.models, after.places.tolist(), strict=True))
    assert {model: now[model] for model in was} == was
    families = [row["family"] for row in after.metadata]
    squared = ((after.places[:, None] - after.places) ** 2).sum(axis=2)
    np.fill_diagonal(squared, np.inf)
    nearest = [families[row] for row in squared.argmin(axis=1)]
    assert [nearest[r] for r, m in enumerate(after.models) if m.startswith("new")] == [
        f"f{row % 4}" for row in range(8)
    ]
    assert "8 new among 24 that stayed" in after.notes or method == "pca"
    assert len(Places.load(places).places) == 32


def test_a_model_whose_weights_have_changed_is_placed_anew(tmp_path, store):
    places = tmp_path / "places.json"
    map_store(store.folder, [], places=places, method="pca")
    fields = json.loads(places.read_bytes())
    fields["models"][3] |= {"revision": "other weights", "place": [1e6, 1e6]}
    places.write_text(json.dumps(fields))
    found = map_store(store.folder, [], places=places)
    assert np.abs(found.places).max() < 1e4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b"{}", "KeyError"),
        (b'{"kind": "other"}', "kind 'other'"),
        (b"[" * 100_000, "RecursionError"),
        (b'"\xff"', "UnicodeDecodeError"),
    ],
)
def test_other_files_are_no_places(tmp_path, store, content, reason):
    path = tmp_path / "places.json"
    path.write_bytes(content)
    with pytest.raises(SpaceError, match=rf"places.json must be a file of places.*{reason}"):
        map_store(store.folder, [], places=path)
    assert path.read_bytes() == content


def row(place, model="a"):
    return {"model": model, "revision": "", "place": place}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "umap"},
        {"models": [row([0, float("nan")])]},
        {"models": [row([0])]},
        {"models": [row([0, 10**400])]},
        {"models": [row([1e300, 0])]},
        {"models": [row("12")]},
        {"models": [row([True, False])]},
        {"models": [row([0, 1]), row([2, 3])]},
        {"perplexity": "many"},
        {"perplexity": float("nan")},
        {"perplexity": -5},
    ],
)
def test_damaged_places_are_refused(tmp_path, store, changes):
    path = tmp_path / "places.json"
    map_store(store.folder, [], places=path, method="pca")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    with pytest.raises(SpaceError, match="must be a file of places"):
        map_store(store.folder, [], places=path)


def test_places_of_other_texts_or_models_are_refused(tmp_path, store):
    path = tmp_path / "places.json"
    map_store(store.folder, [], places=path, method="pca")
    fields = json.loads(path.read_bytes())
    for change, message in (
        ({"textset": "others"}, "places must be those of models on text set texts under 'paper'"),
        ({"models": []}, "places must be those of 2 models of the store, got 0 of them"),
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(SpaceError, match=message):
            map_store(store.folder, [], places=path)


def test_lines_follow_runs_layers_and_parents():
    metadata = [
        {"run": "a", "step": 20},
        {"run": "a", "step": 3.0},
        {"run": "b", "step": 1},
        {"layer_of": "m", "layer": 1, "run": "a", "step": 20, "parents": "m2"},
        {"layer_of": "m", "layer": 0, "run": "a", "step": 20, "parents": "m2"},
        {"parents": ["m0", "gone", 5, "m5"]},
        {"parents": "m2", "run": "a", "step": "late"},
        {"parents": 7, "run": "a", "step": float("nan")},
        {"run": None, "step": 1},
        {"run": None, "step": 10**400},
        {"run": ["a"], "step": True},
    ]
    models = [f"m{row}" for row in range(len(metadata))]
    assert lines_of(models, metadata) == [[1, 0], [4, 3], [0, 5], [2, 6]]


def test_a_map_of_texts_without_bytes_is_in_nats(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    store.add_matrix(make_matrix(collection().values, text_bytes=np.zeros(N)))
    labels = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set_xlabel", lambda _, label, **__: labels.append(label)
    )
    files = [tmp_path / "map.png", tmp_path / "map.html"]
    found = map_store(store.folder, files, dendrogram=tmp_path / "tree.png", method="pca")
    assert found.axes == ("first axis (√ nats/text)", "second (√ nats/text)")
    assert np.isnan(found.bits_per_byte).all()
    assert any("(nats/text)" in label for label in labels)
    assert all(path.stat().st_size > 1000 for path in [*files, tmp_path / "tree.png"])


def test_bits_per_byte_are_of_the_texts_whose_bytes_are_known():
    matrix = collection()
    some = make_matrix(matrix.values, text_bytes=np.where(np.arange(N) < 7, 500.0, 0.0))
    bits = -matrix.values[:, :7].sum(axis=1) / (np.log(2) * 7 * 500)
    np.testing.assert_allclose(make_map(some, method="pca").bits_per_byte, bits)


def test_dtypes_that_differ_are_warned_of_and_flagged():
    values = collection(8).values
    twins = np.concatenate([values, values[:1] + np.random.default_rng(9).normal(0, 9, (1, N))])
    twins = np.concatenate([twins, twins[:1] + 1e-3])
    matrix = make_matrix(
        twins,
        revisions=[*(f"r{row}" for row in range(8)), "r0", "other"],
        dtypes=["float32"] * 8 + ["bfloat16"] * 2,
    )
    with pytest.warns(LlfastWarning, match="dtype"):
        found = make_map(matrix, method="pca")
    (near,) = [kl for row, kl in found.nearest[0] if row == 9]
    assert near.below_noise_floor


def test_layers_are_on_the_map_where_they_are_asked_for(tmp_path):
    store = Store(tmp_path / "store")
    store.add_matrix(collection(6))
    texts = store.matrix().textset_digest
    rng = np.random.default_rng(4)
    results = [
        make_result(rng.standard_normal(N) - 900, model="model 0", layer=layer, metadata={})
        for layer in range(3)
    ]
    assert texts == results[0].textset_digest
    store.add_all(results)
    assert len(map_store(store.folder, [], method="pca").models) == 6
    found = map_store(store.folder, [], method="pca", layers=True)
    names = [found.models[row] for row in found.lines[0]]
    assert names == [f"model 0@layer={layer}" for layer in range(3)]


def test_places_of_models_that_are_not_there_now_are_kept(tmp_path, store):
    path = tmp_path / "places.json"
    map_store(store.folder, [], places=path, method="pca")
    before = Places.load(path).places
    few = Store(tmp_path / "few")
    few.add_matrix(make_matrix(collection().values[:5], revisions=[f"r{row}" for row in range(5)]))
    map_store(few.folder, [], places=path)
    assert Places.load(path).places == before


def test_files_that_would_be_written_over_each_other_are_refused(tmp_path, store):
    same = tmp_path / "x.png"
    for options in ({"dendrogram": same}, {"places": tmp_path / "." / "x.png"}):
        with pytest.raises(ValueError, match=r"files must be different, got '.*x.png' twice"):
            map_store(store.folder, [same], **options)
    with pytest.raises(IsADirectoryError, match="written to a file"):
        map_store(store.folder, [], places=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        map_store(store.folder, [tmp_path / "gone" / "map.html"])
    with pytest.raises(TypeError, match="out must be several files, got 'map.html'"):
        map_store(store.folder, "map.html")
    assert not same.exists()


def test_columns_that_are_not_there_and_trees_too_large_are_refused_before_any_work(
    tmp_path, store, monkeypatch
):
    path = tmp_path / "map.png"
    with pytest.raises(ValueError, match=r"colour must be a column .* \(family\), got 'nope'"):
        map_store(store.folder, [path], colour="nope")
    monkeypatch.setattr("llfast.dendrogram._MOST_MODELS", 23)
    with pytest.raises(ValueError, match="models must be at most 23 for a tree"):
        map_store(store.folder, [path], dendrogram=tmp_path / "tree.png")
    assert not path.exists()


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures_of_few_models_and_of_those_without_family(tmp_path, ending):
    for count in (2, 7):
        models = [f"model $a_{row}$" for row in range(count - 1)] + ["🦙 <b>\n"]
        values = np.random.default_rng(count).standard_normal((count, N)) - 700
        metadata = [{"parents": ["model $a_0$"]}] * count
        if count == 7:
            metadata = [{"family": "$a"}, *metadata[1:]]
        path = tmp_path / f"{count}.{ending}"
        draw_map(
            make_map(make_matrix(values, models=models, metadata=metadata), method="mds"), path
        )
        start = path.read_bytes()[:5]
        assert start == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[ending]
    if ending == "png":
        colours = {
            tuple(c) for c in (imread(path)[..., :3].reshape(-1, 3) * 255).round().astype(int)
        }
        family = tuple(bytes.fromhex(PALETTE[0][1:]))
        assert {family, (138, 145, 156)} <= colours  # of the family, and those without


@pytest.fixture
def figures(monkeypatch):
    """Figures instead of files."""
    drawn = []
    monkeypatch.setattr(map_plots, "save_figure", lambda figure, _: drawn.append(figure))
    return drawn


def drawn_groups(figures, metadata):
    """The shade of each model on a picture, and the words of its legend."""
    values = np.random.default_rng(0).standard_normal((len(metadata), N)) - 700
    found = make_map(make_matrix(values, metadata=metadata), method="pca")
    draw_map(found, "map.png")
    figure = figures.pop()
    figure.draw_without_rendering()
    axes, shades = figure.axes[0], {}
    for points in axes.collections:
        colours = np.resize(points.get_facecolor(), (len(points.get_offsets()), 4))
        for place, colour in zip(points.get_offsets().data.tolist(), colours, strict=True):
            row = np.abs(found.places - place).sum(axis=1).argmin()
            shades[int(row)] = to_hex(colour)
    legend = axes.get_legend()
    words = [] if legend is None else [each.get_text() for each in legend.get_texts()]
    return [shades[row] for row in range(len(metadata))], words, figure


def test_many_numbers_are_a_scale_of_colours(figures):
    """As on a page; of a few, each has a colour of its own, in their order."""
    count = 2 * len(PALETTE)
    many = [{"step": row or None} for row in range(count)]
    shades, words, figure = drawn_groups(figures, many)
    assert words == ["others"]
    assert shades[0] == REST
    truth = colormaps["viridis"](np.linspace(0, 1, count - 1))
    assert shades[1:] == [to_hex(colour) for colour in truth]
    assert figure.axes[1].get_ylabel() == "step"
    sizes = [{"size": 10.0 ** (6 + row / 10)} for row in range(count)]
    shades, _, figure = drawn_groups(figures, sizes)
    truth = colormaps["viridis"](np.linspace(0, 1, count))
    assert shades == [to_hex(colour) for colour in truth], "by their logarithms"
    few = [{"step": float(row % 11)} for row in range(22)]
    shades, words, _ = drawn_groups(figures, few)
    assert words == [str(row) for row in range(11)]
    assert shades == [*PALETTE[:11]] * 2


def test_a_legend_of_long_names_lies_beside_the_map_and_a_long_title_in_the_picture(figures):
    values = np.random.default_rng(0).standard_normal((20, N)) - 700
    metadata = [{"family": f"organisation/of-many-words-{row % 3}"} for row in range(20)]
    found = make_map(make_matrix(values, metadata=metadata), method="pca")
    draw_map(found, "map.png", title="many words " * 30)
    (figure,) = figures
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend, title = (
        each.get_window_extent() for each in (axes.get_legend(), figure.get_children()[-1])
    )
    assert axes.bbox.x1 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert figure.bbox.x0 <= title.x0 < title.x1 <= figure.bbox.x1
    assert axes.bbox.y1 <= title.y0 < title.y1 <= figure.bbox.y1


def test_models_of_which_nothing_is_known_have_a_colour_and_no_legend(figures):
    shades, words, _ = drawn_groups(figures, [{}] * 5)
    assert (set(shades), words) == ({PALETTE[0]}, [])


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # of adjustText
def test_long_names_are_told_apart_on_a_picture_and_leave_room(tmp_path, caplog):
    folder = "/a/folder/of/checkpoints/that/is/deep/down/in/a/file/system/of/a/cluster"
    models = [*(f"{folder}/model-{row}" for row in range(6)), "W" * 60]  # as wide as the axes
    values = np.random.default_rng(0).standard_normal((7, N)) - 700
    path = tmp_path / "map.svg"
    draw_map(make_map(make_matrix(values, models=models), method="pca"), path)
    drawn = path.read_text()
    for row in range(6):
        assert f"cluster/model-{row} -->" in drawn, "matplotlib writes texts as comments, too"
    assert caplog.messages == []
    assert logging.getLogger("adjustText").level == logging.NOTSET, "as it was"


def test_a_dotted_line_leads_from_a_model_to_a_name_that_had_to_move(tmp_path):
    values = np.random.default_rng(0).standard_normal((12, N)) - 700
    values[:10] = values[0]
    path = tmp_path / "map.svg"
    draw_map(make_map(make_matrix(values), method="pca"), path)
    assert path.read_text().count("stroke-dasharray") >= 8, "ten names are at one place"


def test_files_of_other_kinds_are_refused_before_any_work(tmp_path, store):
    for path in ("map.gif", "map"):
        with pytest.raises(ValueError, match=rf"must be written as .html, .png, .*got .*{path}'"):
            map_store(store.folder, [tmp_path / path], places=tmp_path / "places.json")
    with pytest.raises(ValueError, match=r"must be written as .png, .svg or .pdf, got .*tree.html"):
        map_store(store.folder, [], dendrogram=tmp_path / "tree.html")
    assert not (tmp_path / "places.json").exists()

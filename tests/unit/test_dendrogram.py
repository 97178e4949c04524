"""Trees against scipy's own and a plain count, and pictures of odd collections."""

import sys

import numpy as np
import pytest
from scipy.cluster.hierarchy import cophenet, leaves_list, linkage
from scipy.cluster.hierarchy import dendrogram as scipy_dendrogram
from scipy.spatial.distance import squareform

from llfast import MissingDependencyError, dendrogram
from llfast.dendrogram import draw_dendrogram, join_models

ODD = [
    "$x^2$ \\frac",
    "'quoted' \"twice\"",
    "<script>alert(1)</script> &amp;",
    "🦙 模型",
    "a\nb\tc",
]


def make_kl(count, seed=0):
    points = np.random.default_rng(seed).standard_normal((count, 4))
    return ((points[:, None] - points) ** 2).sum(axis=2)


@pytest.fixture
def figures(monkeypatch):
    """Figures instead of files."""
    drawn = []
    monkeypatch.setattr(dendrogram, "save_figure", lambda figure, _: drawn.append(figure))
    return drawn


def drawn(figures, models, kl, **families):
    draw_dendrogram(models, kl, "tree.png", families=families)
    figure = figures.pop()
    (axes,) = figure.axes
    names = {label.get_text(): label.get_color() for label in axes.get_yticklabels()}
    lines = [line for line in axes.get_lines() if len(line.get_xdata())]
    legend = {
        text.get_text(): line.get_color()
        for text, line in zip(
            figure.legends[0].get_texts(), figure.legends[0].get_lines(), strict=True
        )
    }
    return axes, names, lines, legend


def test_the_height_of_a_join_is_the_mean_kl_of_both_sides():
    kl = make_kl(12)
    members = [{leaf} for leaf in range(12)]
    for left, right, height, size in join_models(kl):
        sides = members[int(left)], members[int(right)]
        mean = np.mean([kl[a, b] for a in sides[0] for b in sides[1]])
        assert height == pytest.approx(mean, rel=1e-12)
        members.append(sides[0] | sides[1])
        assert len(members[-1]) == size
    # No pair of groups was nearer than those that were joined.
    np.testing.assert_allclose(
        cophenet(join_models(kl)), cophenet(linkage(squareform(kl), "average")), rtol=1e-12
    )


def test_families_are_found_again_as_branches_of_their_colour(figures):
    points = np.repeat([[0.0, 0], [9, 0], [0, 20], [0, 200]], [3, 4, 1, 2], axis=0)
    points = points + 0.1 * np.random.default_rng(0).standard_normal(points.shape)
    kl = ((points[:, None] - points) ** 2).sum(axis=2)
    models = ["a1", "a2", "a3", "b1", "b2", "b3", "b4", "c1", "d1", "a4"]
    families = {model: model[0] for model in models if model != "d1"}
    _, names, lines, legend = drawn(figures, models, kl, **families)
    assert {legend[name] for name in "ab"} == {"#1f77b4", "#d62728"}
    assert set(legend) == {"a", "b", "others"}
    for model in models:
        assert names[model] == legend.get(model[0], legend["others"])
    # Of three a there are two joins and a stem of both; of four b three and one; of the a that is
    # far from them a stem.
    count = [sum(line.get_color() == legend[name] for line in lines) for name in ("a", "b")]
    assert count == [2 + 4 + 1 + 1, 3 + 6 + 1]
    assert len(lines) == 3 * 9


def test_leaves_and_heights_are_where_scipy_has_them(figures):
    kl, models = make_kl(9), [f"m{row}" for row in range(9)]
    axes, names, lines, _ = drawn(figures, models, kl)
    tree = join_models(kl)
    leaves = leaves_list(tree)
    assert list(names) == [models[leaf] for leaf in leaves]
    np.testing.assert_array_equal(axes.get_yticks(), np.arange(9))
    expected = scipy_dendrogram(tree, no_plot=True)
    joins = [line for line in lines if np.ptp(line.get_xdata()) == 0]
    found = {(10 ** line.get_xdata()[0], *sorted(line.get_ydata())) for line in joins}
    # scipy has the first leaf at 5, and one every 10.
    theirs = {
        (heights[1], places[0] / 10 - 0.5, places[3] / 10 - 0.5)
        for heights, places in zip(expected["dcoord"], expected["icoord"], strict=True)
    }
    np.testing.assert_allclose(sorted(found), sorted(theirs), rtol=1e-9)
    ends = {tuple(sorted(10 ** line.get_xdata())) for line in lines if np.ptp(line.get_xdata())}
    floor = tree[0, 2] / 2
    theirs = {
        (max(start, floor), heights[1])
        for heights in expected["dcoord"]
        for start in (heights[0], heights[3])
    }
    np.testing.assert_allclose(sorted(ends), sorted(theirs), rtol=1e-9)
    ticks = zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
    ticks = {float(label.get_text()): place for label, place in ticks}
    assert len(ticks) > 2
    for shown, place in ticks.items():
        assert place == pytest.approx(np.log10(shown))
    low, high = axes.get_xlim()[::-1]
    assert low == pytest.approx(np.log10(floor))
    assert high > np.log10(tree[-1, 2])


def test_joins_that_are_next_to_nothing_are_at_the_right_end(figures):
    kl = make_kl(6)
    kl[0, 1] = kl[1, 0] = 1e-12
    axes, _, lines, _ = drawn(figures, list("abcdef"), kl)
    floor = join_models(kl)[-1, 2] * 1e-6
    lowest = min(line.get_xdata().min() for line in lines)
    assert 10**lowest == pytest.approx(floor)
    assert f"below {floor:.2g} at the right end" in axes.get_xlabel()


@pytest.mark.parametrize("height", [0.0011, 0.19, 0.41, 4.9, 5.5, 99.0])
def test_there_is_a_number_on_every_scale(figures, height):
    """Also on one that goes from twice a number to five times, as of two models."""
    axes, *_ = drawn(figures, ["a", "b"], np.array([[0, height], [height, 0]]))
    right, left = sorted(axes.get_xlim())
    assert any(right < place < left for place in axes.get_xticks())


def test_a_picture_grows_with_its_models(figures):
    heights = []
    for count in (2, 50, 400):
        axes, names, *_ = drawn(figures, [f"m{row}" for row in range(count)], make_kl(count))
        assert len(names) == count
        heights.append(axes.figure.get_figheight())
    assert heights[0] < 3
    assert np.diff(heights) / [48, 350] == pytest.approx([0.17, 0.17])


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_names_are_drawn_as_they_are(tmp_path, ending):
    path = tmp_path / f"tree.{ending}"
    families = dict(zip(ODD, ["$f$", "$f$", "🦙", "🦙", "<b>"], strict=True))
    draw_dendrogram(ODD, make_kl(5), path, families=families)
    assert path.read_bytes()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[ending]
    assert b"<script>" not in path.read_bytes()


def test_names_are_in_one_line_and_long_ones_cut_at_their_beginning(figures):
    models = [*ODD, "org/" + "long" * 30 + "-v2"]
    _, names, _, legend = drawn(figures, models, make_kl(6), **dict.fromkeys(models, "$f$"))
    assert set(legend) == {r"\$f\$"}
    assert r"\$x^2\$ \frac" in names
    assert r"a\nb\tc" in names
    cut = next(name for name in names if name.startswith("…"))
    assert len(cut) == 60
    assert cut.endswith("longlong-v2")


def test_every_family_is_in_the_legend_and_the_legend_in_the_picture(figures):
    """matplotlib leaves out what begins with a line, and cuts what is too wide."""
    names = ["_own", "W" * 30, *("organisation/of-many-words-" + each for each in "abcdef")]
    models = [f"m{row}" for row in range(2 * len(names))]
    families = {model: names[row // 2] for row, model in enumerate(models)}
    axes, _, _, legend = drawn(figures, models, make_kl(len(models)), **families)
    assert [each.strip() for each in legend] == names
    figure = axes.figure
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_models_that_are_all_the_same_are_joined_at_0(figures):
    axes, names, lines, _ = drawn(figures, list("abcd"), np.zeros((4, 4)))
    assert len(names) == 4
    assert {place for line in lines for place in line.get_xdata()} == {axes.get_xlim()[1]}
    assert axes.get_xlabel().endswith("(bits/byte; 0 for all)")
    assert not len(axes.get_xticks())


@pytest.mark.parametrize(
    ("kl", "message"),
    [
        (np.zeros((1, 1)), "models must be at least two to be joined, got 1"),
        (np.full((2, 2), np.nan), "kl must be finite and at least 0 for any two models, got nan"),
        (np.array([[0, np.inf], [np.inf, 0]]), "for any two models, got inf"),
        (np.array([[0, -1.0], [-1.0, 0]]), "for any two models, got -1.0"),
        (np.zeros((401, 401)), "models must be at most 400 .*, got 401; choose fewer"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path, kl, message):
    models = [f"m{row}" for row in range(len(kl))]
    with pytest.raises(ValueError, match=message):
        draw_dendrogram(models, kl, tmp_path / "tree.png", families={})
    with pytest.raises(ValueError, match=r"must end in .png, .svg or .pdf, got .*tree.gif"):
        draw_dendrogram(models, kl, tmp_path / "tree.gif", families={})
    assert not list(tmp_path.iterdir())


def test_without_scipy_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "scipy.cluster.hierarchy")
    with pytest.raises(MissingDependencyError, match=r"pip install 'llfast\[map\]'"):
        join_models(make_kl(3))


@pytest.mark.usefixtures("untyped")
def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"for any two models, got shape \(2, 3\)"):
        join_models(np.zeros((2, 3)))

"""Pictures of KL by relation: what is drawn where, and odd collections."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex

from llfast import comparison_plots
from llfast.comparison import PUBLISHED, Quartile, RelationKL
from llfast.comparison_plots import draw_relations


def make_relation(name, kl, interval=(0.5, 2.0), total=None):
    kl = np.sort(np.array(kl, dtype=float))
    first, median, third = np.quantile(kl, [0.25, 0.5, 0.75]).tolist()
    unknown = (np.nan, np.nan)
    return RelationKL(
        relation=name,
        pairs=total or len(kl),
        kl=kl,
        first_quartile=Quartile(first, interval or unknown),
        median=Quartile(median, interval or unknown),
        third_quartile=Quartile(third, interval or unknown),
        drawn="models" if interval else None,
        published=PUBLISHED.get(name, {}),
    )


MANY = np.random.default_rng(0).lognormal(size=200)


@pytest.fixture
def draw(monkeypatch):
    """`draw(found)` is the axes of a picture that is not written."""
    figures = []
    monkeypatch.setattr(comparison_plots, "save_figure", lambda figure, _: figures.append(figure))

    def run(*found):
        draw_relations(found, "a.png")
        (axes,) = figures.pop().axes
        return axes

    return run


def points(axes, colour):
    """Places (n, 2) of all points of a colour."""
    lines = [line for line in axes.get_lines() if to_hex(line.get_color()) == to_hex(colour)]
    return np.array([place for line in lines for place in line.get_xydata()])


def test_many_pairs_are_a_shape_and_few_are_points(draw):
    axes = draw(make_relation("random", MANY), make_relation("siblings", [0.1, 0.2, 0.4]))
    (shape,) = axes.collections
    outline = shape.get_paths()[0].vertices
    assert -0.5 < outline[:, 0].min() < outline[:, 0].max() < 0.5
    assert outline[:, 1].min() == pytest.approx(np.log10(MANY.min()), abs=0.5)
    few = points(axes, comparison_plots._PAIRS)
    np.testing.assert_allclose(np.sort(few[:, 1]), np.log10([0.1, 0.2, 0.4]))
    assert (np.abs(few[:, 0] - 1) < 0.2).all()
    inked = points(axes, "0.15")
    quartiles = np.log10(np.quantile(MANY, [0.25, 0.5, 0.75]))
    for height in [*quartiles, *np.log10([0.5, 2.0])]:
        assert np.isclose(inked, [0, height]).all(axis=1).any()


def test_what_was_published_stands_beside_it(draw):
    axes = draw(make_relation("adjacent steps", MANY), make_relation("quantised twin", MANY))
    np.testing.assert_allclose(
        points(axes, comparison_plots._PUBLISHED), [[0.4, np.log10(kl)] for kl in (0.011, 0.067)]
    )
    labels = {text.get_text() for text in axes.texts}
    assert labels == {"0.011\nlate", "0.067\nearly"}
    assert len(axes.figure.legends[0].get_texts()) == 3
    assert {text.get_text() for text in draw(make_relation("random", MANY)).texts} == {"2.2"}
    assert len(draw(make_relation("siblings", MANY)).figure.legends[0].get_texts()) == 2


def test_an_axis_says_what_it_shows(draw):
    axes = draw(
        make_relation("siblings", [0, 0, 0.03, 25], interval=None),
        make_relation("random", MANY, total=12345),
    )
    titles = [label.get_text() for label in axes.get_xticklabels()]
    assert titles == ["siblings\n4 pairs\n2 of them 0", "random\n200 of\n12,345 pairs"]
    ticks = dict(
        zip([label.get_text() for label in axes.get_yticklabels()], axes.get_yticks(), strict=False)
    )
    assert ticks == {"0.01": -2, "0.1": -1, "1": 0, "10": 1, "100": 2}
    assert axes.get_ylim() == (-2, 2)
    assert len(points(axes, comparison_plots._PAIRS)) == 2


def test_points_at_the_ends_of_an_axis_are_whole(draw):
    axes = draw(make_relation("siblings", [0, 0, 1e-9, 1.0]), make_relation("same family", [0.99]))
    drawn = [line for line in axes.get_lines() if len(line.get_xdata())]
    at_ends = [line for line in drawn if line.get_marker() in ("o", "D")]
    assert len(at_ends) == 5  # pairs and median of both, and a published median
    assert not any(line.get_clip_on() for line in at_ends)


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_words_do_not_run_into_each_other_or_out_of_the_picture(draw, count):
    axes = draw(*[make_relation("adjacent layers", MANY, total=1234567)] * count)
    figure = axes.figure
    figure.draw_without_rendering()
    titles = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(titles))
    for box in (*titles, figure.legends[0].get_window_extent()):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
@pytest.mark.parametrize(
    "kl",
    [[0.3], [0.0], [0.0] * 50, [0.2] * 50, [1e-9, 1e9]],
    ids="one same sames equal far".split(),
)
def test_odd_collections_are_drawn(tmp_path, kl, ending):
    interval = None if len(kl) < 5 else (kl[0], kl[0])
    path = tmp_path / f"a.{ending}"
    draw_relations([make_relation("siblings", kl, interval)], path)
    assert path.read_bytes()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[ending]


def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="found must be of at least one relation, got none"):
        draw_relations([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"must end in .png, .svg or .pdf, got .*a.gif"):
        draw_relations([make_relation("siblings", MANY)], tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())

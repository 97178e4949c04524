"""Trajectories against plain numpy, and against paths whose shape is known."""

import itertools
import json
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from llfast import LlfastWarning, SpaceError, trajectory_plots
from llfast.intervals import group_codes, kl_estimate
from llfast.trajectory import find_steps, follow
from llfast.trajectory_plots import draw_trajectory
from tests.spaces import make_matrix

K, N = 12, 300
STEPS = [100 * (row + 1) for row in range(K)]


def walk(seed=0, k=K, n=N):
    """Log-likelihoods that rise and wander, some texts by leaps, and two where all are clipped."""
    rng = np.random.default_rng(seed)
    moves = rng.standard_normal((k, n)) + 2 + 20 * (rng.random((k, n)) < 0.01)
    values = -900 + 60 * rng.standard_normal(n) + np.cumsum(moves, axis=0)
    values[:, :2] -= 400
    values[0, :2] -= 500
    return values


def matrix_of(values, **options):
    rng = np.random.default_rng(1)
    return make_matrix(values, **{"text_bytes": rng.integers(300, 1000, values.shape[1])} | options)


def by_hand(values, text_bytes, warm_up=0, steps=STEPS):
    """The published procedure: clip, drop 3 % by jumps after the warm-up, half the variance."""
    clip = np.quantile(values, 0.02)
    clipped = np.maximum(values, clip)
    late = clipped[[step >= warm_up for step in steps]]
    jumps = np.abs(np.diff(late, axis=0)).max(axis=0)
    dropped = np.argsort(jumps)[::-1][: round(0.03 * values.shape[1])]
    keep = np.setdiff1d(np.arange(values.shape[1]), dropped)
    kl = (clipped[:, None, keep] - clipped[:, keep]).var(axis=2)
    return clip, dropped, keep, kl / (2 * text_bytes[keep].mean() * math.log(2))


@pytest.mark.parametrize("warm_up", [0, 550])
def test_numbers_are_those_of_the_published_procedure(warm_up):
    matrix = matrix_of(walk())
    found = follow(matrix, STEPS, warm_up=warm_up)
    clip, dropped, keep, kl = by_hand(matrix.values, matrix.text_bytes, warm_up)
    assert found.clip == pytest.approx(clip, rel=1e-12)
    assert found.clipped_share == pytest.approx(0.02, abs=1e-3)
    assert found.dropped == tuple(f"text {text}" for text in dropped)
    assert (found.texts, found.warm_up) == (len(keep), warm_up)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose([e.value for e in found.from_previous], np.diag(kl, 1), rtol=1e-9)
    np.testing.assert_allclose([e.value for e in found.from_start], kl[0, 1:], rtol=1e-9)
    np.testing.assert_allclose(
        found.bits_per_byte,
        -matrix.values.sum(axis=1) / matrix.text_bytes.sum() / math.log(2),
        rtol=1e-12,
    )
    assert found.path_length == pytest.approx(np.sqrt(np.diag(kl, 1)).sum())
    assert found.tortuosity == pytest.approx(found.path_length / math.sqrt(kl[0, -1]))
    late = follow(matrix, STEPS, warm_up=550).dropped
    assert late != follow(matrix, STEPS).dropped


def test_both_steps_of_the_preparation_can_be_left_out():
    matrix = matrix_of(walk())
    found = follow(matrix, STEPS, clip_quantile=None, drop_share=0.0)
    kl = (matrix.values[:, None] - matrix.values).var(axis=2) / 2
    kl /= matrix.text_bytes.mean() * math.log(2)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-9, atol=1e-15)
    assert (found.clip, found.clipped_share, found.dropped, found.texts) == (None, 0.0, (), N)
    assert follow(matrix, STEPS, clip_quantile=0.0).clip is None
    # Less than half a text is none, and needs no jumps to be chosen by.
    assert follow(matrix, STEPS, drop_share=0.001).dropped == ()


def test_intervals_allow_for_documents_of_which_several_texts_are():
    groups = [f"document {text // 5}" for text in range(N)]
    matrix = matrix_of(walk(), groups=groups)
    found = follow(matrix, STEPS)
    clip, _, keep, _ = by_hand(matrix.values, matrix.text_bytes)
    clipped = np.maximum(matrix.values, clip)[:, keep]
    codes = group_codes([groups[text] for text in keep])
    per_nat = 1 / (matrix.text_bytes[keep].mean() * math.log(2))
    expected = kl_estimate(clipped[4] - clipped[3], codes)
    assert found.from_previous[3].standard_error == pytest.approx(
        expected.standard_error * per_nat, rel=1e-6
    )
    expected = kl_estimate(clipped[4] - clipped[0], codes)
    np.testing.assert_allclose(
        found.from_start[3].interval, np.array(expected.interval) * per_nat, rtol=1e-6
    )


def test_the_order_of_rows_plays_no_part():
    matrix = matrix_of(walk(), revisions=[f"r{row}" for row in range(K)])
    distances = np.square(np.subtract.outer(STEPS, STEPS)).astype(float) + 1 - np.eye(K)
    found = follow(matrix, STEPS, weight_distances=distances)
    order = np.random.default_rng(2).permutation(K)
    shuffled = matrix_of(
        matrix.values[order],
        models=[matrix.models[row] for row in order],
        text_bytes=matrix.text_bytes,
    )
    again = follow(
        shuffled, [STEPS[row] for row in order], weight_distances=distances[np.ix_(order, order)]
    )
    assert again.models == found.models == matrix.models
    np.testing.assert_array_equal(again.steps, STEPS)
    # A reference mean is summed in another order.
    np.testing.assert_allclose(again.kl, found.kl, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(again.weight_distances, distances)
    np.testing.assert_allclose(again.bits_per_byte, found.bits_per_byte)
    assert found.weight_diffusion.median == pytest.approx(again.weight_diffusion.median)


def test_a_straight_path_is_no_longer_than_it_must_be():
    rng = np.random.default_rng(3)
    start, way = rng.standard_normal((2, N))
    values = -700 + 50 * start + np.array(STEPS)[:, None] / 100 * way
    found = follow(matrix_of(values), STEPS, clip_quantile=None)
    assert found.tortuosity == pytest.approx(1)
    assert found.diffusion.median == pytest.approx(2)
    # There and back again.
    back = np.concatenate([values[:6], values[:6][::-1] + 1e-9 * way, values[:1]])
    returned = follow(matrix_of(back), range(13), clip_quantile=None, drop_share=0.0)
    assert returned.straight_length == 0
    assert returned.tortuosity is None
    assert returned.path_length > 0


def test_exponents_of_both_spaces_are_kept_apart():
    rng = np.random.default_rng(4)
    values = -700 + np.cumsum(rng.standard_normal((40, 2000)), axis=0)
    steps = list(range(40))
    distances = np.abs(np.subtract.outer(steps, steps)).astype(float) ** 1.5
    found = follow(
        matrix_of(values), steps, clip_quantile=None, drop_share=0.0, weight_distances=distances
    )
    assert found.diffusion.median == pytest.approx(1, abs=0.05)
    assert found.weight_diffusion.median == pytest.approx(1.5)
    summary = json.loads(json.dumps(found.summary(), default=vars_of))
    assert summary["weight_diffusion"]["median"] == pytest.approx(1.5)
    assert len(summary["kl_from_previous"]) == 39
    assert summary["steps"] == steps


def vars_of(estimate):
    return {"value": estimate.value, "interval": estimate.interval}


def test_two_checkpoints_have_a_distance_and_no_exponent():
    matrix = matrix_of(walk(k=2))
    with pytest.warns(
        LlfastWarning, match="no diffusion exponent in log-likelihood and weight .*2"
    ):
        found = follow(matrix, [1, 5], weight_distances=np.ones((2, 2)))
    assert (found.diffusion, found.weight_diffusion) == (None, None)
    assert len(found.from_previous) == len(found.from_start) == 1
    assert found.tortuosity == pytest.approx(1)
    assert found.summary()["diffusion"] is None


def test_checkpoints_that_are_all_the_same_do_not_move():
    matrix = matrix_of(np.tile(walk(k=1), (6, 1)))
    with pytest.warns(LlfastWarning, match="got 6 points, 15 distances of 0 among them"):
        found = follow(matrix, range(6))
    assert not found.kl.any()
    assert found.path_length == 0
    assert found.tortuosity is None
    assert all(each.interval == (0, 0) for each in found.from_previous)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("EleutherAI/pythia-70m@step1000", 1000),
        ("runs/a@b/checkpoint-500/", 500),
        ("runs/global_step_40", 40),
        ("allenai/OLMo-1B@step20000-tokens84B", 20000),
        ("stage1-step1000-tokens5B", 1000),
        ("runs/model-7", 7),
        ("a/Step3", 3),
        ("a/step0", 0),
        ("org/model@main", None),
        ("step1000/final", None),
        ("a/step143k", None),
        ("a/step1.5k", None),
        ("a/epoch-0.25", None),
        ("org/model@9f8e7d6c5b4a39281706f5e4d3c2b1a09f8e7d12", None),
        ("org/model@1f8e7d2", None),
        ("runs/0001000", 1000),
    ],
)
def test_steps_are_found_in_names(name, step):
    if step is None:
        with pytest.raises(SpaceError, match=f"the step of '{name}' must be a natural number, got"):
            find_steps([name, "step5"], [{}, {}])
    else:
        assert find_steps([name, "step5"], [{}, {}]) == [step, 5]


def test_what_is_given_comes_before_metadata_and_metadata_before_names():
    names, metadata = ["step1", "step2", "x"], [{"step": 7}, {"step": None}, {"step": 0}]
    assert find_steps(names, metadata) == [7, 2, 0]
    assert find_steps(names, metadata, [3, 4, 5]) == [3, 4, 5]


def test_whole_steps_may_be_written_as_floats():
    """As `relations` takes them, and as tables write them whose columns have gaps."""
    found = find_steps(["a", "b"], [{"step": 3.0}, {"step": 4}])
    assert (found, [type(each) for each in found]) == ([3, 4], [int, int])


@pytest.mark.usefixtures("untyped")
def test_steps_may_be_those_of_numpy():
    assert find_steps(["a", "b"], [{}, {}], np.array([3, 4])) == [3, 4]
    assert find_steps(["a", "b"], [{"step": np.int64(3)}, {"step": 4}]) == [3, 4]


@pytest.mark.parametrize(
    ("names", "metadata", "given", "message"),
    [
        (["step1"], [{}], None, "must have at least two checkpoints, got 1"),
        ([], [], None, "must have at least two checkpoints, got 0"),
        (["a1", "b1"], [{}, {}], None, "must be different, got 1 for 'a1' and 'b1'"),
        (["a1", "b2"], [{}, {"step": 1}], None, "must be different, got 1 for 'a1' and 'b2'"),
        (["a", "b2"], [{}, {}], None, "of 'a' must be a natural number, got None"),
        (["a1", "b"], [{}, {"step": "2"}], None, "of 'b' must be a natural number, got '2'"),
        (["a1", "b"], [{}, {"step": True}], None, "of 'b' must be a natural number, got True"),
        (["a1", "b"], [{}, {"step": 1.5}], None, "of 'b' must be a natural number, got 1.5"),
        (["a1", "b2"], [{}, {}], [1, -2], "of 'b2' must be a natural number, got -2"),
        (["a1", "b2"], [{}, {}], [1], r"steps must be one a checkpoint \(2\), got 1"),
        (["a1", f"b{10**30}"], [{}, {}], None, "must be a natural number, got 10000"),
    ],
)
def test_steps_that_are_not_known_are_asked_for(names, metadata, given, message):
    with pytest.raises(SpaceError, match=message):
        find_steps(names, metadata, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_quantile": 1.0}, r"clip_quantile must be in \[0, 1\), got 1.0"),
        ({"drop_share": -0.1}, r"drop_share must be in \[0, 1\), got -0.1"),
        ({"drop_share": 0.999}, "drop_share must leave two texts, got 0.999 of 300"),
        ({"window": 2}, "window must be at least 3, got 2"),
        ({"warm_up": 1200}, "warm_up must leave two checkpoints .*, got 1 from step 1200 on"),
        ({"weight_distances": np.ones((2, 2))}, r"must have shape \(12, 12\), got \(2, 2\)"),
        ({"steps": STEPS[:-1]}, r"steps must be one a checkpoint \(12\), got 11"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(options, message):
    with pytest.raises((SpaceError, ValueError), match=message):
        follow(matrix_of(walk()), **{"steps": STEPS} | options)
    if "warm_up" in options:
        assert follow(matrix_of(walk()), STEPS, drop_share=0.0, warm_up=1200).dropped == ()


def test_one_text_has_no_variance():
    with pytest.raises(SpaceError, match="must leave two texts, got 0.0 of 1; score more texts"):
        follow(matrix_of(walk()[:, 3:4]), STEPS, drop_share=0.0)
    assert follow(matrix_of(walk()[:, 3:5]), STEPS, drop_share=0.0).texts == 2


# ------------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_has_both_spaces_and_the_path(tmp_path, ending):
    distances = np.abs(np.subtract.outer(STEPS, STEPS)).astype(float)
    found = follow(matrix_of(walk()), STEPS, weight_distances=distances)
    path = tmp_path / f"t.{ending}"
    draw_trajectory(found, path)
    start = path.read_bytes()[:5]
    assert start == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[ending]
    if ending == "png":
        colours = {tuple(c) for c in (imread(path)[..., :3].reshape(-1, 3) * 255).astype(int)}
        assert len(colours) > 100
    if ending == "svg":
        assert "weight space: exponent 1.00" in path.read_text()


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.filterwarnings("ignore::llfast.LlfastWarning")
def test_a_picture_of_few_checkpoints_or_of_one_many_times(tmp_path, count):
    for name, values in (("moved", walk(k=count)), ("still", np.tile(walk(k=1), (count, 1)))):
        for distances in (None, np.zeros((count, count))):
            found = follow(matrix_of(values), range(count), weight_distances=distances)
            draw_trajectory(found, tmp_path / f"{name}.svg")
            assert f"to the next {count - 1} -->" in (tmp_path / f"{name}.svg").read_text()


@pytest.mark.filterwarnings("ignore:there is no diffusion exponent")
@pytest.mark.parametrize("change", [1e-4, 3.0])
def test_a_picture_of_two_checkpoints_has_a_point_a_space_and_both_ends(monkeypatch, change):
    """Of one distance there is no line, and of two places no plane."""
    figures = []
    monkeypatch.setattr(trajectory_plots, "save_figure", lambda figure, _: figures.append(figure))
    values = walk(k=1) + change * np.random.default_rng(0).standard_normal((2, N))
    weights = np.array([[0, 7.0], [7.0, 0]])
    found = follow(matrix_of(values), [139_000, 143_000], weight_distances=weights)
    trajectory_plots.draw_trajectory(found, "t.png")
    figures[0].draw_without_rendering()
    steps, says, plane = figures[0].axes[:3]
    (weighs,) = (axes for axes in figures[0].axes if "weights" in axes.get_ylabel())
    for axes, truth in ((says, found.kl[0, 1]), (weighs, 7.0)):
        (point,) = (line for line in axes.get_lines() if line.get_marker() != "None")
        assert (point.get_xdata().tolist(), point.get_ydata().tolist()) == ([4000], [truth])
        low, high = axes.get_ylim()
        assert low < truth < high
    spans = [line.get_ydata().tolist() for line in steps.get_lines() if len(line.get_ydata()) > 1]
    assert spans == [list(found.from_start[0].interval)] * 2
    start, end = plane.transData.transform(plane.collections[0].get_offsets())
    assert np.hypot(*(end - start)) > 100
    for box in (name.get_window_extent() for name in plane.texts):
        assert plane.bbox.x0 < box.x0 < box.x1 < plane.bbox.x1


def test_names_of_a_path_that_ends_where_it_began_are_apart(monkeypatch):
    figures, values = [], walk()
    monkeypatch.setattr(trajectory_plots, "save_figure", lambda figure, _: figures.append(figure))
    values[-1] = values[0] + 0.1
    trajectory_plots.draw_trajectory(follow(matrix_of(values), STEPS), "t.png")
    figures[0].draw_without_rendering()
    first, last = (name.get_window_extent() for name in figures[0].axes[2].texts)
    assert not first.overlaps(last)


def test_the_median_stands_out_among_many_curves(monkeypatch):
    """All of them have one colour."""
    figures = []
    monkeypatch.setattr(trajectory_plots, "save_figure", lambda figure, _: figures.append(figure))
    found = follow(matrix_of(walk(k=150)), [1000 * (row + 1) for row in range(150)])
    trajectory_plots.draw_trajectory(found, "t.png")
    canvas = FigureCanvasAgg(figures[0])
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[::-1, :, :3]
    axes = figures[0].axes[1]
    (median,) = (line for line in axes.get_lines() if line.get_linewidth() == 3)
    x, y = axes.transData.transform(np.sqrt(median.get_xydata().prod(axis=0))).astype(int)
    assert tuple(image[y, x]) == (31, 119, 180)
    for beside in (image[y : y + 8, x], image[y - 8 : y, x]):
        assert beside.min(axis=1).max() > 250


@pytest.mark.parametrize(
    "steps",
    [
        [1000 + 100 * row for row in range(K)],
        [100_000 + 5000 * row for row in range(K)],
        [10**9 + 10**8 * row for row in range(K)],
        [2**row for row in range(K)],
        [3**row for row in range(K)],
        [0, *range(143_000 - K + 1, 143_000)],
    ],
)
def test_some_steps_are_named_on_each_axis_and_no_name_covers_another(monkeypatch, steps):
    figures = []
    monkeypatch.setattr(trajectory_plots, "save_figure", lambda figure, _: figures.append(figure))
    trajectory_plots.draw_trajectory(follow(matrix_of(walk()), steps), "t.png")
    figures[0].draw_without_rendering()
    for axes in figures[0].axes[:2]:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert len(boxes) >= 3
        assert all(left.x1 + 2 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("level", [1.0, 3.5, 5.0, 9.0])
def test_an_ordinate_of_less_than_a_power_of_ten_has_several_numbers(monkeypatch, level):
    """Distances that are much alike, in both spaces."""
    figures = []
    monkeypatch.setattr(trajectory_plots, "save_figure", lambda figure, _: figures.append(figure))
    rng = np.random.default_rng(0)
    values = -900 + 60 * rng.standard_normal(N) + 3 * rng.standard_normal((5, N))
    distances = level + 0.09 * level * np.abs(np.subtract.outer(range(5), range(5)))
    np.fill_diagonal(distances, 0)
    found = follow(matrix_of(values), STEPS[:5], weight_distances=distances)
    trajectory_plots.draw_trajectory(found, "t.png")
    figures[0].draw_without_rendering()
    (axes,) = (each for each in figures[0].axes if "weights" in each.get_ylabel())
    low, high = axes.get_ylim()
    assert high / low < 10
    labels = [label for label in axes.get_yticklabels(which="both") if label.get_text()]
    assert sum(low <= label.get_position()[1] <= high for label in labels) >= 2


def test_other_endings_are_refused(tmp_path):
    found = follow(matrix_of(walk()), STEPS)
    with pytest.raises(ValueError, match=r"must end in .png, .svg or .pdf, got .*t.gif"):
        draw_trajectory(found, tmp_path / "t.gif")
    assert not list(tmp_path.iterdir())

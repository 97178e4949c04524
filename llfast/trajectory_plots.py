"""A picture of a trajectory: KL over steps, distances over elapsed steps, the path in a plane."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from .diffusion import Diffusion
from .drawing import check_picture, new_figure, outline, save_figure
from .placing import classical_mds
from .results import KLEstimate
from .trajectory import Trajectory

_KL = "KL (bits/byte)"
_CHARACTERS = 40  # that an axis has room for
_SAYS, _WEIGHS = "C0", "C1"  # colours of the two spaces
# Two checkpoints have one distance, which is no line, and is in one place in both spaces.
_POINT = {
    _SAYS: {"marker": "o", "markersize": 5},
    _WEIGHS: {"marker": "s", "markersize": 11, "fillstyle": "none"},
}


def draw_trajectory(trajectory: Trajectory, path: str | os.PathLike[str]) -> None:
    """Draw a trajectory as .png, .svg or .pdf.

    Raises:
        ValueError: if the ending is none that can be written.
        MissingDependencyError: without matplotlib.
        OSError: if the file cannot be written.
    """
    check_picture(path)
    figure = new_figure(17, 5)
    figure.get_layout_engine().set(w_pad=0.12)
    steps, distances, plane = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.15))
    _draw_steps(steps, trajectory)
    _draw_distances(distances, trajectory)
    _draw_plane(figure, plane, trajectory)
    save_figure(figure, path)


def _draw_steps(axes: Any, trajectory: Trajectory) -> None:
    """KL of each checkpoint from the one before it and from the first, with 95 % intervals."""
    # The first of both is the same: the smaller marker is on top of the larger one.
    for label, marker, size, order, estimates, colour in (
        ("from the checkpoint before", "o", 4, 3, trajectory.from_previous, "C2"),
        ("from the first", "s", 6, 2, trajectory.from_start, "C3"),
    ):
        steps, values, low, high = _above_zero(trajectory.steps[1:], estimates)
        style = {"marker": marker, "markersize": size, "zorder": order}
        axes.plot(steps, values, color=colour, label=label, **style)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        if len(steps) == 1:  # between two of which there would be an area
            axes.plot(steps * 2, [*low, *high], color=colour, alpha=0.5)
    axes.set(xscale="log", xlabel="optimiser step", ylabel=_KL)
    if any(estimate.value for estimate in trajectory.from_start):  # matplotlib has no log of none
        _scale_by_powers(axes)
        axes.legend(frameon=False)
    else:
        _say(axes, "KL is 0 between all checkpoints")
        axes.set(yticks=[], xlim=(0.9 * trajectory.steps[1], 1.1 * trajectory.steps[-1]))
    _label_some(axes, trajectory.steps[1:].tolist())
    axes.set_title("KL of each checkpoint, 95 % intervals")
    axes.grid(which="major", color="0.9")


def _draw_distances(axes: Any, trajectory: Trajectory) -> None:
    """Squared distance over elapsed steps, and what the median exponent says, in both spaces.

    Both ordinates span as many powers of ten, so that slopes can be compared.
    """
    spaces = [("log-likelihood", _SAYS, trajectory.kl, trajectory.diffusion, axes)]
    axes.set(xscale="log", xlabel="elapsed steps")
    axes.set_ylabel(_KL, color=_SAYS)
    if trajectory.weight_distances is not None:
        other = axes.twinx()
        other.set_ylabel("squared distance of weights", color=_WEIGHS)
        fit = trajectory.weight_diffusion
        spaces.append(("weight", _WEIGHS, trajectory.weight_distances, fit, other))
    ranges, handles, still = [], [], []
    for name, colour, distances, fit, place in spaces:
        curves = list(_curves(trajectory, distances))
        are_points = all(len(values) == 1 for _, values in curves)
        style = _POINT[colour] if are_points else {"alpha": 0.25, "linewidth": 1}
        for elapsed, values in curves:
            place.plot(elapsed, values, color=colour, **style)
        if curves:
            _scale_by_powers(place)
            every = np.concatenate([np.log10(values) for _, values in curves])
            ranges.append((place, float(every.min()), float(every.max())))
        else:
            still.append(name)
            place.set_yticks([])
        if fit is not None:
            line = {"color": colour, "linewidth": 3, "path_effects": outline(6)}
            handles += place.plot(*_power_law(curves, fit), **line)
            handles[-1].set_label(f"{name} space: exponent {fit.median:.2f}")
    if still:
        _say(axes, f"all distances in {' and '.join(still)} space are 0")
    decades = max((high - low for _, low, high in ranges), default=0.0) + 0.3
    for place, low, high in ranges:
        middle = (low + high) / 2
        place.set_ylim(10 ** (middle - decades / 2), 10 ** (middle + decades / 2))
    steps, window = trajectory.steps.tolist(), trajectory.window
    _label_some(
        axes, [b - a for row, a in enumerate(steps) for b in steps[row + 1 : row + 1 + window]]
    )
    following = min(window, len(steps) - 1)
    axes.set_title(f"Distances from each checkpoint to the next {following}")
    if handles:
        axes.legend(handles=handles, frameon=False, loc="lower right")


def _draw_plane(figure: Any, axes: Any, trajectory: Trajectory) -> None:
    """The path in the plane of classical scaling, from its first checkpoint to its last."""
    places, steps = classical_mds(trajectory.kl), trajectory.steps
    axes.plot(places[:, 0], places[:, 1], color="0.7", linewidth=1, zorder=1)
    points = axes.scatter(places[:, 0], places[:, 1], c=steps, cmap="viridis", s=45, zorder=2)
    figure.colorbar(points, ax=axes, label="optimiser step")
    low, high = places.min(axis=0), places.max(axis=0)
    extent = (high - low).max()
    # Names are away from 0, where classical scaling puts the middle of all, and from each other.
    beside = np.where(places[[0, -1], 1] >= 0, 12, -12)
    if np.abs(places[-1] - places[0]).max() <= extent / 3:
        beside[1] = -beside[0]
    for row, aside in zip((0, -1), beside.tolist(), strict=True):
        axes.annotate(
            f"step {steps[row]:,}",
            places[row],
            (0, aside),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
        )
    edge = 0.3 * extent  # with margins, two places would be too near to the edges
    axes.update_datalim([low - edge, high + edge])
    axes.margins(0 if edge else 0.3)
    axes.locator_params(nbins=5)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel="first axis (√ bits/byte)", ylabel="second axis (√ bits/byte)")
    axes.set_title("The path: squared distance is KL in bits per byte")


def _say(axes: Any, text: str) -> None:
    """Say why there is nothing to see."""
    axes.text(0.5, 0.95, text, transform=axes.transAxes, ha="center", va="top")


def _scale_by_powers(axes: Any) -> None:
    """A logarithmic ordinate, with numbers at all ticks if it spans less than a power of ten."""
    axes.set_yscale("log")
    axes.yaxis.get_minor_formatter().minor_thresholds = (1, 1)


def _label_some(axes: Any, steps: Sequence[int]) -> None:
    """Name some of the steps on a logarithmic axis, as many as have room side by side."""
    character = math.log(max(steps) / min(steps)) / _CHARACTERS
    shown: dict[int, str] = {}
    end = -math.inf  # of the name before
    for step in sorted(set(steps)):
        name = f"{step:,}"
        half = (len(name) + 1) / 2 * character
        if math.log(step) - half >= end:
            shown[step], end = name, math.log(step) + half
    axes.set_xticks([*shown], [*shown.values()])
    axes.set_xticks([], minor=True)


def _above_zero(
    steps: Any, estimates: tuple[KLEstimate, ...]
) -> tuple[list[int], list[float], list[float], list[float]]:
    """What logarithmic axes can show: values above 0, and the finite ends of their intervals."""
    shown = [
        (int(step), each.value, *each.interval)
        for step, each in zip(steps, estimates, strict=True)
        if each.value > 0
    ]
    return (
        [step for step, *_ in shown],
        [value for _, value, *_ in shown],
        [low or value for _, value, low, _ in shown],
        [high if np.isfinite(high) else value for _, value, _, high in shown],
    )


def _curves(
    trajectory: Trajectory, distances: Float64[np.ndarray, "K K"]
) -> Iterator[tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]]:
    """Elapsed steps and squared distances from each checkpoint to those within the window."""
    steps = trajectory.steps.astype(np.float64)
    for start in range(len(steps) - 1):
        window = slice(start + 1, start + 1 + trajectory.window)
        usable = distances[start, window] > 0
        if usable.any():
            yield (steps[window] - steps[start])[usable], distances[start, window][usable]


def _power_law(
    curves: list[tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]], fit: Diffusion
) -> tuple[Float64[np.ndarray, " 2"], Float64[np.ndarray, " 2"]]:
    """The line of the median exponent, at the median level of all curves."""
    elapsed, values = (np.log(np.concatenate(each)) for each in zip(*curves, strict=True))
    level = float(np.median(values - fit.median * elapsed))
    ends = np.array([elapsed.min(), elapsed.max()])
    return np.exp(ends), np.exp(level + fit.median * ends)

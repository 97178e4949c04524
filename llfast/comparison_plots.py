"""A picture of KL divergences by relation, beside the published medians."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .comparison import RelationKL
from .drawing import check_picture, new_figure, save_figure

_FEWEST_FOR_A_SHAPE = 20  # fewer pairs are drawn as points
_PAIRS, _INK, _PUBLISHED = "#1f77b4", "0.15", "#d62728"
_POINT = {"marker": "o", "linestyle": "", "clip_on": False}  # whole at the ends of the axis, too


def draw_relations(found: Sequence[RelationKL], path: str | os.PathLike[str]) -> None:
    """Draw the KL divergences of each relation, on a logarithmic axis, as .png, .svg or .pdf.

    A shape is as wide as pairs are frequent at its height; of few pairs, each is a point. A
    logarithmic axis has no 0: pairs that do not differ are counted below it.

    Args:
        found: as `compare_relations` gives them, at least one.
        path: where to write; the ending says what.

    Raises:
        ValueError: if there is no relation, or the ending is none that can be written.
        MissingDependencyError: without matplotlib.
        OSError: if the file cannot be written.
    """
    check_picture(path)
    if not found:
        raise ValueError("found must be of at least one relation, got none")
    drawn = np.concatenate([[*each.kl, *each.published.values()] for each in found])
    drawn = drawn[drawn > 0] if drawn.any() else np.array([1.0])
    floor, top = math.floor(math.log10(drawn.min())), math.ceil(math.log10(drawn.max()) + 1e-9)
    figure = new_figure(3 + 1.5 * len(found), 5.5)
    axes = figure.add_subplot()
    for place, each in enumerate(found):
        _draw_relation(axes, place, each, floor)
    axes.set_ylim(floor, top)
    powers = np.arange(floor, top + 1)
    axes.set_yticks(powers, [f"{10.0**power:g}" for power in powers])
    between = powers[:-1, None] + np.log10(np.arange(2, 10))
    axes.set_yticks(between.ravel(), minor=True)
    axes.set_ylabel("KL (bits/byte)")
    axes.set_xlim(-0.6, len(found) - 0.2)
    axes.set_xticks(range(len(found)), [_title(each) for each in found])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot([], [], color=_INK, linewidth=5, alpha=0.4, label="first to third quartile")
    axes.plot([], [], color=_INK, marker="o", markersize=5, label="median, 95 % interval")
    if any(each.published for each in found):
        label = "published median (arXiv 2505.15353)"
        axes.plot([], [], color=_PUBLISHED, marker="D", linestyle="", markersize=5, label=label)
    figure.legend(loc="outside upper center", ncols=3 if len(found) > 3 else 1, frameon=False)
    save_figure(figure, path)


def _draw_relation(axes: Any, place: int, each: RelationKL, floor: int) -> None:
    logs = np.log10(each.kl[each.kl > 0])
    if len(logs) >= _FEWEST_FOR_A_SHAPE:
        shape = axes.violinplot([logs], [place], widths=0.7, showextrema=False)
        for body in shape["bodies"]:
            body.set(facecolor=_PAIRS, edgecolor=_PAIRS, alpha=0.35)
    else:
        # To the sides of what is drawn over them, and so that close ones can be told apart.
        aside = np.resize([-0.12, 0.12, -0.2, 0.2], len(logs))
        axes.plot(place + aside, logs, color=_PAIRS, markersize=4, alpha=0.6, **_POINT)

    def height(kl: float) -> float:
        return math.log10(kl) if kl > 0 else float(floor)

    ends = [height(each.first_quartile.value), height(each.third_quartile.value)]
    axes.plot([place] * 2, ends, color=_INK, linewidth=5, alpha=0.4, solid_capstyle="butt")
    if each.drawn is not None:
        ends = [height(end) for end in each.median.interval]
        axes.plot([place] * 2, ends, color=_INK, linewidth=1.5, marker="_", markersize=9)
    axes.plot([place], [height(each.median.value)], color=_INK, markersize=5, **_POINT)
    for name, kl in each.published.items():
        style = {**_POINT, "marker": "D", "color": _PUBLISHED, "markersize": 5}
        axes.plot([place + 0.4], [height(kl)], **style)
        label = f"{kl:g}\n{name}" if len(each.published) > 1 else f"{kl:g}"
        axes.annotate(
            label,
            (place + 0.4, height(kl)),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=_PUBLISHED,
            fontsize=8,
        )


def _title(each: RelationKL) -> str:
    used = len(each.kl)
    pairs = f"{used:,} pair{'s'[: used > 1]}"
    if used < each.pairs:
        pairs = f"{used:,} of\n{each.pairs:,} pairs"
    same = int((each.kl == 0).sum())
    return f"{each.relation}\n{pairs}" + (f"\n{same:,} of them 0" if same else "")

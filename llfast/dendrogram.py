"""A tree of models: those that say nearly the same are joined first."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from .drawing import check_picture, legend_label, model_label, new_figure, save_figure
from .errors import needed

_MOST_MODELS = 400  # names stay large enough to be read, and the picture small enough to be opened
_COLUMNS = 6  # of the legend, at most
_CHARACTERS = 120  # that a line of the legend has room for, nine of them a column before its name
_NARROWEST = 1e-6  # of the highest join: what is below is rounding, or as good as the same
_GREY = "0.45"
# Told apart by most eyes, and dark enough for names on white.
_COLOURS = (
    "#1f77b4 #d62728 #2ca02c #9467bd #e07b00 #8c564b #d6409f #00889a #808000 #3b3bd6 #b8860b "
    "#006b3c #e8604c #5f9ea0 #6b0f2b #7a5cff #c71585 #4d4d00 #0a3d62 #000000"
).split()


def join_models(kl: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "joins 4"]:
    """Join the two nearest groups of models again and again, as scipy's `linkage` has it.

    The distance of two groups is the mean KL of their models (average linkage, UPGMA), so a join
    has a height that can be read: bits per byte between a model of one side and one of the other,
    on average. One near pair does not join two groups, as in single linkage; one far pair does not
    keep them apart, as in complete linkage; and joins never go down again, as with centroids.

    Args:
        kl: between any two models, as `ModelSpace.kl_matrix` gives them.

    Raises:
        ValueError: if there are fewer than two models, or a KL is not finite or below 0.
        MissingDependencyError: without scipy.
    """
    count = len(kl)
    if count < 2:
        raise ValueError(f"models must be at least two to be joined, got {count}")
    if kl.shape != (count, count) or not (np.isfinite(kl).all() and (kl >= 0).all()):
        wrong = kl[~(np.isfinite(kl) & (kl >= 0))]
        found = f"shape {kl.shape}" if kl.shape != (count, count) else f"{wrong[0]}"
        raise ValueError(f"kl must be finite and at least 0 for any two models, got {found}")
    joins: Float64[np.ndarray, "joins 4"] = _hierarchy().linkage(
        kl[np.triu_indices(count, 1)], "average", optimal_ordering=True
    )
    return joins


def refuse_large_tree(models: int) -> None:
    """Refuse, with a ValueError, a tree of more models than can be read."""
    if models > _MOST_MODELS:
        raise ValueError(
            f"models must be at most {_MOST_MODELS} for a tree that can be read, got {models:,}; "
            "choose fewer"
        )


def draw_dendrogram(
    models: Sequence[str],
    kl: Float64[np.ndarray, "K K"],
    path: str | os.PathLike[str],
    *,
    families: Mapping[str, str],
    unit: str = "bits_per_byte",
) -> None:
    """Draw K models as the leaves of a tree, coloured by family, as .png, .svg or .pdf.

    A branch has the colour of a family if all of its models are of it.

    Args:
        models: their names.
        kl: between any two, as `ModelSpace.kl_matrix` gives them.
        path: where to write; the ending says what.
        unit: of `kl`.
        families: the family of each model. Those of which there is one model, and models that have
            none, are drawn in grey; from the 21st family on, colours are used again.

    Raises:
        ValueError: if there are more than 400 models, the ending is none that can be written, or
            as `join_models` says.
        MissingDependencyError: without matplotlib or scipy.
        OSError: if the file cannot be written.
    """
    check_picture(path)
    refuse_large_tree(len(models))
    joins = join_models(kl)
    families_of = [families.get(model, "") for model in models]
    sizes = Counter(family for family in families_of if family)
    several = [family for family, size in sizes.most_common() if size > 1]
    colours = {each: _COLOURS[row % len(_COLOURS)] for row, each in enumerate(several)}
    longest = max((len(legend_label(family)) for family in colours), default=0)
    columns = min(_COLUMNS, max(1, _CHARACTERS // (longest + 9)))
    figure = new_figure(10, 1.2 + 0.17 * len(models) + 0.2 * -(-(len(colours) + 1) // columns))
    axes = figure.add_subplot()
    leaves = _hierarchy().leaves_list(joins).tolist()
    axes.set_ylim(-0.5, len(models) - 0.5)
    axes.yaxis.tick_right()
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_yticks(range(len(models)), [model_label(models[leaf]) for leaf in leaves])
    for label, leaf in zip(axes.get_yticklabels(), leaves, strict=True):
        label.set_color(colours.get(families_of[leaf], _GREY))
    floor = _scale(axes, joins[:, 2], unit.replace("_per_", "/"))
    # Height, place and family of each leaf, and of each join after both that it joins.
    drawn = [(floor, float(leaves.index(leaf)), families_of[leaf]) for leaf in range(len(models))]
    for left, right, mean, _ in joins.tolist():
        height = max(mean, floor)
        (start, low, family), (other_start, high, other_family) = (
            drawn[int(left)],
            drawn[int(right)],
        )
        _line(axes, [start, height], [low, low], colours.get(family, _GREY))
        _line(axes, [other_start, height], [high, high], colours.get(other_family, _GREY))
        both = family if family == other_family else ""
        _line(axes, [height, height], [low, high], colours.get(both, _GREY))
        drawn.append((height, (low + high) / 2, both))
    for family, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=3, label=legend_label(family))
    if not colours.keys() >= set(families_of):
        axes.plot([], [], color=_GREY, linewidth=3, label="others")
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    save_figure(figure, path)


def _line(axes: Any, heights: Sequence[float], places: Sequence[float], colour: str) -> None:
    style = {"linewidth": 1.4, "solid_capstyle": "projecting", "clip_on": False}
    axes.plot(np.log10(heights), places, color=colour, **style)


def _scale(axes: Any, heights: Float64[np.ndarray, " joins"], unit: str) -> float:
    """Lay out KL on a logarithmic scale, from the root at the left to leaves at the right.

    Returns: the KL at the right end, where leaves are, and joins below it.
    """
    highest = float(heights.max()) or 1.0
    least = float(heights[heights > 0].min(initial=highest))
    floor = max(least / 2, highest * _NARROWEST)
    low, high = math.log10(floor), math.log10(highest)
    axes.set_xlim(high + 0.02 * (high - low), low)
    named = range(1, 10) if high - low < 0.7 else (1, 2, 5) if high - low < 2 else (1,)
    for digits, minor in ((named, False), (range(1, 10), True)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        ticks = [tick for tick in ticks if floor < tick <= heights.max()]
        names = [] if minor else [f"{tick:g}" for tick in ticks]
        axes.set_xticks(np.log10(ticks), names, minor=minor)
    below = f"; below {floor:.2g} at the right end" if heights.min() < floor else ""
    below = below if heights.any() else "; 0 for all"
    axes.set_xlabel(f"mean KL between the two sides of a join ({unit}{below})")
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    return floor


def _hierarchy() -> Any:
    with needed("scipy", "joining models needs scipy; run `pip install 'llfast[map]'`"):
        import scipy.cluster.hierarchy
    return scipy.cluster.hierarchy

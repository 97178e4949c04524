"""A picture of a map: models as points, labelled where there is room."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from .drawing import (
    PALETTE,
    REST,
    WIDE,
    any_letters,
    check_picture,
    legend_label,
    model_label,
    new_figure,
    plain,
    save_figure,
)
from .errors import needed
from .page import Cell, ModelMap, colour_column, column_cells

_MOST_LABELS = 100
_LONG = 20  # characters of a group's name
_DIGITS = re.compile(r"(\d+)")


def draw_map(
    found: ModelMap,
    path: str | os.PathLike[str],
    *,
    title: str = "Models by what they say",
    colour: str | None = None,
) -> None:
    """Draw a map as .png, .svg or .pdf.

    Args:
        found: the map.
        path: where to write; the ending says what.
        title: above it.
        colour: as for `page.colour_column`. Models without it are grey.

    Raises:
        ValueError: if the ending is none that can be written, or there is no such column.
        MissingDependencyError: without matplotlib or adjustText.
        OSError: if the file cannot be written.
    """
    check_picture(path)
    column = colour_column(found.metadata, colour)
    few = len(found.models) <= _MOST_LABELS
    width = 13 if few and len(found.models) > 30 else 9
    spans = np.ptp(found.places, axis=0)
    figure = new_figure(width, width * float(np.clip(spans[1] / max(spans[0], 1e-300), 0.5, 0.72)))
    axes = figure.add_subplot()
    for line in found.lines:
        axes.plot(*found.places[list(line)].T, color="0.8", linewidth=1, zorder=1)
    style = {"s": 60 if len(found.models) <= 30 else 40 if few else 9, "linewidth": 0, "zorder": 2}
    cells = column_cells(found.metadata, column) if column else ["models"] * len(found.models)
    if (numbers := _many_numbers(cells)) is None:
        groups = _groups(cells)
    else:
        known = np.isfinite(numbers)
        own = numbers[known]
        norm = "log" if 0 < WIDE * own.min() <= own.max() else "linear"
        points = axes.scatter(*found.places[known].T, c=own, cmap="viridis", norm=norm, **style)
        figure.colorbar(points, ax=axes, label=legend_label(column))
        groups = {} if known.all() else {None: np.flatnonzero(~known).tolist()}
    shades = {**dict(zip(groups, PALETTE, strict=False)), None: REST}
    for group, rows in groups.items():
        label = "others" if group is None else legend_label(group)
        axes.scatter(*found.places[rows].T, color=shades[group], label=label, **style)
    axes.margins(0.12 if few else 0.03)
    axes.set_aspect("equal", adjustable="datalim")
    figure.suptitle(textwrap.fill(plain(title), 8 * width))
    if found.axes is None:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    else:
        axes.set(xlabel=found.axes[0], ylabel=found.axes[1])
    legend = None
    if groups and column:
        # Of many groups, or long names, a legend on the map would lie on models.
        aside = len(groups) > 8 or max(len(group or "") for group in groups) > _LONG
        legend = axes.legend(
            title=legend_label(column),
            frameon=False,
            fontsize=8 if aside else 10,
            **({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if aside else {}),
        )
    if few:
        with any_letters():
            _label(figure, axes, found, legend)
    save_figure(figure, path)


def _groups(cells: Sequence[Cell]) -> dict[str | None, list[int]]:
    """Rows by what is in a column, the largest groups first, as a page has them, and the rest last.

    Those are of the smallest groups, if there are more than colours, and have no value (None).
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, cell in enumerate(cells):
        if cell is not None:
            whole = isinstance(cell, float) and cell.is_integer()
            rows[str(int(cell) if whole else cell)].append(row)
    unknown = [row for row, cell in enumerate(cells) if cell is None]
    order = sorted(rows, key=lambda name: (-len(rows[name]), _in_order(name), name))
    rest = [row for name in order[len(PALETTE) :] for row in rows[name]] + unknown
    groups: dict[str | None, list[int]] = {name: rows[name] for name in order[: len(PALETTE)]}
    return groups | ({None: rest} if rest else {})


def _in_order(name: str) -> list[str | int]:
    """What names are sorted by: numbers in them count as such, and cases are alike."""
    parts = _DIGITS.split(name.casefold())  # every other one is a number
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _many_numbers(cells: Sequence[Cell]) -> Float64[np.ndarray, " K"] | None:
    """A column of numbers, NaN where there is none, if there are more of them than colours."""
    known = {cell for cell in cells if cell is not None}
    if len(known) <= len(PALETTE) or any(isinstance(cell, str) for cell in known):
        return None
    return np.array([np.nan if cell is None else cell for cell in cells], dtype=np.float64)


def _label(figure: Any, axes: Any, found: ModelMap, legend: Any | None) -> None:
    """Put names beside the points, moved so that they cover as little as can be."""
    with needed("adjustText", "drawing a map needs adjustText; run `pip install 'llfast[map]'`"):
        from adjustText import adjust_text
    figure.draw_without_rendering()  # labels are placed within the axes as they will be
    size = 8 if len(found.models) <= 30 else 6
    labels = [
        axes.text(x, y, model_label(model), fontsize=size, color="0.25")
        for model, (x, y) in zip(found.models, found.places.tolist(), strict=True)
    ]
    with _without_remarks():
        adjust_text(
            labels,
            objects=None if legend is None else [legend],
            ax=axes,
            expand=(1.15, 1.4),
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.7, "linestyle": ":"},
        )


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Nothing from adjustText on long names."""
    logger = logging.getLogger("adjustText")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

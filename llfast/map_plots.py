"""A picture of a map: models as points, labelled where there is room."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from .drawing import (
    LONGEST_NAME,
    PALETTE,
    REST,
    any_letters,
    check_picture,
    model_label,
    new_figure,
    plain,
    save_figure,
)
from .errors import needed
from .page import ModelMap, colour_column

_MOST_LABELS = 100


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
    size = 60 if len(found.models) <= 30 else 40 if few else 9
    groups = _groups(found, column)
    shades = {**dict(zip(groups, PALETTE, strict=False)), None: REST}
    for group, rows in groups.items():
        axes.scatter(
            *found.places[rows].T,
            s=size,
            color=shades[group],
            label="others" if group is None else _short(group),
            linewidth=0,
            zorder=2,
        )
    axes.margins(0.12 if few else 0.03)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(plain(title))
    if found.axes is None:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    else:
        axes.set(xlabel=found.axes[0], ylabel=found.axes[1])
    many = len(groups) > 8
    legend = axes.legend(
        title=_short(column or "models"),
        frameon=False,
        fontsize=8 if many else 10,
        **({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if many else {}),
    )
    if few:
        with any_letters():
            _label(figure, axes, found, legend)
    save_figure(figure, path)


def _groups(found: ModelMap, key: str) -> dict[str | None, list[int]]:
    """Rows by value of a key, the largest groups first, and the rest by themselves at the end.

    Those are of the smallest groups, if there are more than colours, and have no value (None).
    """
    rows: dict[str | None, list[int]] = defaultdict(list)
    for row, each in enumerate(found.metadata):
        value = each.get(key)
        rows[None if value is None else str(value)].append(row)
    unknown = rows.pop(None, [])
    order = sorted(rows, key=lambda name: (-len(rows[name]), str(name)))
    rest = [row for name in order[len(PALETTE) :] for row in rows[name]] + unknown
    groups = {name: rows[name] for name in order[: len(PALETTE)]}
    return groups | ({None: rest} if rest else {})


def _short(name: str) -> str:
    """A name in a legend: long ones are cut, and none begins with what matplotlib leaves out."""
    cut = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return plain(" " + cut if cut.startswith("_") else cut or "(empty)")


def _label(figure: Any, axes: Any, found: ModelMap, legend: Any) -> None:
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
            objects=[legend],
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

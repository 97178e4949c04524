"""Pictures: a figure to draw on, and the file that it becomes."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import needed
from .files import atomic_write, refuse_unwritable
from .progress import clean

# Told apart on light and on dark, the first ones by people who see few colours, too.
PALETTE = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#1fa8a0", "#d4a017", "#9c755f",
    "#d37295", "#6b8e23", "#7f6bd1", "#3ca5d9", "#c85200", "#86bc86", "#a0526f", "#5f7f95",
    "#e0a3b0", "#8c8c00", "#b55fd6",
)  # fmt: skip
REST = "#8a919c"
WIDE = 100  # times the least of a column of numbers, which are coloured by their logarithms then
LONGEST_NAME = 60  # characters of a name
_KINDS = ("png", "svg", "pdf")


def check_picture(path: str | os.PathLike[str]) -> str:
    """The kind of picture that a path names, by its ending.

    Raises:
        ValueError: if it is none that can be written.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in _KINDS:
        raise ValueError(f"path must end in .png, .svg or .pdf, got {os.fspath(path)!r}")
    return kind


def refuse_undrawable(path: str | os.PathLike[str]) -> None:
    """Refuse, before any work, a picture that could not be drawn, or not be written, after it.

    Raises:
        ValueError: if the ending is none that can be written.
        OSError: if it is a folder, or its folder is not there.
        MissingDependencyError: without matplotlib.
    """
    check_picture(path)
    refuse_unwritable(path, "A picture")
    new_figure(1, 1)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    with needed("matplotlib", "drawing needs matplotlib; run `pip install 'llfast[map]'`"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def plain(name: str) -> str:
    """A name as matplotlib draws it: in one line, and a dollar sign begins no formula."""
    return clean(name).replace("$", r"\$")


def model_label(name: str) -> str:
    """The end of a long name, which tells models apart."""
    return plain(name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :])


def legend_label(name: str) -> str:
    """The beginning of a long name; none begins with what matplotlib leaves out of legends."""
    cut = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return plain(" " + cut if cut.startswith("_") else cut or "(empty)")


def outline(width: float) -> list[Any]:
    """A white edge, by which a line stands out among hundreds of its own colour."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground="white")]


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure, atomically.

    Raises:
        ValueError: if the ending is none that can be written.
        OSError: if the file cannot be written.
    """
    kind = check_picture(path)
    with atomic_write(path) as file, any_letters():
        figure.savefig(file, format=kind, dpi=150)


@contextlib.contextmanager
def any_letters() -> Iterator[None]:
    """Draw letters that the font lacks, such as emoji, as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield

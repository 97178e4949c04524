"""A picture of a space: models as points whose squared distances are their KL divergences."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from .errors import MissingDependencyError
from .files import atomic_write


def classical_mds(squared_distances: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K 2"]:
    """The plane that keeps squared distances best, by classical scaling.

    Source: Torgerson (1952), Psychometrika 17: eigenvectors of the doubly centred -D/2.
    """
    k = len(squared_distances)
    centring = np.eye(k) - 1.0 / k
    gram = -0.5 * centring @ squared_distances @ centring
    values, vectors = np.linalg.eigh(gram)
    places: Float64[np.ndarray, "K 2"] = np.zeros((k, 2))
    for axis, number in enumerate(np.argsort(values)[::-1][:2]):
        vector = vectors[:, number]
        # Eigenvectors have no sign of their own: let the largest entry be positive.
        vector = vector * np.sign(vector[np.argmax(np.abs(vector))])
        places[:, axis] = vector * np.sqrt(max(values[number], 0.0))
    return places


def draw_map(
    models: Sequence[str],
    kl: Float64[np.ndarray, "K K"],
    path: str | os.PathLike[str],
    *,
    families: Mapping[str, str],
    parents: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Draw K models, coloured by family, as .png, .svg or .pdf.

    Args:
        models: their names.
        kl: bits per byte between any two, as `ModelSpace.kl_matrix` gives them.
        path: where to write; the ending says what.
        families: the family of each model; those that have none are drawn in grey.
        parents: lines are drawn from these models to their parents.

    Raises:
        ValueError: if the ending is none that can be written.
        MissingDependencyError: without matplotlib or adjustText.
        OSError: if the file cannot be written.
    """
    try:
        from adjustText import adjust_text
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "drawing needs matplotlib and adjustText; run `pip install 'llfast[map]'`"
        ) from None
    places = dict(zip(models, classical_mds(kl), strict=True))
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    kind = Path(path).suffix.removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"path must end in .png, .svg or .pdf, got {os.fspath(path)!r}")
    axes = figure.add_subplot()
    for child, its_parents in (parents or {}).items():
        for parent in its_parents:
            if child in places and parent in places:
                line = np.array([places[parent], places[child]])
                axes.plot(line[:, 0], line[:, 1], color="0.8", linewidth=1, zorder=1)
    colours = {name: f"C{row % 10}" for row, name in enumerate(sorted(set(families.values())))}
    family_of = {model: families.get(model, "unknown") for model in models}
    for family in sorted(set(family_of.values())):
        points = np.array([places[model] for model in models if family_of[model] == family])
        colour = colours.get(family, "0.5")
        axes.scatter(points[:, 0], points[:, 1], s=60, color=colour, label=family, zorder=2)
    axes.margins(0.12)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title("Models by what they say: squared distance is KL in bits per byte")
    axes.set_xlabel("first axis (√ bits/byte)")
    axes.set_ylabel("second axis (√ bits/byte)")
    legend = axes.legend(title="family", frameon=False)
    figure.draw_without_rendering()  # labels are placed within the axes as they will be
    labels = [
        axes.text(x, y, model.replace("$", r"\$"), fontsize=8, color="0.25")
        for model, (x, y) in places.items()
    ]
    adjust_text(labels, objects=[legend], ax=axes, expand=(1.15, 1.4))
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=150)

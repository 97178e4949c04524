"""A map as one HTML file that needs nothing else: no network, no other file.

Plotly draws it: it is maintained, puts 10,000 points on WebGL, and its Python package brings the
JavaScript along. Names and metadata are data, never HTML: the page reads them as JSON and shows
them as text, and its policy lets no script run but those written here.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from jaxtyping import Float64

from .drawing import PALETTE, REST, WIDE
from .errors import needed
from .results import KLEstimate

_SHOWN = 1000  # characters of a cell, or of a column's name
Cell = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelMap:
    """Models in a plane, and what is shown of each.

    Attributes:
        models: (K,) their names.
        places: (K, 2).
        bits_per_byte: (K,) mean over texts; NaN where bytes are not known.
        metadata: (K,) one mapping a model.
        nearest: (K,) rows of the nearest other models, and how far they are, nearest first.
        lines: rows of the models along each trajectory and through each model's layers, and of each
            child with a parent.
        unit: of KL, and of the square of a place by PCA or MDS.
        method: "tsne", "pca" or "mds".
        perplexity: of t-SNE.
        notes: how the map was made.
    """

    models: tuple[str, ...]
    places: Float64[np.ndarray, "K 2"]
    bits_per_byte: Float64[np.ndarray, " K"]
    metadata: Sequence[Mapping[str, Any]]
    nearest: Sequence[Sequence[tuple[int, KLEstimate]]]
    lines: Sequence[Sequence[int]]
    unit: str
    method: str
    perplexity: float
    notes: str

    @property
    def axes(self) -> tuple[str, str] | None:
        """What its axes are; None where they mean nothing."""
        unit = self.unit.replace("_per_", "/")
        return None if self.method == "tsne" else (f"first axis (√ {unit})", f"second (√ {unit})")


def map_page(found: ModelMap, *, title: str, colour: str | None = None) -> str:
    """A map as HTML.

    Args:
        found: the map.
        title: what the page is called.
        colour: as for `colour_column`.

    Raises:
        ValueError: if there is no such column.
        MissingDependencyError: if plotly is not installed.
    """
    colour = colour_column(found.metadata, colour)
    data = {
        "models": found.models,
        "x": [_rounded(x) for x in found.places[:, 0].tolist()],
        "y": [_rounded(y) for y in found.places[:, 1].tolist()],
        "bits": [_rounded(each) for each in found.bits_per_byte.tolist()],
        "columns": {
            name[:_SHOWN]: column_cells(found.metadata, name)
            for name in _column_names(found.metadata)
        },
        "nearest": [[_neighbour(row, kl) for row, kl in near] for near in found.nearest],
        "lines": found.lines,
        "axes": found.axes,
        "unit": found.unit.replace("_per_", "/"),
        "colour": colour[:_SHOWN],
        "palette": PALETTE,
        "rest": REST,
        "wide": WIDE,
        "notes": found.notes,
    }
    plotly = _plotly()
    script = "".join(map(_resource, ("pinch.js", "search.js", "map.js")))
    hashes = " ".join(f"'sha256-{_sha256(each)}'" for each in (plotly, script))
    # Plotly compiles its shaders' bindings when it draws, and brings styles of its own.
    policy = (
        f"default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "title": html.escape(title),
        "policy": policy,
        "style": _resource("map.css"),
        "data": _json(data),
        "plotly": plotly,
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _resource("map.html"))


def colour_column(metadata: Sequence[Mapping[str, Any]], colour: str | None) -> str:
    """The column that colours a map.

    Args:
        metadata: of the models.
        colour: its name. None: family, if there is one, else the first.

    Returns: its name; "" if there is none.

    Raises: ValueError if there is no such column.
    """
    names = _column_names(metadata)
    if colour is None:
        return names[0] if names else ""
    if colour not in ("", *names):
        listed = ", ".join(names) or "none"
        raise ValueError(
            f"colour must be a column of the models' metadata ({listed}), got {colour!r}"
        )
    return colour


def column_cells(metadata: Sequence[Mapping[str, Any]], name: str) -> list[Cell]:
    """What a map shows of a key of the metadata, a value a model; None where there is none."""
    return [_cell(row.get(name)) for row in metadata]


def _column_names(metadata: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with a value that says something, family first."""
    known = {
        name: None for row in metadata for name, value in row.items() if _cell(value) is not None
    }
    return sorted((name for name in known if name), key=lambda name: name != "family")


def _cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _rounded(value)
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else str(value)[:_SHOWN]  # JavaScript rounds larger
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value)) or None
    return None if value is None else str(value)[:_SHOWN]


def _neighbour(row: int, kl: KLEstimate) -> dict[str, Any]:
    low, high = kl.interval
    noise = {"noise": True} if kl.below_noise_floor else {}
    figures = {"kl": kl.value, "error": kl.standard_error, "low": low, "high": high}
    return {"row": row} | noise | {name: _rounded(each, 4) for name, each in figures.items()}


def _rounded(value: float, digits: int = 6) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _json(data: Any) -> str:
    """JSON that ends no script element, whatever is in it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escaped = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
    text = re.sub("[<>&]", lambda found: escaped[found[0]], text)
    return text.encode("utf-8", "backslashreplace").decode()  # names may be no Unicode at all


def _resource(name: str) -> str:
    return (files("llfast") / "web" / name).read_text("utf-8")


def _plotly() -> str:
    with needed(
        "plotly", "a map as HTML needs plotly; run `pip install 'llfast[map]'`, or write a .png"
    ):
        from plotly.offline import get_plotlyjs
    found: str = get_plotlyjs()
    return found


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

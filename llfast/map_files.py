"""A store's models as files: a page, pictures, a tree, and the places for a later map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .dendrogram import draw_dendrogram, refuse_large_tree
from .drawing import check_picture
from .files import as_utf8, atomic_write, refuse_unwritable
from .map_plots import draw_map
from .mapping import make_map, map_space
from .page import ModelMap, colour_column, map_page
from .places import Places
from .relations import family_of
from .results import LogLikelihoodMatrix
from .store import Store


def map_store(
    store: str | os.PathLike[str],
    out: Sequence[str | os.PathLike[str]],
    *,
    dendrogram: str | os.PathLike[str] | None = None,
    places: str | os.PathLike[str] | None = None,
    method: str = "tsne",
    perplexity: float | None = None,
    seed: int = 0,
    colour: str | None = None,
    title: str | None = None,
    layers: bool = False,
    textset: str | None = None,
    convention: str | None = None,
    dtype: str | None = None,
    newest: bool = False,
) -> ModelMap:
    """Draw a store's models.

    Args:
        store: the folder of results, or s3://bucket/prefix.
        out: files of the map: .html, .png, .svg or .pdf.
        dendrogram: a picture of the tree that average linkage makes of the models.
        places: a file of places. If it is there, its models stay where they are, others are placed
            among them as they were, and it is added to; else it is written.
        method: "tsne", "pca" or "mds".
        perplexity: of t-SNE.
        seed: of t-SNE.
        colour: a column of metadata; by default family.
        title: of the map.
        layers: with the layers that `llfast layers` has scored.
        textset: the start of a text set's digest, for a store with several.
        convention: only results under this convention.
        dtype: only models that ran in it.
        newest: of several rows of one model, take the newest.

    Raises:
        ValueError: for a file that is of no kind that can be written, or named twice.
        OSError: if a file cannot be written.
        And as `make_map`, `map_page` and `Store.matrix` say.
    """
    if isinstance(out, str | os.PathLike):
        raise TypeError(f"out must be several files, got {os.fspath(out)!r}; give a list of it")
    others = [path for path in (dendrogram, places) if path is not None]
    _refuse_paths(out, dendrogram, others)
    duplicates = "newest" if newest else "error"
    matrix = Store(store).matrix(textset, convention, dtype, duplicates=duplicates, layers=layers)
    kept = None if places is None or not Path(places).exists() else Places.load(places)
    column = colour_column(matrix.metadata, colour)
    if dendrogram is not None:
        refuse_large_tree(len(matrix.models))
    space = map_space(matrix, kept)
    found = make_map(
        matrix, method=method, perplexity=perplexity, seed=seed, kept=kept, space=space
    )
    if places is not None:  # first, for they are what took the time
        _places_of(found, matrix, kept).save(places)
    title = as_utf8(title or f"{len(found.models):,} models by what they say")
    for path in out:
        write_map(found, path, title=title, colour=column)
    if dendrogram is not None:
        kl = space.kl_matrix(found.unit)
        families = {
            model: family
            for model, row in zip(matrix.models, matrix.metadata, strict=True)
            if (family := family_of(row)) is not None
        }
        draw_dendrogram(matrix.models, kl, dendrogram, families=families, unit=found.unit)
    return found


def write_map(
    found: ModelMap, path: str | os.PathLike[str], *, title: str, colour: str | None = None
) -> None:
    """Write a map as its file's ending says.

    Raises: as `map_page` and `draw_map` do; OSError if the file cannot be written.
    """
    if not _is_page(path):
        draw_map(found, path, title=title, colour=colour)
        return
    page = map_page(found, title=title, colour=colour)
    with atomic_write(path) as file:
        file.write(page.encode())


def _is_page(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() in (".html", ".htm")


def _refuse_paths(
    out: Sequence[str | os.PathLike[str]],
    dendrogram: str | os.PathLike[str] | None,
    others: Sequence[str | os.PathLike[str]],
) -> None:
    """Refuse, before any work, what cannot be written, or would be written over."""
    for path, kinds in (
        *((path, ".html, .png, .svg or .pdf") for path in out if not _is_page(path)),
        *((path, ".png, .svg or .pdf") for path in [dendrogram] if path is not None),
    ):
        try:
            check_picture(path)
        except ValueError:
            raise ValueError(f"a map must be written as {kinds}, got {os.fspath(path)!r}") from None
    for path in [*out, *others]:
        refuse_unwritable(path, "A map")
    names = [Path(path).resolve() for path in [*out, *others]]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"files must be different, got {os.fspath(repeated)!r} twice")


def _places_of(found: ModelMap, matrix: LogLikelihoodMatrix, kept: Places | None) -> Places:
    """All places of the map, and those of an earlier one that are of models it does not have."""
    keys = zip(matrix.models, matrix.revisions, strict=True)
    own = {key: (x, y) for key, (x, y) in zip(keys, found.places.tolist(), strict=True)}
    return Places(
        method=found.method,
        perplexity=found.perplexity,
        textset_digest=matrix.textset_digest,
        convention=matrix.convention,
        places=({} if kept is None else dict(kept.places)) | own,
    )

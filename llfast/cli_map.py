"""`llfast map`: a store's models in a plane."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import AsJson, Newest, StoredConvention, StoredDtype, StorePath, TextSetDigest
from .output import print_json, print_line


def map_command(
    store: StorePath,
    out: Annotated[
        list[Path], typer.Option(help="A .html page, or a .png, .svg or .pdf; may be given again.")
    ],
    dendrogram: Annotated[
        Path | None, typer.Option(help="Draw the models as a tree, too: .png, .svg or .pdf.")
    ] = None,
    places: Annotated[
        Path | None,
        typer.Option(
            help="A file of places. Its models stay where they are, by the method of that map; new "
            "ones are added to it."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="tsne, pca or mds.")] = "tsne",
    perplexity: Annotated[
        float | None,
        typer.Option(help="Of tsne: how many neighbours count; 30, or fewer."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of tsne.")] = 0,
    colour: Annotated[
        str | None,
        typer.Option("--colour", "--color", help="A column of metadata: family, if left out."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="What stands above the map.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="With the layers that `llfast layers` has scored.")
    ] = False,
    textset: TextSetDigest = None,
    convention: StoredConvention = None,
    dtype: StoredDtype = None,
    newest: Newest = False,
    as_json: AsJson = False,
) -> None:
    """Draw the models of a store: near ones say the same."""
    from .map_files import map_store

    found = map_store(
        store,
        out,
        dendrogram=dendrogram,
        places=places,
        method=method,
        perplexity=perplexity,
        seed=seed,
        colour=colour,
        title=title,
        layers=layers,
        textset=textset,
        convention=convention,
        dtype=dtype,
        newest=newest,
    )
    written = [*out, *(each for each in (dendrogram, places) if each is not None)]
    if as_json:
        rows = zip(found.models, found.places.tolist(), strict=True)
        print_json(
            {
                "files": written,
                "method": found.method,
                "models": [{"model": model, "place": place} for model, place in rows],
            }
        )
        return
    print_line(found.notes.partition("\n")[0])
    print_line(f"wrote {', '.join(shlex.quote(str(path)) for path in written)}")

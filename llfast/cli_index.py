"""`llfast index`: the index of a store, for searches among many models."""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_options import (
    AsJson,
    Newest,
    SearchMode,
    StoredConvention,
    StoredDtype,
    StorePath,
    TextSetDigest,
)
from .output import print_facts, print_json

index_app = typer.Typer(help="Indexes of a store.", no_args_is_help=True)


@index_app.command("build")
def build_command(
    store: StorePath,
    mode: SearchMode = "auto",
    refit: Annotated[
        bool, typer.Option("--refit", help="From scratch, in a basis of what is there now.")
    ] = False,
    textset: TextSetDigest = None,
    convention: StoredConvention = None,
    dtype: StoredDtype = None,
    newest: Newest = False,
    as_json: AsJson = False,
) -> None:
    """Make the index that searches use, or merge what came since into it."""
    from .nearest import build_index

    facts = build_index(
        store,
        mode,
        textset=textset,
        convention=convention,
        dtype=dtype,
        newest=newest,
        refit=refit,
    )
    print_json(facts) if as_json else print_facts(facts, [])

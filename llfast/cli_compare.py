"""`llfast compare`: KL divergence by relation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import AsJson, Newest, StoredConvention, StoredDtype, StorePath, TextSetDigest
from .output import print_json, print_line, print_table


def compare_command(
    store: StorePath,
    plot: Annotated[
        Path | None, typer.Option(help="Draw them, too: a .png, .svg or .pdf file.")
    ] = None,
    textset: TextSetDigest = None,
    convention: StoredConvention = None,
    dtype: StoredDtype = None,
    newest: Newest = False,
    as_json: AsJson = False,
) -> None:
    """KL by relation: of parents and children, siblings, families, steps, layers, strangers."""
    from .comparison import compare_store
    from .comparison_plots import draw_relations
    from .drawing import refuse_undrawable

    if plot is not None:
        refuse_undrawable(plot)
    found = compare_store(store, textset=textset, convention=convention, dtype=dtype, newest=newest)
    if plot is not None:
        draw_relations(found, plot)
    if as_json:
        print_json([each.summary() for each in found])
        return
    print_table(
        ["relation", "pairs", "used", "first quartile", "median", "third quartile", "published"],
        [
            (
                each.relation,
                each.pairs,
                len(each.kl),
                str(each.first_quartile),
                str(each.median),
                str(each.third_quartile),
                ", ".join(f"{kl:g} ({name})" for name, kl in each.published.items()),
            )
            for each in found
        ],
        title="KL in bits/byte by relation, 95 % intervals, and the medians of arXiv 2505.15353",
    )
    if plot is not None:
        print_line(f"Picture: {plot}")

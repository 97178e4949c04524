"""`llfast predict`: benchmark scores from where models are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    AsJson,
    Newest,
    StoredConvention,
    StoredDtype,
    StorePath,
    TextSetDigest,
    UsageError,
)
from .output import print_json, print_table


def predict_command(
    store: StorePath,
    scores: Annotated[
        Path, typer.Option(help="A CSV file: models and benchmarks, in rows and columns.")
    ],
    group: Annotated[
        str | None,
        typer.Option(
            help="A key of the metadata: models with the same value of it are predicted together, "
            "from all others. family, if left out."
        ),
    ] = None,
    alone: Annotated[
        bool,
        typer.Option("--alone", help="Instead: folds without regard to such groups."),
    ] = False,
    log: Annotated[
        list[str] | None,
        typer.Option(help="A benchmark whose logarithm is predicted; may be given again."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="How many, at most.")] = 5,
    textset: TextSetDigest = None,
    convention: StoredConvention = None,
    dtype: StoredDtype = None,
    newest: Newest = False,
    as_json: AsJson = False,
) -> None:
    """Predict benchmark scores from where models are, each from those of other families."""
    from .prediction import predict_from_store

    if alone and group is not None:
        raise UsageError("--group goes without --alone, which has no groups")
    found = predict_from_store(
        store,
        scores,
        textset=textset,
        convention=convention,
        dtype=dtype,
        newest=newest,
        group=None if alone else "family" if group is None else group,
        folds=folds,
        log=log or (),
    )
    if as_json:
        print_json(found)
        return
    print_table(
        ["benchmark", "models", "r", "rank r", "r of mean log-likelihood", "rank r of it"],
        [
            (
                each.benchmark,
                len(each.models),
                str(each.pearson),
                str(each.spearman),
                str(each.baseline_pearson),
                str(each.baseline_spearman),
            )
            for each in found
        ],
        title="Predicted and real scores, 95 % intervals",
    )

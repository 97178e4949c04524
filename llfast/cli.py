"""The command line: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .cli_bench import bench_app
from .cli_compare import compare_command
from .cli_fleet import fleet_app
from .cli_index import index_app
from .cli_layers import layers_command
from .cli_map import map_command
from .cli_options import (
    AdapterBase,
    AllowPickle,
    AsJson,
    Convention,
    Device,
    Dtype,
    Manifest,
    MemoryBudget,
    Newest,
    Revision,
    SearchMode,
    StoredConvention,
    StoredDtype,
    StorePath,
    TextSetDigest,
    TextsPath,
    TokenBudget,
    TokenizerFolder,
    TrustRemoteCode,
    Unit,
    UsageError,
    Verify,
    Weights,
)
from .cli_predict import predict_command
from .cli_texts import texts_app
from .cli_trajectory import trajectory_command
from .output import (
    print_estimates,
    print_facts,
    print_json,
    print_line,
    print_note,
    print_outcome,
    print_table,
)

app = typer.Typer(
    name="llfast",
    help="Score texts with causal language models, and find each model's relatives by KL "
    "divergence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(texts_app, name="texts")
app.add_typer(bench_app, name="bench")
app.add_typer(index_app, name="index")
app.add_typer(fleet_app, name="fleet")
app.command("map")(map_command)
app.command("layers")(layers_command)
app.command("predict")(predict_command)
app.command("compare")(compare_command)
app.command("trajectory")(trajectory_command)


def _print_version(asked: bool) -> None:
    if asked:
        print_line(f"llfast {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and stop."
        ),
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command("score")
def score_command(
    texts: TextsPath,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Folders or Hub ids.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="<path>", help="The folder of results, or s3://bucket/prefix."),
    ] = None,
    model_list: Annotated[
        Path | None, typer.Option("--list", help="A file with a model a line, or .jsonl.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What to call the model (with one).")] = None,
    revision: Revision = None,
    convention: Convention = "paper",
    dtype: Dtype = "auto",
    device: Device = "auto",
    token_budget: TokenBudget = None,
    weights: Weights = "auto",
    memory_budget: MemoryBudget = None,
    verify: Verify = False,
    manifest: Manifest = None,
    together: Annotated[
        bool, typer.Option("--together", help="Read once what several of the models share.")
    ] = False,
    tokenizer: TokenizerFolder = None,
    adapter_base: AdapterBase = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score models on a text set; what the store has already is skipped."""
    from .fleet import estimate_models, score_models
    from .model_list import ModelRequest, read_model_list
    from .store import Store
    from .texts import TextSet

    requests = [
        ModelRequest(
            model=model,
            name=name,
            revision=revision,
            tokenizer=tokenizer,
            adapter_base=adapter_base,
        )
        for model in models or []
    ]
    if model_list is not None:
        requests += read_model_list(model_list)
    if not requests:
        raise UsageError("give at least one MODEL, or --list FILE")
    if name is not None and len(requests) > 1:
        raise UsageError("--name goes with one MODEL")
    own = {"--name": name, "--revision": revision, "--tokenizer": tokenizer}
    own["--adapter-base"] = adapter_base
    if not models and (given := [option for option, value in own.items() if value is not None]):
        raise UsageError(f"{given[0]} goes with MODEL; say it in the list, as .jsonl")
    text_set = TextSet.load(texts)
    options: dict[str, Any] = {
        "convention": convention,
        "dtype": dtype,
        "device": device,
        "token_budget": token_budget,
        "weights": weights,
        "memory_budget": memory_budget,
        "verify": verify if manifest is None else manifest,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
    }
    if dry_run and together:
        raise UsageError("--together goes with a run; --dry-run says what each model takes alone")
    if dry_run:
        estimates = estimate_models(requests, text_set, **options)
        print_json(estimates) if as_json else print_estimates(estimates)
        return
    if store is None:
        raise UsageError("--store DIR is needed, except with --dry-run")
    outcomes = score_models(
        requests,
        text_set,
        Store(store),
        together=together,
        report=None if as_json else print_outcome,
        **options,
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if as_json:
        print_json([outcome.summary() for outcome in outcomes])
    if failed:
        print_note(f"llfast: {len(failed)} of {len(outcomes)} models failed; the store has why")
        raise typer.Exit(1)


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="A .csv, .npz or .parquet file.")],
    store: StorePath,
    unit: Annotated[str, typer.Option(help="nats or bits_per_byte.")],
    text_bytes: Annotated[
        str, typer.Option(help="Bytes a text: one number, or a file (.jsonl, .csv, .txt).")
    ],
    convention: Annotated[str, typer.Option(help="The name to keep it under.")] = "imported",
    as_json: AsJson = False,
) -> None:
    """Put a model x text matrix that was made elsewhere into the store."""
    from .importing import import_matrix
    from .store import Store

    matrix = import_matrix(file, unit=unit, text_bytes=text_bytes, convention=convention)
    Store(store).add_matrix(matrix)
    k, n = matrix.values.shape
    if as_json:
        print_json({"models": k, "texts": n, "textset": matrix.textset_digest})
        return
    print_line(f"{k} models on {n} texts in {store}, text set {matrix.textset_digest[:12]}")


@app.command("search")
def search_command(
    model: Annotated[str, typer.Argument(help="A model of the store, a folder or a Hub id.")],
    store: StorePath,
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="How many relatives: 10, if left out.")
    ] = None,
    radius: Annotated[
        float | None, typer.Option(min=0, help="Instead: all models within this KL, in --unit.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Only such models: a SQL condition, \"family = 'llama'\"."),
    ] = None,
    mode: SearchMode = "auto",
    texts: Annotated[
        Path | None, typer.Option(help="The text set, to score a model the store lacks.")
    ] = None,
    textset: TextSetDigest = None,
    convention: StoredConvention = None,
    dtype: StoredDtype = None,
    newest: Newest = False,
    unit: Unit = "bits_per_byte",
    as_json: AsJson = False,
) -> None:
    """The nearest relatives of a model, by KL divergence with a 95 % interval."""
    from .nearest import find_nearest

    if k is not None and radius is not None:
        raise UsageError("-k goes without --radius, which finds all models within it")
    query, hits = find_nearest(
        model,
        store,
        k=k or 10,
        radius=radius,
        where=where,
        mode=mode,
        texts=texts,
        textset=textset,
        convention=convention,
        dtype=dtype,
        newest=newest,
        unit=unit,
    )
    if as_json:
        found = {"model": query, "unit": unit, "hits": [hit.summary() for hit in hits]}
        print_json(found | {"certificate": hits.certificate, "recall_at_10": hits.recall})
        return
    label = unit.replace("_per_", "/")
    print_table(
        ["model", "KL", "±", "95 % interval", "family"],
        [
            (
                hit.model,
                hit.kl,
                hit.standard_error,
                "{:.4g} to {:.4g}".format(*hit.interval)
                + (", below the noise of mixed dtypes" if hit.estimate.below_noise_floor else ""),
                hit.metadata.get("family"),
            )
            for hit in hits
        ],
        title=f"Nearest to {query}, KL in {label}",
    )
    print_line(hits.certificate_line(label))


@app.command("kl")
def kl_command(
    a: Annotated[str, typer.Argument(help="A model of the store.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    store: StorePath,
    textset: TextSetDigest = None,
    convention: StoredConvention = None,
    dtype: StoredDtype = None,
    newest: Newest = False,
    unit: Unit = "bits_per_byte",
    as_json: AsJson = False,
) -> None:
    """The KL divergence between two models, with its 95 % interval."""
    from .nearest import find_kl

    a, b, kl = find_kl(
        a,
        b,
        store,
        textset=textset,
        convention=convention,
        dtype=dtype,
        newest=newest,
        unit=unit,
    )
    if as_json:
        print_json({"a": a, "b": b, "kl": kl})
        return
    print_line(f"KL({a}, {b}) = {kl}")


@app.command("info")
def info_command(
    target: Annotated[
        str | None, typer.Argument(help="A store or a checkpoint; nothing: this machine.")
    ] = None,
    adapter_base: AdapterBase = None,
    as_json: AsJson = False,
) -> None:
    """What a store or a checkpoint holds, or what llfast runs on here."""
    from .about import describe

    if target is None and adapter_base is not None:
        raise UsageError("--adapter-base goes with the adapter that belongs to it")
    facts, rows = describe(target, adapter_base)
    if as_json:
        print_json({**facts, "rows": rows})
        return
    print_facts(facts, rows)


@app.command("compact")
def compact_command(store: StorePath, as_json: AsJson = False) -> None:
    """Merge the store's small files; readers and writers may go on meanwhile."""
    from .store import Store

    merged = Store(store).compact()
    if as_json:
        print_json({"merged": merged})
        return
    print_line(f"{merged} shards merged" if merged else "nothing to merge")


@app.command("remove")
def remove_command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Names in the store, or name@revision.")
    ],
    store: StorePath,
    as_json: AsJson = False,
) -> None:
    """Take models and their layers out of the store; `llfast compact` frees their space."""
    from .store import Store

    removed = Store(store).remove(models)
    if as_json:
        print_json({"removed": removed})
        return
    print_line(f"{removed} results removed")


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="The folder for models, results and the map.")] = Path(
        "demo"
    ),
    as_json: AsJson = False,
) -> None:
    """Train a small zoo of models, score them, and find their relatives again."""
    from .demo import run_demo

    report = run_demo(out, say=print_note if as_json else print_line)
    if as_json:
        print_json(report)
    if not report["families_found"]:
        raise typer.Exit(1)

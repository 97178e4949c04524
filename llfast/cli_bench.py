"""`llfast bench`: benchmarks of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import AsJson, Device, Dtype, MemoryBudget, TextSetDigest
from .output import print_json, print_note

bench_app = typer.Typer(help="Measure llfast on this machine.", no_args_is_help=True)


@bench_app.command("kernel")
def bench_kernel(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="How many tokens; may be given again.")
    ] = None,
    heads: Annotated[
        list[str] | None, typer.Option(help="GPT-2, Llama-3-8B, ...; may be given again.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small heads: that it runs, not how fast.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The fused output head beside torch and other packages: errors, time and memory.

    On a CPU it runs with small heads unless some are named; the aims are for GPUs.
    """
    import torch

    from .bench.kernel import measure, wrong_cases
    from .bench.table import show

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    is_small = quick or (device == "cpu" and not heads)
    if device == "cpu":
        print_note("llfast: the aims are for GPUs; on a CPU this shows that the benchmark runs")
    found = measure(
        device=device,
        dtype=dtype,
        tokens=tokens,
        heads=heads,
        quick=is_small,
        case_seconds=0.1 if is_small else 1.0,
    )
    print_json(found) if as_json else show(found)
    if wrong_cases(found):
        raise typer.Exit(1)


@bench_app.command("loading")
def bench_loading(
    model: Annotated[str, typer.Argument(help="A checkpoint folder.")],
    tokens: Annotated[int, typer.Option(min=2, help="How many random tokens to score.")] = 4096,
    memory_budget: MemoryBudget = None,
    device: Device = "auto",
    repetitions: Annotated[int, typer.Option(min=1, help="Of everything, in turn.")] = 3,
    as_json: AsJson = False,
) -> None:
    """How fast a checkpoint's weights come, beside this machine's disk and memory."""
    from .bench.loading import measure, show

    found = measure(
        model,
        tokens=tokens,
        memory_budget=memory_budget,
        device=device,
        repetitions=repetitions,
    )
    print_json(found) if as_json else show(found)


@bench_app.command("search")
def bench_search(
    store: Annotated[
        Path | None, typer.Option(help="The folder of results; without it models are made up.")
    ] = None,
    textset: TextSetDigest = None,
    models: Annotated[int, typer.Option(min=20, help="How many are made up.")] = 20_000,
    texts: Annotated[int, typer.Option(min=2, help="Of made-up models.")] = 2_000,
    questions: Annotated[int, typer.Option(min=1, help="How many models are asked for.")] = 50,
    k: Annotated[int, typer.Option("-k", min=1, help="How many relatives.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Certified, exact and approximate searches beside faiss Flat, in turn, on this machine."""
    from .bench.search import measure, show

    found = measure(store, textset=textset, models=models, texts=texts, questions=questions, k=k)
    print_json(found) if as_json else show(found)


@bench_app.command("throughput")
def bench_throughput(
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", help="GPT-2, Llama-3-8B, ...; may be given again."),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="A checkpoint folder; may be given again."),
    ] = None,
    texts: Annotated[int | None, typer.Option(min=1, help="How many texts are scored.")] = None,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    repetitions: Annotated[int, typer.Option(min=1, help="Of everything, in turn.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure; what is written is removed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Models an hour and tokens/s, part by part beside what this machine can do.

    Shapes are made with random weights, of which the disk must hold all at once.
    """
    from .bench.throughput import measure
    from .bench.throughput_table import show

    found = measure(
        shapes,
        models=models or (),
        texts=texts,
        dtype=dtype,
        device=device,
        repetitions=repetitions,
        folder=folder,
    )
    print_json(found) if as_json else show(found)

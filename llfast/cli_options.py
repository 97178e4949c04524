"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# What all misuse raises; typer has no public name for it.
UsageError: Any = typer.BadParameter.__mro__[1]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
# No Path, which would take a slash out of s3://.
StorePath = Annotated[
    str,
    typer.Option("--store", metavar="<path>", help="The folder of results, or s3://bucket/prefix."),
]
TextsPath = Annotated[Path, typer.Option("--texts", help="A text set (.jsonl).")]
TextSetDigest = Annotated[
    str | None,
    typer.Option("--textset", help="Which text set of the store, by the start of its digest."),
]
Convention = Annotated[
    str, typer.Option(help="What is fed and scored: paper, always-bos or lm-eval.")
]
StoredConvention = Annotated[
    str | None, typer.Option("--convention", help="Only results under this convention.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
StoredDtype = Annotated[
    str | None, typer.Option("--dtype", help="Only models that ran in this dtype.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
# The largest is that of `check_token_budget`, whose module would load torch for `--help`.
TokenBudget = Annotated[
    int | None, typer.Option(min=1, max=1 << 20, help="The most tokens in a batch.")
]
Weights = Annotated[
    str, typer.Option(help="resident, paged (a layer at a time), or auto: paged if too large.")
]
MemoryBudget = Annotated[
    str | None, typer.Option(help="For weights and texts on their way: 8GiB, 500MB.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare weights with the Hub's sha256 digests.")
]
Manifest = Annotated[Path | None, typer.Option(help="Verify against this file, made by sha256sum.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
TokenizerFolder = Annotated[str | None, typer.Option("--tokenizer", help="Another tokenizer.")]
AdapterBase = Annotated[
    str | None, typer.Option(help="The model that a LoRA adapter is merged into.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let checkpoints bring code of their own.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load pickled weights, which can run code.")
]
Newest = Annotated[
    bool, typer.Option("--newest", help="Of several rows of one model, take the newest.")
]
Attempts = Annotated[
    int, typer.Option(min=1, help="How often a model is tried whose failure may pass.")
]
SearchMode = Annotated[
    str, typer.Option(help="exact, certified, approximate, or auto: by the number of models.")
]
Unit = Annotated[str, typer.Option(help="bits_per_byte or nats_per_text.")]

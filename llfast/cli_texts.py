"""`llfast texts`: make and look at text sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import AsJson
from .output import human_bytes, print_json, print_line, print_note, print_table

texts_app = typer.Typer(help="Make and look at text sets.", no_args_is_help=True)


@texts_app.command("build")
def texts_build(
    inputs: Annotated[list[Path], typer.Argument(metavar="FILE", help="Files and folders.")],
    out: Annotated[
        Path, typer.Option(help="Where to write the set (.jsonl); folders are read without it.")
    ],
    n: Annotated[int, typer.Option("--n", help="How many chunks to sample.")] = 10_000,
    max_bytes: Annotated[int, typer.Option(help="The longest chunk.")] = 1024,
    min_bytes: Annotated[int, typer.Option(help="Chunks up to this long are dropped.")] = 256,
    seed: Annotated[int, typer.Option(help="Names the sample.")] = 42,
    as_json: AsJson = False,
) -> None:
    """Cut documents into chunks of whole characters and sample them."""
    from .texts import build_texts

    texts, report = build_texts(
        inputs, n=n, max_bytes=max_bytes, min_bytes=min_bytes, seed=seed, out=out
    )
    texts.save(out)
    if report.skipped_files:
        print_note(
            f"llfast: {len(report.skipped_files)} files without usable text were left out, "
            f"{report.skipped_files[0]} among them"
        )
    if len(texts) < n:
        print_note(f"llfast: only {len(texts)} chunks were long enough for the {n} asked for")
    if as_json:
        print_json({"texts": len(texts), "digest": texts.digest, "out": out, "report": report})
        return
    print_line(
        f"{len(texts)} of {report.chunks} chunks from {report.documents} documents in {out}, "
        f"digest {texts.digest[:12]}"
    )


@texts_app.command("show")
def texts_show(
    path: Annotated[Path, typer.Argument(help="A text set (.jsonl).")],
    rows: Annotated[int, typer.Option(min=0, help="How many texts to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Count a text set and show its first texts."""
    from .texts import TextSet

    texts = TextSet.load(path)
    sizes = texts.text_bytes
    if as_json:
        summary = {
            "texts": len(texts),
            "digest": texts.digest,
            "bytes": int(sizes.sum()),
            "mean_bytes": float(sizes.mean()),
            "groups": len(set(texts.groups)) if texts.groups else None,
        }
        print_json(summary)
        return
    groups = f" from {len(set(texts.groups)):,} documents" if texts.groups else ""
    print_line(
        f"{len(texts):,} texts{groups}, {human_bytes(int(sizes.sum()))}, {sizes.min()} to "
        f"{sizes.max()} bytes, {sizes.mean():.1f} on average"
    )
    print_line(f"digest {texts.digest}")
    shown = list(zip(texts.ids, sizes.tolist(), texts.texts, strict=True))[:rows]
    if shown:
        print_table(["id", "bytes", "text"], [(i, b, t[:100]) for i, b, t in shown])

"""How the command line prints: tables for people, JSON for programs.

Names and metadata come from files of other people: rich's markup and the terminal's control
characters in them are made harmless.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

_WIDTH_OF_A_PIPE = 200


def print_json(value: Any) -> None:
    """One JSON document on standard output; a number that is not finite is null."""
    json.dump(_plain(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None
) -> None:
    """A table on standard output; numbers to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(title), title_justify="left", title_style="bold")
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(cell)) for cell in row))
    _console().print(table)


def print_line(text: str) -> None:
    """One line on standard output."""
    sys.stdout.write(clean(text) + "\n")


def print_note(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(clean(text) + "\n")


def print_outcome(outcome: Any) -> None:
    """One line a model, as soon as it is done."""
    facts = outcome.summary()
    if outcome.status == "scored":
        cut = facts["truncated_texts"]
        print_line(
            f"scored   {facts['model']}: {facts['bits_per_byte']:.4f} bits/byte, "
            f"{facts['tokens']:,} tokens in {human_seconds(facts['seconds'])} in {facts['dtype']}"
            + (f", {cut} texts truncated" if cut else "")
            + (f", {facts['unscored_texts']} without a token" if facts["unscored_texts"] else "")
        )
    else:
        reason = f": {outcome.error}" if outcome.error else ": in the store already"
        print_line(f"{outcome.status:8} {facts['model']}{reason}")


def print_estimates(estimates: Sequence[Any]) -> None:
    """What each model would take."""
    columns = ["model", "dtype", "device", "parameters", "to read", "memory", "tokens", "compute"]
    print_table(
        columns,
        [
            (
                each.model,
                each.dtype,
                each.device,
                each.parameters,
                human_bytes(each.read_bytes),
                human_bytes(each.memory_bytes),
                each.tokens,
                human_seconds(each.seconds),
            )
            for each in estimates
        ],
    )


def clean(text: str) -> str:
    """Text without line breaks and other control characters."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def human_bytes(count: float) -> str:
    """A size with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """A time with a unit."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE, highlight=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return clean(str(value))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value

"""How the command line prints: tables for people, JSON for programs.

Names and metadata come from files of other people: rich's markup and the terminal's control
characters in them are made harmless.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .progress import clean
from .redaction import without_secrets

_WIDTH_OF_A_PIPE = 200


def print_json(value: Any) -> None:
    """One JSON document on standard output; a number that is not finite is null."""
    json.dump(_plain(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None
) -> None:
    """A table on standard output; numbers to the right."""
    _console().print(table_of(columns, rows, title=title))


def table_of(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None
) -> Any:
    """A table, to be printed with others or anew."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(clean(title)), title_justify="left", title_style="bold")
    numeric = [
        all(isinstance(row[i], int | float | None) for row in rows)
        and any(row[i] is not None for row in rows)
        for i in range(len(columns))
    ]
    cells = [[_cell(cell) for cell in row] for row in rows]
    least = [
        max(map(len, column)) if right else 1
        for column, right in zip(zip(columns, *cells, strict=True), numeric, strict=True)
    ]
    # Where there is no room for them, numbers have to be folded, or rich would cut them.
    whole = sum(least) + 3 * len(columns) + 1 <= _console().width
    for name, right in zip(columns, numeric, strict=True):
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=right and whole)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def print_parts(parts: Sequence[Any]) -> None:
    """Lines, and tables of `table_of`, on standard output."""
    for part in parts:
        print_line(part) if isinstance(part, str) else _console().print(part)


def is_live_terminal() -> bool:
    """Whether standard output is a terminal on which what was printed can be replaced."""
    return sys.stdout.isatty() and not _console().is_dumb_terminal


@contextlib.contextmanager
def live_display() -> Iterator[Callable[[Sequence[Any]], None]]:
    """Yield `show(parts)`, which replaces what it showed before; in the end, all of it goes."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=_console(), auto_refresh=False, transient=True) as live:

        def show(parts: Sequence[Any]) -> None:
            shown = (Text(clean(part)) if isinstance(part, str) else part for part in parts)
            live.update(Group(*shown), refresh=True)

        yield show


def print_facts(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a fact that is known, then a table of what they are about."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if value is not None:
            print_line(f"{name:{width}} {_fact(name, value)}")
    if rows:
        print_table(
            list(rows[0]), [[_short(name, value) for name, value in row.items()] for row in rows]
        )


def print_line(text: str) -> None:
    """One line on standard output."""
    sys.stdout.write(clean(text) + "\n")


def print_note(text: str) -> None:
    """One line on standard error, without secrets."""
    sys.stderr.write(clean(without_secrets(text)) + "\n")


def print_outcome(outcome: Any) -> None:
    """One line a model, as soon as it is done."""
    facts = outcome.summary()
    if outcome.status == "scored":
        print_line(
            f"scored   {facts['model']}: {facts['bits_per_byte']:.4f} bits/byte, "
            f"{facts['tokens']:,} tokens in {human_seconds(facts['seconds'])} in {facts['dtype']}"
            + _named(facts["truncated_ids"], "truncated")
            + _named(facts["unscored_ids"], "without a token")
            + _paged(facts.get("paged"))
            + _verified(facts.get("verified"))
        )
    else:
        reason = f": {outcome.error}" if outcome.error else ": in the store already"
        print_line(f"{outcome.status:8} {facts['model']}{reason}")


def _named(ids: Sequence[str], what: str) -> str:
    if not ids:
        return ""
    first = ", ".join((*ids[:3], "...") if len(ids) > 3 else ids)
    return f", {len(ids)} text{'s'[: len(ids) > 1]} {what} ({first})"


def _paged(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return ""
    waves = f"{facts['waves']} wave{'s'[: facts['waves'] > 1]}"
    together = ""
    if others := facts.get("relatives"):
        shared = human_bytes(facts["shared_bytes"])
        together = f" for {others + 1} relatives together, which saved {shared}"
    return (
        f", {human_bytes(facts['bytes'])} of weights read in {waves} at "
        f"{human_bytes(facts['read_bytes_per_second'])}/s{together}, waited "
        f"{human_seconds(facts['stall_seconds'])} for them"
    )


def _verified(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return ""
    return (
        f", {human_bytes(facts['bytes'])} verified meanwhile in {human_seconds(facts['seconds'])}, "
        f"waited {human_seconds(facts['waited_seconds'])} for that"
    )


def print_estimates(estimates: Sequence[Any]) -> None:
    """What each model would take."""
    columns = "model, dtype, device, parameters, weights, to read, memory, tokens, compute"
    print_table(
        columns.split(", "),
        [
            (
                each.model,
                each.dtype,
                each.device,
                each.parameters,
                each.weights,
                human_bytes(each.read_bytes) + (" a wave" if each.weights == "paged" else ""),
                f"over {human_bytes(each.weights_bytes)}"
                if each.weights == "paged"
                else human_bytes(each.memory_bytes),
                each.tokens,
                human_seconds(each.seconds),
            )
            for each in estimates
        ],
    )


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


def _fact(name: str, value: Any) -> str:
    if isinstance(value, Mapping):  # how many texts each text set has
        return ", ".join(f"{digest[:12]} ({n:,} texts)" for digest, n in value.items())
    return human_bytes(value) if name.endswith("bytes") else _cell(value)


def _short(name: str, value: Any) -> Any:
    """Digests by their beginning, which every command takes for the whole."""
    return value[:12] if name in ("revision", "text set") else value


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

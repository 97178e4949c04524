"""A progress bar for scoring: texts, tokens a second, time left.

Names come from files of other people: what drives a terminal is taken out of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NAME_WIDTH = 30


@contextmanager
def progress_bar(
    name: str, *, done: int, total: int, show: bool | None
) -> Iterator[Callable[[int, int], None]]:
    """Yield `advance(texts, tokens)`, which moves a bar on standard error.

    Args:
        name: stands before the bar.
        done: texts that are scored already.
        total: all texts.
        show: None shows the bar only in a terminal; elsewhere, True shows its last state.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda _texts, _tokens: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class TokensPerSecond(ProgressColumn):
        def render(self, task: Task) -> Text:
            seconds = task.elapsed or 0.0
            rate = task.fields["tokens"] / seconds if seconds else 0.0
            return Text(f"{rate:,.0f} tokens/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("texts"),
        TokensPerSecond(table_column=Column(no_wrap=True)),  # the bar gives way, not this
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(escape(_short(clean(name))), total=total, completed=done, tokens=0)
        scored = 0

        def advance(texts: int, tokens: int) -> None:
            nonlocal scored
            scored += tokens
            bar.update(task, advance=texts, tokens=scored)

        yield advance


def _short(name: str) -> str:
    """The end of a long path, which tells models apart and leaves room for the bar."""
    return name if len(name) <= _NAME_WIDTH else "…" + name[1 - _NAME_WIDTH :]


def clean(text: str) -> str:
    """Text without line breaks and other control characters, which are shown as Python writes them.

    Rich's own escaping is for its markup only.
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)

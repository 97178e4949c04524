"""A progress bar for scoring: texts, tokens a second, time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    name: str, *, done: int, total: int, show: bool | None
) -> Iterator[Callable[[int, int], None]]:
    """Yield `advance(texts, tokens)`, which moves a bar on standard error.

    Args:
        name: stands before the bar.
        done: texts that are scored already.
        total: all texts.
        show: None shows the bar only in a terminal.
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
        TokensPerSecond(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(name), total=total, completed=done, tokens=0)
        scored = 0

        def advance(texts: int, tokens: int) -> None:
            nonlocal scored
            scored += tokens
            bar.update(task, advance=texts, tokens=scored)

        yield advance

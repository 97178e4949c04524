"""What the tables are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of Markdown."""
    titles = list(titles)
    head = " | ".join(titles).lstrip()  # of an empty first title
    return [f"| {head} |", "|" + "---|" * len(titles), *(f"| {' | '.join(row)} |" for row in rows)]


def spread(value: Mapping[str, float], form: str) -> str:
    """A median, with least and most in brackets."""
    median, least, most = (format(value[name], form) for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"

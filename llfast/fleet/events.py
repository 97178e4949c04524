"""What a worker does, as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from llfast.redaction import without_secrets

_MOST_LISTED = 20  # ids in an event


class Log(Protocol):
    """Takes events."""

    def __call__(self, event: str, **facts: Any) -> None:
        """One event, and facts about it."""


def no_log(event: str, **facts: Any) -> None:
    """Discard it."""


class JsonLog:
    """One line an event, as soon as it happens: `time`, `event`, who, and what.

    Lines are appended at once each, so that several workers can share a file on a local disk.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        """Args: path: a file to append to. facts: in every event.

        Raises:
            OSError: if it cannot be written.
        """
        self._path, self._facts = path, facts
        path.open("a").close()

    def __call__(self, event: str, **facts: Any) -> None:
        """Write an event."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = _plain({"time": now, "event": event, **self._facts, **facts})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")


def _plain(value: Any) -> Any:
    """Short, and without secrets, before anything is escaped."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value[:_MOST_LISTED]]
    return value if isinstance(value, int | float | None) else without_secrets(str(value))

"""`llfast fleet status`: how far many workers are, as a live table or as JSON."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import AsJson, Attempts, Convention, Dtype, StorePath, TextSetDigest
from .output import (
    human_seconds,
    is_live_terminal,
    live_display,
    print_json,
    print_note,
    print_parts,
    table_of,
)

_LEAST_SECONDS = 2.0  # between two looks at the store
_SHARE_OF_TIME = 0.2  # that may go into looking
_MOST_FAILED = 10  # in the live table; all are shown at the end


def fleet_status_command(
    store: StorePath,
    models: Annotated[
        Path | None, typer.Option(help="The list, to be told how much is left.")
    ] = None,
    textset: TextSetDigest = None,
    convention: Convention = "paper",
    dtype: Dtype = "auto",
    attempts: Attempts = 3,
    once: Annotated[
        bool, typer.Option("--once", help="One table, instead of one that goes on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """How far a fleet is: done, running, failed and why, models an hour, time left.

    In a terminal the table goes on until nothing of the list is left to do, or Ctrl-C; elsewhere
    this prints JSON. Convention, dtype and attempts are those that its workers were told.
    """
    from .model_list import read_model_list
    from .store import Store

    opened = Store(store)
    if not opened.folder.is_dir():
        print_note(f"llfast: there is no store at {store} yet")
    looks = _looks(
        opened,
        textset,
        convention=convention,
        dtype=dtype,
        attempts=attempts,
        requests=None if models is None else read_model_list(models),
    )
    if as_json or not (once or is_live_terminal()):
        print_json(next(looks).summary())
    elif once:
        print_parts(_parts(next(looks)))
    elif (found := _last(looks)) is not None:
        print_parts(_parts(found))


def _looks(store: Any, textset: str | None, *, convention: str, **options: Any) -> Iterator[Any]:
    """The status, again and again; each time, only what is new is read."""
    from .fleet.status import Watch, find_textset, fleet_status

    digest, watch = None, None
    while True:
        if digest is None:  # as long as nobody has begun
            digest = find_textset(store, textset, convention)
            watch = None if digest is None else Watch(store, digest, convention)
        yield fleet_status(store, digest, convention=convention, watch=watch, **options)


def _last(looks: Iterator[Any]) -> Any:
    """Show each until nothing is left to do, or Ctrl-C; returns the last one, if there was one."""
    found = None
    with live_display() as show, contextlib.suppress(KeyboardInterrupt):
        while True:
            start = time.monotonic()
            found = next(looks)
            show(_parts(found, most_failed=_MOST_FAILED))
            if found.to_do == 0:
                break
            took = time.monotonic() - start
            time.sleep(max(_LEAST_SECONDS, took / _SHARE_OF_TIME))
    return found


def _parts(found: Any, most_failed: int | None = None) -> list[Any]:
    """Lines and tables."""
    left = "" if found.to_do is None else f", {found.to_do:,} to do"
    parts: list[Any] = [
        f"{found.done:,} done{left}, {len(found.running)} running, {len(found.failed)} failed"
    ]
    if found.models_an_hour is None:
        parts.append("models an hour, tokens/s and time left are known from the second result on")
    else:
        rest = found.seconds_left
        parts.append(
            f"{found.models_an_hour:,.0f} models an hour, {found.tokens_a_second:,.0f} tokens/s"
            + ("" if rest is None else f", {human_seconds(rest)} left")
        )
    if found.running:
        parts.append(
            table_of(
                ["running", "host", "rank", "for", "silent for"],
                [
                    (
                        *(each[name] for name in ("model", "host", "rank")),
                        human_seconds(each["seconds"]),
                        human_seconds(each["silent_seconds"]),
                    )
                    for each in found.running
                ],
            )
        )
    newest = sorted(found.failed.items(), key=lambda each: -each[1].created_us)[:most_failed]
    if newest:
        parts.append(
            table_of(
                ["failed", "attempts", "reason"],
                [(name, each.attempts, each.reason) for name, each in sorted(newest)],
            )
        )
    if len(newest) < len(found.failed):
        parts.append(f"and {len(found.failed) - len(newest):,} that failed before")
    return parts

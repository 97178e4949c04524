"""What comparing weights with their sha256 costs a run that reads them a page at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llfast.bench import report

if TYPE_CHECKING:
    from bench_loading import Bench


def write_manifest(files: Sequence[Path], path: Path) -> Path:
    """As `sha256sum` writes it."""
    lines = []
    for file in files:
        with file.open("rb") as opened:
            lines.append(f"{hashlib.file_digest(opened, 'sha256').hexdigest()}  {file.name}\n")
    path.write_text("".join(lines))
    return path


def measure_verify(bench: Bench, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The same texts without and with `verify`, in turn, from files that no cache holds.

    Args:
        bench: what runs them.
        sizes: (texts, tokens of each) of every case.
    """
    manifest = str(write_manifest(bench.shards, bench.folder.with_suffix(".sha256")))
    cases = []
    for size in sizes:
        plain, verified = [], []
        for _ in range(bench.repetitions):
            plain.append(bench.run("llfast", size))
            verified.append(bench.run("llfast", size, verify=manifest))
        seconds = [[each["seconds"] for each in runs] for runs in (plain, verified)]
        extras = [each["extra"] for each in verified]
        cases.append(
            {
                "texts": size,
                "tokens": size[0] * size[1],
                "verified_bytes": extras[0]["verified_bytes"],
                "plain_seconds": report.spread(seconds[0]),
                "verified_seconds": report.spread(seconds[1]),
                "over_plain": report.paired(seconds[1], seconds[0]),
                "verify_seconds": report.spread([each["verify_seconds"] for each in extras]),
                "wait_seconds": report.spread([each["verify_wait_seconds"] for each in extras]),
                "disk_bytes_over_plain": report.paired(
                    [each["disk_bytes"] for each in verified],
                    [max(each["disk_bytes"], 1) for each in plain],
                ),
            }
        )
    return cases

"""How much memory a step takes, by what the kernel says of this process (Linux)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def highest_growth_mib(run: Callable[[], object]) -> float:
    """How far the resident size rose above where it was, at its highest, while `run` ran."""
    ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status_kib("VmRSS")
    run()
    return max(status_kib("VmHWM") - before, 0) / 1024


def measured_elsewhere(arguments: Sequence[str]) -> float:
    """The number that a script prints last, in a process whose allocator gives back what is freed.

    Without the settings, glibc keeps freed blocks and gives them out again.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return round(float(done.stdout.splitlines()[-1]), 1)


def status_kib(field: str) -> int:
    """A size that the kernel tells of this process, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status must have {field}")

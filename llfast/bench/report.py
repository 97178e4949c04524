"""What every benchmark's JSON says about where and how it was measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import llfast
from llfast.files import atomic_write
from llfast.kernels import instruction_set
from llfast.processor import processor_name

_ROOT = Path(__file__).parents[2]  # of a clone


def hardware() -> dict[str, Any]:
    """Chip, threads, and the GPU if there is one."""
    return {
        "processor": processor_name(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those of the packages named that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "llfast":  # runs from a clone without being installed, too
                found[package] = llfast.__version__
    return found


def commit() -> str:
    """Which commit was measured; empty outside a clone."""
    if not (_ROOT / ".git").exists():  # the repository of somebody else may lie further up
        return ""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(  # noqa: S603 (a fixed command)
            command, capture_output=True, text=True, check=False, cwd=_ROOT
        )
    except OSError:  # there is no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, to four digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios within each repetition."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())

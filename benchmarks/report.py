"""What every benchmark's JSON says about where and how it was measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llfast.devices import device_name
from llfast.kernels import instruction_set

RESULTS = Path(__file__).parent / "results"


def hardware() -> dict[str, Any]:
    """Chip, threads, and the GPU if there is one."""
    return {
        "processor": device_name(torch.device("cpu")),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of the packages named."""
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version(), **found}


def commit() -> str:
    """Which commit was measured; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, to four digits."""
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    found = {"median": middle, "min": ordered[0], "max": ordered[-1]}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios within each repetition."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")

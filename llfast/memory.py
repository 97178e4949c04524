"""How much memory there is, and sizes in words."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path

import numpy as np
import torch

_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_bytes(size: int | str) -> int:
    """A number of bytes, or "8GiB", "500 MB", "2e9".

    Raises:
        ValueError: if it is something else, or not positive.
    """
    number: float = 0.0
    if isinstance(size, str):
        found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-z]*)\s*", size.lower())
        if found and found[2] in _UNITS:
            with contextlib.suppress(ValueError):
                number = float(found[1]) * _UNITS[found[2]]
    elif isinstance(size, int | np.integer) and not isinstance(size, bool):
        number = int(size)
    if not 1 <= number < 2**63:
        raise ValueError(f"memory_budget must be a size like '8GiB', got {size!r}")
    return int(number)


@functools.cache
def total_bytes() -> int:
    """Memory of this machine, or of a container that has less; 0 where Linux does not say."""
    limits = (_number(f"{folder}/{name}") for folder, name, _ in _CGROUPS)
    found = [_field("/proc/meminfo", "MemTotal:") << 10, *(limit or 0 for limit in limits)]
    return min((size for size in found if size), default=0)


def available_bytes(device: torch.device) -> int:
    """Memory of a device that can be had now; 0 where nothing says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    found = [_field("/proc/meminfo", "MemAvailable:") << 10]
    for folder, limit_name, use_name in _CGROUPS:
        limit, use = _number(f"{folder}/{limit_name}"), _number(f"{folder}/{use_name}")
        if limit is not None and use is not None:
            # Cached files count as used, but go when memory is needed.
            cached = _field(f"{folder}/memory.stat", "inactive_file")
            found.append(max(limit - use + cached, 1))
    return min((size for size in found if size), default=0)


def _field(path: str, name: str) -> int:
    """The number behind a name, one a line; 0 if it is not there."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(path).read_text().splitlines():
            words = line.split()
            if words[:1] == [name]:
                return int(words[1])
    return 0


def _number(path: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # a limit may be the word "max"
        return int(Path(path).read_text())
    return None

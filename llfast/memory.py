"""How much memory there is, and sizes in words."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

# Of both versions of control groups: the controller by which /proc/self/cgroup has a process's own
# group, where groups are, and what says in each how much may be used, is used, and is a cache.
_CGROUPS = (
    ("", "/sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
    (
        "memory",
        "/sys/fs/cgroup/memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
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
    """Memory of this machine, or of a container or job with less; 0 where Linux does not say."""
    limits = (_number(f"{folder}/{name}") for folder, (name, _, _) in _groups())
    found = [_field("/proc/meminfo", "MemTotal:") << 10, *(limit or 0 for limit in limits)]
    return min((size for size in found if size), default=0)


def available_bytes(device: torch.device) -> int:
    """Memory of a device that can be had now; 0 where nothing says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    found = [_field("/proc/meminfo", "MemAvailable:") << 10]
    for folder, (limit_name, use_name, cached_name) in _groups():
        limit, use = _number(f"{folder}/{limit_name}"), _number(f"{folder}/{use_name}")
        if limit is not None and use is not None:
            # Cached files count as used, but go when memory is needed.
            cached = _field(f"{folder}/memory.stat", cached_name)
            found.append(max(limit - use + cached, 1))
    return min((size for size in found if size), default=0)


def _groups() -> Iterator[tuple[str, tuple[str, str, str]]]:
    """The control groups whose limits hold for this process, and the names of their files.

    These are its own, which may be that of a job on a cluster, and all that it lies in. A container
    that sees no others has the outermost only.
    """
    own: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path)
    for controller, folder, names in _CGROUPS:
        parts = [folder, *filter(None, own.get(controller, "").split("/"))]
        for count in range(len(parts)):
            yield "/".join(parts[: count + 1]), names


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

"""How fast weights come, beside what this machine's disk, memory and processor can do.

All in one run: the disk read past the system's cache, one block after the other and as llfast reads
it, memory copied, and a checkpoint scored with its weights paged, once with the files out of the
cache and once in it. What computing takes is the part of a run that does not wait for weights.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llfast.devices import resolve_device
from llfast.errors import MissingDependencyError
from llfast.models import open_model
from llfast.output import human_bytes, human_seconds, print_line, print_table
from llfast.paging import LoadingStatistics
from llfast.scoring import score

from .report import commit, hardware, spread, versions
from .timing import seconds_a_call

try:
    from llfast._native import FileReader, Memory
except ImportError as error:
    raise MissingDependencyError(
        "measuring how weights are read needs llfast's C++ module; build it with `pip install -e .`"
    ) from error

_SLOT_BYTES = 256 << 20
_BLOCK_BYTES = 8 << 20
_COPIED_BYTES = 256 << 20
_TEXT_TOKENS = 256
_VERSIONS = ("llfast", "torch", "transformers")


def measure(
    model: str,
    *,
    tokens: int = 4096,
    memory_budget: str | None = None,
    device: str = "auto",
    repetitions: int = 3,
) -> dict[str, Any]:
    """Measure on one checkpoint folder.

    Args:
        model: the folder.
        tokens: how many random tokens are scored, in texts of up to 256.
        memory_budget: as for `score`.
        device: "auto", "cpu" or "cuda".
        repetitions: of everything, in turn.

    Returns: what `show` prints; rates in bytes a second.

    Raises:
        CheckpointError: if the folder holds no checkpoint that can be scored.
    """
    source = open_model(model)
    if source.checkpoint is None:
        raise ValueError("model must be a checkpoint folder, got a loaded model")
    place = resolve_device(device, source)
    texts = _random_texts(source.config.get_text_config().vocab_size, tokens)
    ceilings: dict[str, list[float]] = {
        name: [] for name in ("disk", "disk, one reader", "memory copy", "copy to device")
    }
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}

    def run() -> dict[str, float]:
        loading = LoadingStatistics()
        start = time.perf_counter()
        score(
            source,
            token_ids=texts,
            weights="paged",
            memory_budget=memory_budget,
            device=device,
            loading=loading,
            progress=False,
        )
        found = _summary(loading, time.perf_counter() - start)
        if place.type != "cpu":  # the host does not wait for a device that computes
            del found["compute_rate"]
        return found

    for _ in range(repetitions):
        forget(source.checkpoint.weights)
        ceilings["disk"].append(read_rate(source.checkpoint.weights))
        forget(source.checkpoint.weights)
        ceilings["disk, one reader"].append(sequential_rate(source.checkpoint.weights))
        ceilings["memory copy"].append(copy_rate(torch.device("cpu")))
        if place.type == "cuda":
            ceilings["copy to device"].append(copy_rate(place))
        forget(source.checkpoint.weights)
        runs["cold"].append(run())
        read_into_cache(source.checkpoint.weights)
        runs["warm"].append(run())
    return {
        "benchmark": "loading",
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(*_VERSIONS),
        "model": {
            "type": source.config.model_type,
            "weight_bytes": source.checkpoint.weight_bytes,
            "parameters": source.checkpoint.parameters,
        },
        "tokens": sum(map(len, texts)),
        "memory_budget": memory_budget,
        "ceilings": {name: spread(rates) for name, rates in ceilings.items() if rates},
        "runs": {
            name: {key: spread([each[key] for each in found]) for key in found[0]}
            for name, found in runs.items()
        },
    }


def read_rate(paths: Sequence[Path]) -> float:
    """Bytes a second of files that no cache holds, read from beginning to end."""
    reader = FileReader(list(map(str, paths)))
    memory = Memory(_SLOT_BYTES)
    total = 0
    start = time.perf_counter()
    for number, path in enumerate(paths):
        size = path.stat().st_size
        for offset in range(0, size, _SLOT_BYTES):
            count = min(_SLOT_BYTES, size - offset)
            reader.read(memory, np.array([[number, offset, count, 0]], dtype=np.int64))
            total += count
    return total / (time.perf_counter() - start)


def sequential_rate(paths: Sequence[Path]) -> float:
    """The same by one thread, which waits for each 8 MiB; past the cache where possible."""
    start = time.perf_counter()
    total = 0
    with mmap.mmap(-1, _BLOCK_BYTES) as block:  # O_DIRECT wants whole pages
        for path in paths:
            try:
                file = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:  # on a file system without direct reads
                file = os.open(path, os.O_RDONLY)
            try:
                while count := os.readv(file, [block]):
                    total += count
            finally:
                os.close(file)
    return total / (time.perf_counter() - start)


def forget(paths: Sequence[Path]) -> None:
    """Take files out of the system's cache, as far as it lets go of them."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def read_into_cache(paths: Sequence[Path]) -> None:
    """Read files into the system's cache."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def copy_rate(device: torch.device) -> float:
    """Bytes a second from memory to memory, or to a device."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    copy: Callable[[], object] = lambda: target.copy_(source, non_blocking=True)  # noqa: E731
    copy()
    return _COPIED_BYTES / seconds_a_call(copy, 5, device)


def _random_texts(vocabulary: int, tokens: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes = [_TEXT_TOKENS] * (tokens // _TEXT_TOKENS) + [tokens % _TEXT_TOKENS]
    return [random.integers(vocabulary, size=size) for size in sizes if size]


def _summary(loading: LoadingStatistics, seconds: float) -> dict[str, float]:
    pages = loading.pages
    return {
        "seconds": seconds,
        "waves": loading.waves,
        "bytes": loading.nbytes,
        "cached_bytes": sum(page.cached_bytes for page in pages),
        "read_seconds": loading.read_seconds,
        "stall_seconds": loading.stall_seconds,
        "read_rate": loading.read_rate,
        "compute_rate": loading.nbytes / max(seconds - loading.stall_seconds, 1e-9),
        "slot_bytes": loading.slot_bytes,
        "state_bytes": loading.state_bytes,
    }


def show(found: Mapping[str, Any]) -> None:
    """Print rates side by side, and what a run took."""
    print_table(
        ["bytes a second", "median", "from", "to"],
        [
            (name, *(f"{human_bytes(rate[key])}/s" for key in ("median", "min", "max")))
            for name, rate in (
                *found["ceilings"].items(),
                *((f"weights, {name}", run["read_rate"]) for name, run in found["runs"].items()),
                *(
                    (f"computing, {name}", run["compute_rate"])
                    for name, run in found["runs"].items()
                    if "compute_rate" in run
                ),
            )
        ],
        title=f"{found['model']['type']}, {human_bytes(found['model']['weight_bytes'])}",
    )
    for name, run in found["runs"].items():
        middle = {key: values["median"] for key, values in run.items()}
        waves = middle["waves"]
        print_line(
            f"{name}: {found['tokens']:,} tokens in {human_seconds(middle['seconds'])}, "
            f"{human_bytes(middle['bytes'])} read in {waves:.0f} wave{'s'[: waves > 1]}, in "
            f"{human_seconds(middle['read_seconds'])}, of which "
            f"{human_seconds(middle['stall_seconds'])} were waited for"
        )

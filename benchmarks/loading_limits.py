"""What this machine's disk and memory can do, to hold loading against."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llfast.bench import loading

BLOCK = 8 << 20  # of raw reads
# Threads that read with preadv, and llfast's reader, whose memory has huge pages.
SEQUENTIAL = "1 thread"
WAYS = (SEQUENTIAL, "2 threads", "4 threads", "8 threads", "llfast's reader")


def read_rate(paths: Sequence[Path], way: str) -> float:
    """GB/s of reading files from begin to end past the cache, in one of the ways."""
    if way == "llfast's reader":
        return loading.read_rate(paths) / 1e9
    return raw_read_rate(paths, int(way.partition(" ")[0]))


def raw_read_rate(paths: Sequence[Path], threads: int) -> float:
    """GB/s of reading files from begin to end with O_DIRECT, each thread block after block."""
    blocks = [(path, at) for path in paths for at in range(0, path.stat().st_size, BLOCK)]
    files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths}
    counts = [0] * threads
    following = iter(blocks)  # taking the next of a list's iterator is one step of the interpreter

    def read(thread: int) -> None:
        with mmap.mmap(-1, BLOCK) as buffer:
            for path, at in following:
                counts[thread] += os.preadv(files[path], [buffer], at)

    workers = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    for file in files.values():
        os.close(file)
    if sum(counts) != sum(path.stat().st_size for path in paths):
        raise OSError("raw reads must bring all bytes")
    return sum(counts) / seconds / 1e9


def memory_copy_rate() -> float:
    """GB/s of torch's copy of 256 MiB, bytes copied."""
    source = torch.ones(256 << 20, dtype=torch.uint8)
    target = torch.zeros_like(source)
    start = time.perf_counter()
    for _ in range(5):
        target.copy_(source)
    return 5 * len(source) / (time.perf_counter() - start) / 1e9

"""Ways of scoring texts with a checkpoint, each run in a process of its own.

    python benchmarks/loading_peers.py PROVIDER '{"folder": ..., "texts": 4, "tokens": 16, ...}'

Prints one line of JSON. Before anything is measured, the same is done with a tiny checkpoint, so
that what a process loads once is no part of it. What a peer computes is written as sparingly as it
can be: no cache, and the softmax of one text at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_checkpoint import draw_texts
from memory import status_kib

TINY_TEXTS, TINY_TOKENS = 4, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be scored, and how.

    Attributes:
        folder: of the checkpoint.
        tiny: of one to begin with.
        texts, tokens: how many texts, and how many tokens each has.
        batch: texts in a peer's batch.
        cold: whether the files are dropped from the page cache first, and before every batch of a
            peer: so it finds a checkpoint that is larger than memory.
        memory_budget, token_budget: of `llfast.score`.
        verify: a manifest for it; empty for none.
        limit_mib: of memory that the process may take on top of what it has, for good; 0 for all.
        shards: where AirLLM has its copies of checkpoints.
    """

    folder: str
    tiny: str
    texts: int
    tokens: int
    batch: int = 1
    cold: bool = True
    memory_budget: str = "2GiB"
    token_budget: int | None = None
    verify: str = ""
    limit_mib: int = 0
    shards: str = ""

    def ids(self) -> list[np.ndarray]:
        """Of all texts."""
        config = json.loads(Path(self.folder, "config.json").read_text())
        return draw_texts(self.texts, self.tokens, config["vocab_size"])

    def files(self) -> list[Path]:
        """All that a provider may read weights from."""
        folders = [Path(self.folder), *([airllm_copy(self)] if self.shards else [])]
        return [path for folder in folders for path in folder.rglob("*.safetensors")]


@dataclass(slots=True)
class Outcome:
    """What came of it.

    Attributes:
        values: log-likelihood of every text.
        load_seconds: until the model can be called, all of its weights touched where it keeps them.
        score_seconds: from there to the last value.
        extra: what only some providers say.
    """

    values: list[float] = field(default_factory=list)
    load_seconds: float = 0.0
    score_seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------- providers


def run_paged(task: Task) -> Outcome:
    """`llfast.score` with weights that are paged."""
    import llfast
    from llfast.paging import LoadingStatistics

    loading = LoadingStatistics()
    start = time.perf_counter()
    found = llfast.score(
        task.folder,
        token_ids=task.ids(),
        weights="paged",
        memory_budget=task.memory_budget,
        token_budget=task.token_budget,
        verify=task.verify or False,
        loading=loading,
        progress=False,
    )
    seconds = time.perf_counter() - start
    largest = max((page.nbytes for page in loading.pages), default=0)
    extra = {
        name: getattr(loading, name)
        for name in (
            *("nbytes", "read_seconds", "stall_seconds", "waves", "slot_bytes", "kept_bytes"),
            *("state_bytes", "peak_bytes", "wave_tokens", "rows_bytes"),
            *("verified_bytes", "verify_seconds", "verify_wait_seconds"),
        )
    }
    first = loading.pages[1].stall_seconds if len(loading.pages) > 1 else 0.0
    extra |= {"page_bytes": largest, "first_stall_seconds": first}
    return Outcome(found.values.tolist(), 0.0, seconds, extra)


def run_resident(task: Task) -> Outcome:
    """`llfast.score` with a model that is in memory."""
    import llfast

    start = time.perf_counter()
    model = load_plain(task.folder)
    loaded = time.perf_counter()
    found = llfast.score(
        (model, None), token_ids=task.ids(), token_budget=task.token_budget, progress=False
    )
    return Outcome(found.values.tolist(), loaded - start, time.perf_counter() - loaded)


def run_plain(task: Task) -> Outcome:
    """As transformers does by itself, with all weights in memory."""
    start = time.perf_counter()
    model = load_plain(task.folder)
    return score_in_batches(model, task, start)


def run_accelerate(task: Task) -> Outcome:
    """With accelerate's disk offload of the layers, where nearly all weights are."""
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        task.folder,
        dtype=torch.bfloat16,
        device_map={**places, "lm_head": "cpu", "model.layers": "disk"},
        offload_folder=f"{task.tiny}-offload",
    )
    return score_in_batches(model.eval(), task, start)


def run_airllm(task: Task) -> Outcome:
    """AirLLM on a CPU. It has split the checkpoint into a file a layer before."""
    with contextlib.redirect_stdout(sys.stderr):
        from airllm import AirLLMBaseModel

        class WithoutTokenizer(AirLLMBaseModel):  # type: ignore[misc]
            def get_tokenizer(self, hf_token: str | None = None) -> None:  # noqa: ARG002
                return None

        start = time.perf_counter()
        model = WithoutTokenizer(
            task.folder,
            device="cpu",
            layer_shards_saving_path=str(airllm_copy(task)),
        )
        return score_in_batches(model, task, start)


PROVIDERS: dict[str, Callable[[Task], Outcome]] = {
    "llfast": run_paged,
    "resident": run_resident,
    "from_pretrained": run_plain,
    "accelerate": run_accelerate,
    "AirLLM": run_airllm,
}


def load_plain(folder: str) -> Any:
    """A model all of whose weights have been read from the files that transformers maps."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.data.view(-1)[:: mmap.PAGESIZE // parameter.element_size()].sum()
    return model


def airllm_copy(task: Task) -> Path:
    """Where AirLLM has a checkpoint in pieces."""
    return Path(task.shards, Path(task.folder).name)


def score_in_batches(model: Any, task: Task, start: float) -> Outcome:
    """One forward a batch; all texts are of one length, so there is no padding."""
    loaded = time.perf_counter()
    pause = 0.0
    ids = torch.from_numpy(np.stack(task.ids()))
    values = []
    with torch.inference_mode():
        for first in range(0, len(ids), task.batch):
            if task.cold and first:
                before = time.perf_counter()
                drop(task.files())
                pause += time.perf_counter() - before
            rows = ids[first : first + task.batch]
            logits = model(input_ids=rows, use_cache=False).logits
            for row, own in zip(rows, logits, strict=True):
                logprobs = torch.log_softmax(own[:-1], dim=-1, dtype=torch.float32)
                values.append(logprobs.gather(-1, row[1:, None]).double().sum().item())
    end = time.perf_counter()
    return Outcome(values, loaded - start, end - loaded - pause)


# ------------------------------------------------------------------------------------ page cache


def drop(files: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(files: Sequence[Path]) -> float:
    """How much of files is in the page cache, by mincore."""
    cached = total = 0
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            array = np.frombuffer(mapped, np.uint8)
            pages = -(-len(array) // mmap.PAGESIZE)
            found = np.zeros(pages, np.uint8)
            address, result = ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(found.ctypes.data)
            if ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(array)), result) != 0:
                raise OSError(f"mincore must work on {path}")
            cached += int((found & 1).sum())
            total += pages
            del array
    return cached / max(total, 1)


# ------------------------------------------------------------------------------------------ main


def measured(provider: Callable[[Task], Outcome], task: Task) -> dict[str, Any]:
    """A provider's outcome, with what the system says of this process."""
    tiny = {**asdict(task), "folder": task.tiny, "texts": TINY_TEXTS, "tokens": TINY_TOKENS}
    provider(Task(**{**tiny, "cold": False, "verify": ""}))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if task.limit_mib:
        limit_memory(task.limit_mib << 20)
    if task.cold:
        drop(task.files())
    cached = cached_share(task.files())
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    rss, read = status_kib("VmRSS"), _read_bytes()
    with _highest_anonymous() as anonymous:
        outcome = provider(task)
    return {
        **asdict(outcome),
        "seconds": outcome.load_seconds + outcome.score_seconds,
        "process_mib": rss / 1024,
        "peak_mib": (status_kib("VmHWM") - rss) / 1024,
        "peak_anonymous_mib": anonymous[0] / 1024,
        "disk_bytes": _read_bytes() - read,
        "cached_before": cached,
    }


@contextlib.contextmanager
def _highest_anonymous() -> Iterator[list[int]]:
    """KiB of memory that is no mapped file, at its highest (looked at every 20 ms), beyond now."""
    from threading import Event, Thread

    before, highest, done = status_kib("RssAnon"), [0], Event()

    def look() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], status_kib("RssAnon") - before)

    thread = Thread(target=look)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


def limit_memory(beyond: int) -> None:
    """Have the system refuse this process more than so many bytes on top of what it has.

    What counts is private memory that may be written to, touched or not (RLIMIT_DATA); files that
    are mapped do not. An address space (`ulimit -v`) has libraries and thread stacks in it, too.
    """
    limit = (status_kib("VmData") << 10) + beyond
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        bytearray(beyond + (64 << 20))
    except MemoryError:
        return
    raise OSError("the limit must hold")


def _read_bytes() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io must have read_bytes")


if __name__ == "__main__":
    print(json.dumps(measured(PROVIDERS[sys.argv[1]], Task(**json.loads(sys.argv[2])))))

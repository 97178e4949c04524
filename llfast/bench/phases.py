"""Where the time of scoring goes: a stopwatch at the seams of the hot path.

Each part is timed around the very functions that `llfast.score` calls, for as long as it is
watched. At any time one part is running, the innermost one; so the parts sum to the total.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

TOKENISE, READ, BODY, HEAD, STORE = PARTS = ("tokenise", "read", "body", "head", "store")
OTHER = "other"

# (module of llfast, what of it, part): how a model that is paged, or kept, and one that is loaded
# whole go through them.
_SEAMS = (
    ("runs", "tokenize", TOKENISE),
    ("paging.pages", "Pages.take", READ),  # waits for a page
    ("paging.pages", "Pages.rows", READ),  # of the embedding
    ("models", "FolderSource.load", READ),
    ("paging.suspended", "Forward.resume", BODY),
    ("batchwise", "run_model", BODY),
    ("paging.waves", "_add", HEAD),
    ("kernels", "PartialLogprobs.statistics", HEAD),
    ("head", "Head.token_logprobs", HEAD),
    ("store", "Store.add", STORE),
)


class Phases:
    """A stopwatch for each part.

    On CUDA it waits for the device whenever the part changes; a model that is paged then overlaps
    less than it does without.

    Attributes:
        seconds: by part; "other" is what is none of them.
        calls: of each seam, so that one which is never gone through can be noticed.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys((*PARTS, OTHER), 0.0)
        self.calls = {f"{module}.{name}": 0 for module, name, _ in _SEAMS}
        self._device = device
        self._running = [OTHER]
        self._since = 0.0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Time what is done meanwhile, in this thread."""
        with contextlib.ExitStack() as stack:
            for module, name, part in _SEAMS:
                stack.enter_context(self._around(module, name, part))
            self._synchronise()
            self._since = time.perf_counter()
            try:
                yield
            finally:
                self._lap()

    @contextlib.contextmanager
    def _around(self, module: str, name: str, part: str) -> Iterator[None]:
        owner: Any = importlib.import_module(f"llfast.{module}")
        *path, attribute = name.split(".")
        for each in path:
            owner = getattr(owner, each)
        before: Callable[..., Any] = vars(owner)[attribute]

        @functools.wraps(before)
        def timed(*given: Any, **named: Any) -> Any:
            self.calls[f"{module}.{name}"] += 1
            self._lap()
            self._running.append(part)
            try:
                return before(*given, **named)
            finally:
                self._lap()
                self._running.pop()

        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            setattr(owner, attribute, before)

    def _lap(self) -> None:
        """What has passed since the last change belongs to the part that was running."""
        self._synchronise()
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

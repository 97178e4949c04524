"""What runs on the machines of a Ray cluster: workers, and where they find token ids."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from llfast import cache
from llfast.errors import StoreError, needed
from llfast.model_list import ModelRequest
from llfast.outcomes import Outcome
from llfast.remote import AnyPath
from llfast.store import Store
from llfast.texts import TextSet

from .failures import reason_of
from .ledger import Asked, Ledger
from .prefetch import Prefetch
from .terms import Terms
from .worker import LEASES, Worker

with needed("ray", "a Ray cluster needs Ray; pip install 'llfast[ray]'"):
    import ray


@dataclass(frozen=True, slots=True)
class Broken:
    """What keeps a worker from working at any model.

    Attributes:
        reason: in one line.
        is_of_store: whether it keeps all others, too.
    """

    reason: str
    is_of_store: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What is the same for all workers of a run, sent once to each machine."""

    texts: TextSet
    folder: str
    terms: Terms
    forgiven: Mapping[Asked, int]
    run: str
    working_folder: str


class ScoringWorker:
    """A process that scores one model after the other; an actor."""

    def __init__(self, name: str, assignment: Assignment, tokens: Any, gpus: float) -> None:
        self._name, self._assignment = name, assignment
        self._tokens, self._gpus = tokens, gpus
        self._worker: Worker | None = None
        self._has_scored = False
        terms = assignment.terms
        self._prefetch = Prefetch(
            trust_remote_code=terms.trust_remote_code, allow_pickle=terms.allow_pickle
        )

    def begin(self) -> Broken | None:
        """Be ready for models; what is wrong with this machine, if anything is."""
        own = self._assignment
        with contextlib.suppress(OSError):
            os.chdir(own.working_folder)  # that relative paths in the list mean
        try:
            store = _find_store(own.folder, own.run)
            if 0 < self._gpus < 1:
                torch.cuda.set_per_process_memory_fraction(self._gpus)
            ledger = Ledger(store, own.texts.digest, own.terms.convention)
            ledger.refresh()
            cache.share_with(_SharedTokens(self._tokens, self._name))
            self._worker = Worker(
                own.texts,
                store,
                own.terms,
                facts={"rank": self._name},
                ledger=ledger,
                forgiven=own.forgiven,
                run=own.run,
                progress=False,
            )
            self._worker.__enter__()  # until the process ends
        except Exception as error:
            return Broken(reason_of(error), isinstance(error, StoreError | OSError))
        return None

    def attempt(
        self, request: ModelRequest, following: ModelRequest | None
    ) -> Outcome | Literal["held", "settled"] | Broken:
        """Score a model, as `Worker.attempt` does, while the files of the next one are fetched."""
        assert self._worker is not None
        self._prefetch.end()
        if following is not None:
            self._prefetch.begin(following)
        try:
            return self._worker.attempt(request)
        except Exception as error:
            return Broken(reason_of(error), is_of_store=True)
        finally:
            # A tokenizer that has failed has made no token ids: nobody is to wait for them.
            self._tokens.give_up_on.remote(self._name)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if not self._has_scored:
                self._has_scored = True
                spare_collections()  # modules are there now


def sign_of(store: Store, run: str) -> AnyPath:
    """A file that a store has while a run is on: a folder of that name may be another one."""
    return store.folder / LEASES / f"{run}.run"


def _find_store(folder: str, run: str) -> Store:
    """The driver's store, as this machine sees it."""
    store = Store(folder)
    if not sign_of(store, run).exists():
        raise StoreError(
            f"store must be where all machines of the cluster see it, got {folder}, which "
            f"{socket.gethostname()} does not"
        )
    return store


def spare_collections() -> None:
    """Let garbage collections pass over all that there is now.

    As long as anything of a run waits for room, Ray has each process collect every ten seconds,
    which with the modules of transformers takes a second of Python's lock.
    """
    gc.collect()
    gc.freeze()


class TokenIds:
    """Token ids in the object store, made once by whoever asks first; an actor.

    It is the owner of all of them: they outlive the worker that has made them.
    """

    def __init__(self) -> None:
        self._known: dict[str, asyncio.Future[Any]] = {}
        self._makers: dict[str, str] = {}  # of what is not there yet
        self._made = 0
        spare_collections()

    async def find(self, name: str, worker: str) -> list[Any] | None:
        """In a list, a reference to arrays; None for a worker that is to make them."""
        while (known := self._known.get(name)) is not None:
            if (found := await asyncio.shield(known)) is not None:
                return [found]
        self._known[name] = asyncio.get_running_loop().create_future()
        self._makers[name] = worker
        return None

    async def keep(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Take in what was made."""
        self._made += 1
        self._makers.pop(name, None)
        known = self._known.setdefault(name, asyncio.get_running_loop().create_future())
        if not known.done():
            known.set_result(ray.put(arrays))

    async def give_up_on(self, worker: str) -> None:
        """Let others make what a worker was to make, and has not."""
        for name in [name for name, maker in self._makers.items() if maker == worker]:
            del self._makers[name]
            self._known.pop(name).set_result(None)

    async def made(self) -> int:
        """How often arrays were made."""
        return self._made


class _SharedTokens:
    """`cache.SharedArrays` from the object store; without an answer everybody makes their own."""

    def __init__(self, tokens: Any, worker: str) -> None:
        self._tokens, self._worker = tokens, worker

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        with contextlib.suppress(ray.exceptions.RayError):
            found = ray.get(self._tokens.find.remote(name, self._worker))
            if found is not None:
                arrays: dict[str, np.ndarray] = ray.get(found[0])
                return arrays
        return None

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._tokens.keep.remote(name, arrays))


def first_gpu_bytes() -> int:
    """Memory of this machine's GPUs, which are taken to be alike."""
    return int(torch.cuda.get_device_properties(0).total_memory)

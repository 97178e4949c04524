"""Gets a model's files into memory, or at least onto this machine, before its turn comes."""

from __future__ import annotations

import contextlib
import threading

import torch

from llfast.memory import available_bytes
from llfast.model_list import ModelRequest
from llfast.models import find_folder

_SHARE_OF_FREE_MEMORY = 0.25
_CHUNK_BYTES = 4 << 20


class Prefetch:
    """One model at a time, by a thread beside the one that computes.

    Files of the Hub are downloaded. All are then read, which leaves them in the page cache; not if
    they would take much of what memory is free.
    """

    def __init__(self, *, trust_remote_code: bool, allow_pickle: bool) -> None:
        self._trust, self._allow_pickle = trust_remote_code, allow_pickle
        self._stop = threading.Event()

    def begin(self, request: ModelRequest) -> None:
        """Fetch a model; stop fetching any other."""
        self.end()
        stop = self._stop = threading.Event()
        threading.Thread(
            target=self._fetch, args=(request, stop), name="llfast-prefetch", daemon=True
        ).start()

    def end(self) -> None:
        """Read no more; a download that has begun goes on."""
        self._stop.set()

    def _fetch(self, request: ModelRequest, stop: threading.Event) -> None:
        trust = self._trust or request.trust_remote_code
        places = [(request.model, request.revision)]
        if request.adapter_base is not None:
            places.append((request.adapter_base, None))
        with contextlib.suppress(Exception):  # what is wrong is told when it is the model's turn
            folders = [find_folder(*each, trust, self._allow_pickle)[0] for each in places]
            files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
            most = _SHARE_OF_FREE_MEMORY * available_bytes(torch.device("cpu"))
            if sum(path.stat().st_size for path in files) > most:
                return
            buffer = bytearray(_CHUNK_BYTES)
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while not stop.is_set() and file.readinto(buffer):
                        pass

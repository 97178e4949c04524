"""The growing result of one scoring run, kept on disk so that a killed run can go on."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float32, Float64, Int32

from .batches import Batch, TokenizedTexts
from .files import atomic_write, read_npz
from .results import RaggedArray

_SECONDS_BETWEEN_SAVES = 5.0


class PartialScores:
    """Log-likelihoods of N texts, NaN where a text is not scored yet.

    Attributes:
        loglikelihoods: (N,) nats; 0.0 from the start for texts without a scored token.
        token_budgets: (N,) the batch ladder that each was scored on.
        logprobs: nats of every scored token, if kept.
    """

    def __init__(self, tokens: TokenizedTexts, *, per_token: bool) -> None:
        counts = tokens.token_counts
        self.loglikelihoods: Float64[np.ndarray, " N"] = np.where(counts == 0, 0.0, np.nan)
        self.token_budgets: Int32[np.ndarray, " N"] = np.zeros(len(tokens), dtype=np.int32)
        self.logprobs: RaggedArray | None = None
        if per_token:
            offsets = np.concatenate(([0], np.cumsum(counts)))
            self.logprobs = RaggedArray(np.zeros(offsets[-1], dtype=np.float32), offsets)
        self._path: Path | None = None
        self._key = ""
        self._saved_at = time.monotonic()

    @classmethod
    def open(
        cls,
        tokens: TokenizedTexts,
        path: str | os.PathLike[str] | None,
        *,
        key: str,
        per_token: bool,
    ) -> PartialScores:
        """Start, or go on from the file at `path` if it is of the same run.

        A run is the same if `key` (model, texts, numeric path) and the token ids are. A file of
        another run, or one that cannot be read, is written over.

        Raises:
            OSError: if the folder of `path` cannot be made.
        """
        scores = cls(tokens, per_token=per_token)
        if path is None:
            return scores
        digest = hashlib.sha256(f"{key} {per_token} {tokens.digest()}".encode())
        scores._path, scores._key = Path(path), digest.hexdigest()
        scores._path.parent.mkdir(parents=True, exist_ok=True)
        scores._restore()
        return scores

    @property
    def done(self) -> int:
        """How many texts are scored."""
        return int(np.isfinite(self.loglikelihoods).sum())

    def open_texts(self, batch: Batch) -> list[int]:
        """Those texts of a batch that are not scored yet."""
        return [text for text in batch.texts if np.isnan(self.loglikelihoods[text])]

    def keep(
        self, text: int, loglikelihood: float, logprobs: Float32[np.ndarray, " t"], budget: int
    ) -> None:
        """Take in the finished text number `text`."""
        self.token_budgets[text] = budget
        if self.logprobs is not None:
            self.logprobs[text][:] = logprobs
        self.loglikelihoods[text] = loglikelihood  # last: it says that the text is done

    def save_now_and_then(self) -> None:
        """Save if the last time is a few seconds ago."""
        if self._path is not None and time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Write what is there, atomically.

        Raises:
            OSError: if it cannot be written.
        """
        if self._path is None:
            return
        arrays = {"loglikelihoods": self.loglikelihoods, "token_budgets": self.token_budgets}
        if self.logprobs is not None:
            arrays["logprobs"] = self.logprobs.values
        with atomic_write(self._path) as file:
            np.savez(file, allow_pickle=False, key=np.array(self._key), **arrays)
        self._saved_at = time.monotonic()

    def discard(self) -> None:
        """Forget everything, on disk, too."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def _restore(self) -> None:
        assert self._path is not None
        try:
            arrays = read_npz(self._path)
            if str(arrays["key"]) != self._key:
                return
            self.loglikelihoods[:] = arrays["loglikelihoods"]
            self.token_budgets[:] = arrays["token_budgets"]
            if self.logprobs is not None:
                self.logprobs.values[:] = arrays["logprobs"]
        except (OSError, ValueError, KeyError):
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is done is left behind by Ctrl-C and errors, too.
        if kind is not None:
            self.save()

"""What became of the models that were to be scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .model_list import ModelRequest
from .paging import LoadingStatistics
from .results import LogLikelihoods


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one model: "scored", "skipped" (it was in the store) or "failed".

    Attributes:
        request: the model.
        status: one of these.
        result: if it was scored.
        error: if it failed.
        attempts: how often it has failed in a row, if it did.
        ran_out_of_memory: whether it failed for that.
        seconds: that it took; of relatives that were scored together, a part each.
        loading: what paging took, of all that were scored together.
        relatives: how many others these were.
    """

    request: ModelRequest
    status: str
    result: LogLikelihoods | None = None
    error: str | None = None
    attempts: int = 0
    ran_out_of_memory: bool = False
    seconds: float = 0.0
    loading: LoadingStatistics | None = None
    relatives: int = 0

    def summary(self) -> dict[str, Any]:
        """What people and programs are told of it."""
        facts: dict[str, Any] = {
            "model": self.request.name or self.request.model,
            "status": self.status,
        }
        if self.error is not None:
            facts["error"] = self.error
        if self.result is not None:
            facts |= {
                "model": self.result.model,
                "revision": self.result.revision,
                "dtype": self.result.dtype,
                "bits_per_byte": self.result.mean_bits_per_byte,
                "tokens": int(self.result.token_counts.sum()),
                "truncated_texts": len(self.result.truncated_ids),
                "truncated_ids": self.result.truncated_ids,
                "unscored_texts": len(self.result.unscored_ids),
                "unscored_ids": self.result.unscored_ids,
                "seconds": self.seconds,
            }
        paged = self.result is not None and self.result.provenance.get("weights") == "paged"
        if paged and self.loading is not None:
            facts["paged"] = {
                "waves": self.loading.waves,
                "bytes": self.loading.nbytes,
                "read_bytes_per_second": self.loading.read_rate,
                "stall_seconds": self.loading.stall_seconds,
            }
            if self.relatives:
                facts["paged"] |= {
                    "relatives": self.relatives,
                    "shared_bytes": self.loading.shared_bytes,
                    "compared_bytes": self.loading.compared_bytes,
                }
        if self.result is not None and self.loading is not None and self.loading.verified_bytes:
            facts["verified"] = {
                "bytes": self.loading.verified_bytes,
                "seconds": self.loading.verify_seconds,
                "waited_seconds": self.loading.verify_wait_seconds,
            }
        return facts

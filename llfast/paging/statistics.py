"""What reading weights took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class PageRead:
    """One read of a page.

    Attributes:
        name: the page's.
        nbytes: of its tensors.
        disk_bytes: taken from the disk, whole blocks.
        cached_bytes: found in the system's page cache.
        read_seconds: from the first request to the last byte.
        stall_seconds: how long the computation waited for it; on CUDA, how long the host did, which
            runs ahead of the device.
    """

    name: str
    nbytes: int = 0
    disk_bytes: int = 0
    cached_bytes: int = 0
    read_seconds: float = 0.0
    stall_seconds: float = 0.0


@dataclass(slots=True)
class LoadingStatistics:
    """What reading weights took; it grows while a model is scored.

    Attributes:
        pages: every read of a page, in order.
        rows_bytes: read of the embedding where it is in no page: single rows, or all of them at
            once.
        shared_bytes: needed, but there already: read for another model that has the same.
        compared_bytes: read to find out what models share; the next time it is known.
        waves: how often the model was gone through.
        order: names of the layers in the order in which the first wave met them.
        slot_bytes: the most that the page slots took, and copies of what lies in them between whole
            addresses.
        kept_bytes: weights that stay in memory from the start.
        state_bytes: the most that the suspended forwards of a wave held; 0 where they were so few
            that it was not looked at.
        wave_tokens: the most tokens in a wave, padding included.
        verified_bytes: of weight files whose sha256 was taken, whichever way a model is run.
        verify_seconds: how long that took, beside all else.
        verify_wait_seconds: how long the run waited for it once all texts were scored.
    """

    pages: list[PageRead] = field(default_factory=list)
    rows_bytes: int = 0
    shared_bytes: int = 0
    compared_bytes: int = 0
    waves: int = 0
    order: list[str] = field(default_factory=list)
    slot_bytes: int = 0
    kept_bytes: int = 0
    state_bytes: int = 0
    wave_tokens: int = 0
    verified_bytes: int = 0
    verify_seconds: float = 0.0
    verify_wait_seconds: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """The most that weights and suspended forwards took; what computing takes comes on top."""
        return self.slot_bytes + self.kept_bytes + self.state_bytes

    @property
    def nbytes(self) -> int:
        """All bytes of weights that were asked for."""
        return sum(page.nbytes for page in self.pages) + self.rows_bytes

    @property
    def read_seconds(self) -> float:
        """How long the reader was busy."""
        return sum(page.read_seconds for page in self.pages)

    @property
    def read_rate(self) -> float:
        """Bytes of pages a second while the reader was busy."""
        return sum(page.nbytes for page in self.pages) / max(self.read_seconds, 1e-9)

    @property
    def stall_seconds(self) -> float:
        """How long the computation waited for pages."""
        return sum(page.stall_seconds for page in self.pages)

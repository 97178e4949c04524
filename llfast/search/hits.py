"""What a search gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llfast.results import KLEstimate

from .searched import Certificate


@dataclass(frozen=True)
class Hit:
    """A model that a search found.

    Attributes:
        model: its name in the index.
        kl: KL from the query, in `unit`.
        unit: bits a byte unless asked otherwise.
    """

    model: str
    kl: float
    unit: str
    _describe: Callable[[], Mapping[str, Any]] = field(repr=False, compare=False)
    _estimate: Callable[[], KLEstimate] = field(repr=False, compare=False)

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What the index knows of it: 0.04 ms, when it is first asked."""
        return self._describe()

    @cached_property
    def estimate(self) -> KLEstimate:
        """KL from the query with its interval: 0.3 ms at 10,000 texts, when it is first asked."""
        return self._estimate()

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval of `kl`."""
        return self.estimate.interval

    @property
    def standard_error(self) -> float:
        """Standard error of `kl`."""
        return self.estimate.standard_error

    def __getstate__(self) -> dict[str, Any]:
        """To another process go the answers, for the index that gives them stays."""
        names = ("model", "kl", "unit", "estimate")
        state = {name: getattr(self, name) for name in names}
        return {**state, "metadata": dict(self.metadata)}

    def summary(self) -> dict[str, Any]:
        """What programs are told of it; an error or end that is not known is None."""
        numbers = (self.standard_error, *self.interval)
        error, low, high = (each if math.isfinite(each) else None for each in numbers)
        return {
            "model": self.model,
            "kl": self.kl,
            "standard_error": error,
            "interval": [low, high],
            "unit": self.unit,
            "confidence": self.estimate.confidence,
            "below_noise_floor": self.estimate.below_noise_floor,
            "metadata": dict(self.metadata),
        }


class Hits(list[Hit]):
    """Hits, nearest first; equally near ones by name.

    Attributes:
        certificate: why nothing nearer can have been missed; None if something can.
        recall: where something can: the share of the 10 nearest that was found for models held out
            when the index was built.
    """

    def __init__(
        self,
        hits: Iterable[Hit] = (),
        certificate: Certificate | None = None,
        recall: float | None = None,
    ) -> None:
        super().__init__(hits)
        self.certificate, self.recall = certificate, recall

    def certificate_line(self, unit: str) -> str:
        """What people are told of the certificate."""
        found = self.certificate
        if found is None:
            return f"approximate: about {self.recall or 0:.1%} of the 10 nearest are found"
        if found.compared == found.models:
            return f"exact: all {found.models:,} models were compared in full"
        return (
            f"exact: {found.compared:,} of {found.models:,} models were compared in full, all "
            f"others are farther than {found.bound:.4g} {unit}"
        )

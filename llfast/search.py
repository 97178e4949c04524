"""Nearest models by KL divergence: faiss proposes, an explicit difference in fp64 decides.

faiss computes in fp32, and in batches as ‖x‖² + ‖y‖² - 2xy, so what it returns may be in the wrong
order. Its error has a bound, though: candidates are fetched until nothing that was left out can be
nearer than what is returned. The answer is that of a search by brute force in fp64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from .errors import MissingDependencyError, SearchError
from .intervals import half_variances
from .results import KLEstimate, LogLikelihoods
from .space import ModelSpace

_ROWS = 256  # converted to fp32, or compared in fp64, at once: 20 MB at 10,000 texts


@dataclass(frozen=True, slots=True)
class Hit:
    """A model that a search found.

    Attributes:
        model: its name in the space.
        estimate: KL from the query, with interval and unit.
        metadata: what the space knows of it.
    """

    model: str
    estimate: KLEstimate
    metadata: Mapping[str, Any]

    @property
    def kl(self) -> float:
        """KL from the query, in `estimate.unit` (bits a byte unless asked otherwise)."""
        return self.estimate.value

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval of `kl`."""
        return self.estimate.interval

    @property
    def standard_error(self) -> float:
        """Standard error of `kl`."""
        return self.estimate.standard_error

    def summary(self) -> dict[str, Any]:
        """What programs are told of it; an error or end that is not known is None."""
        numbers = (self.standard_error, *self.interval)
        error, low, high = (each if math.isfinite(each) else None for each in numbers)
        return {
            "model": self.model,
            "kl": self.kl,
            "standard_error": error,
            "interval": [low, high],
            "unit": self.estimate.unit,
            "confidence": self.estimate.confidence,
            "below_noise_floor": self.estimate.below_noise_floor,
            "metadata": dict(self.metadata),
        }


class KLIndex:
    """Exact nearest models in a space. Searches do not change it.

    Attributes:
        space: what was indexed.
    """

    def __init__(self, space: ModelSpace) -> None:
        self.space = space
        self._index = _faiss().IndexFlatL2(space.coordinates.shape[1])
        largest = 0.0
        for start in range(0, len(space), _ROWS):
            rows = space.coordinates[start : start + _ROWS]
            largest = max(largest, float(np.square(rows).sum(axis=1).max()))
            _refuse_overflow(largest)
            self._index.add(np.ascontiguousarray(rows, dtype=np.float32))
        self._largest = largest

    @classmethod
    def build(cls, space: ModelSpace) -> KLIndex:
        """Index all models of a space.

        Raises:
            MissingDependencyError: if faiss is not installed.
            SearchError: if coordinates are too large for fp32 (beyond 1e17 nats).
        """
        return cls(space)

    def __len__(self) -> int:
        return len(self.space)

    def search(
        self, query: str | LogLikelihoods, k: int = 10, *, unit: str = "bits_per_byte"
    ) -> list[Hit]:
        """The k nearest models, nearest first; equally near ones by name.

        Args:
            query: the name of a model in the space, which is then left out, or a result, which is
                projected (and left out if the space holds the very same under that name).
            k: how many; all there are if there are fewer.
            unit: of the KL: "bits_per_byte" or "nats_per_text".

        Raises:
            ValueError: if k is below 1, or there is no such unit.
            TypeError: if k is not an integer, or the query neither a name nor a result.
            SpaceError: if the query is not in the space, or was scored on other texts or under
                another convention, or bytes are asked for and not known.
            SearchError: if the query is too large for fp32.
        """
        k = index(k)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.space.per_nat(unit)  # refuses a wrong unit before any work
        point, own_row = self._locate(query)
        margin = self._margin(point)
        query32 = point.astype(np.float32)[None]
        wanted = min(k + (own_row is not None), len(self))
        fetched = min(wanted + 16, len(self))
        while True:
            squares, labels = self._index.search(query32, fetched)
            rows = labels[0].astype(np.int64)
            divergences = self._divergences(point, rows)
            farthest = float(np.partition(divergences, wanted - 1)[wanted - 1])
            # No model that faiss left out is nearer than the farthest it gave, less its error.
            bound = (float(squares[0, -1]) - margin) / (2 * len(point))
            if fetched == len(self) or bound > farthest:
                break
            fetched = min(2 * fetched, len(self))
        return self._hits(query, point, rows, divergences, own_row, unit, k)

    def range_search(
        self, query: str | LogLikelihoods, radius: float, *, unit: str = "bits_per_byte"
    ) -> list[Hit]:
        """All models whose KL from the query is at most `radius`, in `unit`, nearest first.

        Raises: as `search` says; ValueError if `radius` is negative or NaN.
        """
        radius = float(radius)
        if not radius >= 0:
            raise ValueError(f"radius must be at least 0, got {radius}")
        factor = self.space.per_nat(unit)
        point, own_row = self._locate(query)
        # Widened a little over the margin: the radius has been divided by a rounded factor.
        square = radius / factor * 2 * len(point) * (1 + 1e-6) + self._margin(point)
        limit = min(square, float(np.finfo(np.float32).max) / 2)
        _, _, labels = self._index.range_search(point.astype(np.float32)[None], limit)
        rows = labels.astype(np.int64)
        divergences = self._divergences(point, rows)
        inside = divergences * factor <= radius
        return self._hits(query, point, rows[inside], divergences[inside], own_row, unit)

    # ------------------------------------------------------------------ inside

    def _locate(self, query: str | LogLikelihoods) -> tuple[Float64[np.ndarray, " N"], int | None]:
        """The query's coordinates, and its own row if it is in the space."""
        point = self.space.point(query)
        _refuse_overflow(float(np.square(point).sum()))
        name = query if isinstance(query, str) else query.model
        if name not in self.space.models:
            return point, None
        row = self.space.models.index(name)
        return point, row if np.array_equal(point, self.space.coordinates[row]) else None

    def _margin(self, point: Float64[np.ndarray, " N"]) -> float:
        """How far a squared distance of faiss can be off, at most.

        A sum of N rounded products is off by at most N·u / (1 - N·u) of the sum of their sizes,
        in any order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), u being
        half of fp32's epsilon. The sizes add up to at most 2 (‖x‖² + ‖y‖²); rounding both points
        to fp32 and adding three terms costs a few u more. This holds for faiss' direct path and
        for its BLAS path; the last term is for what underflows.
        """
        fp32 = np.finfo(np.float32)
        share = (len(point) + 8) * float(fp32.eps) / 2
        gamma = share / (1 - share) if share < 1 else math.inf
        size = float(np.square(point).sum()) + self._largest
        return 2 * gamma * size + len(point) * float(fp32.tiny)

    def _divergences(
        self, point: Float64[np.ndarray, " N"], rows: Int64[np.ndarray, " M"]
    ) -> Float64[np.ndarray, " M"]:
        """KL from the point to rows of the space, in nats a text."""
        found = np.empty(len(rows))
        for start in range(0, len(rows), _ROWS):
            block = slice(start, start + _ROWS)
            found[block] = half_variances(self.space.coordinates[rows[block]] - point)
        return found

    def _hits(
        self,
        query: str | LogLikelihoods,
        point: Float64[np.ndarray, " N"],
        rows: Int64[np.ndarray, " M"],
        divergences: Float64[np.ndarray, " M"],
        own_row: int | None,
        unit: str,
        k: int | None = None,
    ) -> list[Hit]:
        space = self.space
        order = sorted(
            (divergence, space.models[row], row)
            for divergence, row in zip(divergences.tolist(), rows.tolist(), strict=True)
            if row != own_row
        )
        hits = []
        for _, name, row in order[:k]:
            dtypes = (space.dtype(query), space.dtypes[row])
            estimate = space.kl_from(point - space.coordinates[row], dtypes, unit)
            hits.append(Hit(name, estimate, space.metadata[row]))
        return hits


def _refuse_overflow(square: float) -> None:
    if not math.isfinite(square) or square > 1e36:
        raise SearchError(
            f"coordinates must have norms below 1e18 nats for faiss, got {math.sqrt(square):.3g}"
        )


def _faiss() -> Any:
    try:
        with warnings.catch_warnings():
            # SWIG's types have no module name, which newer Pythons remark on.
            warnings.filterwarnings(
                "ignore", "builtin type (SwigPy|swigvar).* has no __module__", DeprecationWarning
            )
            import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        raise MissingDependencyError(
            "searching needs faiss: pip install 'llfast[cpu]', or on a machine with an NVIDIA GPU "
            "pip install 'llfast[gpu]'; never both, they install the same package"
        ) from None
    return faiss

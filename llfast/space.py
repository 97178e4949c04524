"""The space of models: points in a frozen basis, and KL divergences between them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
from jaxtyping import Float64

from .basis import BASIS_ARRAYS, BASIS_FACTS, Basis
from .errors import SpaceError
from .intervals import half_variances
from .mixed import noise_floor, warn_of_bos, warn_of_dtypes, warn_of_kind
from .results import KLEstimate, LogLikelihoodMatrix, LogLikelihoods
from .spacefile import read_space, write_space

_BASIS = (*BASIS_FACTS, *BASIS_ARRAYS)
_FACTS = ("models", *BASIS_FACTS, "dtypes", "revisions")
_ARRAYS = ("coordinates", *BASIS_ARRAYS)
_BLOCK_VALUES = 1 << 17  # differences worked on at once: 1 MiB, which stays in a core's cache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelSpace:
    """K models as points in a frozen basis over N texts; made by `fit` or `load`.

    Attributes:
        models: (K,) unique names.
        coordinates: (K, N) nats, centred.
        clip: log-likelihoods below it were raised to it, in nats; None if none were.
        reference: (N,) mean over models that was subtracted, in nats.
        text_bytes: (N,) bytes of each raw text.
        metadata: (K,) one mapping a model.
        ids: (N,) ids of the texts, if known.
        groups: (N,) the document of each text, if known; intervals allow for it.
        textset_digest: which texts these are.
        convention: which tokens were scored.
        dtypes: (K,) what each model ran in.
        revisions: (K,) which weights each model had.
        basis: clip, reference and texts, without the models.
    """

    models: tuple[str, ...]
    coordinates: Float64[np.ndarray, "K N"]
    clip: float | None
    reference: Float64[np.ndarray, " N"]
    text_bytes: Float64[np.ndarray, " N"]
    metadata: tuple[Mapping[str, Any], ...]
    ids: tuple[str, ...] | None
    groups: tuple[str, ...] | None
    textset_digest: str
    convention: str
    dtypes: tuple[str, ...]
    revisions: tuple[str, ...]
    basis: Basis = field(init=False, repr=False)
    _rows: dict[str, int] = field(init=False, repr=False)
    _noise_floor: float = field(init=False, repr=False)  # nats a text, 0 if not known

    def __post_init__(self) -> None:
        # The matrix class knows the rules for everything but the basis; it copies nothing.
        LogLikelihoodMatrix(
            self.models,
            self.coordinates,
            self.text_bytes,
            self.metadata,
            ids=self.ids,
            groups=self.groups,
            dtypes=self.dtypes,
            revisions=self.revisions,
        )
        for name in _ARRAYS:
            getattr(self, name).flags.writeable = False
        basis = Basis(**{name: getattr(self, name) for name in _BASIS})
        object.__setattr__(self, "basis", basis)
        object.__setattr__(self, "_rows", {name: row for row, name in enumerate(self.models)})
        floor = noise_floor(self.coordinates, self.models, self.revisions, self.dtypes)
        object.__setattr__(self, "_noise_floor", floor)

    def __len__(self) -> int:
        return len(self.models)

    @property
    def digest(self) -> str:
        """sha256 of the basis; coordinates of one digest can be compared."""
        return self.basis.digest

    # ------------------------------------------------------------------ the basis

    @classmethod
    def fit(
        cls,
        matrix: LogLikelihoodMatrix,
        clip_quantile: float | None = 0.02,
        *,
        on: Sequence[int] | None = None,
    ) -> ModelSpace:
        """Freeze a basis on these models, see `Basis.fit`, and place them in it.

        Args:
            matrix: log-likelihoods of K models.
            clip_quantile: as for `Basis.fit`.
            on: numbers of the models that the basis is of; None: of all.

        Warns: LlfastWarning if models ran in different dtypes, or if, under convention "paper",
            some tokenizers add BOS and others do not (`metadata["adds_bos"]`).
        """
        basis = Basis.fit(matrix if on is None else matrix.select(on), clip_quantile)
        space = cls(
            models=matrix.models,
            coordinates=basis.place(matrix.values),
            metadata=matrix.metadata,
            dtypes=matrix.dtypes,
            revisions=matrix.revisions,
            **{name: getattr(basis, name) for name in _BASIS},
        )
        warn_of_dtypes(space.dtypes, space.noise_floor("nats_per_text"))
        warn_of_bos(space.convention, [row.get("adds_bos") for row in space.metadata])
        return space

    def project(self, loglikelihoods: LogLikelihoods) -> Float64[np.ndarray, " N"]:
        """Coordinates in this basis, (N,) nats, of a model that need not be in the space.

        Warns: LlfastWarning if more than 10 % of the values are clipped, or if the model's dtype or
            tokenizer is of another kind than all in the space.
        Raises: SpaceError if it was scored on other texts or under another convention.
        """
        coordinates = self.basis.project(loglikelihoods)
        adds_bos = Counter(row["adds_bos"] for row in self.metadata if "adds_bos" in row)
        floor = self.noise_floor("nats_per_text")
        warn_of_kind(loglikelihoods, self.convention, self.dtypes, adds_bos, floor)
        return coordinates

    def clipped_share(self, loglikelihoods: LogLikelihoods) -> float:
        """The share of a model's log-likelihoods below the clip of this space."""
        return self.basis.clipped_share(loglikelihoods)

    # ------------------------------------------------------------------ distances

    def kl(
        self, a: str | LogLikelihoods, b: str | LogLikelihoods, unit: str = "bits_per_byte"
    ) -> KLEstimate:
        """KL divergence between two models, named or projected, with its 95 % interval.

        A symmetric second-order estimate: half the variance over texts of the clipped
        log-likelihood difference. `intervals.kl_estimate` says what the interval allows for.

        Raises:
            SpaceError: if a name is not in the space, a result was made on other texts or under
                another convention, or bytes are asked for and not known.
        """
        self.per_nat(unit)  # refuses a wrong unit before any work
        dtypes = (self.dtype(a), self.dtype(b))
        return self.kl_from(self.point(a) - self.point(b), dtypes, unit)

    def kl_from(
        self,
        difference: Float64[np.ndarray, " N"],
        dtypes: tuple[str, str] = ("", ""),
        unit: str = "bits_per_byte",
    ) -> KLEstimate:
        """KL divergence of two models whose coordinates differ by `difference`, in nats."""
        return self.basis.kl(difference, dtypes, unit, noise_floor=self._noise_floor)

    def kl_matrix(self, unit: str = "bits_per_byte") -> Float64[np.ndarray, "K K"]:
        """All pairwise KL divergences, (K, K), without intervals; symmetric, 0 on the diagonal."""
        factor = self.per_nat(unit)
        divergences: Float64[np.ndarray, "K K"] = self._half_variances()
        divergences *= factor
        return divergences

    def squared_distances(self) -> Float64[np.ndarray, "K K"]:
        """All pairwise squared Euclidean distances, (K, K) nats²; 2N times the KL in nats a text.

        By explicit difference in fp64: ‖x‖² + ‖y‖² - 2xy would cancel for close models.
        """
        distances: Float64[np.ndarray, "K K"] = self._half_variances()
        distances *= 2 * self.coordinates.shape[1]
        return distances

    def noise_floor(self, unit: str = "bits_per_byte") -> float | None:
        """The largest KL between two dtypes of one model; None if no model is here in two.

        Rows are one model if they have the same revision and the same layer. A KL below it says
        nothing about two models that ran in different dtypes; such estimates are flagged.
        """
        return self._noise_floor * self.per_nat(unit) if self._noise_floor else None

    def per_nat(self, unit: str) -> float:
        """What a KL of one nat a text is in `unit`: "nats_per_text" or "bits_per_byte".

        Raises:
            ValueError: if there is no such unit.
            SpaceError: if bytes are asked for and not known.
        """
        return self.basis.per_nat(unit)

    def point(self, model: str | LogLikelihoods) -> Float64[np.ndarray, " N"]:
        """The (N,) coordinates of a model of the space by name, or of a result by projection."""
        if isinstance(model, LogLikelihoods):
            return self.project(model)
        if not isinstance(model, str):
            raise TypeError(f"model must be a name or a LogLikelihoods, got {type(model).__name__}")
        if model not in self._rows:
            close = get_close_matches(model, self.models, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(close)}?" if close else "score it and pass the result"
            )
            raise SpaceError(f"model must be in the space, got {model!r}; {hint}")
        coordinates: Float64[np.ndarray, " N"] = self.coordinates[self._rows[model]]
        return coordinates

    def dtype(self, model: str | LogLikelihoods) -> str:
        """What a model of the space, or a result, ran in; "" if that is not known."""
        if isinstance(model, LogLikelihoods):
            return model.dtype
        row = self._rows.get(model)
        return "" if row is None else self.dtypes[row]

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the space as .npz, atomically; `load` gives it back with the same digest.

        Raises:
            OSError: if it cannot be written.
            TypeError: if metadata holds something that JSON cannot.
        """
        fields = {name: getattr(self, name) for name in _FACTS}
        fields["metadata"] = [dict(row) for row in self.metadata]
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        write_space(path, {**fields, "digest": self.digest}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelSpace:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            OSError: if the file cannot be opened.
            SpaceError: with the path, if it is damaged, of another kind or of another version.
        """
        fields = read_space(path, _ARRAYS)
        try:
            digest = fields.pop("digest")
            space = cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError, SpaceError) as error:
            raise SpaceError(f"{path} must be a whole file of a space, got {error!r}") from error
        if space.digest != digest:
            raise SpaceError(
                f"{path} must have the basis {digest}, got {space.digest}; it was changed after "
                "it was saved"
            )
        return space

    # ------------------------------------------------------------------ inside

    def _half_variances(self) -> Float64[np.ndarray, "K K"]:
        k, n = self.coordinates.shape
        values = np.zeros((k, k))
        step = max(1, _BLOCK_VALUES // n)
        for row in range(k):
            for start in range(row + 1, k, step):
                block = self.coordinates[start : start + step] - self.coordinates[row]
                values[row, start : start + step] = half_variances(block)
        return values + values.T

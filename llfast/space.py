"""The space of models: log-likelihoods as coordinates, and KL divergences between them.

    log-likelihoods (K, N) ─▶ raise to clip ─▶ less model's mean ─▶ less reference ─▶ points
    ‖point a - point b‖² / 2N = KL in nats a text

Clip and reference are frozen when a space is fitted, so that a model that comes later lands where
it would have been, and vectors from different places stay comparable.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from .errors import LlfastWarning, SpaceError
from .intervals import group_codes, half_variances, kl_estimate
from .mixed import warn_of_bos, warn_of_dtypes
from .results import UNITS, KLEstimate, LogLikelihoodMatrix, LogLikelihoods
from .spacefile import read_space, write_space

_ARRAYS = ("coordinates", "reference", "text_bytes")
_FIELDS = (
    "models",
    "clip",
    "ids",
    "groups",
    "textset_digest",
    "convention",
    "dtypes",
    "revisions",
)
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
        digest: sha256 of the basis (clip, reference, text set, convention). Coordinates of one
            digest can be compared.
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
    digest: str = field(init=False)
    _rows: dict[str, int] = field(init=False, repr=False)
    _group_codes: Int64[np.ndarray, " N"] | None = field(init=False, repr=False)
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
        shape, wanted = self.reference.shape, self.text_bytes.shape
        if shape != wanted or not np.isfinite(self.reference).all():
            found = f"shape {shape}" if shape != wanted else "a NaN or inf"
            raise SpaceError(
                f"reference must be one finite number a text ({wanted[0]}), got {found}"
            )
        for name in _ARRAYS:
            getattr(self, name).flags.writeable = False
        codes = group_codes(self.groups) if self.groups is not None else None
        object.__setattr__(self, "_rows", {name: row for row, name in enumerate(self.models)})
        object.__setattr__(self, "_group_codes", codes)
        object.__setattr__(self, "digest", self._basis_digest())
        object.__setattr__(self, "_noise_floor", self._largest_dtype_difference())

    def __len__(self) -> int:
        return len(self.models)

    # ------------------------------------------------------------------ the basis

    @classmethod
    def fit(cls, matrix: LogLikelihoodMatrix, clip_quantile: float | None = 0.02) -> ModelSpace:
        """Freeze a basis on these models and place them in it.

        Args:
            matrix: log-likelihoods of K models on N texts.
            clip_quantile: the share of all K·N values that is raised to the clip (numpy's linear
                quantile); 0 or None for none.

        Warns: LlfastWarning if models ran in different dtypes, or if, under convention "paper",
            some tokenizers add BOS and others do not (`metadata["adds_bos"]`).
        Raises: ValueError if `clip_quantile` is outside [0, 1).
        Source: Oyama et al., arXiv 2502.16173 (clipping at 2 %, double centring).
        """
        if clip_quantile is not None and not 0 <= clip_quantile < 1:
            raise ValueError(f"clip_quantile must be in [0, 1), got {clip_quantile}")
        clip = float(np.quantile(matrix.values, clip_quantile)) if clip_quantile else None
        coordinates = _clip_and_centre(matrix.values, clip)
        reference = coordinates.mean(axis=0)
        coordinates -= reference
        space = cls(
            models=matrix.models,
            coordinates=coordinates,
            clip=clip,
            reference=reference,
            text_bytes=matrix.text_bytes.copy(),
            metadata=matrix.metadata,
            ids=matrix.ids,
            groups=matrix.groups,
            textset_digest=matrix.textset_digest,
            convention=matrix.convention,
            dtypes=matrix.dtypes,
            revisions=matrix.revisions,
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
        self._refuse_other_texts(loglikelihoods)
        share = self.clipped_share(loglikelihoods)
        if share > 0.1:
            warnings.warn(
                f"{share:.0%} of the log-likelihoods of {loglikelihoods.model!r} are below the "
                f"clip of this space ({self.clip:.6g} nats), so its distances are too small",
                LlfastWarning,
                stacklevel=2,
            )
        if loglikelihoods.dtype not in self.dtypes:
            floor = self.noise_floor("nats_per_text")
            warn_of_dtypes((*self.dtypes, loglikelihoods.dtype), floor)
        known = [row["adds_bos"] for row in self.metadata if "adds_bos" in row]
        adds_bos = loglikelihoods.provenance.get(
            "adds_bos", loglikelihoods.metadata.get("adds_bos")
        )
        if isinstance(adds_bos, bool) and adds_bos not in known:
            warn_of_bos(self.convention, [*known, adds_bos])
        values = np.ascontiguousarray(loglikelihoods.values, dtype=np.float64)
        coordinates: Float64[np.ndarray, " N"] = _clip_and_centre(values[None], self.clip)[0]
        coordinates -= self.reference
        return coordinates

    def clipped_share(self, loglikelihoods: LogLikelihoods) -> float:
        """The share of a model's log-likelihoods below the clip of this space."""
        return 0.0 if self.clip is None else float((loglikelihoods.values < self.clip).mean())

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
        estimate = kl_estimate(difference, self._group_codes)
        if all(dtypes) and dtypes[0] != dtypes[1] and estimate.value < self._noise_floor:
            estimate = replace(estimate, below_noise_floor=True)
        return estimate.scaled(self.per_nat(unit), unit)

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

    def _largest_dtype_difference(self) -> float:
        """Half the variance between two dtypes of one model, at most; 0.0 if there are none."""
        if len({dtype for dtype in self.dtypes if dtype}) < 2:
            return 0.0
        kinds: dict[tuple[str, str], list[int]] = {}
        for row, (name, revision) in enumerate(zip(self.models, self.revisions, strict=True)):
            if revision and self.dtypes[row]:
                kinds.setdefault((revision, name.partition("@layer=")[2]), []).append(row)
        floors = [
            float(half_variances(self.coordinates[[a]] - self.coordinates[b])[0])
            for rows in kinds.values()
            for a in rows
            for b in rows
            if a < b and self.dtypes[a] != self.dtypes[b]
        ]
        return max(floors, default=0.0)

    def per_nat(self, unit: str) -> float:
        """What a KL of one nat a text is in `unit`: "nats_per_text" or "bits_per_byte".

        Raises:
            ValueError: if there is no such unit.
            SpaceError: if bytes are asked for and not known.
        """
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
        if unit == "nats_per_text":
            return 1.0
        mean_bytes = float(self.text_bytes.mean())
        if mean_bytes == 0:
            raise SpaceError(
                "text_bytes must be known for bits_per_byte, got only zeros; "
                "use unit='nats_per_text'"
            )
        return 1 / (mean_bytes * math.log(2))

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
        fields = {name: getattr(self, name) for name in _FIELDS}
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

    def _basis_digest(self) -> str:
        digest = hashlib.sha256(b"llfast space 1\0")
        for part in (self.textset_digest, self.convention, repr(self.clip)):
            digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
        digest.update(self.reference.astype("<f8").tobytes())
        return digest.hexdigest()

    def _half_variances(self) -> Float64[np.ndarray, "K K"]:
        k, n = self.coordinates.shape
        values = np.zeros((k, k))
        step = max(1, _BLOCK_VALUES // n)
        for row in range(k):
            for start in range(row + 1, k, step):
                block = self.coordinates[start : start + step] - self.coordinates[row]
                values[row, start : start + step] = half_variances(block)
        return values + values.T

    def _refuse_other_texts(self, result: LogLikelihoods) -> None:
        for name, advice in (
            ("textset_digest", "score it on the same texts"),
            ("convention", "score it under the same convention"),
        ):
            ours, theirs = getattr(self, name), getattr(result, name)
            if ours != theirs:
                raise SpaceError(
                    f"{name} of {result.model!r} must be that of the space, {ours!r}, got "
                    f"{theirs!r}; {advice}"
                )
        n = self.coordinates.shape[1]
        ids = self.ids if self.ids is not None else result.ids
        if len(result) != n or ids != result.ids:
            pairs = enumerate(zip(ids, result.ids, strict=False))
            at = next((row for row, (a, b) in pairs if a != b), min(n, len(result)))
            raise SpaceError(
                f"ids of {result.model!r} must be those of the space ({n} texts), got "
                f"{len(result)}, the first other one at {at}: "
                f"{list(ids[at : at + 1])} and {list(result.ids[at : at + 1])}"
            )


def _clip_and_centre(
    values: Float64[np.ndarray, "K N"], clip: float | None
) -> Float64[np.ndarray, "K N"]:
    raised: Float64[np.ndarray, "K N"] = values.copy() if clip is None else np.maximum(values, clip)
    raised -= raised.mean(axis=1, keepdims=True)
    return raised

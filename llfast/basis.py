"""The frozen basis of a space: what turns a model's log-likelihoods into its coordinates.

    log-likelihoods (K, N) ─▶ raise to clip ─▶ less model's mean ─▶ less reference ─▶ points
    ‖point a - point b‖² / 2N = KL in nats a text

Clip and reference are frozen when a basis is fitted, so that a model that comes later lands where
it would have been, and vectors from different places stay comparable.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float64, Int64

from .errors import LlfastWarning, SpaceError
from .intervals import group_codes, kl_estimate
from .results import UNITS, KLEstimate, LogLikelihoodMatrix, LogLikelihoods

# What a file has of a basis: facts that JSON knows, and arrays.
BASIS_FACTS = ("clip", "ids", "groups", "textset_digest", "convention")
BASIS_ARRAYS = ("reference", "text_bytes")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Basis:
    """How N texts become N coordinates; made by `fit`.

    Attributes:
        clip: log-likelihoods below it are raised to it, in nats; None if none are.
        reference: (N,) mean over models that is subtracted, in nats.
        text_bytes: (N,) bytes of each raw text.
        ids: (N,) ids of the texts, if known.
        groups: (N,) the document of each text, if known; intervals allow for it.
        textset_digest: which texts these are.
        convention: which tokens were scored.
        digest: sha256 of clip, reference, text set and convention. Coordinates of one digest can
            be compared.

    Raises:
        SpaceError: if the reference is not one finite number a text.
    """

    clip: float | None
    reference: Float64[np.ndarray, " N"]
    text_bytes: Float64[np.ndarray, " N"]
    ids: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    textset_digest: str = ""
    convention: str = ""
    digest: str = field(init=False)
    _group_codes: Int64[np.ndarray, " N"] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape, wanted = self.reference.shape, self.text_bytes.shape
        if shape != wanted or not np.isfinite(self.reference).all():
            found = f"shape {shape}" if shape != wanted else "a NaN or inf"
            raise SpaceError(
                f"reference must be one finite number a text ({wanted[0]}), got {found}"
            )
        codes = group_codes(self.groups) if self.groups is not None else None
        object.__setattr__(self, "_group_codes", codes)
        object.__setattr__(self, "digest", self._digest())

    def __len__(self) -> int:
        return len(self.reference)

    @classmethod
    def fit(cls, matrix: LogLikelihoodMatrix, clip_quantile: float | None = 0.02) -> Basis:
        """Freeze a basis on these models.

        Args:
            matrix: log-likelihoods of K models on N texts.
            clip_quantile: the share of all K·N values that is raised to the clip (numpy's linear
                quantile); 0 or None for none.

        Raises: ValueError if `clip_quantile` is outside [0, 1).
        Source: Oyama et al., arXiv 2502.16173 (clipping at 2 %, double centring).
        """
        if clip_quantile is not None and not 0 <= clip_quantile < 1:
            raise ValueError(f"clip_quantile must be in [0, 1), got {clip_quantile}")
        clip = float(np.quantile(matrix.values, clip_quantile)) if clip_quantile else None
        return cls(
            clip=clip,
            reference=_clip_and_centre(matrix.values, clip).mean(axis=0),
            text_bytes=matrix.text_bytes.copy(),
            ids=matrix.ids,
            groups=matrix.groups,
            textset_digest=matrix.textset_digest,
            convention=matrix.convention,
        )

    def place(self, values: Float64[np.ndarray, "K N"]) -> Float64[np.ndarray, "K N"]:
        """Coordinates (K, N) of log-likelihoods (K, N), both in nats.

        A row's bits do not depend on the others.
        """
        coordinates = _clip_and_centre(values, self.clip)
        coordinates -= self.reference
        return coordinates

    def project(self, loglikelihoods: LogLikelihoods) -> Float64[np.ndarray, " N"]:
        """Coordinates (N,) of a result, in nats.

        Warns: LlfastWarning if more than 10 % of the values are clipped.
        Raises: SpaceError if it was scored on other texts or under another convention.
        """
        self._refuse_other_texts(loglikelihoods)
        share = self.clipped_share(loglikelihoods)
        if share > 0.1:
            warnings.warn(
                f"{share:.0%} of the log-likelihoods of {loglikelihoods.model!r} are below the "
                f"clip of this space ({self.clip:.6g} nats), so its distances are too small",
                LlfastWarning,
                stacklevel=3,
            )
        values = np.ascontiguousarray(loglikelihoods.values, dtype=np.float64)
        coordinates: Float64[np.ndarray, " N"] = self.place(values[None])[0]
        return coordinates

    def clipped_share(self, loglikelihoods: LogLikelihoods) -> float:
        """The share of a model's log-likelihoods below the clip."""
        return 0.0 if self.clip is None else float((loglikelihoods.values < self.clip).mean())

    def kl(
        self,
        difference: Float64[np.ndarray, " N"],
        dtypes: tuple[str, str] = ("", ""),
        unit: str = "bits_per_byte",
        *,
        noise_floor: float = 0.0,
    ) -> KLEstimate:
        """KL divergence of two models whose coordinates differ by `difference`, in nats.

        Args:
            difference: (N,) nats.
            dtypes: what the two ran in; "" if that is not known.
            unit: of the estimate.
            noise_floor: a KL below it, in nats a text, says nothing about models of two dtypes.
        """
        estimate = kl_estimate(difference, self._group_codes)
        if all(dtypes) and dtypes[0] != dtypes[1] and estimate.value < noise_floor:
            estimate = replace(estimate, below_noise_floor=True)
        return estimate.scaled(self.per_nat(unit), unit)

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

    # ------------------------------------------------------------------ inside

    def _digest(self) -> str:
        digest = hashlib.sha256(b"llfast space 1\0")
        for part in (self.textset_digest, self.convention, repr(self.clip)):
            digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
        digest.update(self.reference.astype("<f8").tobytes())
        return digest.hexdigest()

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
        n = len(self)
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

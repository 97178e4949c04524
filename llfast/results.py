"""What scoring and comparing give back: plain values that name how they were made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Shaped

from .errors import SpaceError


@dataclass(frozen=True, slots=True, eq=False)
class RaggedArray:
    """Rows of different lengths in one array: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Float32[np.ndarray, " T"]
    offsets: Int64[np.ndarray, " N1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Float32[np.ndarray, " t"]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {row}")
        row %= len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class ResultKey(NamedTuple):
    """What makes two results the same row of a store."""

    model: str
    revision: str
    textset_digest: str
    convention: str
    dtype: str
    layer: int | None
    scoring_version: int

    @property
    def label(self) -> str:
        """The name that it is shown under, which is a layer's own."""
        return self.model if self.layer is None else f"{self.model}@layer={self.layer}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogLikelihoods:
    """The log-likelihood of every text under one model, and how it was made.

    The first seven attributes are the key under which a store keeps the result.

    Attributes:
        model: the name it goes by: a Hub id, a folder, or what the caller chose.
        revision: the Hub's commit, or a digest of the folder; "" for a model in memory.
        textset_digest: `TextSet.digest` of the texts.
        convention: which tokens were scored ("paper", "always-bos", "lm-eval", "token-ids").
        dtype: what the model's body ran in ("float32", "bfloat16", "float16").
        layer: the hidden state that was read out; None for the model's output.
        scoring_version: raised when a release changes numbers.
        ids: (N,) ids of the texts.
        loglikelihoods: (N,) nats, the fp64 sum of a text's fp32 per-token logprobs.
        token_counts: (N,) scored tokens; a text with none has log-likelihood 0.0.
        text_bytes: (N,) UTF-8 bytes of the raw text, 0 where unknown; an imported matrix may have
            means, which are no whole numbers.
        truncated: (N,) whether the text was longer than the model takes.
        token_budgets: (N,) the batch ladder each text was scored on.
        groups: the document of each text, if known.
        logprobs: nats of each scored token, if asked for.
        provenance: head, device, instruction set, versions: what else decides the bits. Of
            `score_models` and fleets also what was `asked`: revision, dtype, tokenizer and base.
        metadata: the caller's own columns (family, parameters, ...).

    Raises:
        TypeError: if what must be an array of numbers, or a tuple of ids, is not.
        ValueError: if shapes disagree, or a log-likelihood is not finite.
    """

    model: str
    revision: str
    textset_digest: str
    convention: str
    dtype: str
    layer: int | None = None
    scoring_version: int
    ids: tuple[str, ...]
    loglikelihoods: Float64[np.ndarray, " N"]
    token_counts: Int64[np.ndarray, " N"]
    text_bytes: Shaped[np.ndarray, " N"]
    truncated: Bool[np.ndarray, " N"]
    token_budgets: Int32[np.ndarray, " N"]
    groups: tuple[str, ...] | None = None
    logprobs: RaggedArray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.ids, tuple):
            raise TypeError(f"ids must be a tuple, got {self.ids!r:.60}")
        for name in ("loglikelihoods", "token_counts", "text_bytes", "truncated", "token_budgets"):
            given = getattr(self, name)
            if not isinstance(given, np.ndarray) or given.dtype.kind not in "biuf":
                raise TypeError(f"{name} must be an array of numbers, got {given!r:.60}")
            if (shape := given.shape) != (len(self.ids),):
                raise ValueError(f"{name} must have shape ({len(self.ids)},), got {shape}")
        for name in ("groups", "logprobs"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != len(self.ids):
                raise ValueError(f"{name} must be one a text ({len(self.ids)}), got {len(rows)}")
        if not np.isfinite(self.loglikelihoods).all():
            bad = self.ids[int(np.argmin(np.isfinite(self.loglikelihoods)))]
            raise ValueError(f"loglikelihoods must be finite, got a NaN or inf for text {bad!r}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key(self) -> ResultKey:
        """The key under which a store keeps the result."""
        return ResultKey(*(getattr(self, name) for name in ResultKey._fields))

    @property
    def values(self) -> Float64[np.ndarray, " N"]:
        """Alias of `loglikelihoods`: (N,) nats."""
        return self.loglikelihoods

    @property
    def bits_per_byte(self) -> Float64[np.ndarray, " N"]:
        """(N,) positive bits a UTF-8 byte of raw text; NaN where the text has no bytes."""
        known = np.where(self.text_bytes > 0, self.text_bytes, np.nan)
        # Not negated: of a text without a scored token, that would be -0.0.
        bits: Float64[np.ndarray, " N"] = (0.0 - self.loglikelihoods) / (known * np.log(2.0))
        return bits

    @property
    def mean_bits_per_byte(self) -> float:
        """Bits over bytes of all texts whose bytes are known; NaN if there are none."""
        return float(_mean_bits_per_byte(self.loglikelihoods[None], self.text_bytes)[0])

    @property
    def unscored_ids(self) -> tuple[str, ...]:
        """Texts without a single scored token."""
        return tuple(self.ids[row] for row in np.flatnonzero(self.token_counts == 0))

    @property
    def truncated_ids(self) -> tuple[str, ...]:
        """Texts of which a part was cut off."""
        return tuple(self.ids[row] for row in np.flatnonzero(self.truncated))


@dataclass(frozen=True, slots=True, eq=False)
class LogLikelihoodMatrix:
    """Log-likelihoods of K models on the same N texts.

    Attributes:
        models: (K,) unique names.
        values: (K, N) nats, finite.
        text_bytes: (N,) bytes of each raw text; may be one constant when unknown.
        metadata: (K,) one mapping a model; NaN is null there, as tables write what is missing.
        ids: (N,) ids of the texts, if known.
        groups: (N,) the document of each text, if known.
        textset_digest: which texts these are.
        convention: which tokens were scored.
        dtypes: (K,) what each model ran in.
        revisions: (K,) which weights each model had.

    Raises:
        SpaceError: if shapes disagree, names repeat, or a value is not finite.
    """

    models: tuple[str, ...]
    values: Float64[np.ndarray, "K N"]
    text_bytes: Float64[np.ndarray, " N"]
    metadata: tuple[Mapping[str, Any], ...] = ()
    ids: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    textset_digest: str = ""
    convention: str = ""
    dtypes: tuple[str, ...] = ()
    revisions: tuple[str, ...] = ()
    _rows: dict[str, int] = field(init=False, repr=False)

    def __init__(
        self,
        models: Sequence[str],
        values: Shaped[np.ndarray, "K N"],
        text_bytes: Shaped[np.ndarray, " N"] | Sequence[float],
        metadata: Sequence[Mapping[str, Any]] = (),
        *,
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        textset_digest: str = "",
        convention: str = "",
        dtypes: Sequence[str] = (),
        revisions: Sequence[str] = (),
    ) -> None:
        fields = {
            "models": tuple(models),
            "values": np.ascontiguousarray(values, dtype=np.float64),
            "text_bytes": np.asarray(text_bytes, dtype=np.float64),
            "metadata": tuple(map(plain_metadata, metadata)) or tuple({} for _ in models),
            "ids": tuple(map(str, ids)) if ids is not None else None,
            "groups": tuple(map(str, groups)) if groups is not None else None,
            "textset_digest": textset_digest,
            "convention": convention,
            "dtypes": tuple(dtypes) or tuple("" for _ in models),
            "revisions": tuple(revisions) or tuple("" for _ in models),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_rows", {name: row for row, name in enumerate(self.models)})
        self._validate()

    def _validate(self) -> None:
        if self.text_bytes.ndim != 1:
            raise SpaceError(
                f"text_bytes must be one number a text, got shape {self.text_bytes.shape}"
            )
        k, n = len(self.models), len(self.text_bytes)
        if self.values.shape != (k, n) or not k or not n:
            raise SpaceError(
                f"values must have shape (models, texts) = ({k}, {n}), got {self.values.shape}"
            )
        if len(self._rows) != k:
            repeated = sorted(name for name, count in Counter(self.models).items() if count > 1)
            raise SpaceError(f"models must be unique, got {', '.join(repeated)} more than once")
        for name, rows in (
            ("metadata", self.metadata),
            ("dtypes", self.dtypes),
            ("revisions", self.revisions),
        ):
            if len(rows) != k:
                raise SpaceError(f"{name} must be one a model ({k}), got {len(rows)}")
        for name, texts in (("ids", self.ids), ("groups", self.groups)):
            if texts is not None and len(texts) != n:
                raise SpaceError(f"{name} must be one a text ({n}), got {len(texts)}")
        if not (np.isfinite(self.text_bytes).all() and (self.text_bytes >= 0).all()):
            raise SpaceError("text_bytes must be finite and at least 0, got other values")
        finite = np.isfinite(self.values)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise SpaceError(
                f"values must be finite, got {self.values[row, column]} for model "
                f"{self.models[row]!r}, text {column}"
            )

    def __len__(self) -> int:
        return len(self.models)

    @property
    def bits_per_byte(self) -> Float64[np.ndarray, " K"]:
        """Of each model, over all texts whose bytes are known; NaN if there are none."""
        return _mean_bits_per_byte(self.values, self.text_bytes)

    def select(
        self,
        models: Sequence[int] | None = None,
        texts: Sequence[int] | None = None,
    ) -> LogLikelihoodMatrix:
        """Some of the models and texts, in the order of their numbers given; None for all.

        With other texts it is of no text set that has a digest.
        """
        rows = range(len(self.models)) if models is None else models
        columns = range(len(self.text_bytes)) if texts is None else texts
        return LogLikelihoodMatrix(
            [self.models[row] for row in rows],
            self.values[np.ix_(rows, columns)],
            self.text_bytes[list(columns)],
            [self.metadata[row] for row in rows],
            ids=self.ids and [self.ids[column] for column in columns],
            groups=self.groups and [self.groups[column] for column in columns],
            textset_digest=self.textset_digest if texts is None else "",
            convention=self.convention,
            dtypes=[self.dtypes[row] for row in rows],
            revisions=[self.revisions[row] for row in rows],
        )

    def row(self, model: str) -> Float64[np.ndarray, " N"]:
        """The (N,) log-likelihoods of one model, in nats; KeyError if it is not there."""
        values: Float64[np.ndarray, " N"] = self.values[self._rows[model]]
        return values


def plain_metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metadata as JSON and SQL know it: numpy's numbers are Python's, and NaN is null.

    NaN is how tables write what is not there.
    """
    if not any(isinstance(value, np.generic | float) for value in row.values()):
        return row
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in plain.items()}


def _mean_bits_per_byte(
    loglikelihoods: Float64[np.ndarray, "K N"], text_bytes: Shaped[np.ndarray, " N"]
) -> Float64[np.ndarray, " K"]:
    known = text_bytes > 0
    if not known.any():
        return np.full(len(loglikelihoods), np.nan)
    total = float(text_bytes.sum()) * np.log(2.0)
    bits: Float64[np.ndarray, " K"] = (0.0 - loglikelihoods[:, known].sum(axis=1)) / total
    return bits


UNITS = ("bits_per_byte", "nats_per_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class KLEstimate:
    """A Kullback-Leibler divergence between two models, with what is known of its error.

    Attributes:
        value: the estimate.
        standard_error: of the estimate, same unit.
        interval: lower and upper end at `confidence`, same unit.
        unit: "bits_per_byte" or "nats_per_text".
        confidence: nominal coverage of the interval.
        below_noise_floor: the models ran in different dtypes, and one model in both differs from
            itself by more than this, so it says nothing (`ModelSpace.noise_floor`).
    """

    value: float
    standard_error: float
    interval: tuple[float, float]
    unit: str = "bits_per_byte"
    confidence: float = 0.95
    below_noise_floor: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        low, high = self.interval
        unit = self.unit.replace("_per_", "/")
        flag = ", below the noise of mixed dtypes" if self.below_noise_floor else ""
        return f"{self.value:.4g} ± {self.standard_error:.2g} {unit} [{low:.4g}, {high:.4g}]{flag}"

    def scaled(self, factor: float, unit: str) -> KLEstimate:
        """The same estimate in another unit, `factor` of the old one each."""
        low, high = self.interval
        return replace(
            self,
            value=self.value * factor,
            standard_error=self.standard_error * factor,
            interval=(low * factor, high * factor),
            unit=unit,
        )

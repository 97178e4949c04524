"""How a model moved while it was trained: its checkpoints in the order of their steps.

log-likelihoods ─▶ clip ─▶ drop texts that jump ─▶ KL from step to step, path, exponent
squared distances between weights ──────────────────────────────────────────▶ exponent
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from .basis import Basis
from .diffusion import LEAST_POINTS, Diffusion, diffusion
from .errors import LlfastWarning, SpaceError
from .results import KLEstimate, LogLikelihoodMatrix
from .space import ModelSpace

_STEP = re.compile(r"(?:step|checkpoint)[-_]?(\d+)(?![0-9a-z]|\.\d)", re.IGNORECASE)
_LAST_NUMBER = re.compile(r"(?<![\d.])(\d+)$")
_COMMIT = re.compile(r"(?=.*[a-f])(?:[0-9a-f]{7,12}|[0-9a-f]{40})")  # may end in a digit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """Where K checkpoints of one training are, in the order of their steps.

    Attributes:
        models: (K,) their names.
        steps: (K,) rising.
        bits_per_byte: (K,) on all texts, as they were scored.
        kl: (K, K) bits per byte between any two, on texts that were kept.
        from_previous: (K - 1,) KL of each but the first from the one before it.
        from_start: (K - 1,) KL of each but the first from the first.
        clip: log-likelihoods below it were raised to it, in nats; None if none were.
        clipped_share: of all log-likelihoods.
        dropped: ids of the texts that were left out for their jumps, the largest first.
        warm_up: jumps from this step on counted.
        texts: how many were kept.
        window: how many of the checkpoints after each start an exponent is fitted to.
        diffusion: exponents of `kl`; None if there is none to fit.
        weight_distances: (K, K) squared, between checkpoints within a window, NaN elsewhere; None
            if weights were not compared.
        weight_diffusion: exponents of these.
    """

    models: tuple[str, ...]
    steps: Int64[np.ndarray, " K"]
    bits_per_byte: Float64[np.ndarray, " K"]
    kl: Float64[np.ndarray, "K K"]
    from_previous: tuple[KLEstimate, ...]
    from_start: tuple[KLEstimate, ...]
    clip: float | None
    clipped_share: float
    dropped: tuple[str, ...]
    warm_up: int
    texts: int
    window: int
    diffusion: Diffusion | None
    weight_distances: Float64[np.ndarray, "K K"] | None
    weight_diffusion: Diffusion | None

    @property
    def path_length(self) -> float:
        """The sum of the distances from each checkpoint to the next, √KL each, √(bits/byte)."""
        return float(np.sqrt(np.diagonal(self.kl, 1)).sum())

    @property
    def straight_length(self) -> float:
        """The distance from the first checkpoint to the last, √KL, in √(bits/byte)."""
        return math.sqrt(self.kl[0, -1])

    @property
    def tortuosity(self) -> float | None:
        """Path over straight length, at least 1; None if the path ends where it began."""
        return self.path_length / self.straight_length if self.straight_length else None

    def summary(self) -> dict[str, Any]:
        """What programs are told of it."""
        return {
            "models": list(self.models),
            "steps": self.steps.tolist(),
            "bits_per_byte": self.bits_per_byte.tolist(),
            "kl_from_previous": list(self.from_previous),
            "kl_from_start": list(self.from_start),
            "path_length": self.path_length,
            "straight_length": self.straight_length,
            "tortuosity": self.tortuosity,
            "clip_nats": self.clip,
            "clipped_share": self.clipped_share,
            "texts": self.texts,
            "dropped": list(self.dropped),
            "warm_up": self.warm_up,
            "window": self.window,
            "diffusion": self.diffusion and self.diffusion.summary(),
            "weight_diffusion": self.weight_diffusion and self.weight_diffusion.summary(),
        }


def follow(
    matrix: LogLikelihoodMatrix,
    steps: Sequence[int] | None = None,
    *,
    clip_quantile: float | None = 0.02,
    drop_share: float = 0.03,
    warm_up: int = 0,
    window: int = 10,
    weight_distances: Float64[np.ndarray, "K K"] | None = None,
) -> Trajectory:
    """Follow a model through its training.

    Log-likelihoods are clipped, then texts are dropped whose clipped log-likelihood has jumped the
    most between one checkpoint and the next: a few texts that are learned, or lost, all at once
    would outweigh the many that change little by little.

    Args:
        matrix: log-likelihoods of its K checkpoints, in any order.
        steps: of each of them, see `find_steps`.
        clip_quantile: see `Basis.fit`.
        drop_share: the share of texts that is dropped, rounded to a whole one; 0 for none.
        warm_up: only jumps between checkpoints from this step on count.
        window: see `diffusion`.
        weight_distances: squared, between the checkpoints' weights, in the order of the matrix.

    Raises:
        ValueError: if an option is out of range.
        SpaceError: if there are fewer than two checkpoints, steps are not known, or not different
            ones, fewer than two are left after the warm-up, or fewer than two texts are kept.
    Warns: LlfastWarning if there is no diffusion exponent; or as `ModelSpace.fit` does.
    Source: Kishino et al., arXiv 2505.15353 (2 % clipped, 3 % dropped, after step 2,000 of Pythia).
    """
    found = find_steps(matrix.models, matrix.metadata, steps)
    check_options(found, len(matrix.text_bytes), clip_quantile, drop_share, warm_up, window)
    order = np.argsort(found)
    passed = np.array(found, dtype=np.int64)[order]
    matrix = matrix.select(order.tolist())
    clip = Basis.fit(matrix, clip_quantile).clip
    clipped = matrix if clip is None else replace(matrix, values=np.maximum(matrix.values, clip))
    dropped = _largest_jumps(clipped.values[passed >= warm_up], drop_share)
    keep = sorted(set(range(len(matrix.text_bytes))).difference(dropped))
    space = ModelSpace.fit(clipped.select(texts=keep), None)
    models, kl = space.models, space.kl_matrix()
    if weight_distances is not None:
        if weight_distances.shape != kl.shape:
            raise SpaceError(
                f"weight_distances must have shape {kl.shape}, got {weight_distances.shape}"
            )
        weight_distances = weight_distances[np.ix_(order, order)]
    exponents = _exponents({"log-likelihood": kl, "weight": weight_distances}, passed, window)
    ids = matrix.ids or tuple(map(str, range(len(matrix.text_bytes))))
    return Trajectory(
        models=models,
        steps=passed,
        bits_per_byte=matrix.bits_per_byte,
        kl=kl,
        from_previous=tuple(space.kl(after, before) for before, after in pairwise(models)),
        from_start=tuple(space.kl(model, models[0]) for model in models[1:]),
        clip=clip,
        clipped_share=0.0 if clip is None else float((matrix.values < clip).mean()),
        dropped=tuple(ids[text] for text in dropped),
        warm_up=warm_up,
        texts=len(keep),
        window=window,
        diffusion=exponents.get("log-likelihood"),
        weight_distances=weight_distances,
        weight_diffusion=exponents.get("weight"),
    )


def find_steps(
    models: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    given: Sequence[int] | None = None,
) -> list[int]:
    """The step of each checkpoint: as given, else `step` of its metadata, else from its name.

    In the name of its revision or folder, that is the number after "step" or "checkpoint"
    (`step1000`, `checkpoint-1000`), or else the one at the end. Fractions (`epoch-0.5`) and commits
    say no step.

    Raises:
        SpaceError: if there are fewer than two checkpoints, a step is not known or no natural
            number, or two are the same.
    """
    if len(models) < 2:
        raise SpaceError(f"a trajectory must have at least two checkpoints, got {len(models)}")
    if given is not None and len(given) != len(models):
        raise SpaceError(f"steps must be one a checkpoint ({len(models)}), got {len(given)}")
    found: dict[int, str] = {}
    for row, (model, columns) in enumerate(zip(models, metadata, strict=True)):
        step = _step(model, columns) if given is None else given[row]
        if isinstance(step, float) and step.is_integer():  # 3.0, as tables with gaps write it
            step = int(step)
        is_whole = isinstance(step, int | np.integer) and not isinstance(step, bool)
        if not is_whole or not 0 <= step < 2**63:
            raise SpaceError(
                f"the step of {model!r} must be a natural number, got {step!r}; give all steps"
            )
        if step in found:
            raise SpaceError(
                f"steps must be different, got {step} for {found[step]!r} and {model!r}"
            )
        found[int(step)] = model
    return list(found)


def _step(model: str, metadata: Mapping[str, Any]) -> Any:
    if metadata.get("step") is not None:
        return metadata["step"]
    found = split_step(re.split("[/@]", model.rstrip("/"))[-1])
    return None if found is None else found[1]


def split_step(name: str) -> tuple[str, int] | None:
    """What stands before the step in the name of a revision or folder, and the step."""
    if _COMMIT.fullmatch(name):
        return None
    number = _STEP.search(name) or _LAST_NUMBER.search(name)
    return None if number is None else (name[: number.start()].rstrip("-_."), int(number[1]))


def check_options(
    steps: Sequence[int],
    texts: int,
    clip_quantile: float | None,
    drop_share: float,
    warm_up: int,
    window: int,
) -> None:
    """Refuse what `follow` does, before any model has run in vain.

    Raises:
        ValueError: if an option is out of range.
        SpaceError: if no jumps are left after the warm-up, and texts are to be dropped for them; or
            if fewer than two texts are left, which have no variance.
    """
    if clip_quantile is not None and not 0 <= clip_quantile < 1:
        raise ValueError(f"clip_quantile must be in [0, 1), got {clip_quantile}")
    if not 0 <= drop_share < 1:
        raise ValueError(f"drop_share must be in [0, 1), got {drop_share}")
    if window < LEAST_POINTS:
        raise ValueError(f"window must be at least {LEAST_POINTS}, got {window}")
    left = sum(step >= warm_up for step in steps)
    if drop_share and left < 2:
        raise SpaceError(
            f"warm_up must leave two checkpoints to see jumps between, got {left} from step "
            f"{warm_up} on; lower it, or drop no texts"
        )
    if texts - round(texts * drop_share) < 2:
        raise SpaceError(
            f"drop_share must leave two texts, got {drop_share} of {texts}; score more texts"
        )


def _largest_jumps(values: Float64[np.ndarray, "K N"], share: float) -> list[int]:
    """The texts whose log-likelihood changes most from one row to the next, the largest first."""
    count = round(values.shape[1] * share)
    if not count:
        return []
    jumps = np.abs(np.diff(values, axis=0)).max(axis=0)
    largest: list[int] = np.argsort(-jumps, kind="stable")[:count].tolist()
    return largest


def _exponents(
    distances: Mapping[str, Float64[np.ndarray, "K K"] | None],
    steps: Int64[np.ndarray, " K"],
    window: int,
) -> dict[str, Diffusion]:
    """The exponents of each space that has any."""
    found, reasons = {}, {}
    for space, each in distances.items():
        if each is not None:
            try:
                found[space] = diffusion(each, steps, window)
            except SpaceError as error:
                reasons[space] = error
    if reasons:
        warnings.warn(
            f"there is no diffusion exponent in {' and '.join(reasons)} space: "
            f"{next(iter(reasons.values()))}",
            LlfastWarning,
            stacklevel=3,
        )
    return found

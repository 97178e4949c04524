"""How fast points move away from where they were: diffusion exponents.

Squared distances that grow as elapsed steps to the power c have the exponent c: 1 for a walk of
independent steps, 2 for a straight line, less than 1 for what is held back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from .errors import SpaceError

LEAST_POINTS = 3  # that a line is fitted to


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Diffusion:
    """The exponents of a path, from each of its points on.

    Attributes:
        starts: (S,) steps of the points from which there is one.
        exponents: (S,) of squared distance.
        r_squared: (S,) of the lines that they are slopes of.
        zero_distances: how many distances were 0, and left out for want of a logarithm.
    """

    starts: Int64[np.ndarray, " S"]
    exponents: Float64[np.ndarray, " S"]
    r_squared: Float64[np.ndarray, " S"]
    zero_distances: int

    @property
    def median(self) -> float:
        """Of the exponents."""
        return float(np.median(self.exponents))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the exponents, the lower and the upper one."""
        low, high = np.quantile(self.exponents, [0.25, 0.75]).tolist()
        return low, high

    @property
    def median_r_squared(self) -> float:
        """Of the fits."""
        return float(np.median(self.r_squared))

    def __str__(self) -> str:
        low, high = self.quartiles
        zeros = f", {self.zero_distances} distances of 0 left out" if self.zero_distances else ""
        return (
            f"{self.median:.2f} (quartiles {low:.2f} to {high:.2f}, median R² "
            f"{self.median_r_squared:.3f}, {len(self.starts)} starts{zeros})"
        )

    def summary(self) -> dict[str, Any]:
        """What programs are told of it."""
        return {
            "median": self.median,
            "quartiles": list(self.quartiles),
            "median_r_squared": self.median_r_squared,
            "starts": self.starts.tolist(),
            "exponents": self.exponents.tolist(),
            "r_squared": self.r_squared.tolist(),
            "zero_distances": self.zero_distances,
        }


def diffusion(
    squared_distances: Float64[np.ndarray, "K K"], steps: Int64[np.ndarray, " K"], window: int = 10
) -> Diffusion:
    """Fit log squared distance over log elapsed steps, from each point to those after it.

    Args:
        squared_distances: in any unit. Of each point only those to the `window` after it are
            looked at; of these, zeros are left out.
        steps: when each point was passed; they rise.
        window: how many of the points after a start are fitted. Starts with fewer than three left
            have no exponent.

    Raises:
        ValueError: if `window` is below three.
        SpaceError: if shapes disagree, steps do not rise, a distance is negative or not finite, or
            no start is left.
    Source: Kishino et al., arXiv 2505.15353 (ten points after each start).
    """
    if window < LEAST_POINTS:
        raise ValueError(f"window must be at least {LEAST_POINTS}, got {window}")
    k = len(steps)
    if squared_distances.shape != (k, k):
        raise SpaceError(
            f"squared_distances must have shape ({k}, {k}), got {squared_distances.shape}"
        )
    if not (np.diff(steps) > 0).all():
        raise SpaceError(f"steps must rise, got {steps.tolist()}")
    starts, fits, zeros = [], [], 0
    for start in range(k - 1):
        distances = squared_distances[start, start + 1 : start + 1 + window]
        if not (np.isfinite(distances) & (distances >= 0)).all():
            raise SpaceError(
                "squared_distances must be finite and at least 0, got "
                f"{distances[~(distances >= 0) | np.isinf(distances)][0]} from step {steps[start]}"
            )
        elapsed = steps[start + 1 : start + 1 + window] - steps[start]
        usable = distances > 0
        zeros += int((~usable).sum())
        if usable.sum() >= LEAST_POINTS:
            starts.append(start)
            fits.append(_line(np.log(elapsed[usable]), np.log(distances[usable])))
    if not starts:
        raise SpaceError(
            f"squared_distances must be above 0 from a point to {LEAST_POINTS} after it, got "
            f"{k} points" + (f", {zeros} distances of 0 among them" if zeros else "")
        )
    slopes, r_squared = np.array(fits).T
    return Diffusion(
        starts=steps[starts], exponents=slopes, r_squared=r_squared, zero_distances=zeros
    )


def _line(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Slope and R² of least squares; R² is 1 where y does not vary, for nothing is unexplained."""
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y) / float(x @ x)
    spread = float(y @ y)
    residual = y - slope * x
    return slope, 1.0 - float(residual @ residual) / spread if np.ptp(y) else 1.0

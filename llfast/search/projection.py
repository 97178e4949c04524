"""Few coordinates from which a distance cannot be overestimated.

    point (N,) ─▶ coordinates along m directions, and the norm of what they leave out
    distance of two such rows ≤ distance of the points

For orthonormal directions B, ‖x - y‖² = ‖Bx - By‖² + ‖Rx - Ry‖², where R is what B leaves out, and
‖Rx - Ry‖ is at least | ‖Rx‖ - ‖Ry‖ |. Two stages use the same directions: the first few to look at
all rows, the rest to look again at those that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from .flat import norms_of

# With the norm, 64 and 192 floats: whole cache lines. 3.1 % of 10,000-dimensional fp32 vectors,
# the directions themselves for 100,000 models included.
STAGES = (63, 254)
_SAMPLE_BYTES = 1 << 28  # of fp64 points, from which basis and directions are found
_MOST_SAMPLE = 4096
_LITTLE = 1e-4  # of a squared norm


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """Rows of lower-bound coordinates.

    Attributes:
        first: (M, m0 + 1) coordinates of the first stage, and the norm of the rest.
        rest: (M, m1 - m0 + 1) those of the second stage, and the norm of what it leaves out.
    """

    first: Float32[np.ndarray, "M F"]
    rest: Float32[np.ndarray, "M R"]

    def __getitem__(self, row: int) -> Reduced:
        """One row, still as rows."""
        return Reduced(self.first[[row]], self.rest[[row]])


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Orthonormal directions of a space.

    Attributes:
        directions: (m1, N) fp64, the most important first.
        first: m0, how many of them the first stage uses.
        explained: the share of the sample's squared norms that each stage keeps.
    """

    directions: Float64[np.ndarray, "M N"]
    first: int
    explained: tuple[float, float]

    @classmethod
    def fit(
        cls, sample: Float64[np.ndarray, "S N"], stages: tuple[int, int] = STAGES
    ) -> Projection:
        """The directions along which a sample of points spreads most.

        Randomised singular value decomposition with power iterations (Halko, Martinsson & Tropp
        2011, SIAM Review 53, algorithm 5.1); any directions give bounds, these give close ones.

        Args:
            sample: (S, N) points.
            stages: how many directions each of the two stages has, at most.
        """
        import torch

        most = min(sample.shape)
        first, both = (min(each, most) for each in stages)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            points = torch.from_numpy(np.array(sample, dtype=np.float32))
            _, _, found = torch.svd_lowrank(points, q=min(both + 16, most), niter=2)
        # Orthonormal to fp64's precision, which the bound takes for granted.
        directions = np.linalg.qr(found[:, :both].double().numpy())[0].T
        squares = np.square(sample @ directions.T).sum(axis=0)
        whole = float(np.square(sample).sum()) or 1.0
        explained = float(squares[:first].sum()) / whole, float(squares.sum()) / whole
        return cls(np.ascontiguousarray(directions), first, explained)

    def reduce(self, points: Float64[np.ndarray, "M N"]) -> Reduced:
        """Lower-bound coordinates of points, computed in fp64 and rounded once."""
        along = points @ self.directions.T
        kept = np.einsum("ij,ij->i", along, along)
        squares = np.einsum("ij,ij->i", points, points)
        left_out = np.sqrt(np.maximum(squares - kept, 0.0))
        # That difference is exact to 1e-9 of the norm, unless almost nothing is left out.
        if (few := squares - kept < _LITTLE * squares).any():
            left_out[few] = norms_of(points[few] - along[few] @ self.directions)
        beyond = along[:, self.first :]
        first_left_out = np.sqrt(left_out**2 + np.einsum("ij,ij->i", beyond, beyond))
        return Reduced(
            np.column_stack([along[:, : self.first], first_left_out]).astype(np.float32),
            np.column_stack([beyond, left_out]).astype(np.float32),
        )


def draw_sample(count: int, dimensions: int) -> Int64[np.ndarray, " S"]:
    """Rows from which directions are found: all of them, or some drawn at random."""
    most = min(_MOST_SAMPLE, max(1, _SAMPLE_BYTES // (8 * dimensions)))
    if count <= most:
        return np.arange(count)
    drawn: Int64[np.ndarray, " S"] = np.random.default_rng(0).choice(count, most, replace=False)
    return np.sort(drawn)

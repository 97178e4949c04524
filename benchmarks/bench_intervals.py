"""Coverage of the interval on KL, by simulation.

    python benchmarks/bench_intervals.py [--repetitions 4000] [--pairs bits_per_byte.csv]

Claim: a nominal 95 % interval covers 93-97 % for heavy-tailed log-likelihood differences, at 265
and at 10,000 texts, whether texts are independent or come five to a document.

Every cell draws differences whose half variance is known, makes the interval of `kl_estimate`, and
counts how often it holds the truth. Two simpler intervals are made from the same draws: the plain
log jackknife (symmetric, t with G - 1 degrees of freedom) and the normal interval on KL itself,
which takes texts as independent. In the grouped layout a text's difference is √½ of its document's
draw plus √½ of its own. Cells marked `beyond_claim` (very heavy tails, few documents) show where
the claim ends.

`--pairs` adds a cell that draws from measured differences: a table with one row a text and one
column a model (the first column is the text's id), bits per byte; each repetition takes a random
pair of models, clipped as `ModelSpace.fit` clips.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llfast.bench import report
from llfast.intervals import kl_estimate, student_t_quantile

RESULTS = Path(__file__).parent / "results"
SIZES = (265, 10_000)
FEW_DOCUMENTS = (5, 10, 20)
CHUNKS = 5  # texts a document in the grouped layout
CONFIDENCE = 0.95
CLAIM = (0.93, 0.97)

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


# ------------------------------------------------- distributions: mean 0, variance 1, by their draw


def student(freedom: float) -> Draw:
    """Student's t."""
    scale = math.sqrt(freedom / (freedom - 2))
    return lambda rng, shape: rng.standard_t(freedom, shape) / scale


def contaminated(share: float, sd: float) -> Draw:
    """Normal, with a share of the draws wider by `sd`."""
    scale = math.sqrt(1 - share + share * sd**2)
    return lambda rng, shape: (
        rng.standard_normal(shape) * np.where(rng.random(shape) < share, sd, 1.0) / scale
    )


def lognormal(sigma: float) -> Draw:
    """Log-normal: heavy and skewed."""
    mean, scale = math.exp(sigma**2 / 2), math.sqrt(math.expm1(sigma**2) * math.exp(sigma**2))
    return lambda rng, shape: (np.exp(sigma * rng.standard_normal(shape)) - mean) / scale


DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "student t, 8 df": student(8),
    "laplace": lambda rng, shape: rng.laplace(size=shape) / math.sqrt(2),
    "5 % at 3 sd": contaminated(0.05, 3),
    "log-normal, sigma 0.5": lognormal(0.5),
    "exponential": lambda rng, shape: rng.standard_exponential(shape) - 1,
    "student t, 5 df": student(5),
}
VERY_HEAVY: dict[str, Draw] = {
    "1 % at 5 sd": contaminated(0.01, 5),
    "log-normal, sigma 1": lognormal(1.0),
}


def two_levels(draw: Draw, rng: np.random.Generator, count: int, n: int, chunks: int) -> np.ndarray:
    """(count, n) draws; with several chunks a document, half of the variance is the document's."""
    if chunks == 1:
        return draw(rng, (count, n))
    documents = -(-n // chunks)
    shared, own = draw(rng, (count, documents, 1)), draw(rng, (count, documents, chunks))
    return (math.sqrt(0.5) * (shared + own)).reshape(count, -1)[:, :n]


# --------------------------------------------------------------------------------- populations


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """What differences are drawn from: rows of N texts, and the half variance of each row."""

    name: str
    draw: Callable[[np.random.Generator, int, int, int], tuple[np.ndarray, np.ndarray]]


def plain(name: str, draw: Draw) -> Population:
    """A distribution of differences whose half variance is 0.5."""
    return Population(
        name=name,
        draw=lambda rng, count, n, chunks: (
            two_levels(draw, rng, count, n, chunks),
            np.full(count, 0.5),
        ),
    )


def uneven() -> Population:
    """Documents of unlike spread: a text's standard deviation is its document's, log-normal."""

    def draw(
        rng: np.random.Generator, count: int, n: int, chunks: int
    ) -> tuple[np.ndarray, np.ndarray]:
        spread = np.exp(0.5 * rng.standard_normal((count, -(-n // chunks), 1)) - 0.25)
        own = rng.standard_normal((count, spread.shape[1], chunks))
        return (spread * own).reshape(count, -1)[:, :n], np.full(count, 0.5)

    return Population(name="documents of unlike spread", draw=draw)


def clipped() -> Population:
    """Two models that share a text's difficulty, t5 noise each, clipped at their 2 % quantile."""
    noise = student(5)

    def pair(rng: np.random.Generator, count: int, n: int, chunks: int) -> list[np.ndarray]:
        difficulty = two_levels(DISTRIBUTIONS["normal"], rng, count, n, chunks)
        return [3 * difficulty + two_levels(noise, rng, count, n, chunks) for _ in range(2)]

    truths: dict[int, tuple[float, float]] = {}

    def truth(chunks: int) -> tuple[float, float]:
        if chunks not in truths:
            # 2e7 draws: off by 0.05 %, a thirtieth of the standard error at 10,000 texts.
            rng = np.random.default_rng(7)
            clip = float(np.quantile(pair(rng, 1, 2_000_000, chunks), 0.02))
            halves = []
            for _ in range(20):
                a, b = (np.maximum(each, clip) for each in pair(rng, 1, 1_000_000, chunks))
                halves.append(np.square(a - b).mean() / 2)
            truths[chunks] = clip, float(np.mean(halves))
        return truths[chunks]

    def draw(
        rng: np.random.Generator, count: int, n: int, chunks: int
    ) -> tuple[np.ndarray, np.ndarray]:
        clip, value = truth(chunks)
        a, b = (np.maximum(each, clip) for each in pair(rng, count, n, chunks))
        return a - b, np.full(count, value)

    return Population(name="clipped pair, student t, 5 df", draw=draw)


def measured(path: Path) -> Population:
    """Random pairs of models from a table of bits per byte, each a population of its own."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    values = -np.array([[float(cell) for cell in row[1:]] for row in rows[1:]]).T
    values = np.maximum(values, np.quantile(values, 0.02))
    k, texts = values.shape

    def draw(
        rng: np.random.Generator, count: int, n: int, chunks: int
    ) -> tuple[np.ndarray, np.ndarray]:
        drawn = np.empty((count, n))
        for row in range(count):
            difference = np.zeros(texts)
            while not difference.any():  # two columns may be one model
                a, b = rng.choice(k, 2, replace=False)
                difference = values[a] - values[b]
            standard = (difference - difference.mean()) / difference.std()
            resample: Draw = lambda rng, shape, of=standard: of[rng.integers(0, texts, shape)]  # noqa: E731
            drawn[row] = two_levels(resample, rng, 1, n, chunks)[0]
        return drawn, np.full(count, 0.5)

    return Population(name=f"measured pairs, {k} models on {texts} texts", draw=draw)


# --------------------------------------------------------------------------------- the simulation


def jackknife_log(difference: np.ndarray, chunks: int) -> tuple[float, float]:
    """Plain: log KL ± t(G - 1) jackknife standard errors."""
    d = difference - difference.mean()
    starts = np.arange(0, len(d), chunks)
    sums, squares = np.add.reduceat(d, starts), np.add.reduceat(d * d, starts)
    left = len(d) - np.diff(np.append(starts, len(d)))
    logs = np.log(((squares.sum() - squares) / left - (sums / left) ** 2) / 2)
    error = math.sqrt((len(logs) - 1) * logs.var())
    value, t = math.log(d.var() / 2), student_t_quantile(CONFIDENCE, len(logs) - 1)
    return math.exp(value - t * error), math.exp(value + t * error)


def normal_on_kl(difference: np.ndarray, chunks: int) -> tuple[float, float]:  # noqa: ARG001
    """Simplest: KL ± 1.96 standard errors of the mean of half the squared differences."""
    halves = (difference - difference.mean()) ** 2 / 2
    reach = 1.959964 * halves.std(ddof=1) / math.sqrt(len(halves))
    return halves.mean() - reach, halves.mean() + reach


def grouped_jackknife(difference: np.ndarray, chunks: int) -> tuple[float, float]:
    """What llfast reports."""
    groups = np.arange(len(difference)) // chunks if chunks > 1 else None
    return kl_estimate(difference, groups, confidence=CONFIDENCE).interval


METHODS: dict[str, Callable[[np.ndarray, int], tuple[float, float]]] = {
    "llfast": grouped_jackknife,
    "plain log jackknife": jackknife_log,
    "normal on KL": normal_on_kl,
}


def simulate(
    population: Population, n: int, chunks: int, repetitions: int, beyond_claim: str
) -> dict[str, object]:
    """One cell: the share of intervals that hold the truth, for each method."""
    rng = np.random.default_rng([n, chunks, *population.name.encode()])
    ends: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    truths, kurtosis = [], []
    batch = max(1, min(repetitions, 2_000_000 // n))
    for start in range(0, repetitions, batch):
        drawn, truth = population.draw(rng, min(batch, repetitions - start), n, chunks)
        truths.append(truth)
        centred = drawn - drawn.mean(axis=1, keepdims=True)
        kurtosis.append((centred**4).mean(axis=1) / (centred**2).mean(axis=1) ** 2)
        for row in drawn:
            for name, method in METHODS.items():
                ends[name].append(method(row, chunks))
    truth = np.concatenate(truths)
    found = {}
    for name, pairs in ends.items():
        low, high = np.array(pairs).T
        coverage = float(((low <= truth) & (truth <= high)).mean())
        found[name] = {
            "coverage": coverage,
            "monte_carlo_error": round(math.sqrt(coverage * (1 - coverage) / repetitions), 5),
            "truth_below": float((truth < low).mean()),
            "truth_above": float((truth > high).mean()),
            "median_width": round(float(np.median((high - low) / truth)), 4),
        }
    return {
        "distribution": population.name,
        "texts": n,
        "texts_a_document": chunks,
        "beyond_claim": beyond_claim,
        "median_sample_kurtosis": round(float(np.median(np.concatenate(kurtosis))), 2),
        "intervals": found,
    }


def plan(pairs: Path | None) -> Iterator[tuple[Population, int, int, str]]:
    """(population, texts, texts a document, what puts it beyond the claim) of each cell."""
    claimed = [plain(name, draw) for name, draw in DISTRIBUTIONS.items()]
    claimed += [uneven(), clipped()]
    if pairs is not None:
        claimed.append(measured(pairs))
    heavy = [plain(name, draw) for name, draw in VERY_HEAVY.items()]
    for beyond, group in (("", claimed), ("very heavy tails", heavy)):
        for population in group:
            for n in SIZES:
                for chunks in (1, CHUNKS):
                    yield population, n, chunks, beyond
    for documents in FEW_DOCUMENTS:
        for name in ("normal", "laplace", "student t, 5 df"):
            yield plain(name, DISTRIBUTIONS[name]), documents * CHUNKS, CHUNKS, "few documents"


def main() -> int:
    """Run all cells, print them, write the JSON; 1 if a cell falls outside the claim."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=4000)
    parser.add_argument("--pairs", type=Path, help="table of bits per byte, one row a text")
    parser.add_argument("--out", type=Path, default=RESULTS / "intervals.json")
    options = parser.parse_args()
    started, cells = time.perf_counter(), []
    print(f"{'coverage, %':38s} {'texts':>6s} {'a doc':>5s}  " + "  ".join(METHODS))
    outside = 0
    for population, n, chunks, beyond in plan(options.pairs):
        cell = simulate(population, n, chunks, options.repetitions, beyond)
        cells.append(cell)
        coverage = [found["coverage"] for found in cell["intervals"].values()]
        outside += not (beyond or CLAIM[0] <= coverage[0] <= CLAIM[1])
        shown = "".join(
            f"{100 * share:{len(name) + 2}.1f}"
            for name, share in zip(METHODS, coverage, strict=True)
        )
        print(f"{population.name:38s} {n:6d} {chunks:5d}{shown}  {beyond}", flush=True)
    found = {
        "benchmark": "intervals",
        "claim": "nominal 95 % intervals hold the truth 93-97 % of the time, except beyond_claim",
        "cells_outside_claim": outside,
        "confidence": CONFIDENCE,
        "repetitions": options.repetitions,
        "seconds": round(time.perf_counter() - started, 1),
        "hardware": report.hardware(),
        "versions": report.versions("numpy"),
        "commit": report.commit(),
        "cells": cells,
    }
    print(f"{outside} cells outside the claim")
    report.write(found, options.out)
    print(f"wrote {options.out}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())

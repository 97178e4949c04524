"""Trainings of small models followed from step to step: three sizes, three seeds each.

    python benchmarks/trajectories.py --folder DIR

Claim: as Kishino et al. (arXiv 2505.15353) found for Pythia, what a model says moves away from
where it was more slowly than its weights do: the diffusion exponent in log-likelihood space is
below that in weight space. The models are trained first, unless they are there, on what every
Python installation carries; all sizes and seeds read the same documents, in an order of their own.
The learning rate rises for a tenth of a schedule of which the first half is run, and is at 63 % of
its peak by then. An exponent is fitted to the ten checkpoints after its start, or as many as are
left, at least three.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llfast import ModelSpace, Store, TextSet, score_layers
from llfast.bench import report
from llfast.drawing import new_figure, save_figure
from llfast.model_list import ModelRequest
from llfast.placing import classical_mds
from llfast.stored_layers import compare_layers
from llfast.trajectory import Trajectory
from llfast.trajectory_scoring import trajectory_of
from llfast.zoo_corpora import installed_corpora
from llfast.zoo_training import (
    Mixture,
    Sizes,
    TrainingRun,
    publish,
    sample_batches,
    start_worker,
    tokenize_documents,
    train,
    train_tokenizer,
)

RESULTS = Path(__file__).parent / "results"
WIDTHS = (64, 128, 192)
SEEDS = (0, 1, 2)
SCHEDULE = 3000  # optimiser steps of the whole schedule
EVERY = 50
STEPS = tuple(range(EVERY, SCHEDULE // 2 + 1, EVERY))
WARM_UP = SCHEDULE // 10
MIXTURE = Mixture(name="all", prose_share=0.5, pool_share=1.0)


def make_run(width: int, seed: int) -> TrainingRun:
    """Of a size and a seed; its last snapshot, which ends the schedule, is never wanted."""
    name = f"w{width}-s{seed}"
    snapshots = [(step, f"{name}/step{step}") for step in (*STEPS, SCHEDULE)]
    return TrainingRun(
        name=name,
        architecture="gpt_neox",
        start=None,
        mixture=MIXTURE,
        learning_rate=2e-3,
        snapshots=tuple(snapshots),
        seed=seed,
    )


def train_all(
    pool: ProcessPoolExecutor, folder: Path, runs: dict[str, tuple[int, TrainingRun]], corpora: Any
) -> bool:
    """Train what is not there yet, the largest first.

    Returns: whether that was all of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not any(folder.glob("*/step*"))
    if not (folder / "tokenizer").exists():
        tokenizer = train_tokenizer(corpora.training, Sizes().vocabulary)
        publish(folder / "tokenizer", b"", tokenizer.save_pretrained)
    documents = tokenize_documents(folder, corpora.training)
    futures = {}
    for name, (width, run) in sorted(runs.items(), key=lambda each: -each[1][0]):
        names = {each for step, each in run.snapshots if step in STEPS}
        missing = frozenset(each for each in names if not (folder / each).exists())
        if missing:
            sizes = Sizes(width=width)
            batches = sample_batches(run, sizes, documents)
            provenance = json.dumps({"width": width, "run": name}).encode()
            futures[name] = pool.submit(train, run, sizes, batches, folder, provenance, missing)
    for name, future in futures.items():
        future.result()
        say(f"trained {name}")
    return is_new


def summarise(found: Trajectory) -> dict[str, Any]:
    """Medians over the starts after the warm-up, and where the run came from and to."""
    facts: dict[str, Any] = {}
    for space, each in (("loglikelihood", found.diffusion), ("weight", found.weight_diffusion)):
        late = each.starts >= WARM_UP
        facts[space] = {
            "exponent": rounded(np.median(each.exponents[late])),
            "quartiles": [rounded(q) for q in np.quantile(each.exponents[late], [0.25, 0.75])],
            "r_squared": rounded(np.median(each.r_squared[late])),
            "starts": int(late.sum()),
            "exponents": [rounded(value) for value in each.exponents],
        }
    late_steps = [
        each.value
        for step, each in zip(found.steps[1:], found.from_previous, strict=True)
        if step > WARM_UP
    ]
    return {
        **facts,
        "bits_per_byte": [rounded(found.bits_per_byte[0]), rounded(found.bits_per_byte[-1])],
        "kl_from_previous": [rounded(each.value) for each in found.from_previous],
        "median_late_kl": rounded(np.median(late_steps)),
        "path_length": rounded(found.path_length),
        "straight_length": rounded(found.straight_length),
        "clip_nats": rounded(found.clip),
        "dropped": len(found.dropped),
    }


def between(space: ModelSpace, is_pair: Callable[[str, str], bool]) -> dict[str, float]:
    """KL, bits per byte, of pairs of runs at their last checkpoint."""
    kl = space.kl_matrix()
    names = space.models
    return report.spread(
        [
            float(kl[row, other])
            for row, a in enumerate(names)
            for other, b in enumerate(names[:row])
            if is_pair(a, b)
        ]
    )


def measure(pool: ProcessPoolExecutor, folder: Path, texts: int) -> tuple[dict[str, Any], Any]:
    """All of it: what the JSON holds, and the picture."""
    corpora = installed_corpora()
    runs = {
        run.name: (width, run)
        for width in WIDTHS
        for seed in SEEDS
        if (run := make_run(width, seed))
    }
    start = time.monotonic()
    is_new = train_all(pool, folder / "models", runs, corpora)
    trained = time.monotonic()
    sample, _ = corpora.evaluation_texts(texts)
    store = Store(folder / "store")
    is_new = is_new and not store.rows()
    futures = {
        name: pool.submit(follow_run, folder / "models", name, width, sample, store)
        for name, (width, _) in runs.items()
    }
    found = {}
    for name, future in futures.items():
        found[name] = future.result()
        say(f"followed {name}")
    followed = time.monotonic()
    ends = [each.models[-1] for each in found.values()]
    last = ModelSpace.fit(store.matrix(sample.digest, models=ends, duplicates="newest"))
    every = [model for each in found.values() for model in each.models]
    whole = ModelSpace.fit(store.matrix(sample.digest, models=every, duplicates="newest"))
    summaries = {name: summarise(each) for name, each in found.items()}
    exponents = {
        space: [each[space]["exponent"] for each in summaries.values()]
        for space in ("loglikelihood", "weight")
    }
    facts = {
        "benchmark": "trajectories",
        "models": {"architecture": "gpt_neox", "widths": WIDTHS, "layers": Sizes().layers},
        "steps": STEPS,
        "schedule": {"steps": SCHEDULE, "warm_up": WARM_UP, "peak_learning_rate": 2e-3},
        "texts": len(sample),
        "exponents": {space: report.spread(each) for space, each in exponents.items()},
        "runs_below": sum(a < b for a, b in zip(*exponents.values(), strict=True)),
        "runs": summaries,
        "kl_between_layers": {
            name: layers_of(folder / "models" / name / f"step{STEPS[-1]}", sample) for name in runs
        },
        "seconds": {  # of all of it, or none: a part says nothing of the whole
            "training": round(trained - start, 1),
            "scoring and following": round(followed - trained, 1),
        }
        if is_new
        else None,
        "kl_of_last": {
            "seeds": between(last, lambda a, b: width_of(a) == width_of(b)),
            "sizes": between(last, lambda a, b: seed_of(a) == seed_of(b)),
        },
    }
    return facts, picture(found, whole)


def follow_run(folder: Path, name: str, width: int, texts: TextSet, store: Store) -> Trajectory:
    """One run, its checkpoints scored unless they are."""
    requests = [
        ModelRequest(
            model=str(folder / name / f"step{step}"),
            name=f"{name}/step{step}",
            metadata={"family": f"w{width}"},
        )
        for step in STEPS
    ]
    return trajectory_of(requests, texts, store, warm_up=WARM_UP, progress=False)


def layers_of(checkpoint: Path, texts: TextSet) -> list[float]:
    """KL, bits per byte, from each hidden state to the next, the embeddings first."""
    readings = compare_layers(score_layers(str(checkpoint), texts, progress=False))
    return [rounded(each.kl_to_next.value) for each in readings if each.kl_to_next is not None]


def width_of(model: str) -> str:
    """By its name."""
    return model.partition("-")[0]


def seed_of(model: str) -> str:
    """By its name."""
    return model.partition("-")[2].partition("/")[0]


def picture(found: dict[str, Trajectory], space: ModelSpace) -> Any:
    """KL from step to step, exponents of both spaces, and all paths in one plane."""
    figure = new_figure(17, 5.2)
    steps, exponents, plane = figure.subplots(1, 3)
    colours = {f"w{width}": f"C{number}" for number, width in enumerate(WIDTHS)}
    labels = {name: f"width {name[1:]}" for name in colours}
    places = dict(zip(space.models, classical_mds(space.kl_matrix()), strict=True))
    for name, each in found.items():
        width = width_of(name)
        colour = colours[width]
        label = labels.pop(width, None)
        values = [estimate.value for estimate in each.from_previous]
        steps.plot(each.steps[1:], values, color=colour, linewidth=1.2, label=label)
        for fit, style in ((each.diffusion, "-"), (each.weight_diffusion, "--")):
            exponents.plot(fit.starts, fit.exponents, style, color=colour, linewidth=1.2)
        path = np.array([places[model] for model in each.models])
        plane.plot(path[:, 0], path[:, 1], color=colour, linewidth=1, marker="o", markersize=2.5)
        plane.plot(*path[-1], color=colour, marker="*", markersize=12, label=label)
    for axes in (steps, exponents):
        axes.axvline(WARM_UP, color="0.6", linewidth=1, linestyle=":")
    steps.annotate(
        "end of the\nlearning rate's rise",
        (WARM_UP, 0.98),
        (5, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="0.4",
    )
    steps.set(yscale="log", xlabel="optimiser step", ylabel="KL (bits/byte)")
    steps.set_title(f"KL from the checkpoint {EVERY} steps before")
    steps.legend(frameon=False)
    exponents.plot([], [], "-", color="0.3", label="log-likelihood space")
    exponents.plot([], [], "--", color="0.3", label="weight space")
    exponents.axhline(1, color="0.8", linewidth=1, zorder=0)
    exponents.set(xlabel="start (optimiser step)", ylabel="exponent of squared distance")
    exponents.set_title("Diffusion exponents over the next ten checkpoints, or what is left")
    exponents.legend(frameon=False)
    plane.set_aspect("equal", adjustable="datalim")
    plane.set(xlabel="first axis (√ bits/byte)", ylabel="second axis (√ bits/byte)")
    plane.set_title("All paths in one plane; stars are their ends")
    plane.legend(frameon=False)
    return figure


def rounded(value: Any) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where models and results are")
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS / "trajectories.json")
    options = parser.parse_args()
    with ProcessPoolExecutor(  # of one thread each: models this small are slower on several
        mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
    ) as pool:
        facts, figure = measure(pool, options.folder, options.texts)
    described = {
        "command": "python benchmarks/trajectories.py --folder DIR",
        "commit": report.commit(),
        "hardware": report.hardware(),
        "versions": report.versions("llfast", "torch", "transformers", "numpy"),
    }
    report.write({**described, **facts}, options.out)
    save_figure(figure, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

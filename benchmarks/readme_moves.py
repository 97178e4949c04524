"""The README's table on trainings."""

from __future__ import annotations

import statistics
from typing import Any

from readme_tables import table

_SPACES = ("loglikelihood", "weight")


def trajectories(found: dict[str, Any]) -> list[str]:
    """How fast small models move while they are trained, by their size."""
    titles = (
        "width",
        "exponent of what they say",
        "exponent of their weights",
        "KL of a step, late",
        "KL of a layer to the next",
        "bits/byte at the end",
    )
    rows = []
    for width in found["models"]["widths"]:
        names = [name for name in found["runs"] if name.startswith(f"w{width}-")]
        runs = [found["runs"][name] for name in names]
        layers = [found["kl_between_layers"][name] for name in names]
        cells = [
            str(width),
            *(_range([run[space]["exponent"] for run in runs]) for space in _SPACES),
            _range([run["median_late_kl"] for run in runs]),
            ", ".join(_range(list(each)) for each in zip(*layers, strict=True)),
            _range([run["bits_per_byte"][1] for run in runs]),
        ]
        rows.append(cells)
    seeds, sizes = (found["kl_of_last"][name]["median"] for name in ("seeds", "sizes"))
    steps, models = found["steps"], found["models"]
    told = (
        f"Medians of three seeds, least to most in brackets; {len(steps)} checkpoints each, "
        f"{steps[0]} to {steps[-1]} steps, of {models['layers']}-layer {models['architecture']} "
        f"models on {found['texts']} texts. Exponents are of squared distance over the next ten "
        "checkpoints, or the three to nine that are left, from starts after the learning rate's "
        "rise: in "
        f"{found['runs_below']} of {len(found['runs'])} runs that of what they say is the lower "
        f"one. The last models of two seeds are {seeds:.2g} bits/byte apart, of two sizes "
        f"{sizes:.2g}. Layers are the embeddings and each layer's output, read by the logit lens. "
    )
    if (seconds := found["seconds"]) is not None:
        told += (
            f"{seconds['training'] / 60:.0f} minutes of training and "
            f"{seconds['scoring and following'] / 60:.0f} of scoring on "
            f"{found['hardware']['threads']} threads. "
        )
    return [*table(titles, rows), "", f"{told}Command: `{found['command']}`."]


def _range(values: list[float]) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.2f} ({least:.2f} to {most:.2f})"

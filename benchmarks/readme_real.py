"""The README's tables on real models."""

from __future__ import annotations

from typing import Any


def real_models(found: dict[str, Any]) -> list[str]:
    """The nearest of some of 90 real models."""
    lines = ["| model | nearest | second | third |", "|---|---|---|---|"]
    for model, hits in found["nearest"].items():
        cells = [
            "{} {:.4f} ({:.4f} to {:.4f})".format(h["model"], h["kl"], *h["interval"]) for h in hits
        ]
        lines.append(f"| {model} | " + " | ".join(cells[:3]) + " |")
    lines.append("")
    lines.append(
        f"{found['models']} models on {found['texts']} texts. The nearest model is of the same "
        f"family for {found['nearest_is_kin']} of the {found['with_kin']} whose family has "
        "another. Bytes of the texts are not known, so values order models but are no absolute KL. "
        "Command: `python benchmarks/real_models.py bits_per_byte.csv`."
    )
    return lines


def real_predictions(found: dict[str, Any]) -> list[str]:
    """How predicted scores go with real ones."""
    lines = [
        "| error on | r | of ranks | mean log-likelihood alone: r | of ranks |",
        "|---|---|---|---|---|",
    ]
    names = ("pearson", "spearman", "baseline_pearson", "baseline_spearman")
    for benchmark, each in found["benchmarks"].items():
        cells = [
            "{:.2f} ({:.2f} to {:.2f})".format(each[name]["value"], *each[name]["interval"])
            for name in names
        ]
        title = f"{benchmark}, log perplexity" if benchmark in found["log"] else benchmark
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"{found['models']} models of {found['families']} families on {found['texts']} texts; "
        "correlations of predicted and real errors, with 95 % intervals from drawing families "
        "again, for predictions as they are. Each family is predicted by the others: their clip, "
        "penalty and weights. "
        "Command: `python benchmarks/real_predictions.py bits_per_byte.csv benchmark_errors.csv`."
    )
    return lines

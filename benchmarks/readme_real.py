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


def real_relations(found: dict[str, Any]) -> list[str]:
    """KL by relation among 90 real models, and how the tree goes with families."""
    lines = [
        "| relation | pairs | first quartile | median | third quartile |",
        "|---|---|---|---|---|",
    ]
    for each in found["relations"]:
        pairs = f"{each['pairs']:,}"
        if each["used"] < each["pairs"]:
            pairs = f"{each['used']:,} of {pairs}"
        cells = [
            "{:.2g} ({:.2g} to {:.2g})".format(each[name]["value"], *each[name]["interval"])
            for name in ("first_quartile", "median", "third_quartile")
        ]
        lines.append(f"| {each['relation']} | {pairs} | " + " | ".join(cells) + " |")
    tree = found["tree"]
    told = (
        f"{found['models']} models of {found['families']} families on {found['texts']} texts; "
        "bytes of the texts are not known, so values can be compared with one another only. "
        "95 % intervals from "
        f"drawing families (of steps, models) again. The tree, cut into {tree['clusters']}, "
        f"goes with the families by an adjusted Rand index of {tree['adjusted_rand']:.2f} (95 % of "
        f"shuffled ones: below {tree['adjusted_rand_of_shuffled']:.2f}). Command: `python "
        "benchmarks/real_relations.py bits_per_byte.csv`."
    )
    return [*lines, "", told]

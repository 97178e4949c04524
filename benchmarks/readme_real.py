"""The README's tables on real models."""

from __future__ import annotations

from typing import Any

from readme_tables import table


def real_models(found: dict[str, Any]) -> list[str]:
    """The nearest of some of 90 real models."""
    form = "{} {:.4f} ({:.4f} to {:.4f})"
    rows = [
        (model, *(form.format(h["model"], h["kl"], *h["interval"]) for h in hits[:3]))
        for model, hits in found["nearest"].items()
    ]
    told = (
        f"{found['models']} models on {found['texts']} texts. The nearest model is of the same "
        f"family for {found['nearest_is_kin']} of the {found['with_kin']} whose family has "
        "another. Bytes of the texts are not known, so values order models but are no absolute KL. "
        "Command: `python benchmarks/real_models.py bits_per_byte.csv`."
    )
    return [*table(("model", "nearest", "second", "third"), rows), "", told]


def real_predictions(found: dict[str, Any]) -> list[str]:
    """How predicted scores go with real ones."""
    titles = ("error on", "r", "of ranks", "mean log-likelihood alone: r", "of ranks")
    rows = []
    names = ("pearson", "spearman", "baseline_pearson", "baseline_spearman")
    for benchmark, each in found["benchmarks"].items():
        cells = [
            "{:.2f} ({:.2f} to {:.2f})".format(each[name]["value"], *each[name]["interval"])
            for name in names
        ]
        title = f"{benchmark}, log perplexity" if benchmark in found["log"] else benchmark
        rows.append((title, *cells))
    told = (
        f"{found['models']} models of {found['families']} families on {found['texts']} texts; "
        "correlations of predicted and real errors, with 95 % intervals from drawing families "
        "again, for predictions as they are. Each family is predicted by the others: their clip, "
        "penalty and weights. "
        "Command: `python benchmarks/real_predictions.py bits_per_byte.csv benchmark_errors.csv`."
    )
    return [*table(titles, rows), "", told]


def real_relations(found: dict[str, Any]) -> list[str]:
    """KL by relation among 90 real models, and how the tree goes with families."""
    titles = ("relation", "pairs", "first quartile", "median", "third quartile")
    rows = []
    for each in found["relations"]:
        pairs = f"{each['pairs']:,}"
        if each["used"] < each["pairs"]:
            pairs = f"{each['used']:,} of {pairs}"
        cells = [
            "{:.2g} ({:.2g} to {:.2g})".format(each[name]["value"], *each[name]["interval"])
            for name in ("first_quartile", "median", "third_quartile")
        ]
        rows.append((each["relation"], pairs, *cells))
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
    return [*table(titles, rows), "", told]

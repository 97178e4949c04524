"""The README's table of where the time of scoring goes."""

from __future__ import annotations

from typing import Any

from readme_tables import spread, table

PARTS = ("tokenise", "read", "body", "head", "store", "other")


def throughput(found: dict[str, Any]) -> list[str]:
    """A row a model: how fast it is, and each part's share of the time and of its ceiling."""
    rows = [
        (
            f"{model['name']}, {model['parameters'] / 1e6:,.0f}M",
            spread(model["models_an_hour"], ",.0f"),
            spread(model["tokens_a_second"], ",.0f"),
            *(_part(model["parts"][part]) for part in PARTS),
        )
        for model in found["models"]
    ]
    chip, versions = found["hardware"], found["versions"]
    tokens = sorted({model["tokens"] for model in found["models"]})
    bounds = "; ".join(f"{model['name']}: {model['bound']['line']}" for model in found["models"])
    dtypes = " and ".join(sorted({model["dtype"] for model in found["models"]}))
    line = (
        f"{found['texts']} texts ({' or '.join(f'{each:,}' for each in tokens)} tokens) scored by "
        f"models of random weights in {dtypes}, from files that no cache holds into a store; "
        "each part's share of the time, and in brackets its rate over that of what it is held "
        "against: `encode_batch`, the disk (while something is read; the share of the time is what "
        "is waited for), the faster of `torch.mm` and oneDNN's packed product, a plain write with "
        f"fsync. {bounds}. FLOP: {found['flop_formula']}. {chip['threads']} threads of "
        f"{chip['gpu'] or chip['processor']} ({found['kernel']}), torch {versions['torch']}, "
        f"transformers {versions['transformers']}; medians of {found['repetitions']} interleaved "
        f"repetitions, least to most in brackets. Command: `{found['command']}`."
    )
    return [*table(("model", "models an hour", "tokens/s", *PARTS), rows), "", line]


def _part(part: dict[str, Any]) -> str:
    share = part["share_of_ceiling"]
    beside = "" if share is None else f" ({share['median']:.2f})"
    return f"{100 * part['share_of_time']['median']:.1f} %{beside}"

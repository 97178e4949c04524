"""What a benchmark of throughput has found, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llfast.output import human_bytes, human_seconds, print_line, print_table


def show(found: Mapping[str, Any]) -> None:
    """Print a table a model, and what bounds it."""
    chip = found["hardware"]
    print_line(
        f"{chip['gpu'] or chip['processor']} ({found['kernel']}), {chip['threads']} threads, torch "
        f"{found['versions']['torch']}: {found['texts']:,} texts, medians of "
        f"{found['repetitions']}, least to most in brackets"
    )
    for model in found["models"]:
        _show_model(model)


def _show_model(model: Mapping[str, Any]) -> None:
    print_table(
        ["part", "seconds", "of the time", "rate", "ceiling", "by", "of the ceiling"],
        [(name, *_cells(part)) for name, part in model["parts"].items()],
        title=(
            f"{model['name']}, {model['parameters'] / 1e6:,.0f}M parameters in {model['dtype']}, "
            f"{human_bytes(model['weight_bytes'])} on disk, weights {model['weights']}"
        ),
    )
    print_line(
        f"{_range(model['models_an_hour'])} models an hour, {_range(model['tokens_a_second'])} "
        f"tokens/s: {model['tokens']:,} tokens in {human_seconds(model['seconds']['median'])}"
    )
    print_line(model["bound"]["line"])
    cached = model["cached_share"]
    if cached is not None and cached["median"] > 0.5:
        print_line("the weights came from memory: this folder's files cannot be kept out of it")


def _cells(part: Mapping[str, Any]) -> tuple[str, ...]:
    unit, best = part["unit"], part["ceiling"]
    share = part["share_of_ceiling"]
    return (
        f"{part['seconds']['median']:.3g}",
        f"{100 * part['share_of_time']['median']:.1f} %",
        "" if part["rate"] is None else _rate(part["rate"]["median"], unit),
        "" if best is None else _rate(part["ceilings"][best]["median"], unit),
        best or "",
        ""
        if share is None
        else f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})",
    )


def _rate(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{human_bytes(value)}/s"
    return f"{value / 1e9:,.0f} GFLOP/s" if unit == "FLOP" else f"{value:,.0f} {unit}/s"


def _range(value: Mapping[str, float]) -> str:
    return "{median:,.0f} ({min:,.0f} to {max:,.0f})".format(**value)

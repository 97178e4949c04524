"""The README's tables on maps."""

from __future__ import annotations

from typing import Any

from readme_tables import table


def real_map(found: dict[str, Any]) -> list[str]:
    """How families of real models hang together on a map."""
    near, kin = found["nearest_on_the_map_is_kin"], found["with_kin"]
    line = (
        f"{found['models']} models of {found['families']} families on {found['texts']} texts. The "
        f"nearest on the map is of the same family for {near['tsne']} of the {kin} whose family "
        f"has another (by PCA: {near['pca']}). That fewer neighbours should count where models are "
        "few was found on these. Command: `python benchmarks/real_map.py bits_per_byte.csv --page "
        "map.html`."
    )
    return [line]


def page(found: dict[str, Any]) -> list[str]:
    """How fast the page is."""
    titles = "models,file,opens in,a picture while it moves,another colour,a search".split(",")
    rows = [
        (
            f"{case['models']:,}",
            f"{case['file_mib']:.1f} MiB",
            *(_ms(case["ms"][name]) for name in ("open", "frame", "colour", "search")),
        )
        for case in found["cases"]
    ]
    last = found["cases"][-1]
    made = last["made_in_seconds"]
    told = (
        f"Median milliseconds, least to most in brackets; {found['browser']}, "
        f"{found['hardware']['threads']} threads of {found['hardware']['processor']}, plotly "
        f"{found['versions']['plotly']}. The map of {last['models']:,} models on "
        f"{last['texts']} texts took {made['map']:.0f} s to make. Command: `{found['command']}`."
    )
    return [*table(titles, rows), "", told]


def _ms(spread: dict[str, float]) -> str:
    median, least, most = (_figure(spread[name]) for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def _figure(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.2g}"

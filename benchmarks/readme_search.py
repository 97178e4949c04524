"""The README's tables on search."""

from __future__ import annotations

from typing import Any

from readme_tables import spread, table

_CERTIFIED, _EXACT, _FLAT = "llfast certified", "llfast exact", "faiss Flat"
_TITLES = {
    _CERTIFIED: "**llfast**",
    _EXACT: "llfast, all in full",
    "llfast approximate": "llfast, approximate",
}
_GRAPHS = ("faiss HNSW", "usearch", "hnswlib")
_KIND = "outside"
_OWN = (  # titles of llfast's own figures
    "models",
    "faiss Flat over llfast",
    "compared in full",
    "of the collection",
    "with intervals",
    "in batches",
    "faiss Flat in batches",
    "just opened",
    "cold",
    "memory over vectors",
    "built in",
)


def search(found: dict[str, Any]) -> list[str]:
    """The nearest models: milliseconds of every provider, then more of llfast's own."""
    cases = found["cases"]
    asked = [case["questions"][_KIND] for case in cases]
    names = list(dict.fromkeys(name for each in asked for name in each["providers"]))
    times, own_figures = [], []
    for case, each in zip(cases, asked, strict=True):
        cells = [_title(case)]
        for name in names:
            one = each["providers"].get(name)
            cells.append("" if one is None else _cell(one["ms"], one["recall"]))
        times.append(cells)
    for case, each in zip(cases, asked, strict=True):
        batch, own = each["batch"], each["certified"]
        flat = each["providers"].get(_FLAT)
        cells = [
            _title(case),
            "" if flat is None else spread(flat["over_certified"], ".1f"),
            spread(own["compared"], ",.0f"),
            _cell(case["questions"]["held in"]["providers"][_CERTIFIED]["ms"]),
            _cell(own["with_intervals"]["ms"]),
            *(
                _cell(batch[name]["ms_a_question"], batch[name]["recall"]) if name in batch else ""
                for name in (_CERTIFIED, _FLAT)
            ),
            _cell(each["first_touch_ms"]),
            _cell(each["cold_ms"]),
            f"{100 * case['memory']['share_of_vectors']:.1f} %",
            f"{case['build']['llfast']['seconds']:,.0f} s",
        ]
        own_figures.append(cells)
    return [
        *table(("models", *(_TITLES.get(name, name) for name in names)), times),
        "",
        *table(_OWN, own_figures),
        "",
        " ".join(_notes(found, asked)),
    ]


def _notes(found: dict[str, Any], asked: list[dict[str, Any]]) -> list[str]:
    chip, versions, cases = found["hardware"], found["versions"], found["cases"]
    reads = [each["rates"]["read_gb_a_second"]["median"] for each in asked]
    sizes = {case["texts"] for case in cases}
    told = (
        f"The {found['k']} nearest, for a fine-tune that the collection does not have; median "
        "milliseconds, and the share of right answers where it is not all of them. Synthetic "
        f"collections on {', '.join(f'{size:,}' for size in sorted(sizes))} texts: families are of "
        "Zipf's sizes, or (half) one has half of the models. llfast's answers are certified, but "
        "for its approximate ones, and were compared with those of a scan of all models. For one "
        "question faiss Flat takes one thread; llfast's scan (all in full) is what all of them can "
        "do."
    )
    notes = [told]
    for case, each in zip(cases, asked, strict=True):
        if case is not max(cases, key=lambda case: case["models"]):
            continue
        rates = each["rates"]
        notes.append(
            f"With {_title(case)}, the first bounds are read at "
            f"{100 * rates['first_pass_share_of_read']['median']:.0f} % of the rate at which the "
            "same bytes are read alone."
        )
    if adding := found.get("adding"):
        stored = adding["stored_ms"]
        notes.append(
            f"Adding a model to a store of {adding['models']:,}, durably, takes "
            f"{stored['median']:.0f} ms ({stored['min']:.0f} to {stored['max']:.0f}), "
            f"{adding['in_memory_ms']['median']:.1f} ms of it in the index; the next search finds "
            "it."
        )
    if missed := [aim for aim in found["aims"] if not aim["met"]]:
        aims = (f"{aim['aim']} {aim['figure']:.3g} (aim {aim['limit']:g})" for aim in missed)
        notes.append(f"Missed: {'; '.join(aims)}.")
    settings = {
        name: built["settings"]
        for case in cases
        for name, built in case["build"].items()
        if name in _GRAPHS
    }
    told = "; ".join(f"{name}: {text}" for name, text in settings.items())
    notes.append(
        f"Batches are of {found['batch']} questions; cold means that no cache holds the vectors, "
        "just opened that the process has not checked them. What is not there did not fit into the "
        f"time or the memory it was given, which the JSON tells. Graphs' settings: {told}."
    )
    peers = ", ".join(
        f"{name} {versions[name]}"
        for name in ("faiss-cpu", "usearch", "hnswlib", "scikit-learn")
        if name in versions
    )
    notes.append(
        f"{chip['threads']} threads of {chip['processor']}, memory read at {min(reads):.0f} to "
        f"{max(reads):.0f} GB/s; {peers}; least to most in brackets. Command: "
        f"`{found['command']}`."
    )
    return notes


def _title(case: dict[str, Any]) -> str:
    kind = "" if case["families"] == "zipf" else f", {case['families']}"
    return f"{case['models']:,}{kind}"


def _cell(ms: dict[str, float], recall: float = 1.0) -> str:
    figure = ms["median"]
    shown = (
        f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 1 else f"{figure:.2f}"
    )
    return shown if recall == 1.0 else f"{shown} ({100 * recall:.1f} %)"

"""What the search benchmark is to show, and a plain table of what it found."""

from __future__ import annotations

from typing import Any

from search_cases import APPROXIMATE, CERTIFIED

LEAST_SPEEDUP, LEAST_ANYWHERE = 50.0, round(1 / 1.2, 3)  # of faiss Flat's time over certified's
MOST_MS = 10.0
LEAST_RECALL = 0.99
MOST_MEMORY_SHARE = 0.05
MOST_COMPARED = {"zipf": 100, "half": 1000}
MOST_ADDING_MS = 20.0
AIMED_AT = 100_000  # models: aims of time and memory are for so many
FLAT = "faiss Flat"


def aims_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each aim with its figure, and whether it is met."""
    aims: list[dict[str, Any]] = []

    def add(what: str, figure: float, limit: float, *, more: bool = False) -> None:
        met = figure >= limit if more else figure <= limit
        aims.append({"aim": what, "figure": figure, "limit": limit, "met": met})

    for case in found["cases"]:
        where = f"{case['families']}, {case['models']:,}"
        for kind, each in case["questions"].items():
            here = f"{where}, {kind}"
            own = each["providers"][CERTIFIED]
            add(f"{here}: recall", own["recall"], 1.0, more=True)
            if found_some := each["providers"].get(APPROXIMATE):
                add(f"{here}: approximate recall", found_some["recall"], LEAST_RECALL, more=True)
            aimed_at = case["models"] == AIMED_AT
            if FLAT in each["providers"]:
                over = each["providers"][FLAT]["over_certified"]["median"]
                least = LEAST_SPEEDUP if aimed_at else LEAST_ANYWHERE
                add(f"{here}: times as fast as faiss Flat", over, least, more=True)
            if not aimed_at:
                continue
            add(f"{here}: ms", own["ms"]["median"], MOST_MS)
            compared = each["certified"]["compared"]["median"]
            add(f"{here}: compared in full", compared, MOST_COMPARED[case["families"]])
        if case["models"] == AIMED_AT:
            share = case["memory"]["share_of_vectors"]
            add(f"{where}: memory over vectors", share, MOST_MEMORY_SHARE)
    if adding := found.get("adding"):
        add(f"adding to {adding['models']:,}, ms", adding["stored_ms"]["median"], MOST_ADDING_MS)
    return aims


def show(found: dict[str, Any]) -> None:
    """Print cases and aims."""
    for case in found["cases"]:
        memory = case["memory"]
        print(
            f"\n{case['families']}, {case['models']:,} x {case['texts']:,}: built in "
            f"{case['build']['llfast']['seconds']:.0f} s, "
            f"{100 * memory['share_of_vectors']:.1f} % of the vectors in memory"
        )
        for kind, each in case["questions"].items():
            own, rates = each["certified"], each["rates"]
            print(
                f"  {kind}: {own['compared']['median']:.0f} compared in full, closed by "
                f"{own['closed_by']}; with intervals {own['with_intervals']['ms']['median']:.2f} "
                f"ms, first touch {each['first_touch_ms']['median']:.2f}, cold "
                f"{each['cold_ms']['median']:.2f}; memory {rates['read_gb_a_second']['median']:.0f}"
                " GB/s"
            )
            heads = ("", "ms", "least", "most", "over certified", "recall", "in batches", "recall")
            print("    " + _line(heads))
            for name, one in each["providers"].items():
                cells = [name, *(f"{one['ms'][key]:.2f}" for key in ("median", "min", "max"))]
                cells += [f"{one['over_certified']['median']:.2f}", f"{one['recall']:.4f}"]
                if batch := each["batch"].get(name):
                    cells += [f"{batch['ms_a_question']['median']:.2f}", f"{batch['recall']:.4f}"]
                print("    " + _line(cells))
        for name, reason in case["left_out"].items():
            print(f"  left out: {name}: {reason}")
    if adding := found.get("adding"):
        stored, memory_only = adding["stored_ms"], adding["in_memory_ms"]
        print(
            f"\nadding to {adding['models']:,}: {stored['median']:.1f} ms ({stored['min']:.1f} to "
            f"{stored['max']:.1f}), of it in memory {memory_only['median']:.2f}"
        )
    print()
    for aim in found["aims"]:
        state = "met   " if aim["met"] else "MISSED"
        print(f"{state} {aim['aim']}: {aim['figure']:.4g}, limit {aim['limit']:g}")


def _line(cells: Any) -> str:
    first, *others = cells
    return f"{first:<18}" + "".join(f"{cell:>15}" for cell in others)

"""How fast the map's page is in a browser, with 90 models and with 10,000.

    python benchmarks/bench_map.py

Needs Playwright and Chromium. Times are of a headless one that draws WebGL on the CPU: with a
GPU, drawing takes less. Claim: the page opens in seconds, with 10,000 models, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import MEAN_BYTES, Collection, Recipe

from llfast.bench import report
from llfast.mapping import make_map
from llfast.page import map_page
from llfast.results import LogLikelihoodMatrix

RESULTS = Path(__file__).parent / "results"
SIZES = (90, 10_000)
TEXTS = 500
REPEATS = 7
# From one picture to the next while the map flies to a model.
_FRAMES = """() => new Promise((done) => {
    const map = document.getElementById("map");
    const times = [];
    let last = performance.now();
    const look = () => {
        times.push(performance.now() - last);
        last = performance.now();
    };
    map.on("plotly_afterplot", look);
    const query = document.getElementById("query");
    query.value = "1";
    query.dispatchEvent(new Event("input"));
    query.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
    const wait = () => {
        if (performance.now() - last < 1000) { setTimeout(wait, 100); return; }
        map.removeListener("plotly_afterplot", look);
        done(times.slice(1));
    };
    setTimeout(wait, 500);
})"""
_COLOUR = """async (column) => {
    const begin = performance.now();
    const select = document.getElementById("colour");
    select.value = column;
    const map = document.getElementById("map");
    const drawn = new Promise((done) => map.once("plotly_afterplot", done));
    select.dispatchEvent(new Event("change"));
    await drawn;
    return performance.now() - begin;
}"""
_SEARCH = """(text) => {
    const begin = performance.now();
    const query = document.getElementById("query");
    query.value = text;
    query.dispatchEvent(new Event("input"));
    return performance.now() - begin;
}"""


def page_of(count: int) -> tuple[str, dict[str, float]]:
    """A page of a synthetic collection, and what making it took."""
    made = Collection(Recipe(models=count, texts=TEXTS))
    rows = np.arange(count)
    names, described = made.describe(rows)
    metadata = [{**each, "parents": each["parent"]} for each in described]
    values = np.concatenate(
        [made.values(part) for part in np.array_split(rows, max(1, count // 500))]
    )
    matrix = LogLikelihoodMatrix(
        names, values, np.full(TEXTS, MEAN_BYTES), metadata, textset_digest="synthetic"
    )
    start = time.perf_counter()
    found = make_map(matrix)
    placed = time.perf_counter()
    page = map_page(found, title=f"{count:,} synthetic models")
    seconds = {"map": placed - start, "page": time.perf_counter() - placed}
    return page, {name: round(each, 2) for name, each in seconds.items()}


def measure(browser: Any, count: int, folder: Path) -> dict[str, Any]:
    """Times of a page with so many models."""
    text, seconds = page_of(count)
    path = folder / f"{count}.html"
    path.write_text(text, encoding="utf-8")
    times: dict[str, list[float]] = {name: [] for name in ("open", "frame", "colour", "search")}
    for repeat in range(REPEATS):
        page = browser.new_page(viewport={"width": 1200, "height": 800}, offline=True)
        start = time.perf_counter()
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("body[data-ready]")
        times["open"].append(1e3 * (time.perf_counter() - start))
        times["frame"] += page.evaluate(_FRAMES)
        column = ("dtype", "relation")[repeat % 2]
        times["colour"].append(page.evaluate(_COLOUR, column))
        times["search"].append(page.evaluate(_SEARCH, "1"))
        page.close()
    return {
        "models": count,
        "texts": TEXTS,
        "file_mib": round(len(text.encode()) / 2**20, 2),
        "made_in_seconds": seconds,
        "ms": {name: report.spread(each) for name, each in times.items()},
    }


def main() -> None:
    """Measure, and write the JSON."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    parser.add_argument("--out", type=Path, default=RESULTS / "map.json")
    arguments = parser.parse_args()
    launch = {
        "executable_path": arguments.chromium,
        "args": ["--no-sandbox", "--enable-unsafe-swiftshader", "--use-angle=swiftshader"],
    }
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(**launch)
        cases = [measure(browser, count, Path(folder)) for count in SIZES]
        version = browser.version
        browser.close()
    found = {
        "benchmark": "map",
        "command": "python benchmarks/bench_map.py",
        "browser": f"Chromium {version}, headless, WebGL on the CPU",
        "cases": cases,
        "hardware": report.hardware(),
        "versions": report.versions("llfast", "plotly", "openTSNE", "playwright"),
        "commit": report.commit(),
    }
    report.write(found, arguments.out)
    for case in cases:
        print(case)


if __name__ == "__main__":
    main()

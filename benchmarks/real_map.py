"""A map of 90 real models by their log-likelihoods of 263 real texts.

    python benchmarks/real_map.py bits_per_byte.csv --page map.html

The file is examples/get_error_and_bpb/bits_per_byte.csv of the public repository
TristanThrush/perplexity-correlations (MIT licence). The picture and the JSON are committed; the
page is written where it is asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from real_models import MEAN_BYTES, RESULTS

from llfast.bench import report
from llfast.importing import import_matrix
from llfast.map_files import write_map
from llfast.mapping import make_map
from llfast.page import ModelMap

TITLE = "90 real models by what they say of 263 texts"


def near_kin(found: ModelMap) -> tuple[int, int]:
    """How many models have one of their family nearest on the map, of how many that have any."""
    families = [row["family"] for row in found.metadata]
    squared = np.square(found.places[:, None] - found.places).sum(axis=2)
    np.fill_diagonal(squared, np.inf)
    kin = [row for row, family in enumerate(families) if families.count(family) > 1]
    return sum(families[squared[row].argmin()] == families[row] for row in kin), len(kin)


def measure(values: Path) -> tuple[dict[str, Any], ModelMap]:
    """How families hang together by each method, and the map by t-SNE."""
    matrix = import_matrix(values, unit="bits_per_byte", text_bytes=MEAN_BYTES)
    maps = {method: make_map(matrix, method=method) for method in ("tsne", "pca")}
    near = {method: near_kin(found) for method, found in maps.items()}
    facts = {
        "benchmark": "real_map",
        "models": len(matrix.models),
        "families": len({row["family"] for row in matrix.metadata}),
        "texts": len(matrix.text_bytes),
        "notes": maps["tsne"].notes,
        "with_kin": near["tsne"][1],
        "nearest_on_the_map_is_kin": {method: count for method, (count, _) in near.items()},
        "versions": report.versions("llfast", "openTSNE", "plotly", "numpy"),
        "commit": report.commit(),
    }
    return facts, maps["tsne"]


def main() -> None:
    """Write the JSON, the picture and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("values", type=Path, help="bits_per_byte.csv")
    parser.add_argument("--page", type=Path, help="where the page goes")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_map.json")
    parser.add_argument("--picture", type=Path, default=RESULTS / "real_map.png")
    arguments = parser.parse_args()
    facts, found = measure(arguments.values)
    report.write(facts, arguments.out)
    for path in (arguments.picture, arguments.page):
        if path is not None:
            write_map(found, path, title=TITLE)
    print(f"wrote {arguments.out} and {arguments.picture}")


if __name__ == "__main__":
    main()

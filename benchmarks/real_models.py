"""The nearest relatives of 90 real models on 263 real texts.

    python benchmarks/real_models.py bits_per_byte.csv

The file is examples/get_error_and_bpb/bits_per_byte.csv of the public repository
TristanThrush/perplexity-correlations (MIT licence): a row a text, a column a model. It gives no
byte counts; one constant for every text orders models as they are, but the KL divergences are not
absolute. Every answer is compared with a sort of all distances in fp64.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llfast import KLIndex, ModelSpace, Store
from llfast.bench import report
from llfast.importing import import_matrix

RESULTS = Path(__file__).parent / "results"
MEAN_BYTES = "972.3188"  # of the papers' texts
SHOWN = ("scb10x/typhoon-7b", "TencentARC/Mistral_Pro_8B_v0.1", "EleutherAI/pythia-1.4b-deduped")


def measure(path: Path) -> dict[str, Any]:
    """What the index of a store says of them, as what the JSON holds."""
    matrix = import_matrix(path, unit="bits_per_byte", text_bytes=MEAN_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        store.add_matrix(matrix)
        index = KLIndex.build(store, "certified")
        check(index, ModelSpace.fit(store.matrix()))
        families = {
            name: str(row["family"])
            for name, row in zip(matrix.models, matrix.metadata, strict=True)
        }
        nearest = {name: index.search(name, 5) for name in matrix.models}
    counts = {family: list(families.values()).count(family) for family in families.values()}
    kin = [name for name in matrix.models if counts[families[name]] > 1]
    return {
        "benchmark": "real_models",
        "models": len(matrix.models),
        "texts": len(matrix.text_bytes),
        "with_kin": len(kin),
        "nearest_is_kin": sum(families[nearest[name][0].model] == families[name] for name in kin),
        "nearest": {name: [hit.summary() for hit in nearest[name]] for name in SHOWN},
        "versions": report.versions("llfast", "faiss-cpu", "numpy"),
        "commit": report.commit(),
    }


def check(index: KLIndex, space: ModelSpace) -> None:
    """Raise AssertionError unless an index finds what a sort of all distances does."""
    kl = space.kl_matrix()
    for row, name in enumerate(space.models):
        others = sorted(zip(kl[row].tolist(), space.models, strict=True))
        others = [pair for pair in others if pair[1] != name]
        hits = index.search(name, len(space))
        assert [hit.model for hit in hits] == [other for _, other in others]
        np.testing.assert_allclose([hit.kl for hit in hits], [each for each, _ in others], 1e-5)


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="bits_per_byte.csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_models.json")
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(measure(arguments.file), indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()

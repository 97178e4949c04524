"""Benchmark errors of 90 real models, predicted from their log-likelihoods of 263 real texts.

    python benchmarks/real_predictions.py bits_per_byte.csv benchmark_errors.csv

The files are those of examples/get_error_and_bpb of the public repository
TristanThrush/perplexity-correlations (MIT licence). They give no byte counts; predictions are the
same for any constant.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from real_models import MEAN_BYTES, RESULTS

from llfast import predict_scores, read_scores
from llfast.bench import report
from llfast.importing import import_matrix


def measure(values: Path, errors: Path) -> dict[str, Any]:
    """Correlations of every benchmark, as what the JSON holds."""
    matrix = import_matrix(values, unit="bits_per_byte", text_bytes=MEAN_BYTES)
    scores = read_scores(errors)
    perplexities = [name for name in scores if name.startswith("lambada")]
    found = predict_scores(matrix, scores, log=perplexities)
    names = ("pearson", "spearman", "baseline_pearson", "baseline_spearman")
    return {
        "benchmark": "real_predictions",
        "models": len(matrix.models),
        "texts": len(matrix.text_bytes),
        "log": perplexities,
        "families": len({row["family"] for row in matrix.metadata}),
        "benchmarks": {
            each.benchmark: {
                "models": len(each.models),
                "penalties": each.penalties,
                **{
                    name: {
                        "value": round(getattr(each, name).value, 4),
                        "interval": [round(end, 4) for end in getattr(each, name).interval],
                    }
                    for name in names
                },
            }
            for each in found
        },
        "versions": report.versions("llfast", "scikit-learn", "numpy"),
        "commit": report.commit(),
    }


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("values", type=Path, help="bits_per_byte.csv")
    parser.add_argument("errors", type=Path, help="benchmark_errors.csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_predictions.json")
    arguments = parser.parse_args()
    report.write(measure(arguments.values, arguments.errors), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()

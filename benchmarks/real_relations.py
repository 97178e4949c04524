"""KL by relation, and the family tree, of 90 real models on 263 real texts.

    python benchmarks/real_relations.py bits_per_byte.csv

The file is examples/get_error_and_bpb/bits_per_byte.csv of the public repository
TristanThrush/perplexity-correlations (MIT licence). It gives no byte counts, so that KL divergences
are not absolute. It gives families; runs and steps are in the models' names, and PARENTS is common
knowledge of what models were trained on from.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from real_models import MEAN_BYTES, RESULTS
from scipy.cluster.hierarchy import fcluster
from sklearn.metrics import adjusted_rand_score

from llfast import LogLikelihoodMatrix, ModelSpace, compare_relations
from llfast.bench import report
from llfast.comparison import Quartile
from llfast.dendrogram import draw_dendrogram, join_models
from llfast.importing import import_matrix

QUARTILES = ("first_quartile", "median", "third_quartile")
PARENTS = {
    "scb10x/typhoon-7b": "mistralai/Mistral-7B-v0.1",
    "TencentARC/Mistral_Pro_8B_v0.1": "mistralai/Mistral-7B-v0.1",
    "gordicaleksa/YugoGPT": "mistralai/Mistral-7B-v0.1",
    "TencentARC/LLaMA-Pro-8B": "meta-llama/Llama-2-7b-hf",
    "codellama/CodeLlama-7b-hf": "meta-llama/Llama-2-7b-hf",
    "Wanfq/FuseLLM-7B": "meta-llama/Llama-2-7b-hf",
    **{f"sail/Sailor-{size}": f"Qwen/Qwen1.5-{size}" for size in ("0.5B", "1.8B", "4B", "7B")},
}
# A checkpoint's name says its step; the name of Pythia's last checkpoint does not.
STEP = re.compile(r"(EleutherAI/pythia-6.9b-deduped)_step(\d+)$|(TinyLlama)/.*-step-(\d+)[kK]-")
LAST = {"EleutherAI/pythia-6.9b-deduped": 143_000}


def related(matrix: LogLikelihoodMatrix) -> LogLikelihoodMatrix:
    """The same models, with what their names say, and what is known of them."""
    metadata = []
    for model, own in zip(matrix.models, matrix.metadata, strict=True):
        found = STEP.match(model)
        more: dict[str, Any] = {"parents": PARENTS.get(model)}
        if model in LAST:
            more |= {"run": model, "step": LAST[model]}
        elif found and found[1]:
            more |= {"run": found[1], "step": int(found[2])}
        elif found:
            more |= {"run": found[3], "step": 1000 * int(found[4])}
        metadata.append({**own, **more})
    return dataclasses.replace(matrix, metadata=metadata)


def rounded(quartile: Quartile) -> dict[str, Any]:
    """A quartile as JSON has it."""
    ends = [None if math.isnan(end) else round(end, 5) for end in quartile.interval]
    return {"value": round(quartile.value, 5), "interval": ends}


def measure(path: Path, picture: Path) -> dict[str, Any]:
    """KL by relation, and how the tree goes with families, as what the JSON holds."""
    matrix = related(import_matrix(path, unit="bits_per_byte", text_bytes=MEAN_BYTES))
    space = ModelSpace.fit(matrix)
    families = {
        name: str(row["family"]) for name, row in zip(matrix.models, matrix.metadata, strict=True)
    }
    kl = space.kl_matrix()
    draw_dendrogram(space.models, kl, picture, families=families)
    with Image.open(picture) as image:  # of few colours, a third of the size
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(picture, optimize=True)
    found = list(families.values())
    cut = fcluster(join_models(kl), len(set(found)), "maxclust")
    np.fill_diagonal(kl, np.inf)
    nearest = [found[row] for row in kl.argmin(axis=1)]
    kin = [row for row, family in enumerate(found) if found.count(family) > 1]
    rng = np.random.default_rng(0)
    chance = [adjusted_rand_score(found, rng.permutation(cut)) for _ in range(1000)]
    return {
        "benchmark": "real_relations",
        "models": len(matrix),
        "texts": len(matrix.text_bytes),
        "families": len(set(found)),
        "relations": [
            each.summary() | {name: rounded(getattr(each, name)) for name in QUARTILES}
            for each in compare_relations(matrix)
        ],
        "tree": {
            "with_kin": len(kin),
            "nearest_is_kin": sum(nearest[row] == found[row] for row in kin),
            "clusters": len(set(cut.tolist())),
            "adjusted_rand": adjusted_rand_score(found, cut),
            "adjusted_rand_of_shuffled": float(np.quantile(chance, 0.95)),
        },
        "versions": report.versions("llfast", "scipy", "scikit-learn", "numpy"),
        "commit": report.commit(),
    }


def main() -> None:
    """Write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="bits_per_byte.csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_relations.json")
    arguments = parser.parse_args()
    picture = arguments.out.with_name("real_dendrogram.png")
    report.write(measure(arguments.file, picture), arguments.out)
    print(f"wrote {arguments.out} and {picture}")


if __name__ == "__main__":
    main()

"""The nearest models of a collection, beside other ways to find nearest rows.

    python benchmarks/bench_search.py --folder DIR

Claim: the ten nearest of 100,000 models are found exactly, and certified, in a fraction of the time
that reading all vectors takes. Synthetic collections (synthetic.py) of 1,000, 20,000 and 100,000
models on 10,000 texts are written as indexes into DIR unless they are there (9 GB); every provider
is given the same vectors and asked the same, in turn. Answers are checked first: llfast's certified
ones with its exact ones, those with brute force in fp64, and the others' by how many are right.
What does not fit into memory together takes turns, each beside llfast.

`--only 1000 20000` measures these sizes again into the same JSON; `--million` adds 1,000,000 models
(40 GB, an hour).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cpu_limits import Limits
from search_adding import measure_adding
from search_aims import aims_of, show
from search_cases import BATCH, K, Plan, measure, quiet, say
from search_peers import Budget
from synthetic import Recipe
from synthetic_lineage import FAMILIES

from llfast.bench import report

RESULTS = Path(__file__).parent / "results"
SIZES = (1000, 20_000, 100_000)
MILLION = 1_000_000
TEXTS, QUESTIONS, MILLION_QUESTIONS = 10_000, 100, 20
ADDING, ADDED = 2000, 20
QUICK_SIZES, QUICK_TEXTS, QUICK_QUESTIONS, QUICK_ADDING = (200, 500), 300, 8, 100
PACKAGES = ("llfast", "torch", "numpy", "faiss-cpu", "usearch", "hnswlib", "scikit-learn")


def described(command: str) -> dict[str, Any]:
    """Where and how."""
    return {
        "command": command,
        "commit": report.commit(),
        "hardware": report.hardware(),
        "versions": report.versions(*PACKAGES),
        "k": K,
        "batch": BATCH,
    }


def replaced(cases: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases with a new one in its place, small ones first."""

    def key(case: dict[str, Any]) -> tuple[int, int]:
        return FAMILIES.index(case["families"]), case["models"]

    return sorted([*(case for case in cases if key(case) != key(new)), new], key=key)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all that is asked for; what there is, is written after every collection."""
    found: dict[str, Any] = {"cases": []}
    is_whole = options.only is None and not options.million
    if not is_whole and options.out.exists():
        found = json.loads(options.out.read_text())
    command = "python benchmarks/bench_search.py --folder DIR" + " --quick" * options.quick
    if options.only is not None:
        command += " --only " + " ".join(map(str, options.only))
    # The command and commit are those of the whole run; cases measured again tell their own commit.
    here = described(command + " --million" * options.million)
    found = {**here, **found}
    texts = QUICK_TEXTS if options.quick else TEXTS
    limits = Limits()
    budget = Budget(options.memory_gb * 1e9, options.peer_seconds)
    asked = QUICK_QUESTIONS if options.quick else QUESTIONS
    plan = Plan(asked, budget, 16 << 20) if options.quick else Plan(asked, budget)
    sizes = options.only or (QUICK_SIZES if options.quick else SIZES)
    todo = [(size, families, plan) for size in sizes for families in options.families]
    if options.million:
        todo = [(MILLION, "zipf", Plan(MILLION_QUESTIONS, None))]

    def save() -> None:
        found["aims"] = aims_of(found)
        report.write(found, options.out)

    if not options.million and (is_whole or "adding" not in found):
        models = QUICK_ADDING if options.quick else ADDING
        found["adding"] = measure_adding(models, texts, options.folder, ADDED)
        say(f"adding: {found['adding']['stored_ms']['median']} ms")
        save()
    for size, families, each in todo:
        recipe = Recipe(models=size, texts=texts, families=families)
        case = measure(recipe, options.folder, each, limits)
        found["cases"] = replaced(found["cases"], {**case, "commit": here["commit"]})
        save()
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where indexes are")
    parser.add_argument("--quick", action="store_true", help="small ones, to show that it runs")
    parser.add_argument("--only", type=int, nargs="+", help="these sizes again")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--million", action="store_true", help="1,000,000 models: 40 GB, an hour")
    parser.add_argument("--memory-gb", type=float, default=13.0, help="of vectors the others hold")
    parser.add_argument("--peer-seconds", type=float, default=600.0, help="to build each of them")
    parser.add_argument("--out", type=Path, help="JSON; with --quick it is in the folder")
    options = parser.parse_args(arguments)
    if options.quick and options.million:
        parser.error("--million is not quick")
    if options.out is None:
        options.out = (options.folder if options.quick else RESULTS) / "search.json"
    options.folder.mkdir(parents=True, exist_ok=True)
    quiet()
    show(run(options))


if __name__ == "__main__":
    main()

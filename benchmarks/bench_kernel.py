"""The fused output head on a GPU, beside torch, other packages, and the rate of a copy.

    python benchmarks/bench_kernel.py [--dtype float16] [--out FILE]

Claim: log-probabilities take about the time of torch's matrix product alone, those of few tokens
little more than reading the output head once; no other way is faster, and memory does not grow with
the vocabulary. What is measured, and how, is said in `llfast/bench/kernel.py`.

The JSON is written after every case, so that a run that is killed keeps what it had. `--device cpu
--quick` shows that all of it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from llfast.bench import report
from llfast.bench.kernel import HEADS, measure, wrong_cases
from llfast.bench.table import show
from llfast.dtypes import DTYPES

RESULTS = Path(__file__).parent / "results"


def default_path(found: dict[str, Any]) -> Path | None:
    """Where the JSON goes unless told otherwise: named after the GPU, nowhere for small runs."""
    if found["quick"] or found["device"] != "cuda":
        return None
    gpu = found["hardware"]["gpu"].lower().removeprefix("nvidia").strip()
    dtype = "" if found["dtype"] == "bfloat16" else f"_{found['dtype']}"
    return RESULTS / f"kernel_{re.sub(r'[^a-z0-9]+', '_', gpu)}{dtype}.json"


def main() -> int:
    """Measure, print, and write the JSON; 1 if llfast is wrong anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--heads", nargs="+", help=", ".join(HEADS))
    parser.add_argument("--case-seconds", type=float, default=1.0, help="for its repetitions")
    parser.add_argument(
        "--most-seconds", type=float, default=300.0, help="later cases are left out"
    )
    parser.add_argument("--quick", action="store_true", help="small heads; written only to --out")
    parser.add_argument("--commit", help="which was measured, where there is no repository")
    parser.add_argument("--out", type=Path, help="results/kernel_<gpu>.json")
    options = parser.parse_args()
    written = None

    def save(found: dict[str, Any]) -> None:
        nonlocal written
        found["command"] = command
        found["commit"] = options.commit or found["commit"]
        written = options.out or default_path(found)
        if written is not None:
            report.write(found, written)
        latest.update(found)

    command = command_of(options, parser)
    latest: dict[str, Any] = {}
    try:
        measure(
            device=options.device,
            dtype=options.dtype,
            tokens=options.tokens,
            heads=options.heads,
            quick=options.quick,
            case_seconds=options.case_seconds,
            most_seconds=options.most_seconds,
            save=save,
        )
    except ValueError as error:
        sys.exit(f"bench_kernel.py: {error}")
    finally:
        if latest:
            show(latest)
        if written is not None:
            print(f"wrote {written}")
    return 1 if wrong_cases(latest) else 0


def command_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """What to type for the same measurement."""
    words = ["python", "benchmarks/bench_kernel.py"]
    for name in ("device", "dtype", "tokens", "heads", "case_seconds", "quick"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            words.append(f"--{name.replace('_', '-')}")
            words += (
                [] if value is True else map(str, value if isinstance(value, list) else [value])
            )
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())

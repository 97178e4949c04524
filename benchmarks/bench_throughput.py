"""What `llfast bench throughput` finds of its default shapes, for the README.

    python benchmarks/bench_throughput.py [--shape GPT-2] [--texts 50] [--folder DIR]

Claim: on a CPU, the body and the head take most of the time of all but the smallest models, and
reading and storing next to none; each part is reported beside what the same machine can do of it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from llfast.bench import report
from llfast.bench.shapes import SHAPES
from llfast.bench.throughput import measure
from llfast.bench.throughput_table import show

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--texts", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.json")
    options = parser.parse_args()
    found = measure(
        options.shape,
        texts=options.texts,
        dtype=options.dtype,
        device=options.device,
        repetitions=options.repetitions,
        folder=options.folder,
    )
    words = iter(sys.argv[1:])
    # Where it was measured is no part of the command.
    kept = [each for each in words if not (each in ("--folder", "--out") and next(words))]
    command = shlex.join(["python", "benchmarks/bench_throughput.py", *kept])
    report.write({**found, "command": command}, options.out)
    show(found)


if __name__ == "__main__":
    main()

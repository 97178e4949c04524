"""All that needs a GPU: the tests that do, then benchmarks of the kernel, loading and scoring.

    python3 benchmarks/on_gpu.py --out DIR [--commit "$(git describe --always --dirty)"]

It takes at most eight minutes (or `--seconds`), needs no installed llfast, builds the C++ module if
there is none (which takes a compiler, setuptools and pybind11), and writes `tests.json`,
`kernel.json`, `loading.json` and `scoring.json` into the folder as it goes: a run that is killed
keeps what it had. `--device cpu --quick` shows that all of it runs. Peers are measured if
liger-kernel and cut-cross-entropy can be imported, and run-time types are checked if beartype can
be.

Eight minutes are short for all of it: the kernel's cases get what the others leave, and those that
do not fit are left out. All of it fits into two runs:

    --only build tests kernel --seconds 430
    --only loading scoring --seconds 260
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MOST_SECONDS = 470.0
BUILD_SECONDS = 120.0
TESTS_SECONDS = 150.0  # more where no other part needs them
KERNEL_SECONDS = 150.0
LOADING_SECONDS = 150.0
SCORING_SECONDS = 100.0
INTERRUPTED_SECONDS = 10.0
MOST_WORKERS = 12  # that test side by side
SPARE_SECONDS = 35.0  # to start, compile and finish the last case
TAIL = 10_000  # characters of what a part printed
NEEDED = "greenlet jaxtyping pyarrow pytest rich transformers typer xxhash".split()
COUNTED = ("passed", "failed", "skipped", "unfinished")
PARTS = ("build", "tests", "kernel", "loading", "scoring")


def run(command: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Run a command for so long at most; afterwards nothing that it started is left.

    Returns: its status (None if it was stopped), how long it took, and the end of what it printed.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)  # pytest then writes what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=INTERRUPTED_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output.seek(0)
        text = output.read()
    took = round(time.monotonic() - start, 1)
    return {"code": code, "seconds": took, "limit": seconds, "tail": text[-TAIL:]}


def run_tests(device: str, seconds: float) -> dict[str, Any]:
    """The tests that are marked `gpu`, counted; on CUDA, none may be skipped for want of it."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "tests.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "--tb=short"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += [f"--junitxml={results}"]
        command += ["-W", "default"]  # other versions of packages may warn of other things
        if importlib.util.find_spec("xdist"):
            # Compiling takes most of the time, on a processor core a worker.
            command += ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS))]
        required = {"LLFAST_REQUIRE_GPU": "1"} if device == "cuda" else {}
        found = run(command, seconds, **required)
        counts, failures = _counted(results) if results.exists() else ({}, [])
    return {"part": "tests", **counts, "failures": failures, **found}


def _counted(results: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    counts = dict.fromkeys(COUNTED, 0)
    failures = []
    for case in ET.parse(results).iter("testcase"):
        trouble = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        if case.get("name") is None:  # it was running when pytest-xdist was stopped
            counts["unfinished"] += 1
        elif trouble is None:
            counts["passed"] += 1
        elif trouble.tag == "skipped":
            counts["skipped"] += 1
        else:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            text = (trouble.text or "")[-1500:]
            failures.append({"name": name, "message": trouble.get("message", ""), "text": text})
    return counts, failures


def run_build(seconds: float) -> dict[str, Any]:
    """The C++ module, beside its package, unless it can be imported."""
    found = run([sys.executable, "-c", "import llfast._native"], seconds)
    if found["code"] != 0:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        left = seconds - found["seconds"]
        found = run(command, left, LLFAST_BUILD_JOBS=str(os.cpu_count()))
    return {"part": "build", **found}


def run_kernel(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """`bench_kernel.py`, which writes its own JSON after every case."""
    command = _benchmark("bench_kernel.py", "kernel.json", options, seconds - SPARE_SECONDS)
    if options.quick:
        command += ["--case-seconds", "0.1"]
    return {"part": "kernel", **run(command, seconds)}


def run_benchmark(part: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """`loading_on_gpu.py` or `scoring_on_gpu.py`, which write JSON after every repetition."""
    script, left = f"{part}_on_gpu.py", seconds - SPARE_SECONDS
    return {"part": part, **run(_benchmark(script, f"{part}.json", options, left), seconds)}


def _benchmark(script: str, out: str, options: argparse.Namespace, seconds: float) -> list[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--device", options.device]
    command += ["--out", str(options.out.resolve() / out)]
    command += ["--most-seconds", f"{max(seconds, 10):.0f}"]
    command += ["--commit", options.commit] if options.commit else []
    return command + (["--quick"] if options.quick else [])


def write(found: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def summary(parts: Sequence[dict[str, Any]]) -> list[str]:
    """What each part came to, the benchmark's own table last."""
    lines = []
    for part in parts:
        state = "stopped at its limit" if part["code"] is None else f"status {part['code']}"
        lines.append(f"== {part['part']}: {state}, {part['seconds']} of {part['limit']:.0f} s")
        if part["part"] == "tests":
            counted = [f"{part[name]} {name}" for name in COUNTED if name in part]
            lines.append(", ".join(counted) or part["tail"][-1500:])
            lines += [
                f"  {each['name']}: {each['message'][:160]}" for each in part["failures"][:20]
            ]
        elif part["part"] != "build" or part["code"] != 0:
            lines.append(part["tail"])
    return lines


def main() -> int:
    """Run the parts, write their JSON, and print a summary last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the JSON")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS, help="for all parts")
    parser.add_argument("--quick", action="store_true", help="small heads")
    parser.add_argument("--commit", help="which is measured, where there is no repository")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("needs a CUDA device; --device cpu --quick shows that it runs", file=sys.stderr)
        return 1
    if missing := [each for each in NEEDED if not importlib.util.find_spec(each)]:
        print(f"needs {', '.join(missing)}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    later = {"kernel": KERNEL_SECONDS, "loading": LOADING_SECONDS, "scoring": SCORING_SECONDS}

    def left(*parts: str, least: float = 2 * SPARE_SECONDS) -> float:
        """Seconds for a part before these, but enough to begin with."""
        kept = sum(later[each] for each in parts if each in options.only)
        return max(end - time.monotonic() - kept, least)

    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "build": lambda: run_build(BUILD_SECONDS),
        "tests": lambda: run_tests(
            options.device, left("kernel", "loading", "scoring", least=TESTS_SECONDS)
        ),
        "kernel": lambda: run_kernel(options, left("loading", "scoring")),
        "loading": lambda: run_benchmark("loading", options, left("scoring")),
        "scoring": lambda: run_benchmark("scoring", options, left()),
    }
    parts = []
    for name in PARTS:
        if name in options.only:
            parts.append(steps[name]())
            write(
                parts[-1], options.out / ("tests.json" if name == "tests" else f"{name}_run.json")
            )
            print(f"{name}: {parts[-1]['seconds']} s", flush=True)
    print("\n".join(summary(parts)))
    return 0 if all(part["code"] == 0 for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The C++ core without Python, built with sanitisers, where a compiler is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llfast import _native

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
FLAGS = ["-std=c++17", "-g1", "-ffp-contract=off", f"-I{CSRC}", "-pthread"]
TARGETS = {
    "portable": ("Portable", []),
    "avx2": ("Avx2", ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (
        "Avx512",
        ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    ),
}


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def sanitised(tmp_path):
    """Builds a program from sources with the given sanitisers, and returns its path."""
    if COMPILER is None or not CSRC.is_dir():
        pytest.skip("needs a C++ compiler and the sources of the extension")

    def build(sanitizers: str, sources: list[Path], *flags: str) -> Path:
        flags = (*FLAGS, *flags, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
        probe = tmp_path / "probe.cpp"
        probe.write_text("int main() {}\n")
        linked = subprocess.run(
            [COMPILER, *flags, probe, "-o", tmp_path / "probe"], capture_output=True, check=False
        )
        if linked.returncode != 0:
            pytest.skip(f"{COMPILER} has no runtime for {sanitizers}")
        objects = [tmp_path / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(run, COMPILER, *flags, "-c", source, "-o", to)
                for source, to in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        run(COMPILER, *flags, *objects, "-o", tmp_path / "program")
        return tmp_path / "program"

    return build


@pytest.mark.parametrize(
    "sanitizers",
    [
        "address,undefined",
        pytest.param("thread", marks=pytest.mark.slow),
    ],
)
def test_core_under_sanitisers(sanitised, sanitizers):
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if path.stem != "bindings"]
    run(sanitised(sanitizers, [*sources, HERE / "native_driver.cpp"], "-O1"))


@pytest.mark.parametrize("name", _native.available_instruction_sets())
def test_exp_tanh_and_half_precision(sanitised, name):
    lanes, flags = TARGETS[name]
    source = HERE / "native_functions.cpp"
    # GCC 12 calls the undefined lanes of its own intrinsics uninitialised.
    program = sanitised("undefined", [source], "-O2", "-w", f"-DLLFAST_TEST_SET={lanes}", *flags)
    assert run(program).startswith("exp within")

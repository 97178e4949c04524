"""The C++ core without Python, built with sanitisers, where a compiler is at hand."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llfast import _native

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
FLAGS = ["-std=c++17", "-g1", "-ffp-contract=off", f"-I{CSRC}", "-pthread", "-rdynamic"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
TARGETS = {
    "portable": ("Portable", []),
    "avx2": ("Avx2", AVX2),
    "avx512": ("Avx512", AVX512),
    "avx512_bf16": ("Avx512BFloat16", [*AVX512, "-mavx512bf16"]),
    "amx_bf16": ("AmxLanes", [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]),
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
        run(COMPILER, *flags, *objects, "-ldl", "-o", tmp_path / "program")
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
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if "bindings" not in path.stem]
    run(sanitised(sanitizers, [*sources, HERE / "native_driver.cpp"], "-O1"))


def test_amx_with_emulated_tiles(sanitised):
    """Its kernel needs AVX-512 then, which more processors have."""
    if "avx512" not in _native.available_instruction_sets():
        pytest.skip("the vectors beside the tiles are of AVX-512; runs on processors with that")
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if "bindings" not in path.stem]
    flags = ("-O1", "-include", str(HERE / "emulated_tiles.h"))
    run(sanitised("address,undefined", [*sources, HERE / "native_driver.cpp"], *flags), "amx")


def test_heads_after_a_fork():
    """What waits in the OpenMP runtime for work, which heads share with torch, does not survive."""
    script = """
import os, signal, torch
from llfast import token_logprobs

torch.set_num_threads(2)
torch.manual_seed(0)
hidden, lm_head, targets = torch.randn(64, 64), torch.randn(4096, 64), torch.arange(64)
before = token_logprobs(hidden, lm_head, targets)
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(token_logprobs(hidden, lm_head, targets), before) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run(sys.executable, "-c", script)


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_reader_under_sanitisers(sanitised, sanitizers, tmp_path):
    names = ["aligned_memory", "file_reader", "open_file", "parallel", "read_plan"]
    sources = [CSRC / f"{name}.cpp" for name in names]
    program = sanitised(sanitizers, [*sources, HERE / "reader_driver.cpp"], "-O1")
    run(program, tmp_path)


@pytest.mark.parametrize("name", _native.available_instruction_sets())
def test_exp_tanh_and_half_precision(sanitised, name):
    lanes, flags = TARGETS[name]
    source = HERE / "native_functions.cpp"
    # GCC 12 calls the undefined lanes of its own intrinsics uninitialised.
    program = sanitised("undefined", [source], "-O2", "-w", f"-DLLFAST_TEST_SET={lanes}", *flags)
    assert run(program).startswith("exp within")


# One instruction for each register file that x86-64-v2 lacks: 32-byte vectors, 64-byte vectors,
# tiles and masks. What is read of the disassembly is the operands.
NEWER = re.compile(r"%[yzt]mm|%k[0-7]|%[xyz]mm(1[6-9]|2\d|3[01])|\tv[a-z0-9]+ ")


def test_newer_instructions_stay_where_they_are_asked_for():
    """A module that is built for everybody may run newer instructions in dispatched code only."""
    objdump = shutil.which("objdump")
    if objdump is None or platform.machine() != "x86_64":
        pytest.skip("needs code of x86-64 and objdump, which comes with every GCC")
    text = run(objdump, "--disassemble", "--demangle", "--no-show-raw-insn", _native.__file__)
    newer, functions = set(), 0
    for block in re.split(r"\n\n", text):
        head = re.match(r"[0-9a-f]+ <(.*)>:", block)
        if head is None:
            continue
        functions += 1
        if NEWER.search(block):
            newer.add(head[1])
    assert functions > 100
    dispatched = re.compile(
        r"llfast::((GroupKernelOf<llfast::Avx\w+>|Amx\w+|PanelSoftmax)::|a[vm]x\w+_kernels\(\))"
    )
    assert any("Avx2" in name for name in newer)
    assert any("Avx512" in name for name in newer)
    assert any("AmxKernel" in name for name in newer)
    assert {name for name in newer if not dispatched.search(name)} == set()

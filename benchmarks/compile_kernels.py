"""Compile every row of the Triton kernels' tuning table ahead of time; no GPU is needed.

    python benchmarks/compile_kernels.py [--out FILE]

Writes the registers, the stack (where registers did not suffice) and the shared memory of each
kernel, as `cuobjdump` of the Triton package reads them from the machine code.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from llfast.bench import report
from llfast.kernels import gluon_head, triton_head
from llfast.kernels.cuda import FOLD_ROWS, ROWS
from llfast.kernels.tuning import SCHEDULES, Tile

RESULT = Path(__file__).parent / "results" / "kernel_resources.json"
TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Bytes that a block may have: NVIDIA's CUDA programming guide, "technical specifications".
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# By 16: what the launcher lets Triton look at, as it is in real models.
DIVISIBLE = ("hidden", "lm_head", "hidden_stride_t", "lm_head_stride_v")
INSTRUCTION = re.compile(r"^ +/\*[0-9a-f]+\*/ ", re.MULTILINE)
TYPES = {
    "targets_ptr": "*i64",
    "argmax_ptr": "*i32",
    **dict.fromkeys(("scale", "softcap", "inverse_softcap"), "fp32"),
}
OPTIONS = ("", "statistics", "statistics, bias", "statistics, bias, scale, softcap")
TENSOR_CORES = ("wgmma", "tcgen05.mma", "mma.sync")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One kernel for one architecture."""

    kernel: str
    architecture: int
    constants: dict[str, Any]
    signature: dict[str, str]
    warps: int
    stages: int
    labels: dict[str, Any]
    specialised: bool = False


def head_jobs() -> Iterator[Job]:
    """All schedules of every row, as they load with and without TMA."""
    for (architecture, dtype), row in SCHEDULES.items():
        if row.specialised is not None:
            for options in OPTIONS if dtype == torch.bfloat16 else OPTIONS[:1]:
                yield specialised_job(architecture, dtype, row.specialised, options)
        named = {"many": row.many} | ({} if row.few == row.many else {"few": row.few})
        for schedule, tile in named.items():
            for tma in sorted({row.tma, False}):
                for options in OPTIONS if tma == row.tma else OPTIONS[:1]:
                    # Half-precision dtypes differ in one letter of one instruction.
                    if dtype == torch.bfloat16 or (tma == row.tma and not options):
                        yield head_job(architecture, dtype, schedule, tile, tma, options)


def head_job(
    architecture: int,
    dtype: torch.dtype,
    schedule: str,
    tile: Tile,
    tma: bool,
    options: str,
) -> Job:
    """The launcher's call, for a wide head whose rows are contiguous."""
    name = TRITON_NAMES[dtype]
    constants = {
        **constants_of(tile, options),
        "hidden_stride_d": 1,
        "lm_head_stride_d": 1,
        "HAS_TMA": tma,
        "EVEN_D": True,
        "BLOCK_T": tile.block_t,
    }
    types = dict(TYPES)
    for matrix, rows in (("hidden", tile.block_t), ("lm_head", tile.block_v)):
        types[matrix] = f"tensordesc<{name}[{rows}, {tile.block_d}]>" if tma else f"*{name}"
    return Job(
        kernel="head_partials_kernel",
        architecture=architecture,
        constants=constants,
        signature=types,
        warps=tile.warps,
        stages=tile.stages,
        labels=labels_of(name, schedule, tile, "descriptors" if tma else "pointers", options),
    )


def specialised_job(architecture: int, dtype: torch.dtype, tile: Tile, options: str) -> Job:
    """The same, of the kernel whose warps are specialised."""
    name = TRITON_NAMES[dtype]
    types = dict(TYPES)
    for matrix, rows in (("hidden", gluon_head.ROWS), ("lm_head", tile.block_v)):
        layout = gluon_head.boxes(torch.empty(rows, tile.block_d, dtype=dtype), rows, tile.block_d)
        types[matrix] = f"tensordesc<{name}[{rows}, {tile.block_d}],{layout.layout!r}>"
    return Job(
        kernel="head_partials_kernel",
        architecture=architecture,
        constants={**constants_of(tile, options), "STAGES": tile.stages},
        signature=types,
        warps=tile.warps,
        stages=tile.stages,
        labels=labels_of(name, "many, specialised", tile, "descriptors", options),
        specialised=True,
    )


def constants_of(tile: Tile, options: str) -> dict[str, Any]:
    """Of both kernels."""
    has_bias = "bias" in options
    constants = {
        "HAS_BIAS": has_bias,
        "HAS_SCALE": "scale" in options,
        "HAS_SOFTCAP": "softcap" in options,
        "ONLY_LOGPROBS": "statistics" not in options,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
    }
    return constants if has_bias else constants | {"bias_ptr": None}


def labels_of(dtype: str, schedule: str, tile: Tile, loads: str, options: str) -> dict[str, Any]:
    """What a row of the table is found by."""
    return {
        "dtype": dtype,
        "schedule": schedule,
        "tile": [tile.block_t, tile.block_v, tile.block_d],
        "loads": loads,
        "options": options,
    }


def small_jobs() -> Iterator[Job]:
    """The kernels that fold sums and read statistics from them."""
    fold_types = {"argmax_ptr": "*i32", "total_argmax_ptr": "*i32"}
    for architecture in SHARED_LIMIT_BYTES:
        for has_total in (False, True):
            yield Job(
                kernel="fold_kernel",
                architecture=architecture,
                constants={"HAS_TOTAL": has_total, "BLOCK_T": FOLD_ROWS},
                signature=fold_types,
                warps=1,
                stages=3,
                labels={"options": "onto a total" if has_total else ""},
            )
        yield Job(
            kernel="statistics_kernel",
            architecture=architecture,
            constants={"BLOCK_T": ROWS},
            signature={"sums_argmax_ptr": "*i32", "argmax_ptr": "*i64"},
            warps=4,
            stages=3,
            labels={},
        )


def compiled(job: Job) -> dict[str, Any]:
    """Compile a kernel, and read what it takes."""
    module = gluon_head if job.specialised else triton_head
    function = getattr(module, job.kernel)
    signature = {
        name: "constexpr" if name in job.constants else job.signature.get(name, _type_of(name))
        for name in function.arg_names
    }
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if name in DIVISIBLE and not kind.startswith(("constexpr", "tensordesc"))
    }
    make_source = GluonASTSource if job.specialised else ASTSource
    source = make_source(function, signature, constexprs=job.constants, attrs=divisible)
    options = {"num_warps": job.warps, "num_stages": job.stages, "enable_fp_fusion": True}
    if job.specialised:
        options["maxnreg"] = gluon_head.REGISTERS_AT_START
    found = triton.compile(source, target=GPUTarget("cuda", job.architecture, 32), options=options)
    resources = {
        name: int(value)
        for name, value in re.findall(
            r"([A-Z]+):(\d+)", _dumped(found.asm["cubin"], "--dump-resource-usage")
        )
    }
    sass = _dumped(found.asm["cubin"], "--dump-sass")
    ptx, ttgir = found.asm["ptx"], found.asm["ttgir"]
    layout = re.search(r"nvidia_mma<\{(.*?)\}>", ttgir)
    return {
        "kernel": job.kernel,
        "architecture": job.architecture,
        **job.labels,
        "warps": job.warps,
        "stages": job.stages,
        "registers": resources["REG"],
        "stack_bytes": resources["STACK"],
        "shared_bytes": found.metadata.shared,
        "shared_limit_bytes": SHARED_LIMIT_BYTES[job.architecture],
        "tensor_cores": next((each for each in TENSOR_CORES if each in ptx), ""),
        "tf32": "tf32" in ptx,
        "instructions": len(INSTRUCTION.findall(sass)),
        # wgmma runs several products at a time, unless ptxas has to wait for each.
        "wgmma_products": sass.count("HGMMA"),
        "wgmma_groups": sass.count("WARPGROUP.ARRIVE"),
        "product_layout": "" if layout is None else layout[1],
    }


def _type_of(name: str) -> str:
    return "*fp32" if name.endswith("_ptr") else "i32"


def _dumped(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile all, and write what they take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    rows = [compiled(job) for job in (*head_jobs(), *small_jobs())]
    for row in rows:
        print(row)
    report.write({"triton": triton.__version__, "kernels": rows}, out)


if __name__ == "__main__":
    main()

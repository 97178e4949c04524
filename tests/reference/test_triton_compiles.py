"""Every row of the Triton kernels' tuning table, compiled ahead of time for each architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import triton

from llfast.kernels.tuning import SCHEDULES
from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "compile_kernels.py"
COMMITTED = ROOT / "benchmarks" / "results" / "kernel_resources.json"


def run(*arguments):
    """In a process of its own, for in this one Triton interprets."""
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled") / "resources.json"
    run(SCRIPT, "--out", path)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def heads(found):
    return [row for row in found["kernels"] if row["kernel"] == "head_partials_kernel"]


def test_all_rows_fit_into_shared_memory(found, heads):
    for row in found["kernels"]:
        assert 0 <= row["shared_bytes"] <= row["shared_limit_bytes"], row
        assert 0 < row["registers"] <= 255, row
    short = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
    expected = {(architecture, short[str(dtype)]) for architecture, dtype in SCHEDULES}
    assert {(row["architecture"], row["dtype"]) for row in heads} == expected


def test_half_precision_runs_on_tensor_cores_and_fp32_is_never_rounded_to_tf32(heads):
    instruction = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
    for row in heads:
        expected = "" if row["dtype"] == "fp32" else instruction[row["architecture"]]
        assert row["tensor_cores"] == expected, row
        assert not row["tf32"], row


def test_products_on_sm_90_run_several_at_a_time(heads):
    """ptxas says nothing where it has to serialise them, which costs most of the speed."""
    rows = [row for row in heads if row["tensor_cores"] == "wgmma"]
    assert rows
    for row in rows:
        assert row["wgmma_products"] >= 4 * row["wgmma_groups"] > 0, row


def test_many_tokens_on_sm_90_need_no_memory_for_registers(heads):
    rows = [
        row
        for row in heads
        if row["architecture"] == 90 and "many" in row["schedule"] and "bias" not in row["options"]
    ]
    assert len(rows) == 8
    for row in rows:
        # fp32's two numbers are put away once a tile, outside of the loop of products.
        assert row["stack_bytes"] <= (8 if row["dtype"] == "fp32" else 0), row


def test_log_probabilities_alone_take_fewer_instructions(heads):
    """Of some 15 a logit, arg max and entropy take 5."""
    by_kernel = {}
    for row in heads:
        if row["dtype"] == "bf16" and "bias" not in row["options"]:
            key = row["architecture"], row["schedule"], row["loads"]
            by_kernel.setdefault(key, {})[row["options"]] = row["instructions"]
    compared = [found for found in by_kernel.values() if len(found) > 1]
    assert len(compared) == 5
    for found in compared:
        # Triton 3.9: 0.73 to 0.81; Triton 3.6: 0.75 to 0.87.
        assert found[""] < 0.9 * found["statistics"], by_kernel


def test_spilled_registers_stay_few(found):
    for row in found["kernels"]:
        # With a bias, specialised warps put some 60 away once a tile, and fetch them once.
        specialised = "specialised" in row.get("schedule", "") and "bias" in row["options"]
        assert row["stack_bytes"] <= (288 if specialised else 128), row


def test_schedules_multiply_and_reduce_alike(heads):
    """Threads of one row hold the same columns; tests/gpu then compares the bits."""
    by_row = {}
    for row in heads:
        if row["architecture"] == 90 and row["dtype"] != "fp32":
            layout, key = row["product_layout"], (row["dtype"], row["options"])
            assert layout, row
            # Each holds whole rows, 16 of them; groups of specialised ones have half a tile each.
            assert f"warpsPerCTA = [{row['warps']}, 1]" in layout, row
            groups = 2 if "specialised" in row["schedule"] else 1
            assert row["tile"][0] == 16 * row["warps"] * groups, row
            by_row.setdefault(key, set()).add((layout.split("instrShape")[1], row["tile"][1]))
    assert by_row
    assert all(len(each) == 1 for each in by_row.values()), by_row


@pytest.mark.parametrize(
    "capability",
    [
        "9.0",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("8.0", "8.9", "10.0", "12.0")),
    ],
)
def test_every_call_of_the_launcher_compiles(capability):
    """One word and one token, odd widths, all options: four kernels a call, 12 calls."""
    printed = run("-m", "tests.reference.compile_launches", capability)
    assert printed.split()[-1] == "48"


def test_the_committed_table_is_that_of_this_triton(found):
    committed = json.loads(COMMITTED.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {committed['triton']}, which constraints.txt pins")
    assert committed == found

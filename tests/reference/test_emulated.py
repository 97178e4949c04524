"""The Triton kernels' compiled code, run instruction by instruction on a CPU.

What Triton's interpreter cannot show: bf16, descriptors, tensor cores, and what waits for what.
`tests/ptx` runs the PTX that goes to NVIDIA's assembler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("capability", "calls"),
    [("9.0", 17), ("8.0", 12), pytest.param("10.0", 15, marks=pytest.mark.slow)],
)
def test_compiled_kernels_compute_log_probabilities_whatever_waits_for_what(capability, calls):
    """Against fp64, as all kernels; and what a kernel waits for is missed where it is left out."""
    # In a process of its own, for in this one Triton interprets.
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.reference.emulate_launches", capability],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == calls
    for name, problem in found.items():
        assert problem is None, f"{name}\n{problem}"

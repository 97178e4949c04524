"""What `llfast.kernels` refuses, which kernels run where, and the operator of torch's library."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llfast
from llfast import LlfastWarning
from llfast.kernels import (
    cpu,
    cuda,
    dispatch,
    instruction_set,
    reference,
    token_logprobs,
    token_statistics,
)
from llfast.kernels.tuning import schedules_of

REFUSED = {
    "float64": (TypeError, "hidden must be float32, bfloat16 or float16, got torch.float64"),
    "mixed": (TypeError, "lm_head must have the dtype of hidden, torch.float32, got torch.float16"),
    "float targets": (TypeError, "targets must be int64 or int32, got torch.float32"),
    "int bias": (TypeError, "bias must be of a floating dtype, got torch.int64"),
    "hidden of 3 dimensions": (ValueError, "hidden must be of shape (T, D), got (1, 4, 8)"),
    "width": (ValueError, "D = 8 > 0, got (9, 7)"),
    "no words": (ValueError, "V > 0 and D = 8 > 0, got (0, 8)"),
    "targets": (ValueError, "targets must be of shape (T,) with T = 4, got (3,)"),
    "bias": (ValueError, "bias must be of shape (V,) with V = 9, got (8,)"),
    "high target": (ValueError, "[0, V) with V = 9, got values from 0 to 9"),
    "negative target": (ValueError, "[0, V) with V = 9, got values from -100 to 0"),
    "scale": (ValueError, "scale must be finite in fp32, got nan"),
    "scale beyond fp32": (ValueError, "scale must be finite in fp32, got -1e+39"),
    "softcap 0": (ValueError, "softcap must be positive and finite in fp32, got 0"),
    "softcap inf": (ValueError, "softcap must be positive and finite in fp32, got inf"),
    "softcap 0 in fp32": (ValueError, "softcap must be positive and finite in fp32, got 1e-46"),
    "softcap inf in fp32": (ValueError, "softcap must be positive and finite in fp32, got 1e+39"),
    "device": (ValueError, "lm_head must be on the device of hidden, cpu, got meta"),
}


def refused_arguments(name):
    hidden, lm_head, targets = torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(4).long()
    changes = {
        "float64": {"hidden": hidden.double()},
        "mixed": {"lm_head": lm_head.half()},
        "float targets": {"targets": targets.float()},
        "int bias": {"bias": torch.zeros(9).long()},
        "hidden of 3 dimensions": {"hidden": hidden[None]},
        "width": {"lm_head": lm_head[:, :7]},
        "no words": {"lm_head": lm_head[:0]},
        "targets": {"targets": targets[:3]},
        "bias": {"bias": torch.zeros(8)},
        "high target": {"targets": torch.tensor([0, 9, 0, 0])},
        "negative target": {"targets": torch.tensor([0, -100, 0, 0])},
        "scale": {"scale": math.nan},
        "scale beyond fp32": {"scale": -1e39},
        "softcap 0 in fp32": {"softcap": 1e-46},
        "softcap inf in fp32": {"softcap": 1e39},
        "softcap 0": {"softcap": 0.0},
        "softcap inf": {"softcap": math.inf},
        "device": {"lm_head": lm_head.to("meta")},
    }
    return {"hidden": hidden, "lm_head": lm_head, "targets": targets} | changes[name]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [token_logprobs, token_statistics])
@pytest.mark.usefixtures("untyped")
def test_refusals_name_the_argument_and_its_value(name, function):
    error, message = REFUSED[name]
    with pytest.raises(error) as caught:
        function(**refused_arguments(name))
    assert message in str(caught.value)
    assert "; " in str(caught.value)  # says what to do


def test_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setenv("LLFAST_ISA", "avx1024")
    with pytest.raises(ValueError, match="LLFAST_ISA must name .* got 'avx1024'"):
        instruction_set()
    with pytest.raises(ValueError, match="avx1024"):
        token_logprobs(torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(1).long())


def test_without_the_extension_torch_runs_after_one_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "llfast._native", None)
    monkeypatch.delattr(llfast, "_native")
    cpu.native.cache_clear()
    try:
        case = torch.randn(5, 9), torch.randn(70, 9), torch.arange(5)
        with pytest.warns(LlfastWarning, match="C\\+\\+ kernels are not usable") as warned:
            found = token_logprobs(*case)
        assert instruction_set() == "torch"  # and no second warning, which would be an error
        assert len(warned) == 1
        hidden, lm_head, targets = case
        truth = (hidden.double() @ lm_head.double().T).log_softmax(-1)[targets, targets]
        torch.testing.assert_close(found, truth.float(), rtol=0, atol=1e-5)
    finally:
        cpu.native.cache_clear()


# ------------------------------------------------------------------------ which kernels run where


@pytest.fixture
def _forgotten():
    """What was asked and said before is asked and said again."""
    for cached in (cuda.why_unusable, dispatch._warn_of_the_twin):
        cached.cache_clear()
    yield
    for cached in (cuda.why_unusable, dispatch._warn_of_the_twin):
        cached.cache_clear()


@pytest.mark.usefixtures("_forgotten")
def test_other_devices_take_the_twin_after_one_warning():
    device = torch.device("meta")
    with pytest.warns(LlfastWarning, match="do not run on meta here .no kernels are written") as it:
        assert dispatch.kernels_of(device) is reference
    assert dispatch.kernels_of(device) is reference
    assert instruction_set("meta") == "torch"
    assert len(it) == 1


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("name", "reason"),
    [("old", "compute capability 8.0"), ("amd", "for AMD"), ("no triton", "triton_head")],
)
def test_cuda_devices_that_triton_cannot_serve(name, reason, monkeypatch):
    capability = (7, 5) if name == "old" else (9, 0)
    chip = cuda.Chip(capability=capability, multiprocessors=4)
    monkeypatch.setattr(cuda, "chip_of", lambda _: chip)
    if name == "amd":
        monkeypatch.setattr(torch.version, "hip", "6.0")
    if name == "no triton":
        monkeypatch.setitem(sys.modules, "llfast.kernels.triton_head", None)
        monkeypatch.delattr(llfast.kernels, "triton_head", raising=False)
    assert reason in cuda.why_unusable(torch.device("cuda", 1))
    with pytest.warns(LlfastWarning, match="do not run on cuda here"):
        assert dispatch.kernels_of(torch.device("cuda", 1)) is reference


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 1), (13, 0)])
def test_every_newer_device_has_a_row_in_the_tuning_table(capability, monkeypatch):
    chip = cuda.Chip(capability=capability, multiprocessors=4)
    monkeypatch.setattr(cuda, "chip_of", lambda _: chip)
    device = torch.device("cuda")
    assert dispatch.kernels_of(device) is cuda
    assert instruction_set(device) == "triton sm_{}{}".format(*capability)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        row = schedules_of(capability, dtype)
        for tile in filter(None, (row.many, row.few, row.specialised)):
            assert 1024 % tile.block_v == 0
            assert tile.block_v == row.many.block_v
            assert tile.block_t <= cuda.ROWS


@pytest.mark.parametrize("gluon", [True, False])
def test_warps_are_specialised_for_many_tokens_that_descriptors_can_load(gluon, monkeypatch):
    monkeypatch.setattr(cuda, "_specialised_kernels", lambda: object() if gluon else None)
    row = schedules_of((9, 0), torch.bfloat16)
    many = row.specialised if gluon else row.many
    matrix = torch.zeros(300, 72, dtype=torch.bfloat16)
    assert cuda._tile(row, matrix, matrix) == (many, True)
    assert cuda._tile(row, matrix[:65], matrix[:1]) == (many, True)
    assert cuda._tile(row, matrix[:64], matrix) == (row.few, True)
    assert cuda._tile(row, matrix[:, 1:], matrix[:, 1:]) == (row.many, False)  # not aligned
    assert cuda._tile(row, matrix, matrix.T) == (row.many, False)
    for capability, dtype in ((8, 0), torch.bfloat16), ((9, 0), torch.float32):
        row = schedules_of(capability, dtype)
        assert cuda._tile(row, matrix, matrix)[0] == row.many


def test_gluon_of_another_triton_is_not_used(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.delitem(sys.modules, "llfast.kernels.gluon_head", raising=False)
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    with pytest.raises(ImportError, match=r"that of Triton 3\.6 to 3\.9, got 3\.10\.0"):
        importlib.import_module("llfast.kernels.gluon_head")


# ----------------------------------------------------------------------------- as torch's operator


def operator_case():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 9, generator=random)
    return hidden, torch.randn(70, 9, generator=random), torch.arange(5)


OPERATOR = """
import torch
from llfast.kernels import token_logprobs, token_statistics

hidden, lm_head, targets = case = torch.randn(5, 9), torch.randn(70, 9), torch.arange(5)
for operator in (torch.ops.llfast.token_logprobs, torch.ops.llfast.token_statistics):
    torch.library.opcheck(operator, (*case, None, 1.0, None))
    torch.library.opcheck(operator, (*case, torch.linspace(0, 1, 70), 0.5, 3.0))

def function(hidden, lm_head, targets):
    found = token_statistics(hidden * 2, lm_head, targets, softcap=3.0)
    return found.logprobs + found.entropy, found.argmax, token_logprobs(hidden, lm_head, targets)

compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
for case in (case, (torch.randn(8, 9), lm_head, torch.arange(8))):
    for found, expected in zip(compiled(*case), function(*case), strict=True):
        assert torch.equal(found, expected)
"""


def test_the_operators_are_what_torch_wants_of_them_and_compile():
    """Without the run-time types of tests, which torch cannot trace."""
    subprocess.run([sys.executable, "-c", OPERATOR], check=True, timeout=120)


def test_fake_tensors_have_shapes_and_refusals():
    with FakeTensorMode() as mode:
        hidden, lm_head, targets = map(mode.from_tensor, operator_case())
        found = token_statistics(hidden, lm_head, targets)
        assert found.entropy.shape == found.argmax.shape == (5,)
        assert (found.lse.dtype, found.argmax.dtype) == (torch.float32, torch.int64)
        logprobs = token_logprobs(hidden, lm_head, targets)
        assert (logprobs.shape, logprobs.dtype) == ((5,), torch.float32)
        with pytest.raises(TypeError, match="lm_head must have the dtype of hidden"):
            token_statistics(hidden, lm_head.half(), targets)


def test_in_inference_mode():
    expected = token_logprobs(*operator_case())
    with torch.inference_mode():
        assert torch.equal(token_logprobs(*operator_case()), expected)

"""What `llfast.kernels` refuses, and what it does without its C++ module."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import llfast
from llfast import LlfastWarning
from llfast.kernels import cpu, instruction_set, token_logprobs, token_statistics

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

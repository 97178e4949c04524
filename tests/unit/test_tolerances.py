"""What tests and benchmarks let a GPU's kernels be off by, tried on an emulated tensor core."""

import pytest
import torch

from llfast.bench import truth
from llfast.bench.problems import make_problem
from tests import heads

WIDTH = 4096
real_roundings = truth.gpu_roundings


def cut_off(numbers):
    """To fp32, toward zero."""
    near = numbers.float()
    away = near.double().abs() > numbers.abs()
    return torch.where(away, torch.nextafter(near, torch.zeros(())), near)


def emulated(hidden, lm_head):
    """A chain of sums of 16 products each, as tensor cores of Hopper make it."""
    total = torch.zeros(len(hidden), len(lm_head))
    for first in range(0, hidden.shape[1], 16):
        columns = slice(first, first + 16)
        products = hidden[:, columns].double() @ lm_head[:, columns].double().T
        total = cut_off(total.double() + products)
    return total


def in_parts(hidden, lm_head):
    """As torch's product may be where it has few tiles: the width in parts, which are added up."""
    parts = zip(hidden.chunk(8, dim=1), lm_head.chunk(8, dim=1), strict=True)
    return sum(emulated(*each) for each in parts)


def logprobs(logits, targets):
    return logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0].float()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    def roundings(_, *rest):
        return real_roundings(torch.device("cuda"), *rest)

    for module in (truth, heads):
        monkeypatch.setattr(module, "gpu_roundings", roundings)
    monkeypatch.setattr(heads, "fp32_products", in_parts)


def test_sums_that_are_cut_off_are_no_error_but_rounded_logits_are(as_on_a_gpu):
    case = heads.make_case((12, 1000, WIDTH), torch.bfloat16)
    heads.check_logprobs(lambda h, w, targets: logprobs(emulated(h, w), targets), *case)
    with pytest.raises(AssertionError, match="off by"):
        heads.check_logprobs(lambda h, w, targets: logprobs(emulated(h, w).half(), targets), *case)


def test_a_benchmark_allows_for_the_same(as_on_a_gpu):
    problem = make_problem((3, 1000, WIDTH), torch.bfloat16)
    found = truth.Truth.of(problem, 3)  # its product in fp32 is the CPU's, which is more exact
    logits = emulated(problem.hidden, problem.lm_head)
    for given, is_wrong in ((logits, False), (logits.half(), True)):
        error = found.errors_of(logprobs(given, problem.targets))["max"]
        assert bool(found.why_wrong(error)) == is_wrong, error


def test_a_cpu_rounds_to_nearest():
    assert truth.gpu_roundings(torch.device("cpu"), torch.bfloat16, WIDTH) == 0

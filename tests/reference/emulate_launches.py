"""Run the launcher's own calls, compiled for a chip that is not there, instruction by instruction.

Run by test_emulated.py, in a process where Triton does not interpret. Prints JSON: what went wrong
with each call, null if nothing did.
"""

import itertools
import json
import re
import sys
import traceback
from unittest import mock

import torch

from llfast.kernels import TokenStatistics, cuda, token_logprobs, token_statistics
from tests.heads import (
    STATISTICS,
    check_logprobs,
    check_statistics,
    fp32_products,
    fp64_logits,
    make_case,
    same_bytes,
)
from tests.ptx.device import pretend
from tests.ptx.launch import Emulated
from tests.ptx.machine import Timing

CAPABILITY = tuple(int(number) for number in sys.argv[1].split("."))
# Whether products, and copies, are done at once or only when somebody waits for them.
TIMINGS = [
    Timing(early_products=products, early_copies=copies, seed=seed)
    for seed, (products, copies) in enumerate(itertools.product((True, False), repeat=2))
]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# T, V, D: several chunks of words, the last one not full; in fp16 and fp32, neither is the last
# block of the width. In bf16 on sm_90, a program fills its ring more than twice.
SHAPES = {
    (9, 0): {"bfloat16": (150, 400, 320), "float16": (70, 400, 136), "float32": (70, 140, 24)},
    (8, 0): {"bfloat16": (70, 300, 64), "float16": (70, 140, 40), "float32": (70, 140, 24)},
    (10, 0): {"bfloat16": (150, 300, 192), "float16": (70, 300, 136), "float32": (70, 140, 24)},
}[CAPABILITY]
FEW = 40
OPTIONS = {"scale": 0.5, "softcap": 3.0}
# Without each of these some warp reads what is not there yet, or writes what is still read.
NEEDED = {
    (9, 0): {
        "wait for products": r"wgmma\.wait_group.*",
        "wait for copies": r"mbarrier\.try_wait.*",
        "barrier between warps": r"bar\.sync",
        "fence before tensor cores": r"fence\.proxy\.async.*",
        "fence of registers": r"wgmma\.fence.*",
    },
    (8, 0): {"wait for copies": r"cp\.async\.wait_group", "barrier between warps": r"bar\.sync"},
    (10, 0): {
        "wait for copies and products": r"mbarrier\.try_wait.*",
        "barrier between warps": r"bar\.sync",
        "fence before tensor cores": r"fence\.proxy\.async.*",
    },
}
emulated = Emulated()


def logprobs(dtype, timing):
    """Many tokens."""
    emulated.timing = timing
    check_logprobs(token_logprobs, *make_case(SHAPES[dtype], DTYPES[dtype]))


def same_bits(dtype):
    """Few tokens or many, specialised warps or not, all statistics or one, in any order."""
    hidden, lm_head, targets = make_case(SHAPES[dtype], DTYPES[dtype])
    emulated.timing = TIMINGS[0]
    whole = token_statistics(hidden, lm_head, targets)
    assert torch.equal(whole.logprobs, token_logprobs(hidden, lm_head, targets))
    check_logprobs(token_logprobs, *make_case((65, 5, 8), DTYPES[dtype]))  # one block of all
    with mock.patch.object(cuda, "_specialised_kernels", return_value=None):
        for emulated.timing in TIMINGS[::3]:
            assert same_bytes(token_statistics(hidden, lm_head, targets), whole)
    for timing in TIMINGS:
        emulated.timing = timing
        few = token_statistics(hidden[:FEW], lm_head, targets[:FEW])
        first = TokenStatistics(**{name: getattr(whole, name)[:FEW] for name in STATISTICS})
        assert same_bytes(few, first)


def all_statistics(dtype):
    """And with a bias that rules words out, a scale and a softcap."""
    hidden, lm_head, targets = make_case(SHAPES[dtype], DTYPES[dtype], seed=1)
    emulated.timing = TIMINGS[3]
    bias = torch.randn(len(lm_head), generator=torch.Generator().manual_seed(2))
    for options in ({}, OPTIONS | {"bias": bias}):
        found = token_statistics(hidden, lm_head, targets, **options)
        logits = fp64_logits(hidden.double() @ lm_head.double().T, **options)
        rounded = fp64_logits(fp32_products(hidden, lm_head), **options)
        check_statistics(found, logits, rounded.float(), targets)
    bias[::2] = float("-inf")
    check_logprobs(token_logprobs, hidden, lm_head, targets, bias=bias)


def odd_strides(dtype):
    """Rows that no descriptor can describe, and columns that do not lie side by side."""
    emulated.timing = TIMINGS[3]
    hidden, lm_head, targets = make_case((FEW, 300, 37), DTYPES[dtype])
    check_logprobs(token_logprobs, hidden, lm_head.T.contiguous().T, targets)
    wide = torch.full((FEW, 64), float("nan"), dtype=DTYPES[dtype])
    wide[:, 3:40] = hidden
    check_logprobs(token_logprobs, wide[:, 3:40], lm_head, targets)


def without(dtype, pattern):
    """Whether a run is found out that lacks what it needs, by any of the timings."""
    hidden, lm_head, targets = make_case(SHAPES[dtype], DTYPES[dtype])
    emulated.dropped = re.compile(pattern)
    if "fence" in pattern:  # it stands where the kernel copies without descriptors
        hidden = torch.cat([hidden, hidden], dim=1)[:, 1 : 1 + hidden.shape[1]]
    try:
        for timing in TIMINGS:
            emulated.timing = timing
            check_logprobs(token_logprobs, hidden, lm_head, targets)
    except AssertionError:
        return
    finally:
        emulated.dropped = None
    raise AssertionError(f"nobody misses {pattern}")


def calls():
    """By name: a function, and what it is given."""
    # On sm_80 products are done at once, and dtypes differ in one letter of one instruction.
    timings = {
        "bfloat16": TIMINGS if CAPABILITY >= (9, 0) else TIMINGS[::3],
        "float16": TIMINGS[3:],
    }
    for dtype in ("bfloat16", "float16"):
        for timing in timings[dtype]:
            yield f"{dtype}: log-probabilities, {timing}", logprobs, (dtype, timing)
        for function in (same_bits, all_statistics, odd_strides):
            yield f"{dtype}: {function.__name__}", function, (dtype,)
    yield "float32: log-probabilities", logprobs, ("float32", TIMINGS[3])
    for name, pattern in NEEDED[CAPABILITY].items():
        yield f"bfloat16: without a {name}", without, ("bfloat16", pattern)


if __name__ == "__main__":
    pretend(CAPABILITY, 3, emulated.launch)
    found = {}
    for name, function, arguments in calls():
        try:
            function(*arguments)
        except Exception:
            found[name] = traceback.format_exc()
        else:
            found[name] = None
    print(json.dumps(found))

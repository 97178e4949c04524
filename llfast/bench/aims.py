"""What the fused output head is to reach on a GPU: reported as met or missed, never enforced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .heads import LLFAST, MATMUL

MOST_OVER_MATMUL = 1.05
MOST_OVER_MATMUL_TO_SHIP = 1.25
MATMUL_LEAST_TOKENS = 4096
MATMUL_LEAST_WIDTH = 4096
MOST_OVER_PEERS = 1.0
LEAST_SHARE_OF_COPY = 0.85
# Smaller heads lie partly in L2, where a read is faster than the copy.
LEAST_HEAD_OVER_L2 = 4
MOST_ERROR_RATIO = 2.0
ERROR_LEAST_TOKENS = 64  # of fewer, the largest error says little
MOST_EXTRA_MIB = 64.0

_HALF = ("bfloat16", "float16")


def judged(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each aim in each case that it is about, with its figure; none on a CPU."""
    if found["device"] != "cuda":
        return []
    l2_mib = found["hardware"].get("l2_mib", 0.0)
    cases = [each for each in found["cases"] if each["ms"]]
    return [aim for case in cases for aim in _of_case(case, l2_mib)]


def summed_up(aims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim once: in how many cases it is met, and its worst figure."""
    found = []
    for name in dict.fromkeys(each["aim"] for each in aims):
        cases = [each for each in aims if each["aim"] == name]
        pick = min if " at least " in name else max
        worst = pick(cases, key=lambda each: float(each["figure"]))
        met = sum(each["met"] for each in cases)
        found.append({**worst, "met": met == len(cases), "met_in": met, "cases": len(cases)})
    return found


def _of_case(case: dict[str, Any], l2_mib: float) -> Iterator[dict[str, Any]]:
    where = f"{case['head']}, T {case['T']}"

    def judge(aim: str, figure: float, bound: float, *, most: bool) -> dict[str, Any]:
        met = figure <= bound if most else figure >= bound
        name = f"{aim} {'at most' if most else 'at least'} {bound:g}"
        return {"aim": name, "case": where, "figure": figure, "met": met}

    over = {name: ratio["median"] for name, ratio in case["llfast_over"].items()}
    is_large = case["T"] >= MATMUL_LEAST_TOKENS and case["D"] >= MATMUL_LEAST_WIDTH
    if MATMUL in over and is_large and case["dtype"] in _HALF:
        for bound in (MOST_OVER_MATMUL, MOST_OVER_MATMUL_TO_SHIP):
            yield judge("time over torch.mm", over[MATMUL], bound, most=True)
    peers = {name: ratio for name, ratio in over.items() if name != MATMUL}
    if peers:
        nearest = max(peers, key=lambda name: peers[name])
        aim = judge("time over any other way", peers[nearest], MOST_OVER_PEERS, most=True)
        yield {**aim, "case": f"{where}, {nearest}"}
    item_bytes = 4 if case["dtype"] == "float32" else 2
    head_mib = case["V"] * case["D"] * item_bytes / 2**20
    share = case["share_of_copy"]
    if share and case["dtype"] in _HALF and head_mib >= LEAST_HEAD_OVER_L2 * l2_mib:
        yield judge("share of a copy's rate", share["median"], LEAST_SHARE_OF_COPY, most=False)
    if case["T"] >= ERROR_LEAST_TOKENS:
        yield judge("error over fp32 product's", case["error_ratio"], MOST_ERROR_RATIO, most=True)
    if case["extra_mib"].get(LLFAST) is not None:
        yield judge("extra MiB", case["extra_mib"][LLFAST], MOST_EXTRA_MIB, most=True)

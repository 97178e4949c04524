"""A kernel benchmark's report for people."""

from __future__ import annotations

from typing import Any

from llfast.output import print_line, print_table

from .aims import summed_up
from .heads import LLFAST, MATMUL, PROVIDERS

_SHORT = {
    MATMUL: "torch.mm",
    "matmul + log_softmax + gather": "log_softmax",
    "matmul + one fused read of the logits": "fused read",
    "linear_cross_entropy": "linear_ce",
    "linear_cross_entropy, chunked": "linear_ce, chunked",
    "Liger-Kernel": "Liger",
    "cut-cross-entropy": "CCE",
}


def show(found: dict[str, Any]) -> None:
    """Print a row a case, what did not run, and the aims."""
    chip = found["hardware"]
    print_line(
        f"{chip['gpu'] or chip['processor']}, {found['kernel']}, {found['dtype']}, torch "
        f"{found['versions']['torch']}, {found['seconds']} s"
    )
    peers = [
        name
        for name in PROVIDERS
        if name != LLFAST and any(name in case["llfast_over"] for case in found["cases"])
    ]
    columns = "head,T,ms,eager ms,TFLOP/s,GB/s,of copy,MiB,error,x fp32".split(",")
    print_table(
        columns + [f"/ {_SHORT.get(name, name)}" for name in peers],
        [_row(case, peers) for case in found["cases"]],
        title="llfast.token_logprobs, and its time over that of others",
    )
    if found["stopped"]:
        print_line(f"STOPPED: {found['stopped']}")
    for line in (*_troubles(found), *_bits(found), *_aims(found)):
        print_line(line)


def _row(case: dict[str, Any], peers: list[str]) -> list[Any]:
    def median(spread: dict[str, float] | None, digits: int = 3) -> str:
        return "" if spread is None else f"{spread['median']:.{digits}g}"

    error = case["errors"].get(LLFAST)
    memory = case["extra_mib"].get(LLFAST)
    ratio = case["error_ratio"]
    return [
        case["head"],
        case["T"],
        median(case["ms"].get(LLFAST), 4),
        median(case["eager_ms"], 4),
        median(case["tflops"]),
        median(case["head_gb_a_second"], 4),
        median(case["share_of_copy"], 2),
        "" if memory is None else f"{memory:.1f}",
        "" if error is None else f"{error['max']:.1e}",
        "" if ratio is None else f"{ratio:.2f}",
        *(median(case["llfast_over"].get(name)) for name in peers),
    ]


def _troubles(found: dict[str, Any]) -> list[str]:
    """What was skipped, failed, is wrong or was left out, each with the first case of it."""
    lines: dict[str, list[str]] = {}
    for case in found["cases"]:
        where = f"{case['head']}, T {case['T']}"
        for what in ("skipped", "failed"):
            for name, reason in case[what].items():
                lines.setdefault(f"{what} {name}: {reason}", []).append(where)
        for name, how in case["timed_by"].items():
            if how.startswith("eager: "):
                text = f"{name} is no CUDA graph ({how.removeprefix('eager: ')})"
                lines.setdefault(text, []).append(where)
        if case["wrong"]:
            lines.setdefault(f"WRONG {case['wrong']}", []).append(where)
    for case in found["left_out"]:
        where = f"{case['head']}, T {case['T']}"
        lines.setdefault(f"left out: {case['reason']}", []).append(where)
    return [
        f"{text} [{places[0]}" + (f" and {len(places) - 1} more]" if len(places) > 1 else "]")
        for text, places in lines.items()
    ]


def _bits(found: dict[str, Any]) -> list[str]:
    lines = []
    for each in found["same_bits"]:
        if "failed" in each:
            lines.append(f"bits of {each['head']}: failed, {each['failed']}")
            continue
        other = [name for name, same in each["same"].items() if not same]
        said = f"NOT THE SAME with {', '.join(other)}" if other else "the same"
        where = f"{each['head']}, T {each['T']}"
        lines.append(f"bits of {where}: {said} ({len(each['same'])} comparisons)")
    return lines


def _aims(found: dict[str, Any]) -> list[str]:
    if found["device"] != "cuda":
        return []
    return [
        f"{'met   ' if aim['met'] else 'MISSED'} {aim['aim']}: in {aim['met_in']} of "
        f"{aim['cases']} cases, worst {aim['figure']:.3g} ({aim['case']})"
        for aim in summed_up(found["aims"])
    ]

"""The README's first table: llfast beside others, one line a thing that it does."""

from __future__ import annotations

from typing import Any

from readme_tables import spread, table

REPORTS = ("scoring", "cpu_kernel_avx512_bf16", "loading", "search")  # that it is made of
_MODELS = 100_000
_THERE = "into a tensor that is there"


def summary(found: dict[str, dict[str, Any]]) -> list[str]:
    """Of each, what llfast takes, and how many times that others take."""
    rows = [
        *_scoring(found["scoring"]),
        *_head(found["cpu_kernel_avx512_bf16"]),
        *_loading(found["loading"]),
        *_search(found["search"]),
    ]
    *others, nearest = dict.fromkeys(_chip(found[name]) for name in REPORTS)
    where = f"{', '.join(others)}; searches: {nearest}" if others else nearest
    told = (
        f"{where}. Medians of interleaved repetitions, least to most in brackets; versions and "
        "commands stand with each table in docs/benchmarks.md."
    )
    return [*table(("", "llfast", "beside", "time over llfast's"), rows), "", told]


def _scoring(found: dict[str, Any]) -> list[list[str]]:
    model = found["model"]
    what = f"Scoring, a GPT-2 of {model['parameters'] / 1e6:.0f}M parameters in {model['dtype']}"
    rate = f"{found['tokens_per_second']['llfast']['median']:,.0f} tokens/s"
    over = found["llfast_over"]
    return [
        [what, rate, "the papers' procedure: a text at a time", _times(over["papers"]["ratio"])],
        ["", "", "a padded loop of transformers", _times(over["padded loop"]["ratio"])],
    ]


def _head(found: dict[str, Any]) -> list[list[str]]:
    case = found["many_tokens"][0]
    what = f"Log-probabilities of {case['T']:,} tokens, {case['V']:,} words, {case['D']} wide"
    rate = f"{case['llfast_gflops']['median']:,.0f} GFLOP/s, {case['dtype']}"
    over = {name: _inverse(ratio) for name, ratio in case["llfast_over"].items()}
    return [
        [what, rate, f"`torch.mm` alone, {_THERE}", _times(over[f"matmul {_THERE}"])],
        ["", "", "`F.cross_entropy`", _times(over["cross_entropy"])],
    ]


def _loading(found: dict[str, Any]) -> list[list[str]]:
    texts, tokens = found["peers"]["texts"]
    peers = found["peers"]["peers"]
    own = peers["llfast"]
    gigabytes = found["model"]["weight_bytes"] / 1e9
    what = f"{texts} texts of {tokens} tokens by a model of {gigabytes:.1f} GB on disk"
    took = f"{own['seconds']['median']:.1f} s in {own['peak_mib']['median']:,.0f} MiB"
    rows = []
    for name, peer in peers.items():
        if peer.get("largest_batch"):
            memory = f"{name}, {peer['peak_mib']['median']:,.0f} MiB"
            rows.append(["", "", memory, _times(peer["over_llfast"])])
    few, short = found["read_bound"]["texts"]
    seconds = found["read_bound"]["seconds"]["llfast"]["median"]
    over = found["read_bound"]["over_llfast"]
    rows.append(
        [
            f"{few} texts of {short} tokens, a text a batch elsewhere",
            f"{seconds:.1f} s",
            " and ".join(over),
            " and ".join(map(_times, over.values())),
        ]
    )
    rows[0][:2] = [what, took]
    return rows


def _search(found: dict[str, Any]) -> list[list[str]]:
    case = next(
        case for case in found["cases"] if case["models"] == _MODELS and case["families"] == "zipf"
    )
    providers = case["questions"]["outside"]["providers"]
    took = f"{providers['llfast certified']['ms']['median']:.1f} ms, exact"
    what = f"The {found['k']} nearest of {_MODELS:,} models on {case['texts']:,} texts"
    return [[what, took, "faiss Flat", _times(providers["faiss Flat"]["over_certified"])]]


def _chip(found: dict[str, Any]) -> str:
    chip = found["hardware"]
    return f"{chip['threads']} threads of {chip['processor']}"


def _inverse(ratio: dict[str, float]) -> dict[str, float]:
    return {
        "median": 1 / ratio["median"],
        "min": 1 / ratio["max"],
        "max": 1 / ratio["min"],
    }


def _times(ratio: dict[str, float]) -> str:
    return spread(ratio, ".1f" if ratio["median"] >= 2.5 else ".2f")

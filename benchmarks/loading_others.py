"""The same texts through others that keep weights on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llfast.bench import report

if TYPE_CHECKING:
    from bench_loading import Bench, Sizes

PEERS = ("accelerate", "AirLLM")


def measure_peers(bench: Bench, sizes: Sizes) -> dict[str, Any]:
    """The same texts with weights on disk: in the largest batches that fit, and one a batch."""
    texts, _ = sizes.peers
    found: dict[str, Any] = {"texts": sizes.peers, "limit_mib": sizes.limit_mib, "peers": {}}
    batches = {peer: sizes.batch or _largest_batch(bench, peer, sizes) for peer in PEERS}
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(bench.slow_repetitions):
        runs.setdefault("llfast", []).append(bench.run("llfast", sizes.peers))
        runs.setdefault("from_pretrained", []).append(bench.run("from_pretrained", sizes.peers))
        for peer, batch in batches.items():
            for each in sorted({1, batch}):
                if done := bench.peer(peer, sizes.peers, batch=each):
                    runs.setdefault(f"{peer}, {each} a batch", []).append(done)
    mine = runs["llfast"]
    for name, outcomes in runs.items():
        peer, _, batch = name.removesuffix(" a batch").partition(", ")
        times = [each["seconds"] for each in outcomes]
        found["peers"][name] = {
            "seconds": report.spread(times),
            "bytes_a_text": report.spread([each["disk_bytes"] / texts for each in outcomes]),
            "peak_mib": report.spread([each["peak_mib"] for each in outcomes]),
        }
        if batch and len(outcomes) == len(mine):
            number = -(-texts // int(batch))
            found["peers"][name] |= {
                "batches": number,
                "largest_batch": int(batch) == batches[peer],
                "over_llfast": report.paired(times, [each["seconds"] for each in mine]),
                "llfast_bytes_times_batches": report.spread(
                    [
                        number * own["disk_bytes"] / each["disk_bytes"]
                        for own, each in zip(mine, outcomes, strict=True)
                    ]
                ),
            }
    return {**found, "runs": [described(each) for each in mine], "left_out": bench.left_out}


def measure_read_bound(bench: Bench, sizes: Sizes) -> dict[str, Any]:
    """So few tokens that reading takes longer than computing; peers take a text a batch."""
    runs: dict[str, list[dict[str, Any]]] = {}
    budget = sizes.read_bound[0] * sizes.read_bound[1]  # no dummy rows, which peers have not either
    for _ in range(bench.slow_repetitions):
        done = bench.run("llfast", sizes.read_bound, token_budget=budget)
        runs.setdefault("llfast", []).append(done)
        for peer in PEERS:
            if other := bench.peer(peer, sizes.read_bound, batch=1):
                runs.setdefault(peer, []).append(other)
        done = bench.run("resident", sizes.read_bound, token_budget=budget)
        runs.setdefault("resident", []).append(done)
    mine = [each["seconds"] for each in runs["llfast"]]
    return {
        "texts": sizes.read_bound,
        "read_seconds": report.spread([each["extra"]["read_seconds"] for each in runs["llfast"]]),
        "compute_seconds": report.spread([each["score_seconds"] for each in runs.pop("resident")]),
        "seconds": {
            name: report.spread([each["seconds"] for each in outcomes])
            for name, outcomes in runs.items()
        },
        "over_llfast": {
            name: report.paired([each["seconds"] for each in outcomes], mine)
            for name, outcomes in runs.items()
            if name != "llfast" and len(outcomes) == len(mine)
        },
    }


def _largest_batch(bench: Bench, peer: str, sizes: Sizes) -> int:
    """How many texts fit into memory, from what one and four of them take; 1 if not even one."""
    texts, tokens = sizes.peers
    peaks = []
    for count in (1, 4):
        done = bench.peer(peer, (count, tokens), batch=count, cold=False)
        peaks.append(done["peak_mib"] if done else 0.0)
    a_text = max((peaks[1] - peaks[0]) / 3, 0.1)
    return min(max(1 + int((sizes.limit_mib - peaks[0]) / a_text), 1), texts)


def described(run: dict[str, Any]) -> dict[str, Any]:
    """What the JSON keeps of a run: its measurements, but not its values."""
    kept = {name: value for name, value in run.items() if name not in ("values", "extra")}
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in {**kept, **run["extra"]}.items()
    }

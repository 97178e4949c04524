"""The README's tables on weights from disk."""

from __future__ import annotations

from typing import Any


def loading(found: dict[str, Any]) -> list[str]:
    """Weights from disk: what each provider takes for the same texts."""
    peers, chip, versions = found["peers"], found["hardware"], found["versions"]
    titles = {"llfast": "**llfast, paged**", "from_pretrained": "transformers, all in memory"}
    lines = [
        "| | seconds | over llfast's | read a text | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, each in peers["peers"].items():
        over = each.get("over_llfast")
        cells = (
            titles.get(name, name),
            f"{each['seconds']['median']:.1f}",
            "" if over is None else f"{over['median']:.1f}",
            f"{each['bytes_a_text']['median'] / 1e9:.2f} GB",
            f"{each['peak_mib']['median']:,.0f} MiB",
        )
        lines.append("| " + " | ".join(cells) + " |")
    texts, tokens = peers["texts"]
    rate = found["rate"]
    notes = [
        (
            f"{texts} texts of {tokens} tokens, a {found['model']['shape']} "
            f"({found['model']['weight_bytes'] / 1e9:.1f} GB in bf16) whose files no cache holds, "
            f"on {chip['threads']} threads of {chip['processor']}."
        ),
        (
            f"Pages come at {rate['read_gb_a_second']['median']:.2f} GB/s, "
            f"{_times(rate['share_of_raw'])} of what {rate['fastest_way']}, the fastest of five "
            "ways, takes from the disk from end to end past the cache."
        ),
    ]
    for case in found["overlap"]:
        memory = found["memory"][f"{case['tokens']} tokens"]
        notes.append(
            f"{case['tokens']:,} tokens take {case['paged_seconds']['median']:.0f} s, "
            f"{_times(case['over_floor'])} of what the longer of reading and computing takes "
            f"alone, and {_times(case['over_resident'])} of what they take once all weights are in "
            f"memory; {memory['peak_mib']:,.0f} MiB are the most beyond the interpreter."
        )
    if "read_bound" in found:
        bound = found["read_bound"]
        others = " and ".join(
            f"{name} {_times(over)}" for name, over in bound["over_llfast"].items()
        )
        notes.append(
            f"{bound['texts'][0]} texts of {bound['texts'][1]} tokens, which are read for "
            f"{bound['read_seconds']['median']:.1f} s and computed for "
            f"{bound['compute_seconds']['median']:.1f} s, take "
            f"{bound['seconds']['llfast']['median']:.1f} s; with a text a batch, {others} times "
            "as long."
        )
    if verified := [
        f"{case['tokens']:,} tokens take {_times(case['over_plain'])} of what they take without, "
        f"and wait {case['wait_seconds']['median']:.1f} s for digests that take "
        f"{case['verify_seconds']['median']:.1f} s"
        for case in found.get("verify", ())
    ]:
        meanwhile = "With the sha256 of every file compared meanwhile (`--verify`), "
        notes.append(f"{meanwhile}{'; '.join(verified)}.")
    notes.append(
        f"torch {versions['torch']}, transformers {versions['transformers']}, accelerate "
        f"{versions['accelerate']}, AirLLM {versions['airllm']}; medians, least to most in "
        f"brackets. Command: `{found['command']}`."
    )
    return [*lines, "", " ".join(notes)]


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def relatives(found: dict[str, Any]) -> list[str]:
    """Fine-tunes together, beside each of them alone."""
    runs, chip, versions = found["runs"], found["hardware"], found["versions"]
    lines = ["| | bytes read | seconds | peak memory |", "|---|---|---|---|"]
    for way, title in (("alone", "one after the other"), ("together", "**together**")):
        run = sorted(runs[way], key=lambda each: each["seconds"])[len(runs[way]) // 2]
        memory = max(each["peak_mib"] for each in runs[way])
        cells = f"{run['nbytes'] / 1e9:.2f} GB | {run['seconds']:.1f} | {memory:,.0f} MiB"
        lines.append(f"| {title} | {cells} |")
    texts, tokens = found["texts"]
    compared = found["compare"]
    note = (
        f"{found['models']} fine-tunes of {found['shape']} that share three quarters of their "
        f"{found['weight_bytes'] / 1e9:.1f} GB in bf16, {texts} texts of {tokens} tokens, files "
        f"that no cache holds, {chip['threads']} threads of {chip['processor']}: together they "
        f"read {_times(found['bytes_over_alone'])} of the bytes and take "
        f"{_times(found['seconds_over_alone'])} of the time, with the same bits. Once in a "
        f"checkpoint's life {compared['bytes'] / 1e9:.1f} GB of them are compared, in "
        f"{compared['seconds']:.1f} s. torch {versions['torch']}, transformers "
        f"{versions['transformers']}; medians, least to most in brackets. Command: "
        f"`{found['command']} --folder DIR`."
    )
    return [*lines, "", note]

"""The tables on weights from disk."""

from __future__ import annotations

from typing import Any

from readme_tables import spread, table


def loading(found: dict[str, Any]) -> list[str]:
    """Weights from disk: what each provider takes for the same texts."""
    peers, chip, versions = found["peers"], found["hardware"], found["versions"]
    titles = {"llfast": "**llfast, paged**", "from_pretrained": "transformers, all in memory"}
    rows = []
    for name, each in peers["peers"].items():
        over = each.get("over_llfast")
        row = (
            titles.get(name, name),
            f"{each['seconds']['median']:.1f}",
            "" if over is None else f"{over['median']:.1f}",
            f"{each['bytes_a_text']['median'] / 1e9:.2f} GB",
            f"{each['peak_mib']['median']:,.0f} MiB",
        )
        rows.append(row)
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
            f"{_times(rate['share_of_sequential'])} of what one thread takes from the disk, block "
            f"after block past the cache, and {_times(rate['share_of_raw'])} of what "
            f"{rate['fastest_way']}, the fastest of five ways, takes from end to end; from the "
            f"cache they come at {rate['warm_read_gb_a_second']['median']:.2f} GB/s."
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
    limited = found["limited"]
    notes.append(
        f"So many in a process to which the system gives no more than {limited['limit_mib']:,} MiB "
        f"beyond the interpreter have the same bits, and take {limited['peak_mib']:,.0f} MiB, of "
        f"which weights and texts on their way are {limited['statistics_mib']:,.0f}."
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
    columns = ("", "seconds", "over llfast's", "read a text", "peak memory")
    return [*table(columns, rows), "", " ".join(notes)]


def _times(ratio: dict[str, float]) -> str:
    return spread(ratio, ".2f")


def relatives(found: dict[str, Any]) -> list[str]:
    """Fine-tunes together, beside each of them alone."""
    chip, versions, compared = found["hardware"], found["versions"], found["compare"]
    titles = ",one after the other,**together**,time together,bytes together,peak memory".split(",")
    rows = []
    for case in found["cases"]:
        texts, tokens = case["texts"]
        alone, together = case["runs"]["alone"], case["runs"]["together"]
        cells = [f"{texts} text{'s'[: texts > 1]} of {tokens} tokens"]
        for runs in (alone, together):
            middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
            cells.append(f"{middle['nbytes'] / 1e9:.1f} GB, {middle['seconds']:.1f} s")
        cells += [_times(case["seconds_over_alone"]), _times(case["bytes_over_alone"])]
        peaks = [max(run["peak_mib"] for run in runs) for runs in (alone, together)]
        cells.append(f"{peaks[0]:,.0f} and {peaks[1]:,.0f} MiB")
        rows.append(cells)
    note = (
        f"{found['models']} fine-tunes of {found['shape']} that share three quarters of their "
        f"{found['weight_bytes'] / 1e9:.1f} GB in bf16, files that no cache holds, "
        f"{chip['threads']} threads of {chip['processor']}; the same bits both ways. Once in a "
        f"checkpoint's life {compared['bytes'] / 1e9:.1f} GB of them are compared, in "
        f"{compared['seconds']:.0f} s. torch {versions['torch']}, transformers "
        f"{versions['transformers']}; medians, least to most in brackets. Command: "
        f"`{found['command']} --folder DIR`."
    )
    return [*table(titles, rows), "", note]

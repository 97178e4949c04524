"""Write the tables of README.md and other pages, and the map, from the JSON in benchmarks/results.

    python benchmarks/readme.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and is compared with its JSON by a
test.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from readme_fleet import fleet
from readme_loading import loading, relatives
from readme_maps import page, real_map
from readme_moves import trajectories
from readme_real import real_models, real_predictions, real_relations
from readme_search import search
from readme_summary import REPORTS, summary
from readme_tables import spread, table
from readme_throughput import throughput

from llfast.bench.cases import GRAPH_TOKENS
from llfast.map_plots import draw_map
from llfast.page import ModelMap
from llfast.placing import classical_mds
from llfast.relations import lines_of

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", RESULTS / "kernel.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def scoring(found: dict[str, Any]) -> list[str]:
    """Throughput and memory beside the peers'."""
    peers = {"papers": "the papers' procedure", "padded loop": "padded transformers loop"}
    rates, over = found["tokens_per_second"], found["llfast_over"]
    memory = found["peak_memory_mib"]

    def row(name: str, title: str, *rest: str) -> tuple[str, ...]:
        return title, f"{rates[name]['median']:,.0f}", f"{memory[name]:,.0f} MiB", *rest

    rows = [row("llfast", "**`llfast.score`**", "", "")]
    for peer, title in peers.items():
        ratio, ceiling = over[peer]["ratio"], over[peer]["ceiling"]
        rows.append(row(peer, title, spread(ratio, ".2f"), f"{ceiling['median']:.2f}"))
    model, chip, versions = found["model"], found["hardware"], found["versions"]
    told = (
        f"{found['texts']} texts ({found['tokens']:,} tokens), a GPT-2 shape of "
        f"{model['parameters'] / 1e6:.0f}M parameters in {model['dtype']}, on "
        f"{chip['threads']} threads of {chip['processor']} ({chip['instruction_set']}), torch "
        f"{versions['torch']}, transformers {versions['transformers']}; medians of "
        f"{found['repetitions']} interleaved repetitions, least to most in brackets. The last "
        "column is the ceiling: a head that costs nothing would reach it. The head's own memory is "
        f"{memory['llfast/head']:.1f} MiB, that of the papers {memory['papers/head']:.0f} MiB. "
        f"`score` ran at {100 * found['share_of_matmul']['median']:.0f} % of the rate of torch's "
        f"own matrix product. Command: `{found['command']}`."
    )
    titles = ("", "tokens/s", "memory", "time over llfast's", "over the body's alone")
    return [*table(titles, rows), "", told]


def intervals(found: dict[str, Any]) -> list[str]:
    """Coverage of the interval beside that of two simpler ones."""
    methods = {
        "llfast": "**llfast**",
        "plain log jackknife": "log jackknife",
        "normal on KL": "mean ± 1.96 standard errors",
    }
    claimed = [cell for cell in found["cells"] if not cell["beyond_claim"]]
    layouts = sorted({(cell["texts"], cell["texts_a_document"]) for cell in claimed})
    rows = []
    for texts, chunks in layouts:
        cells = [
            cell["intervals"]
            for cell in claimed
            if (cell["texts"], cell["texts_a_document"]) == (texts, chunks)
        ]
        row = [f"{texts:,}", str(chunks)]
        for method in methods:
            shares = [100 * cell[method]["coverage"] for cell in cells]
            row.append(f"{min(shares):.1f} to {max(shares):.1f} %")
        rows.append(row)
    kinds = len({cell["distribution"] for cell in claimed})
    told = (
        f"Lowest and highest over {kinds} distributions, {found['repetitions']:,} simulated "
        "repetitions each. The last distribution is that of measured pairs of models (`--pairs`). "
        "Command: `python benchmarks/bench_intervals.py`."
    )
    return [*table(("texts", "a document", *methods.values()), rows), "", told]


def demo(found: dict[str, Any]) -> list[str]:
    """The nearest relatives that the demo found."""
    form = "{} {:.2f} ({:.2f} to {:.2f})"
    rows = [
        (model, *(form.format(hit["model"], hit["kl"], *hit["interval"]) for hit in hits))
        for model, hits in found["nearest"].items()
        if model.endswith(("-prose", "-code", "-heavy", "-merge"))
    ]
    told = "KL in bits/byte (95 % interval). Command: `llfast demo --json`."
    return [*table(("model", "nearest", "second", "third"), rows), "", told]


def cpu_kernel(found: dict[str, Any]) -> list[str]:
    """The fused head beside torch's ways, and with few tokens beside a read of the head."""
    peers = {
        "matmul": "time over torch's matmul",
        "matmul into a tensor that is there": "into a tensor that is there",
        "matmul + log_softmax + gather": "with log_softmax + gather",
        "cross_entropy": "`cross_entropy`",
        "linear_cross_entropy": "`linear_cross_entropy`",
        "linear_cross_entropy, chunked": "the same in chunks",
    }
    many, few = found["many_tokens"], found["few_tokens"]
    peers = {name: title for name, title in peers.items() if name in many[0]["llfast_over"]}
    rows = []
    for case in many:
        rate, share = case["llfast_gflops"]["median"], case["share_of_peak"]["median"]
        over = case["llfast_over"]
        ratios = [f"{over[name]['median']:.2f}" for name in peers]
        ratios[0] += f" ({over['matmul']['min']:.2f} to {over['matmul']['max']:.2f})"
        cells = [
            f"{case['T']}, {case['V']}, {case['D']}",
            case["dtype"],
            f"{rate:,.0f} ({100 * share:.0f} %)",
            *ratios,
        ]
        rows.append(cells)
    lines = table(("T, V, D", "dtype", "GFLOP/s (share of peak)", *peers.values()), rows)
    counts = sorted({case["T"] for case in few})
    rows = []
    heads: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for case in few:
        heads.setdefault((case["V"], case["D"], case["dtype"]), []).append(case)
    for (words, width, dtype), cases in heads.items():
        reads = [case["read_gb_a_second"]["median"] for case in cases]
        shares = {case["T"]: 100 * case["share_of_read"]["median"] for case in cases}
        cells = [f"{words}, {width}", dtype, f"{min(reads):.0f} to {max(reads):.0f}"]
        cells += [f"{shares[count]:.0f} %" for count in counts]
        rows.append(cells)
    first, *others = (f"T = {count}" for count in counts)
    titles = ("V, D", "dtype", "read, GB/s", f"share of it at {first}", *others)
    lines += ["", *table(titles, rows)]
    chip, versions, limited = found["hardware"], found["versions"], found["limited_to"]
    held = "" if limited is None else f", torch held to {limited} too"
    lines.append("")
    lines.append(
        f"{chip['threads']} threads of {chip['processor']} ({chip['instruction_set']}{held}), "
        f"torch {versions['torch']}; medians of {found['repetitions']} interleaved repetitions "
        f"({few[0]['pairs']} with few tokens), least to most in brackets; the peak is that of a "
        "loop of multiply-adds, and the read that of the same head by as many threads, both "
        "measured in between; smaller heads lie partly in L3. torch's threads stop spinning before "
        "every call with many tokens. Memory beyond inputs and output: at most "
        f"{max(case['mib_a_thread'] for case in found['memory']):.1f} MiB a thread. Largest error "
        f"against fp64: {max(case['errors']['llfast'] for case in many):.1e} nats, at most "
        f"{max(case['error_ratio'] for case in many):.1f} times that of a product in fp32; torch's "
        f"ways are off by up to {max(max(case['errors'].values()) for case in many):.1e}. "
        f"Command: `{found['command']}`."
    )
    return lines


def kernel(found: dict[str, Any]) -> list[str]:
    """The fused head on a GPU: many tokens beside other ways, few beside a copy's rate."""
    cases = [case for case in found["cases"] if case["ms"]]
    peers = {
        "matmul": "`torch.mm`",
        "matmul + one fused read of the logits": "with a fused read of the logits",
        "matmul + log_softmax + gather": "with log_softmax + gather",
        "cross_entropy": "`cross_entropy`",
        "linear_cross_entropy": "`linear_cross_entropy`",
        "linear_cross_entropy, chunked": "the same in chunks",
        "Liger-Kernel": "Liger-Kernel",
        "cut-cross-entropy": "cut-cross-entropy",
    }
    peers = {
        name: title
        for name, title in peers.items()
        if any(name in case["llfast_over"] for case in cases)
    }
    many = [case for case in cases if case["share_of_copy"] is None]
    rows = []
    for case in many:
        ratios = {name: f"{ratio['median']:.2f}" for name, ratio in case["llfast_over"].items()}
        if "matmul" in ratios:
            ratios["matmul"] += " ({min:.2f} to {max:.2f})".format(**case["llfast_over"]["matmul"])
        cells = [
            case["head"],
            f"{case['T']}, {case['V']}, {case['D']}",
            f"{case['tflops']['median']:,.0f}",
            *(ratios.get(name, "") for name in peers),
        ]
        rows.append(cells)
    lines = table(("head", "T, V, D", "TFLOP/s", *peers.values()), rows)
    titles = "head,T,ms,GB/s of the head,share of a copy's rate,time over `torch.mm`".split(",")
    rows = []
    for case in cases:
        if case["share_of_copy"] is not None:
            over = case["llfast_over"].get("matmul")
            cells = [
                case["head"],
                str(case["T"]),
                f"{case['ms']['llfast']['median']:.3f}",
                f"{case['head_gb_a_second']['median']:,.0f}",
                f"{100 * case['share_of_copy']['median']:.0f} %",
                "" if over is None else f"{over['median']:.2f}",
            ]
            rows.append(cells)
    return [*lines, "", *table(titles, rows), "", _kernel_notes(found, cases)]


def _kernel_notes(found: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    chip, versions = found["hardware"], found["versions"]
    memory = [case["extra_mib"].get("llfast") for case in cases]
    extra = max((each for each in memory if each is not None), default=None)
    peers = [name for name in ("liger-kernel", "cut-cross-entropy") if name in versions]
    same = [each.get("all_same") for each in found["same_bits"]]
    ran = [f"{name} {versions[name]}" for name in ("torch", "triton", *peers)]
    off, off_in_fp32 = (
        max(case["errors"][name]["max"] for case in cases) for name in ("llfast", "product in fp32")
    )
    text = (
        f"{chip['gpu'] or chip['processor']} ({found['kernel']}), {found['dtype']}, "
        f"{', '.join(ran)}; medians of at least three interleaved repetitions, of ratios within "
        f"one. Up to {GRAPH_TOKENS:,} tokens are timed as CUDA graphs, if a way can be captured. "
        "The copy counts bytes read and bytes written. Largest error against fp64: "
        f"{off:.1e} nats; of a product in fp32 {off_in_fp32:.1e}."
    )
    if extra is not None:
        text += f" Memory beyond inputs and output: at most {extra:.1f} MiB."
    if same and all(same):
        text += " A row's bits were the same beside any other rows, in any order."
    return f"{text} Command: `{found['command']}`."


def kernel_resources(found: dict[str, Any]) -> list[str]:
    """What each compiled kernel takes of a multiprocessor."""
    titles = ",dtype,tokens,tile,loads,with,warps,stages,registers,stack bytes".split(",")
    rows = [
        (
            f"sm_{row['architecture']} `{row['kernel'].removesuffix('_kernel')}`",
            row.get("dtype", ""),
            row.get("schedule", ""),
            " x ".join(map(str, row.get("tile", ()))),
            row.get("loads", ""),
            row.get("options", ""),
            str(row["warps"]),
            str(row["stages"]),
            str(row["registers"]),
            str(row["stack_bytes"]),
            f"{row['shared_bytes'] / 1024:.0f} of {row['shared_limit_bytes'] / 1024:.0f}",
            f"{row['instructions']:,}",
        )
        for row in found["kernels"]
    ]
    told = f"Triton {found['triton']}. Command: `python benchmarks/compile_kernels.py`."
    return [*table([*titles, "shared KiB", "instructions"], rows), "", told]


def load(name: str) -> dict[str, Any]:
    """A report that was committed, or those of the summary."""
    if name == "summary":
        return {each: load(each) for each in REPORTS}
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


TABLES = {
    "summary": summary,
    "scoring": scoring,
    "scoring_bfloat16": scoring,
    "scoring_bfloat16_amx": scoring,
    "throughput": throughput,
    "loading": loading,
    "relatives": relatives,
    "search": search,
    "cpu_kernel_avx512_bf16": cpu_kernel,
    "cpu_kernel_amx_bf16": cpu_kernel,
    "cpu_kernel_avx2": cpu_kernel,
    "intervals": intervals,
    "demo": demo,
    "real_models": real_models,
    "real_predictions": real_predictions,
    "real_map": real_map,
    "real_relations": real_relations,
    "trajectories": trajectories,
    "fleet": fleet,
    "map": page,
    "kernel_resources": kernel_resources,
    # A GPU's table is in docs/benchmarks.md once its JSON is here.
    **{
        path.stem: kernel
        for path in sorted(RESULTS.glob("kernel_*.json"))
        if load(path.stem).get("benchmark") == "kernel"
    },
}


def with_tables(text: str) -> str:
    """The text with every table as its JSON has it."""
    return BLOCK.sub(
        lambda block: block[1] + "\n".join(TABLES[block[2]](load(block[2]))) + "\n" + block[3], text
    )


def main() -> None:
    """Write the pages and the map."""
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
    found = load("demo")
    models, families, parents = found["models"], found["families"], found["parents"]
    metadata = [{"family": families[each], "parents": parents.get(each, [])} for each in models]
    drawn = ModelMap(
        models=tuple(models),
        places=classical_mds(np.array(found["kl_bits_per_byte"])),
        bits_per_byte=np.full(len(models), np.nan),
        metadata=metadata,
        nearest=[],
        lines=lines_of(models, metadata),
        unit="bits_per_byte",
        method="mds",
        perplexity=1.0,
        notes="",
    )
    draw_map(drawn, ROOT / "docs" / "map.png", title=f"{len(models)} small models by what they say")


if __name__ == "__main__":
    sys.exit(main())

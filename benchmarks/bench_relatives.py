"""Fine-tunes of one model, scored one after the other and in one pass.

    python benchmarks/bench_relatives.py --folder /tmp/relatives

Claim: what several models share is read once. Eight checkpoints of a Llama of 800 million
parameters in bf16, which share three quarters of their bytes, are written first unless they are
there (13 GB). Every run is a process of its own, weights paged, files dropped from the page cache;
the two ways take turns, ratios are taken within a repetition, and both must return the same bits.
Who shares what is found out by comparing bytes, once in a checkpoint's life; that is measured by
itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loading_peers import drop
from make_checkpoint import Shape, draw_texts, make_checkpoint
from memory import status_kib

import llfast
from llfast.bench import report
from llfast.checkpoint import Checkpoint
from llfast.paging import relatives

RESULTS = Path(__file__).parent / "results"
SHAPE = Shape(layers=12, hidden=2048, heads=16, kv_heads=8, head_dim=128, vocabulary=32_000)
QUICK_SHAPE = Shape(
    layers=8, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocabulary=2048
)
MODELS = 8
SHARED = 0.75  # of all bytes
TEXTS = ((1, 16), (8, 16))  # how many, of so many tokens


def make_family(folder: Path, shape: Shape) -> list[Path]:
    """A base's fine-tunes: whole tensors are other ones, of all kinds, in all layers."""
    base = folder / "base"
    if not (base / "config.json").exists():
        make_checkpoint(base, shape)
    tuned = [folder / f"tuned-{number}" for number in range(MODELS)]
    tensors = Checkpoint.open(base).tensors
    total = sum(each.end - each.begin for each in tensors.values())
    names = np.random.default_rng(0).permutation(sorted(tensors))
    changed, size = [], 0
    for name in names:
        nbytes = tensors[name].end - tensors[name].begin
        if size + nbytes <= (1 - SHARED) * total:
            changed.append(tensors[name])
            size += nbytes
    for number, copy in enumerate(tuned):
        if (copy / "done").exists():
            continue
        shutil.copytree(base, copy, dirs_exist_ok=True)
        generator = torch.Generator().manual_seed(number + 1)
        for tensor in changed:
            with (copy / tensor.path.name).open("r+b") as file:
                file.seek(tensor.begin)
                noise = torch.randn(tensor.parameters, generator=generator)
                weights = (noise / tensor.shape[-1] ** 0.5).bfloat16()
                file.write(memoryview(weights.view(torch.uint8).numpy()))
        (copy / "done").touch()
    return tuned


def run_once(way: str, folders: Sequence[Path], texts: tuple[int, int], budget: str) -> None:
    """Score all; prints what it took as JSON."""
    config = json.loads((folders[0] / "config.json").read_text())
    ids = draw_texts(*texts, config["vocab_size"])
    options: dict[str, Any] = {
        "token_ids": ids,
        "token_budget": min(texts[0] * texts[1], 512),  # no more dummy rows than it takes
        "dtype": "bfloat16",
        "weights": "paged",
        "memory_budget": budget,
        "progress": False,
    }
    loading = [llfast.LoadingStatistics() for _ in folders]
    for folder in folders:
        drop(sorted(folder.glob("*.safetensors")))
    before = status_kib("VmRSS")
    start = time.perf_counter()
    if way == "together":
        results = llfast.score_many(folders, loading=loading[0], **options)
    else:
        results = [
            llfast.score(folder, loading=each, **options)
            for folder, each in zip(folders, loading, strict=True)
        ]
    found = {
        "seconds": time.perf_counter() - start,
        "nbytes": sum(each.nbytes for each in loading),
        "disk_bytes": sum(page.disk_bytes for each in loading for page in each.pages),
        "shared_bytes": sum(each.shared_bytes for each in loading),
        "compared_bytes": sum(each.compared_bytes for each in loading),
        "stall_seconds": sum(each.stall_seconds for each in loading),
        "waves": sum(each.waves for each in loading),
        "peak_mib": (status_kib("VmHWM") - before) / 1024,
        "values": [result.values.tobytes().hex() for result in results],
    }
    print(json.dumps(found))


def measure(folder: Path, shape: Shape, repetitions: int) -> dict[str, Any]:
    """All of it."""
    folders = make_family(folder, shape)
    shutil.rmtree(folder / "cache", ignore_errors=True)  # of an earlier run, which knew it all
    os.environ["LLFAST_CACHE"] = str(folder / "cache")
    checkpoints = [Checkpoint.open(each) for each in folders]
    for checkpoint in checkpoints:
        checkpoint.digest()  # once in a checkpoint's life, which every way of scoring asks for
    drop([path for each in checkpoints for path in each.weights])
    statistics, start = llfast.LoadingStatistics(), time.perf_counter()
    relatives(checkpoints, statistics)
    compare_seconds = time.perf_counter() - start
    return {
        "models": MODELS,
        "shape": f"a Llama, {shape.layers} layers of {shape.hidden}",
        "weight_bytes": sum(each.weight_bytes for each in checkpoints),
        "compare": {"bytes": statistics.compared_bytes, "seconds": round(compare_seconds, 2)},
        "cases": [_case(folder, texts, repetitions) for texts in TEXTS],
    }


def _case(folder: Path, texts: tuple[int, int], repetitions: int) -> dict[str, Any]:
    """Both ways in turn."""
    runs: dict[str, list[dict[str, Any]]] = {"alone": [], "together": []}
    bits: list[list[str]] = []
    for _ in range(repetitions):
        for way, found in runs.items():
            found.append(_child(way, folder, texts))
            say(f"{way} {texts}: {found[-1]['seconds']:.1f} s, {found[-1]['nbytes'] / 1e9:.2f} GB")
            bits.append(found[-1].pop("values"))
            if bits[-1] != bits[0]:
                raise SystemExit(f"{way} must return the same bits, got others")

    def ratio(name: str) -> dict[str, float]:
        return report.paired(*([run[name] for run in runs[way]] for way in ("together", "alone")))

    return {
        "texts": texts,
        "bytes_over_alone": ratio("nbytes"),
        "seconds_over_alone": ratio("seconds"),
        "runs": runs,
    }


def _child(way: str, folder: Path, texts: tuple[int, int]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--folder", str(folder), "--texts", *map(str, texts)]
    done = subprocess.run([*command, "--run", way], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are")
    parser.add_argument("--texts", type=int, nargs=2, default=TEXTS[0], help=argparse.SUPPRESS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small ones, to show that it runs")
    parser.add_argument("--run", choices=("alone", "together"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "relatives.json")
    options = parser.parse_args()
    if options.run:
        texts = (options.texts[0], options.texts[1])
        folders = [options.folder / f"tuned-{number}" for number in range(MODELS)]
        run_once(options.run, folders, texts, "2GiB")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    shape = QUICK_SHAPE if options.quick else SHAPE
    found = measure(options.folder, shape, options.repetitions)
    command = f"python benchmarks/bench_relatives.py --repetitions {options.repetitions}"
    described = {
        "command": command,
        "commit": report.commit(),
        "hardware": report.hardware(),
        "versions": report.versions("llfast", "torch", "transformers"),
    }
    report.write({**described, **found}, options.out)


if __name__ == "__main__":
    main()

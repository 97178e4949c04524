"""Tokens a second of `llfast.score`, beside the papers' procedure and a plain padded loop.

    python benchmarks/bench_scoring.py [--texts 100] [--repetitions 5]

Claim: the output head of `score()` takes less than a tenth of the memory of the papers'. How much
faster it is than either is reported beside what is possible.

The model has the shape of GPT-2 (124M parameters) and random weights; tokenizer and texts come from
this Python installation, so nothing is downloaded. Providers are interleaved, and what they return
is compared before anything is timed. Ratios are taken within a repetition. The ceiling of a ratio
is the peer's time over that of the body alone (in the batches of `score()`): a head that costs
nothing would reach it.

Memory is measured in processes of their own: the highest resident size while a provider runs, less
that before. "Head" is the step from hidden states to log-probabilities, for the largest batch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import highest_growth_mib, measured_elsewhere
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import llfast
from llfast.batches import Batch, TokenizedTexts, plan_batches, tokenize
from llfast.bench import report
from llfast.devices import default_token_budget
from llfast.head import Head
from llfast.linear import linear_layers, linear_path
from llfast.models import quiet
from llfast.texts import sample_chunks
from llfast.zoo_corpora import installed_corpora
from llfast.zoo_training import train_tokenizer

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 50_257
MAX_LENGTH = 1024
PADDED_ROWS = 8  # texts in a batch of the plain padded loop
TOLERANCE = 1e-5  # of a text's log-likelihood: fp32 sums of some hundred terms


@dataclass(frozen=True, slots=True)
class Bench:
    """The model, its tokenizer and the texts that all providers score."""

    model: Any
    tokenizer: Any
    texts: llfast.TextSet

    def tokens(self) -> TokenizedTexts:
        """The texts as `score()` reads them."""
        return tokenize(self.texts, self.tokenizer, "paper", MAX_LENGTH)

    def batches(self) -> tuple[TokenizedTexts, list[Batch]]:
        """The batches of `score()`."""
        tokens = self.tokens()
        return tokens, plan_batches(
            tokens, default_token_budget(self.model.device, self.model.config)
        )


# ------------------------------------------------------------------------------------- providers


def score_with_llfast(bench: Bench) -> np.ndarray:
    """`llfast.score` with its defaults."""
    return llfast.score((bench.model, bench.tokenizer), bench.texts, progress=False).values


def score_as_the_papers(bench: Bench) -> np.ndarray:
    """One text at a time, all logits, one Python float a token (arXiv 2502.16173 and its code)."""
    values = []
    for text in bench.texts.texts:
        ids = bench.tokenizer(text, return_tensors="pt", truncation=True).input_ids
        values.append(papers_head(bench.model(ids).logits, ids))
    return np.array(values)


def papers_head(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """The papers' way from logits to a text's log-likelihood."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return sum(logprobs[0, place - 1, ids[0, place]].item() for place in range(1, ids.shape[1]))


def score_padded(bench: Bench) -> np.ndarray:
    """Batches of eight texts in their order, padded right, with a mask; logits, then a gather."""
    values: list[float] = []
    for start in range(0, len(bench.texts), PADDED_ROWS):
        chunk = list(bench.texts.texts[start : start + PADDED_ROWS])
        batch = bench.tokenizer(chunk, return_tensors="pt", padding=True, truncation=True)
        logits = bench.model(**batch).logits[:, :-1]
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        values += (chosen * batch.attention_mask[:, 1:]).sum(-1).tolist()
    return np.array(values)


PROVIDERS: dict[str, Callable[[Bench], np.ndarray]] = {
    "llfast": score_with_llfast,
    "papers": score_as_the_papers,
    "padded loop": score_padded,
}


def run_body(bench: Bench) -> None:
    """The model without its head, in the batches of `score()` and with its linear layers."""
    tokens, batches = bench.batches()
    with linear_layers_of_score(bench.model):
        for batch in batches:
            ids = torch.zeros(batch.shape, dtype=torch.int64)
            for row, text in enumerate(batch.texts):
                ids[row, : len(tokens[text])] = torch.from_numpy(tokens[text])
            bench.model.base_model(input_ids=ids, use_cache=False)


def run_body_one_by_one(bench: Bench) -> None:
    """The model without its head, one text at a time, with torch's linear layers."""
    tokens = bench.tokens()
    for text in range(len(tokens)):
        ids = torch.from_numpy(tokens[text].astype(np.int64))
        bench.model.base_model(input_ids=ids[None], use_cache=False)


def linear_layers_of_score(model: Any) -> AbstractContextManager[None]:
    """The path that `score()` lets the model's linear layers take."""
    output = model.get_output_embeddings()
    path = linear_path(model.device, model.dtype, model=model, leave_out=output)
    return linear_layers(model, path, leave_out=output)


def matmul_flops(bench: Bench) -> float:
    """FLOP/s of torch's matrix product, at the shape of the model's widest layer."""
    width = bench.model.config.n_embd
    rows = default_token_budget(bench.model.device, bench.model.config)
    a = torch.randn(rows, width, dtype=bench.model.dtype)
    b = torch.randn(4 * width, width, dtype=bench.model.dtype)
    functional.linear(a, b)
    start = time.perf_counter()
    for _ in range(5):
        functional.linear(a, b)
    # 2 FLOP a multiply-add: (rows, width) x (width, 4 width)
    return 5 * 2 * rows * width * 4 * width / (time.perf_counter() - start)


# ---------------------------------------------------------------------------------------- memory


def measure_memory(what: str, bench: Bench) -> float:
    """In this process: a provider's peak in MiB, or that of a head alone."""
    for parameter in bench.model.parameters():
        parameter.sum()  # read in from the mapped file, or a first use would be counted
    name, _, part = what.partition("/")
    if part != "head":
        return highest_growth_mib(lambda: PROVIDERS[name](bench))
    tokens, batches = bench.batches()
    if name == "papers":
        longest = max(range(len(tokens)), key=lambda text: len(tokens[text]))
        ids = torch.from_numpy(tokens[longest].astype(np.int64))[None]
        hidden = bench.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return highest_growth_mib(lambda: papers_head(bench.model.lm_head(hidden), ids))
    # As `find_head` describes it, but without a first call that would warm the allocator.
    head = Head(module=bench.model.lm_head, vocabulary=VOCABULARY, scale=1.0, softcap=None)
    batch = max(batches, key=lambda batch: sum(tokens.token_counts[list(batch.texts)]))
    # What the body returns for it, before the real positions are packed.
    hidden = torch.randn(*batch.shape, bench.model.config.n_embd, dtype=bench.model.dtype)
    counts = tokens.token_counts[list(batch.texts)]
    rows = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    columns = torch.cat([torch.arange(count) for count in counts])
    target = torch.from_numpy(np.concatenate([tokens[text][1:] for text in batch.texts])).long()
    return highest_growth_mib(lambda: head.token_logprobs(hidden[rows, columns], target))


# ------------------------------------------------------------------------------------------ main


def make_bench(folder: Path, texts: int, layers: int, dtype: str) -> None:
    """Write checkpoint, tokenizer and texts."""
    corpora = installed_corpora()
    tokenizer = train_tokenizer(corpora.training, VOCABULARY)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_layer=layers, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    GPT2LMHeadModel(config).to(getattr(torch, dtype)).save_pretrained(folder)
    documents = ((document.name, document.text) for document in corpora.evaluation)
    chunks, _, _ = sample_chunks(documents, n=texts, max_bytes=1024, min_bytes=256, seed=42)
    chunks.save(folder / "texts.jsonl")


def load_bench(folder: Path) -> Bench:
    """What `make_bench` wrote."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return Bench(
        model,
        AutoTokenizer.from_pretrained(folder),
        llfast.TextSet.load(folder / "texts.jsonl"),
    )


def check(bench: Bench) -> float:
    """Compare what the providers return, and return the largest relative difference.

    Raises:
        SystemExit: if they disagree.
    """
    found = {name: provider(bench) for name, provider in PROVIDERS.items()}
    tolerance = TOLERANCE if bench.model.dtype == torch.float32 else 2e-2
    worst = max(
        float((abs(values - found["papers"]) / abs(found["papers"])).max())
        for values in found.values()
    )
    if worst > tolerance:
        raise SystemExit(f"providers must agree within {tolerance} of a sum, got {worst:.3g}")
    return worst


def seconds(run: Callable[[Bench], object], bench: Bench) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run(bench)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS / "scoring.json")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode(), quiet():
        cache = Path(temporary, "cache")
        os.environ["LLFAST_CACHE"] = str(cache)
        folder = options.folder or Path(temporary, "model")
        if options.measure_memory:
            print(json.dumps(measure_memory(options.measure_memory, load_bench(folder))))
            return
        make_bench(folder, options.texts, options.layers, options.dtype)
        report.write(run_all(options, folder, cache), options.out)
    print(f"wrote {options.out}")


def run_all(options: argparse.Namespace, folder: Path, cache: Path) -> dict[str, Any]:
    """All of the measurements, as what the JSON holds."""
    bench = load_bench(folder)
    worst = check(bench)
    tokens = int(bench.tokens().token_counts.sum())
    runs: dict[str, Callable[[Bench], object]] = {
        **PROVIDERS,
        "body alone": run_body,
        "body alone, one by one": run_body_one_by_one,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    flops = []
    for _ in range(options.repetitions):
        for name, run in runs.items():
            shutil.rmtree(cache, ignore_errors=True)  # every provider tokenises
            times[name].append(seconds(run, bench))
        flops.append(matmul_flops(bench))
    # 2 FLOP a weight and scored token; the embeddings count once, as the head. Attention is left
    # out: at these lengths it is 2 % of it.
    work = 2 * tokens * sum(p.numel() for p in bench.model.parameters())
    found: dict[str, Any] = {
        "benchmark": "scoring",
        "command": "python benchmarks/bench_scoring.py "
        f"--texts {options.texts} --layers {options.layers} --dtype {options.dtype} "
        f"--repetitions {options.repetitions}",
        "model": {
            "shape": f"gpt2, {options.layers} layers",
            "parameters": sum(p.numel() for p in bench.model.parameters()),
            "vocabulary": VOCABULARY,
            "dtype": options.dtype,
        },
        "texts": options.texts,
        "tokens": tokens,
        "repetitions": options.repetitions,
        "largest_relative_difference": worst,
        "seconds": {name: report.spread(each) for name, each in times.items()},
        "tokens_per_second": {
            name: report.spread([tokens / each for each in times[name]]) for name in PROVIDERS
        },
        "llfast_over": {
            peer: {
                "ratio": report.paired(times[peer], times["llfast"]),
                "ceiling": report.paired(times[peer], times["body alone"]),
            }
            for peer in ("papers", "padded loop")
        },
        "share_of_matmul": report.spread(
            [work / time / rate for time, rate in zip(times["llfast"], flops, strict=True)]
        ),
        "linear": linear_path(bench.model.device, bench.model.dtype, model=bench.model),
        "matmul_gflops": report.spread([rate / 1e9 for rate in flops]),
        "peak_memory_mib": {
            what: measured_elsewhere([__file__, "--measure-memory", what, "--folder", str(folder)])
            for what in (*PROVIDERS, "papers/head", "llfast/head")
        },
        "hardware": report.hardware(),
        "versions": report.versions("torch", "transformers", "llfast"),
        "commit": report.commit(),
    }
    show(found)
    return found


def show(found: dict[str, Any]) -> None:
    """Print what matters of a report."""
    for name, rate in found["tokens_per_second"].items():
        memory = found["peak_memory_mib"][name]
        print(f"{name:12s} {rate['median']:8.0f} tokens/s, {memory:6.0f} MiB at its peak")
    for peer, each in found["llfast_over"].items():
        ratio, ceiling = each["ratio"], each["ceiling"]
        print(
            f"llfast over {peer}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            f", ceiling {ceiling['median']:.2f}"
        )
    share, memory = found["share_of_matmul"], found["peak_memory_mib"]
    print(f"llfast runs at {100 * share['median']:.0f} % of the rate of torch's matrix product")
    print(f"head: {memory['llfast/head']} MiB, the papers' {memory['papers/head']} MiB")


if __name__ == "__main__":
    main()

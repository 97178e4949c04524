"""Tokens a second of `llfast.score` on a GPU, in batches of several sizes, beside other ways.

    python benchmarks/scoring_on_gpu.py [--out FILE]

Claim: the default size of a batch (`default_token_budget`) is within a tenth of the best, for 1,000
texts, of a narrow model as of a wide one. How much faster it is than the papers' procedure and a
padded loop is reported, and so is its share of the rate of `torch.mm` in the model's own sizes.

Models have random weights in bf16 and are made on the device; lengths of texts are drawn as those
of 1,024 bytes of English. All that is measured takes turns within a repetition. FLOPs are counted
of the texts' own tokens: neither padding nor dummy rows are work. The papers' procedure is given
only some of the texts.

The JSON is written after every measurement, so that a run that is killed keeps what it had.
`--device cpu --quick` shows that all of it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llfast
from llfast.batches import given_tokens, plan_batches
from llfast.bench import report
from llfast.bench.products import TORCH_MM, product_rates
from llfast.bench.shapes import SHAPES, Flops
from llfast.devices import default_token_budget

RESULTS = Path(__file__).parent / "results"
# What a wide model takes for its dummy rows in larger batches would be most of the time.
MODELS = {
    "GPT-2": (*SHAPES["GPT-2"], (2048, 4096, 8192, 16384, 32768)),
    "Llama-3-8B": (*SHAPES["Llama-3-8B"], (2048, 4096, 8192)),
}
QUICK_MODELS = {
    "small": (
        "llama",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 1000,
        },
        (256,),
    )
}
TEXTS, QUICK_TEXTS = 1000, 8
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
MEAN, DEVIATION, LONGEST = 275, 60, 1024  # tokens of a text
PADDED_ROWS = 8
MOST_OVER_BEST = 1.10
TOLERANCES = {"cuda": 2e-2, "cpu": 1e-5}  # of a text's log-likelihood; peers round logits to bf16

Texts = Sequence[np.ndarray]


class Bench:
    """One model on the device, and texts.

    Attributes:
        seconds: a token, of every way, one a repetition; not all are given all texts.
    """

    def __init__(
        self,
        kind: str,
        sizes: Mapping[str, Any],
        budgets: Sequence[int],
        texts: int,
        device: torch.device,
    ) -> None:
        config = AutoConfig.for_model(
            kind, bos_token_id=0, eos_token_id=0, pad_token_id=None, **sizes
        )
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[device.type])
        self.device, self.model = device, model.eval()
        rng = np.random.default_rng(0)
        lengths = rng.normal(MEAN, DEVIATION, texts).clip(16, LONGEST).astype(int)
        self.ids = [rng.integers(1, config.vocab_size, n).astype(np.int32) for n in lengths]
        self.default = default_token_budget(device, config)
        self.budgets = [self.default, *sorted({*budgets} - {self.default})]
        self.flops = Flops.of(config)
        self.seconds: dict[str, list[float]] = {}
        self.products: list[float] = []
        self.plain: np.ndarray | None = None  # log-likelihoods of the first way, the default
        self.differences: dict[str, float] = {}  # from those, of a text's sum, at most

    def warm_up(self) -> None:
        """Compile, and load what a process loads once."""
        few = self.ids[: len(self.ids) // 8]
        self._llfast(few, self.default)
        self._papers(few[:1])
        self._padded(few[:PADDED_ROWS])

    def repeat(self, save: Callable[[], None]) -> None:
        """Measure everything once more, the default first."""
        rates = product_rates(
            self.flops.linear, self.default, self.model.dtype, self.device, packed=False
        )
        self.products.append(rates[TORCH_MM])
        for budget in self.budgets:
            self._time(f"llfast {budget}", 1, lambda ids, n=budget: self._llfast(ids, n))
            save()
        self._time("papers", max(len(self.ids) // 16, 1), self._papers)
        self._time("padded loop", max(len(self.ids) // 128, 1), self._padded)
        save()

    def _time(self, name: str, step: int, run: Callable[[Texts], np.ndarray]) -> None:
        """Run on every so many-th text; the same values are wanted of all."""
        ids = self.ids[::step]
        start = time.perf_counter()
        values = run(ids)  # ends with numbers on the host
        seconds = time.perf_counter() - start
        self.seconds.setdefault(name, []).append(seconds / sum(map(len, ids)))
        self.plain = values if self.plain is None else self.plain
        plain = self.plain[::step]
        self.differences[name] = float(abs(values / plain - 1).max())

    def _llfast(self, ids: Texts, budget: int) -> np.ndarray:
        return llfast.score(self.model, token_ids=ids, token_budget=budget, progress=False).values

    @torch.inference_mode()
    def _papers(self, ids: Texts) -> np.ndarray:
        """One text at a time, all logits, one Python float a token (arXiv 2502.16173)."""
        values = []
        for each in ids:
            given = torch.from_numpy(each.astype(np.int64))[None].to(self.device)
            logprobs = torch.log_softmax(self.model(given).logits, dim=-1)
            values.append(
                sum(logprobs[0, n - 1, given[0, n]].item() for n in range(1, given.shape[1]))
            )
        return np.array(values)

    @torch.inference_mode()
    def _padded(self, ids: Texts) -> np.ndarray:
        """Eight texts at a time, padded right; all logits, then a gather."""
        values: list[float] = []
        for start in range(0, len(ids), PADDED_ROWS):
            chunk = [torch.from_numpy(each.astype(np.int64)) for each in ids[start:][:PADDED_ROWS]]
            given = torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True).to(self.device)
            counted = torch.nn.utils.rnn.pad_sequence(
                [torch.ones(len(each) - 1) for each in chunk], batch_first=True
            )
            logits = self.model(given, use_cache=False).logits[:, :-1]
            chosen = torch.log_softmax(logits, dim=-1).gather(-1, given[:, 1:, None])[..., 0]
            values += (chosen.float() * counted.to(self.device)).sum(-1).tolist()
        return np.array(values)

    def found(self) -> dict[str, Any]:
        """All that was measured."""
        counts = np.array([len(each) for each in self.ids])
        shapes = [(1, int(count)) for count in counts]
        work = self.flops.body(shapes) + self.flops.head(int(counts.sum() - len(counts)))
        ours = self.seconds[f"llfast {self.default}"]
        rates = [work / counts.sum() / each for each in ours]
        return {
            "texts": len(counts),
            "tokens": int(counts.sum()),
            "default_budget": self.default,
            "tokens_run": {str(budget): self._run(budget) for budget in self.budgets},
            "tokens_a_second": {
                name: report.spread([1 / one for one in each])
                for name, each in self.seconds.items()
            },
            "over_default": {
                name: report.paired(each, ours[: len(each)]) for name, each in self.seconds.items()
            },
            "share_of_matmul": report.paired(rates, self.products),
            "matmul_flops": report.spread(self.products),
            "differences": self.differences,
            "agree": max(self.differences.values()) <= TOLERANCES[self.device.type],
        }

    def _run(self, budget: int) -> int:
        """The tokens that run, padding and dummy rows included."""
        return sum(math.prod(b.shape) for b in plan_batches(given_tokens(self.ids, None), budget))


def measure(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Model after model, each for its share of the time."""
    models = QUICK_MODELS if options.quick else MODELS
    texts = QUICK_TEXTS if options.quick else TEXTS
    done: dict[str, Any] = {}
    for number, (name, shape) in enumerate(models.items()):
        begin = time.monotonic()
        bench = Bench(*shape, texts, torch.device(options.device))
        bench.warm_up()

        def save_all(bench: Bench = bench, name: str = name) -> None:
            done[name] = bench.found()
            save(done)

        most, took = options.most_seconds / len(models), 0.0
        for repetition in range(options.repetitions):
            start = time.monotonic()
            if repetition and start - begin + took > most:
                break
            bench.repeat(save_all)
            took = time.monotonic() - start
            print(f"{name}: {took:.1f} s a repetition", file=sys.stderr, flush=True)
        del bench, save_all
        if options.device == "cuda" and number + 1 < len(models):
            torch.cuda.empty_cache()


def main() -> int:
    """Measure, print, and write the JSON; 1 if anything is wrong or clearly not the best."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--most-seconds", type=float, default=200.0, help="for all models")
    parser.add_argument("--quick", action="store_true", help="a small model; written only to --out")
    parser.add_argument("--commit", help="which is measured, where there is no repository")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or (None if options.quick else RESULTS / "scoring_gpu.json")
    latest: dict[str, Any] = {}

    def save(models: dict[str, Any]) -> None:
        latest.update(models)
        found = {
            "benchmark": "scoring on a GPU",
            "command": "python benchmarks/scoring_on_gpu.py",
            "commit": options.commit or report.commit(),
            "hardware": report.hardware(),
            "versions": report.versions("llfast", "torch", "triton", "transformers"),
            "dtype": str(DTYPES[options.device]).removeprefix("torch."),
            "models": models,
        }
        if out is not None:
            report.write(found, out)

    measure(options, save)
    near = [show(shape, each) for shape, each in latest.items()]
    return 0 if all(near) else 1


def show(shape: str, found: dict[str, Any]) -> bool:
    """Print what was found of a model; whether all agree, and the default is near the best."""
    print(f"{shape}: {found['texts']} texts, {found['tokens']:,} tokens")
    for name, rate in found["tokens_a_second"].items():
        over = found["over_default"][name]
        run = found["tokens_run"].get(name.removeprefix("llfast "))
        more = "" if run is None else f", runs {run / found['tokens']:.2f} of the tokens"
        print(
            f"  {name}: {rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f}) tokens/s, "
            f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f}) of the default's time"
            f"{more}"
        )
    share = found["share_of_matmul"]
    print(f"  default, {found['default_budget']}: {share['median']:.2f} of torch.mm's FLOP/s")
    best = min(
        over["median"] for name, over in found["over_default"].items() if name.startswith("llfast")
    )
    near = best * MOST_OVER_BEST >= 1
    print(f"  {'met   ' if near else 'MISSED'} default over the best: {1 / best:.2f}")
    if not found["agree"]:
        print(f"  log-likelihoods DO NOT AGREE: {found['differences']}")
    return near and found["agree"]


if __name__ == "__main__":
    sys.exit(main())

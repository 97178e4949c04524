"""Models an hour and tokens a second of `llfast.score`, and what bounds them on this machine.

    open ── tokenise ── read ─▶ body ─▶ head ── store
            encode_batch  disk   torch.mm  torch.mm  write and fsync

A model is scored the way that users score it: from a folder whose files no cache holds, on texts
that are tokenised anew, into a store on the disk. Below each part is what it is held against,
measured in the same run, in turn with it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llfast.batches import model_max_length, plan_batches, tokenize
from llfast.devices import default_token_budget, parse_device, resolve_device
from llfast.dtypes import dtype_name, parse_dtype
from llfast.kernels import instruction_set
from llfast.linear import PACKED, linear_path
from llfast.models import open_model
from llfast.paging import LoadingStatistics
from llfast.scoring import score
from llfast.store import Store
from llfast.texts import TextSet
from llfast.traits import rope_limits
from llfast.zoo_corpora import installed_corpora
from llfast.zoo_training import train_tokenizer

from .loading import forget, read_rate, sequential_rate
from .phases import BODY, HEAD, OTHER, PARTS, READ, STORE, TOKENISE, Phases
from .products import product_rates
from .report import commit, hardware, paired, spread, versions
from .shapes import Flops, check_shapes, make_checkpoint

DEFAULT_SHAPES = {"cpu": ("stories15M", "GPT-2"), "cuda": ("GPT-2", "Llama-3.2-1B", "Llama-3-8B")}
DEFAULT_TEXTS = {"cpu": 20, "cuda": 2000}
_VERSIONS = ("llfast", "torch", "transformers", "tokenizers", "pyarrow")
_VOCABULARY = 32_000  # of the tokenizer of models that are made; no shape has fewer words
_STORED_DTYPE = torch.bfloat16  # in which most checkpoints come
_SETTLED_SECONDS = 60  # the digest of a file that was written just now would not be remembered
FLOP_FORMULA = (
    "2 FLOP a weight of a linear layer and token, padding included, and 2 S d for a layer's "
    "attention and token (arXiv 2001.08361, table 1); the head: 2 T V D"
)

Rates = dict[str, list[float]]  # of each thing that a part is held against, one a repetition


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What one scoring of a model took."""

    total: float
    seconds: dict[str, float]
    read_seconds: float
    read_bytes: int
    cached_share: float | None
    stored_bytes: int
    weights: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """A model that is measured."""

    name: str
    source: Any
    device: torch.device
    dtype: torch.dtype
    flops: Flops
    shapes: list[tuple[int, int]]
    texts: int
    tokens: int
    runs: list[_Run] = field(default_factory=list)
    ceilings: dict[str, Rates] = field(default_factory=dict)

    @property
    def files(self) -> Sequence[Path]:
        files: Sequence[Path] = self.source.checkpoint.weights
        return files

    @property
    def padded_tokens(self) -> int:
        return sum(rows * length for rows, length in self.shapes)


def measure(
    shapes: Sequence[str] | None = None,
    *,
    models: Sequence[str] = (),
    texts: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    repetitions: int = 3,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure shapes, which are made for it, and checkpoints that are there.

    Args:
        shapes: of `SHAPES`, with random weights; by default some that suit the device, unless
            there are `models`.
        models: checkpoint folders.
        texts: how many texts of up to 1,024 bytes are scored.
        dtype: as for `score`; weights that are made are stored in it, or in bf16.
        device: "auto", "cpu" or "cuda".
        repetitions: of everything, in turn.
        folder: where checkpoints and the store are written, in a folder that is removed again; by
            default where temporary files go.

    Returns: what `show` prints; rates a second. `seconds` are those of one model, from its folder
        to its row in a store. Of `read`, they are those that the computation waited, and
        `busy_seconds` those in which something was read. Where a share of a ceiling is above 1,
        llfast was faster than what it is held against.

    Raises:
        CheckpointError: if a folder holds no checkpoint that can be scored.
        TextSetError: if the Python installation has no sources to make texts of.
        ValueError: for an unknown shape, dtype or device, and no texts; for mixtures of experts.
        OSError: if the folder cannot be written.
    """
    for name, value in (("texts", texts), ("repetitions", repetitions)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    kind = parse_device(device).type
    shapes = (() if models else DEFAULT_SHAPES[kind]) if shapes is None else shapes
    check_shapes(shapes)
    stored_dtype = _STORED_DTYPE if dtype == "auto" else parse_dtype(dtype)
    with (
        tempfile.TemporaryDirectory(prefix="llfast-throughput-", dir=folder) as made,
        _cache_of_its_own(Path(made) / "cache") as cache,
    ):
        corpora = installed_corpora()
        sample, _ = corpora.evaluation_texts(DEFAULT_TEXTS[kind] if texts is None else texts)
        tokenizer = train_tokenizer(corpora.training, _VOCABULARY) if shapes else None
        folders = [(each, each) for each in models]
        for name in dict.fromkeys(shapes):
            place = Path(made) / name
            make_checkpoint(place, name, tokenizer, dtype=stored_dtype, device=torch.device(kind))
            _age(place)
            folders.append((name, str(place)))
        sources = [open_model(place, name=name) for name, place in folders]
        digests = set(cache.iterdir())  # of files; a checkpoint of the Hub comes with its own
        subjects = [_subject(each, sample, dtype, device) for each in sources]
        store = Store(Path(made) / "store")
        for subject in subjects:  # what is loaded once in a process is loaded
            _score(subject, TextSet.from_texts(sample.texts[:1]), store)
        for _ in range(repetitions):
            for subject in subjects:
                for path in set(cache.iterdir()) - digests:  # token ids
                    path.unlink()
                forget(subject.files)
                subject.runs.append(_score(subject, sample, store))
                _hold_against(subject, sample, Path(made))
    return {
        "benchmark": "throughput",
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(*_VERSIONS),
        "device": str(subjects[0].device),
        "kernel": instruction_set(subjects[0].device),
        "texts": len(sample),
        "repetitions": repetitions,
        "flop_formula": FLOP_FORMULA,
        "models": [_summary(each) for each in subjects],
    }


def _subject(source: Any, sample: TextSet, dtype: str, device: str) -> _Subject:
    """All that is known of a model before it is scored."""
    place, own = resolve_device(device, source), source.tokenizer()
    tokens = tokenize(sample, own, "paper", model_max_length(source.config, own, "paper"))
    limits = [limit for _, limit in rope_limits(source.config)]
    batches = plan_batches(tokens, default_token_budget(place, source.config), limits=limits)
    return _Subject(
        name=source.name,
        source=source,
        device=place,
        dtype=source.dtype(dtype, place),
        flops=Flops.of(source.config),
        shapes=[batch.shape for batch in batches],
        texts=len(sample),
        tokens=int(tokens.token_counts.sum()),
    )


def _score(subject: _Subject, sample: TextSet, store: Store) -> _Run:
    """Score a model from its folder into a store, and watch where the time goes."""
    phases, loading = Phases(subject.device), LoadingStatistics()
    before = store.shards(sample.digest)
    with phases.watch():
        start = time.perf_counter()
        result = score(
            open_model(subject.source.checkpoint.folder, name=subject.name),
            sample,
            dtype=dtype_name(subject.dtype),
            device=str(subject.device),
            loading=loading,
            progress=False,
        )
        store.add(result)
        total = time.perf_counter() - start
    new = store.shards(sample.digest).items() - before.items()
    pages = loading.pages  # none where the model was loaded whole
    cached = sum(page.cached_bytes for page in pages)
    from_disk = sum(page.disk_bytes for page in pages)
    return _Run(
        total=total,
        seconds=phases.seconds,
        read_seconds=loading.read_seconds if pages else phases.seconds[READ],
        read_bytes=sum(page.nbytes for page in pages)
        if pages
        else subject.source.checkpoint.weight_bytes,
        cached_share=cached / (cached + from_disk) if pages else None,
        stored_bytes=sum(size for _, size in new),
        weights=result.provenance["weights"],
    )


def _hold_against(subject: _Subject, sample: TextSet, folder: Path) -> None:
    """Measure once more what this machine can do of each part; units are those of `_work`."""
    size = subject.runs[-1].stored_bytes

    def add(part: str, rates: Mapping[str, float]) -> None:
        for name, rate in rates.items():
            subject.ceilings.setdefault(part, {}).setdefault(name, []).append(rate)

    backend = getattr(subject.source.tokenizer(), "backend_tokenizer", None)
    if backend is not None:
        start = time.perf_counter()
        backend.encode_batch(list(sample.texts))
        add(TOKENISE, {"encode_batch": len(sample) / (time.perf_counter() - start)})
    for name, rate in (("llfast's reader alone", read_rate), ("one reader", sequential_rate)):
        forget(subject.files)
        add(READ, {name: rate(subject.files)})
    positions = max(rows * length for rows, length in subject.shapes)
    path = linear_path(subject.device, subject.dtype)
    flops = subject.flops
    for part, linear in ((BODY, flops.linear), (HEAD, {(flops.width, flops.vocabulary): 1})):
        rates = product_rates(
            linear, positions, subject.dtype, subject.device, packed=path == PACKED
        )
        add(part, rates)
    add(STORE, {"write and fsync": size / _write_seconds(folder, size)})


def _summary(subject: _Subject) -> dict[str, Any]:
    runs = subject.runs
    totals = [run.total for run in runs]
    parts = {part: _part(part, subject) for part in (*PARTS, OTHER)}
    shares = [run.cached_share for run in runs if run.cached_share is not None]
    checkpoint = subject.source.checkpoint
    return {
        "name": subject.name,
        "type": subject.source.config.model_type,
        "parameters": checkpoint.parameters,
        "weight_bytes": checkpoint.weight_bytes,
        "dtype": dtype_name(subject.dtype),
        "weights": runs[-1].weights,
        "tokens": subject.tokens,
        "padded_tokens": subject.padded_tokens,
        "seconds": spread(totals),
        "models_an_hour": spread([3600 / total for total in totals]),
        "tokens_a_second": spread([subject.tokens / total for total in totals]),
        "cached_share": spread(shares) if shares else None,
        "parts": parts,
        "bound": bound(parts),
        "runs": [{"seconds": run.total, "parts": run.seconds} for run in runs],
    }


def _part(part: str, subject: _Subject) -> dict[str, Any]:
    """What a part took, beside what this machine can do of it."""
    runs, rates = subject.runs, subject.ceilings.get(part, {})
    seconds = [run.seconds[part] for run in runs]
    busy = [run.read_seconds for run in runs] if part == READ else seconds
    unit, work = _work(part, subject, runs[-1])
    own = [work / each for each in busy] if unit and all(busy) else None
    best = max(rates, key=lambda name: spread(rates[name])["median"], default=None)
    return {
        "seconds": spread(seconds),
        "share_of_time": paired(seconds, [run.total for run in runs]),
        "busy_seconds": spread(busy),
        "unit": unit,
        "work": work,
        "rate": None if own is None else spread(own),
        "ceilings": {name: spread(each) for name, each in rates.items()},
        "ceiling": best,
        "share_of_ceiling": None if own is None or best is None else paired(own, rates[best]),
    }


def _work(part: str, subject: _Subject, run: _Run) -> tuple[str | None, int]:
    """What a part has to do, and in which unit."""
    flops = subject.flops
    return {
        TOKENISE: ("texts", subject.texts),
        READ: ("bytes", run.read_bytes),
        BODY: ("FLOP", flops.body(subject.shapes)),
        HEAD: ("FLOP", flops.head(subject.tokens)),
        STORE: ("bytes", run.stored_bytes),
    }.get(part, (None, 0))


def bound(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The part that takes most of the time, and a line that says so."""
    part = max(parts, key=lambda name: float(parts[name]["share_of_time"]["median"]))
    found = parts[part]
    time_share = found["share_of_time"]["median"]
    share = found["share_of_ceiling"] and found["share_of_ceiling"]["median"]
    of_time = f"{100 * time_share:.0f} % of the time"
    if part == OTHER:
        line = f"no part bounds it: {of_time} goes to opening the model and placing its weights"
    elif share is None:
        line = f"{part} bounds it: {of_time}"
    elif part == READ:
        line = f"read bounds it: {of_time} is waiting for weights, which come at "
        line += f"{share:.2f} of the rate of {found['ceiling']}"
    else:
        line = f"{part} bounds it: {of_time}, at {share:.2f} of the rate of {found['ceiling']}"
    return {"part": part, "share_of_time": time_share, "share_of_ceiling": share, "line": line}


def _write_seconds(folder: Path, size: int) -> float:
    """How long it takes to put so many bytes into a new file on the disk."""
    path, content = folder / ".write", os.urandom(size)
    start = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - start
    finally:
        path.unlink()


def _age(folder: Path) -> None:
    """Make files look as if they had been there for a while."""
    then = time.time() - _SETTLED_SECONDS
    for path in folder.iterdir():
        os.utime(path, (then, then))


@contextlib.contextmanager
def _cache_of_its_own(folder: Path) -> Iterator[Path]:
    """Let llfast keep token ids and digests elsewhere for a while."""
    folder.mkdir()
    before = os.environ.get("LLFAST_CACHE")
    os.environ["LLFAST_CACHE"] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ["LLFAST_CACHE"]
        else:
            os.environ["LLFAST_CACHE"] = before

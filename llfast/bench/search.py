"""How fast nearest models are found: certified, exact and approximate searches beside faiss Flat.

All in one run and in turn, in the index of a store, or among models that are made up for it:
families whose members differ in some directions and, by less, in all. Answers are compared first.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llfast.basis import Basis
from llfast.memory import available_bytes
from llfast.output import human_bytes, human_seconds, print_line, print_table
from llfast.results import LogLikelihoodMatrix
from llfast.search import Hits, KLIndex, Segment, SegmentWriter, StoredIndex, import_faiss
from llfast.search.models import IndexedModel
from llfast.search.projection import Projection
from llfast.store import Store

from .report import commit, hardware, paired, spread, versions
from .timing import Copy, seconds_a_call

FLAT = "faiss Flat"
_VERSIONS = ("llfast", "numpy", "torch", "faiss-cpu", "faiss-gpu")
_MOST_SECONDS = 5.0  # a search; a slow one is asked fewer questions
_LEAST_QUESTIONS = 3
_COPIES = 9
_MODELS_A_FAMILY = 50
_BLOCK = 256  # models that are made up at once

Ask = Callable[[str], Any]


def measure(
    store: Path | None = None,
    *,
    textset: str | None = None,
    models: int = 20_000,
    texts: int = 2_000,
    questions: int = 50,
    k: int = 10,
) -> dict[str, Any]:
    """Measure in the index of a store, which is built if it is not there, or among made-up models.

    Args:
        store: the folder of results; None to make models up.
        textset: the start of a text set's digest, for a store with several.
        models: how many are made up.
        texts: of made-up models.
        questions: models of the index whose nearest are looked for, at most.
        k: how many of the nearest.

    Returns: what `show` prints; times in ms.

    Raises:
        MissingDependencyError: if faiss is not installed.
        StoreError: if the store does not have what is asked for.
        ValueError: if exact answers and certified ones are not the same.
    """
    import_faiss()
    with tempfile.TemporaryDirectory(prefix="llfast-bench-") as folder:
        start = time.perf_counter()
        if store is None:
            segment = _made_up(models, texts, Path(folder))
        else:
            index = KLIndex.build(Store(store), "certified", textset=textset)
            assert isinstance(index, StoredIndex)
            index.merge()
            segment = index.segment
        seconds = time.perf_counter() - start
        return {
            "hardware": hardware(),
            "versions": versions(*_VERSIONS),
            "commit": commit(),
            "store": None if store is None else str(store),
            "models": len(segment),
            "texts": len(segment.basis),
            "ready_seconds": seconds,
            **_measured(segment, questions, k),
        }


def _measured(segment: Segment, questions: int, k: int) -> dict[str, Any]:
    names = segment.table["name"].to_pylist()
    rng = np.random.default_rng(0)
    asked = rng.choice(len(names), min(questions, len(names)), replace=False).tolist()
    searches = _searches(segment, names, k)
    truth = {row: searches["certified"](names[row]) for row in asked}
    counts: dict[str, int] = {}
    recall: dict[str, float] = {}
    for name, ask in searches.items():
        first = seconds_a_call(partial(ask, names[asked[0]]), 1, torch.device("cpu"))
        most = counts.get("certified", len(asked))  # what the others are held against
        counts[name] = min(most, max(_LEAST_QUESTIONS, int(_MOST_SECONDS / first)))
        found = {row: ask(names[row]) for row in asked[: counts[name]]}
        if name == "exact" and any(list(found[row]) != list(truth[row]) for row in found):
            raise ValueError("certified answers must be the exact ones, got others")
        recall[name] = _recall(found, truth, names)
    times: dict[str, dict[int, float]] = {name: {} for name in searches}
    order = list(searches)
    for turn, row in enumerate(asked):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if turn < counts[name]:
                start = time.perf_counter()
                searches[name](names[row])
                times[name][row] = 1e3 * (time.perf_counter() - start)
    copy = Copy(torch.device("cpu"))
    copying = [seconds_a_call(copy, 1, torch.device("cpu")) for _ in range(_COPIES)]
    certificates = [hits.certificate for hits in truth.values()]
    rows = segment.rows
    assert rows.reduced is not None
    bounds = rows.reduced.first.nbytes + rows.reduced.rest.nbytes
    exact = statistics.median(times["exact"].values()) / 1e3
    return {
        "k": k,
        "searches": {
            name: {
                "ms": spread(list(each.values())),
                "questions": len(each),
                "recall": recall[name],
                "over_certified": paired(
                    list(each.values()), [times["certified"][row] for row in each]
                ),
            }
            for name, each in times.items()
        },
        "compared": spread([each.compared for each in certificates if each is not None]),
        "bounds_bytes": bounds,
        "points_bytes": rows.points.nbytes,
        "exact_gb_a_second": rows.points.nbytes / exact / 1e9,
        "copy_gb_a_second": spread([copy.gb / each for each in copying]),
        "lists": None
        if segment.lists is None
        else {
            "count": len(segment.lists.centroids),
            "probes": segment.lists.probes,
            "recall": segment.lists.recall,
        },
    }


def _searches(segment: Segment, names: list[str], k: int) -> dict[str, Ask]:
    """What is timed, by name; each is given a model's name."""
    modes = ["certified", "exact"] + ["approximate"] * (segment.lists is not None)
    searches: dict[str, Ask] = {}
    for mode in modes:
        searches[mode] = partial(KLIndex.of_segment(segment, mode).search, k=k)
    points = segment.rows.points
    if points.nbytes < available_bytes(torch.device("cpu")) // 2:
        flat = import_faiss().IndexFlatL2(points.shape[1])
        flat.add(points)
        rows = {name: row for row, name in enumerate(names)}
        # One more than is wanted, for a model finds itself.
        searches[FLAT] = lambda name: flat.search(points[[rows[name]]], min(k + 1, len(rows)))[1][0]
    return searches


def _recall(found: Mapping[int, Any], truth: Mapping[int, Hits], names: list[str]) -> float:
    """The share of the right answers that were found; ties broken another way do not count."""
    shares = []
    for row, answer in found.items():
        right = {hit.model for hit in truth[row]}
        if isinstance(answer, Hits):
            own = {hit.model for hit in answer}
        else:
            own = {names[number] for number in answer.tolist() if number >= 0}
        shares.append(len(own & right) / max(len(right), 1))
    return float(np.mean(shares))


def _made_up(models: int, texts: int, folder: Path) -> Segment:
    """A segment of so many models: heavy-tailed texts, families, and what members differ in."""
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 1, texts)
    families = 60 * weights * rng.standard_normal((max(models // _MODELS_A_FAMILY, 2), texts))
    directions = rng.standard_normal((40, texts))

    def block(count: int) -> np.ndarray:
        chosen = families[rng.integers(0, len(families), count)]
        shared = (6 * rng.standard_normal((count, 40))) @ directions
        values: np.ndarray = chosen + shared - 900
        values += 3 * weights * rng.standard_normal((count, texts))
        return values

    sample = block(min(models, 2000))
    basis = Basis.fit(
        LogLikelihoodMatrix(
            [f"sample {row}" for row in range(len(sample))],
            sample,
            np.full(texts, 1000.0),
            convention="made up",
        )
    )
    with SegmentWriter(folder / "new", basis, Projection.fit(basis.place(sample))) as writer:
        for at in range(0, models, _BLOCK):
            rows = range(at, min(at + _BLOCK, models))
            some = [IndexedModel(f"model {row}", "", "float32", {}) for row in rows]
            writer.append(some, basis.place(block(len(rows))))
        name = writer.finish({"shards": {}, "removed": []})
    (folder / "new").rename(folder / name)
    return Segment(folder / name)


def show(found: Mapping[str, Any]) -> None:
    """Print times side by side, and what the certified ones took."""
    where = "made-up models" if found["store"] is None else "models"
    print_table(
        ["search", "ms", "from", "to", "over certified", f"of the {found['k']} nearest"],
        [
            (
                name,
                *(f"{each['ms'][key]:.3g}" for key in ("median", "min", "max")),
                f"{each['over_certified']['median']:.2f}",
                f"{each['recall']:.1%}",
            )
            for name, each in found["searches"].items()
        ],
        title=f"{found['models']:,} {where} on {found['texts']:,} texts",
    )
    compared, copying = found["compared"], found["copy_gb_a_second"]["median"]
    print_line(
        f"certified: {compared['median']:,.0f} models compared in full ({compared['min']:,.0f} to "
        f"{compared['max']:,.0f}), bounds take {human_bytes(found['bounds_bytes'])} beside "
        f"{human_bytes(found['points_bytes'])} of vectors"
    )
    print_line(
        f"exact: reads vectors at {found['exact_gb_a_second']:.1f} GB/s; a copy reads and writes "
        f"{copying:.1f} GB/s"
    )
    if lists := found["lists"]:
        print_line(
            f"approximate: {lists['probes']} of {lists['count']:,} lists, which held "
            f"{lists['recall']:.1%} of the nearest when they were made"
        )
    print_line(f"ready in {human_seconds(found['ready_seconds'])}")

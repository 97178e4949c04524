"""What it takes to add a model to an index of a store, on disk, so that it is found."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from search_collections import CONVENTION, TEXTSET, Question, as_result, outside
from synthetic import MEAN_BYTES, Recipe, blocks

from llfast.bench import report
from llfast.results import LogLikelihoodMatrix, LogLikelihoods
from llfast.search import KLIndex
from llfast.search.segment import Segment
from llfast.search.stored import StoredIndex
from llfast.store import Store

FAMILIES = "zipf"


def measure_adding(models: int, texts: int, folder: Path, repetitions: int) -> dict[str, Any]:
    """Of a store of so many models."""
    recipe = Recipe(models=models, texts=texts, families=FAMILIES)
    path = folder / f"store-{models}x{texts}"
    shutil.rmtree(path, ignore_errors=True)
    store = _fill(Store(path), recipe)
    start = time.perf_counter()
    index = KLIndex.build(store, mode="certified")
    build_seconds = time.perf_counter() - start
    assert isinstance(index, StoredIndex)
    current = index.folder / (index.folder / "current").read_text()
    in_memory = KLIndex.of_segment(Segment(current))
    new = [_result(question) for question in outside(recipe, index.basis, repetitions)]
    times: dict[str, list[float]] = {"stored_ms": [], "in_memory_ms": [], "found_ms": []}
    for result in new:
        _time(times["stored_ms"], lambda result=result: index.add(result))
        _time(times["in_memory_ms"], lambda result=result: in_memory.add(result))
        same = dataclasses.replace(result, model=f"again {result.model}")
        (hit,) = _time(times["found_ms"], lambda same=same: index.search(same, 1))
        if (hit.model, hit.kl) != (result.model, 0.0) or in_memory.search(same, 1) != [hit]:
            raise SystemExit(f"what was added must be found, got {hit.model} for {result.model}")
    found = {
        "families": FAMILIES,
        "models": models,
        "texts": texts,
        "build_seconds": round(build_seconds, 2),
        **{what: report.spread(each) for what, each in times.items()},
    }
    # A process of its own would find them, too.
    again = KLIndex.build(Store(path), mode="certified")
    if len(again) != models + len(new):
        raise SystemExit(f"the store must have {models + len(new)} models, got {len(again)}")
    shutil.rmtree(path)
    return found


def _fill(store: Store, recipe: Recipe) -> Store:
    ids = [f"text {number}" for number in range(recipe.texts)]
    for names, metadata, values in blocks(recipe):
        store.add_matrix(
            LogLikelihoodMatrix(
                names,
                values.astype(np.float64),
                np.full(recipe.texts, round(MEAN_BYTES)),
                metadata,
                ids=ids,
                textset_digest=TEXTSET,
                convention=CONVENTION,
                dtypes=[each["dtype"] for each in metadata],
            )
        )
    return store


def _result(question: Question) -> LogLikelihoods:
    assert isinstance(question.ask, LogLikelihoods)
    asked = question.ask
    return as_result(asked.model, asked.values, asked.dtype)


def _time(times: list[float], call: Any) -> Any:
    start = time.perf_counter()
    found = call()
    times.append(1e3 * (time.perf_counter() - start))
    return found

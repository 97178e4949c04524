"""An index that was just opened: its first searches, and the memory that it takes."""

from __future__ import annotations

import gc
import mmap
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loading_peers import cached_share, drop
from search_collections import Question

from llfast.bench import report
from llfast.search import KLIndex
from llfast.search.segment import Segment


def first_touches(path: Path, questions: Sequence[Question], k: int) -> dict[str, Any]:
    """Searches of rows that this process has not seen, cached by the kernel and not."""
    found: dict[str, Any] = {}
    for what in ("first_touch_ms", "cold_ms"):
        segment = Segment(path)
        index = KLIndex.of_segment(segment)
        index.search(segment.table["name"][0].as_py(), k)
        times, shares = [], []
        for question in questions:
            if what == "cold_ms":
                # The kernel keeps what is mapped; and rows that were checked before are few.
                segment.rows.points.base.madvise(mmap.MADV_DONTNEED)
                drop([path / "points.f32"])
                shares.append(cached_share([path / "points.f32"]))
            start = time.perf_counter()
            index.search(question.ask, k)
            times.append(1e3 * (time.perf_counter() - start))
        found[what] = report.spread(times)
        if shares:
            found["cold_cached_share"] = round(max(shares), 4)
        del index, segment
        gc.collect()
    return found


def memory_of(segment: Segment, names: dict[str, int]) -> dict[str, Any]:
    """What the index holds beside the mapped vectors, in bytes."""
    rows = segment.rows
    assert segment.projection is not None
    assert rows.reduced is not None
    lists = segment.lists
    arrays = {
        "first": rows.reduced.first.nbytes,
        "rest": rows.reduced.rest.nbytes,
        "directions": segment.projection.directions.nbytes,
        "lists": 0 if lists is None else lists.centroids.nbytes + lists.numbers.nbytes,
        "checks": 9 * len(segment),  # a sum, and whether it was compared
        "names": sum(map(sys.getsizeof, [*names, list(names), names])),
    }
    total = sum(arrays.values())
    return {
        "arrays": arrays,
        "share_of_vectors": float(f"{total / rows.points.nbytes:.4g}"),
        "table_bytes": 2 * segment.table.nbytes,  # revisions, dtypes, metadata; looked up by row
    }


def lists_of(segment: Segment) -> dict[str, Any] | None:
    """What an approximate search goes by; None if there are no lists."""
    lists = segment.lists
    if lists is None:
        return None
    assert segment.rows.reduced is not None
    first = segment.rows.reduced.first
    return {
        "count": len(lists.centroids),
        "probes": lists.probes,
        "recall_when_built": round(lists.recall, 4),
        "more_memory_bytes": first.nbytes + 8 * len(first),  # list by list, and their rows
    }

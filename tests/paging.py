"""Scoring by pages in as little memory as it takes."""

import re

import pytest

import llfast
from llfast.paging import LoadingStatistics

# Kept small, or a unit of its own: the limits that `units` has for both.
LIMITS = ("LARGEST_KEPT_EMBEDDING_BYTES", "LARGEST_KEPT_LAYER_BYTES")


def least_budget(folder, *texts, **options):
    """The least `memory_budget` that is not refused: room for a batch, and for no other."""
    with pytest.raises(ValueError, match="memory_budget must hold two pages") as caught:
        llfast.score(folder, *texts, weights="paged", memory_budget=1, **options)
    number = re.search(r"it takes more than ([\d,]+)$", str(caught.value))[1]
    return int(number.replace(",", "")) + 1


def score_paged(folder, *texts, memory_budget="1GiB", **options):
    """The result, and what loading took."""
    statistics = LoadingStatistics()
    result = llfast.score(
        folder,
        *texts,
        weights="paged",
        memory_budget=memory_budget,
        loading=statistics,
        per_token=True,
        **options,
    )
    assert result.provenance["weights"] == "paged"
    return result, statistics


def check_same(one, other):
    """The same bits of every text and every token."""
    assert one.values.tobytes() == other.values.tobytes()
    assert one.logprobs.values.tobytes() == other.logprobs.values.tobytes()
    assert one.token_counts.tolist() == other.token_counts.tolist()
    assert one.token_budgets.tolist() == other.token_budgets.tolist()
    provenance = [{**each.provenance, "weights": ""} for each in (one, other)]
    assert provenance[0] == provenance[1]

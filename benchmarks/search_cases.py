"""One collection: every provider is asked the same, in turn."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import search_peers
import torch
from cpu_limits import Limits
from memory import status_kib
from search_collections import Question, Questions, build, held_in, outside
from search_opening import first_touches, lists_of, memory_of
from synthetic import Recipe

from llfast.bench import report
from llfast.errors import LlfastWarning
from llfast.intervals import half_variances
from llfast.search import Hits, KLIndex
from llfast.search.searched import first_bounds
from llfast.search.segment import Segment

K = 10
CERTIFIED, EXACT, INTERVALS = "llfast certified", "llfast exact", "llfast certified, intervals"
APPROXIMATE = "llfast approximate"
# Timed in between, to hold searches against.
FIRST_PASS, READ_FIRST, READ = "first pass", "read of its bytes", "read"
BATCH, BATCHES = 32, 3
SETTLE_SECONDS = 0.01  # for some milliseconds after a call, OpenMP's threads spin in others' way
MOST_SECONDS = 15.0  # a provider and kind of question; a slow one is asked fewer of them
READ_BYTES = 512 << 20  # far beyond any cache
CHECKED = 2  # questions of each kind that are answered in fp64 by brute force, too
TOUCHES = 10  # searches of an index that was just opened

Ask = Callable[[Questions], Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        questions: of each kind.
        budget: of the peers; None for none of them.
        read_bytes: how much is read to find out memory's rate.
    """

    questions: int
    budget: search_peers.Budget | None
    read_bytes: int = READ_BYTES


class Case:
    """A collection's index, opened, with everything that searches it."""

    def __init__(self, recipe: Recipe, path: Path, plan: Plan, limits: Limits) -> None:
        self.recipe, self.plan = recipe, plan
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed would be used again unseen
        before, start = status_kib("RssAnon"), time.perf_counter()
        self.segment = segment = Segment(path)
        self.certified = KLIndex.of_segment(segment)
        self.certified.search(segment.table["name"][0].as_py(), K)  # what is made when first asked
        self.open_seconds = round(time.perf_counter() - start, 3)
        self.resident_mib = round((status_kib("RssAnon") - before) / 1024, 1)
        self.exact = KLIndex.of_segment(segment, "exact")
        self.approximate = KLIndex.of_segment(segment, "approximate")
        self.names = {name: row for row, name in enumerate(segment.table["name"].to_pylist())}
        self.built = search_peers.Built(waiting=list(search_peers.PEERS))
        self._read = torch.ones(plan.read_bytes // 4)
        self._limits = limits
        self._farthest: dict[Question, float] = {}

    def next_round(self) -> None:
        """Build those of the waiting peers that fit into memory, when the last ones are gone."""
        waiting, self.built = self.built.waiting, search_peers.Built()
        if self.plan.budget is not None:
            points, threads = self.segment.rows.points, torch.get_num_threads()
            self.built = search_peers.build_peers(points, threads, self.plan.budget, waiting)
        made, left_out = ", ".join(self.built.peers), self.built.left_out
        say(f"  built {made or 'no others'}; left out {left_out or 'none'}")

    def providers(self) -> dict[str, Ask]:
        """What is timed."""
        searches: dict[str, Ask] = {
            CERTIFIED: lambda asked: self.certified.search(asked.asks, K),
            EXACT: lambda asked: self.exact.search(asked.asks, K),
        }
        if self.approximate.recall is not None:  # there are enough models for lists
            searches[APPROXIMATE] = lambda asked: self.approximate.search(asked.asks, K)
        for name, peer in self.built.peers.items():
            # One more than is wanted, for a model of the collection finds itself.
            searches[name] = lambda asked, peer=peer: peer.search(asked.points, K + 1)
        return searches

    def others(self) -> dict[str, Ask]:
        """What is timed in between."""
        segment, limits = self.segment, self._limits
        assert segment.projection is not None
        assert segment.rows.reduced is not None
        first = torch.from_numpy(segment.rows.reduced.first)
        reduced = segment.projection.reduce(np.zeros((1, self.recipe.texts)))

        def with_intervals(asked: Questions) -> Any:
            found = self.certified.search(asked.asks, K)
            return [hit.interval for hits in found for hit in hits]

        return {
            INTERVALS: with_intervals,
            FIRST_PASS: lambda _: first_bounds([segment.rows], reduced),
            READ_FIRST: lambda _: limits.read_seconds(first),
            READ: lambda _: limits.read_seconds(self._read),
        }

    def rows(self, answer: Any, asked: Questions) -> list[list[int]]:
        """The rows that were found for each question."""
        found = []
        for hits, question in zip(answer, asked.each, strict=True):
            if isinstance(hits, Hits):
                found.append([self.names[hit.model] for hit in hits])
            else:
                found.append([int(row) for row in hits if row != question.row and row >= 0][:K])
        return found

    def farthest(self, question: Question) -> float:
        """KL of the last of the right answers, in nats a text; what is not farther is right."""
        if question not in self._farthest:
            asked = Questions([question])
            (rows,) = self.rows(self.certified.search(asked.asks, K), asked)
            # Rounding of one KL may depend on how many are computed at once.
            limit = float(self.divergences(question, rows).max()) * (1 + 1e-12)
            self._farthest[question] = limit
        return self._farthest[question]

    def divergences(self, question: Question, rows: Sequence[int]) -> np.ndarray:
        """KL of rows, in nats a text."""
        points = self.segment.rows.points[list(rows)].astype(np.float64)
        return half_variances(points - question.point.astype(np.float64))


def measure(recipe: Recipe, folder: Path, plan: Plan, limits: Limits) -> dict[str, Any]:
    """All of a collection's figures."""
    path, built = build(recipe, folder)
    say(f"{path.name}: built in {built['seconds']:.0f} s")
    case = Case(recipe, path, plan, limits)
    asked = {
        "held in": held_in(case.segment, plan.questions),
        "outside": outside(recipe, case.segment.basis, plan.questions),
    }
    found = {
        "families": recipe.families,
        "models": recipe.models,
        "texts": recipe.texts,
        "raw_bytes": case.segment.rows.points.nbytes,
        "build": {"llfast": built},
        "left_out": {},
        "memory": {
            **memory_of(case.segment, case.names),
            "resident_mib": case.resident_mib,
        },
        "open_seconds": case.open_seconds,
        "lists": lists_of(case.segment),
        "questions": {},
    }
    while True:
        case.next_round()
        found["build"] |= case.built.took
        found["left_out"] |= case.built.left_out
        for kind, each in asked.items():
            _join(found["questions"], kind, _kind(case, kind, each))
        if not case.built.waiting:
            break
    del case
    gc.collect()
    for kind, each in asked.items():
        found["questions"][kind] |= first_touches(path, each[:TOUCHES], K)
    return found


def _join(questions: dict[str, Any], kind: str, new: dict[str, Any]) -> None:
    """Add providers that were not there yet; their ratios are to the times of their own round."""
    old = questions.setdefault(kind, new)
    for part in ("providers", "batch"):
        old[part] |= {name: each for name, each in new[part].items() if name not in old[part]}


# ------------------------------------------------------------------------------------ correctness


def _truth(case: Case, questions: Sequence[Question]) -> tuple[list[Hits], dict[str, int]]:
    """What is right, and how often each provider is asked; SystemExit if llfast is wrong."""
    asked = [Questions([question]) for question in questions]
    stride = {}
    for name, call in (case.providers() | case.others()).items():
        call(asked[0])
        seconds = min(_seconds(call, asked[0]) for _ in range(2))
        stride[name] = max(1, math.ceil(len(asked) * seconds / MOST_SECONDS))
    found = [case.certified.search(each.asks, K)[0] for each in asked]
    for at in range(0, len(asked), stride[EXACT]):
        exact = case.exact.search(asked[at].asks, K)[0]
        if _told(exact) != _told(found[at]) or found[at].certificate is None:
            raise SystemExit(f"certified must find what exact finds, got another for question {at}")
    step = max(1, -(-CHECKED // stride[EXACT])) * stride[EXACT]
    checked = range(0, min(len(asked), CHECKED * step), step)
    for at, expected in zip(checked, _brute([questions[at] for at in checked], case), strict=True):
        if _told(case.exact.search(asked[at].asks, K)[0]) != expected:
            raise SystemExit(f"exact must find what brute force finds, got another for {at}")
    return found, stride


def _told(hits: Hits) -> list[tuple[str, float]]:
    return [(hit.model, hit.kl) for hit in hits]


def _brute(questions: Sequence[Question], case: Case) -> list[list[tuple[str, float]]]:
    """The nearest models by KL of everything in fp64."""
    points, names = case.segment.rows.points, list(case.names)
    kls = np.empty((len(questions), len(points)))
    for at in range(0, len(points), 256):
        block = points[at : at + 256].astype(np.float64)
        for own, question in zip(kls, questions, strict=True):
            own[at : at + 256] = half_variances(block - question.point)
    kls *= case.segment.basis.per_nat("bits_per_byte")
    found = []
    for own, question in zip(kls, questions, strict=True):
        order = sorted((kl, name) for kl, name in zip(own.tolist(), names, strict=True))
        without = [(name, kl) for kl, name in order if case.names[name] != question.row]
        found.append(without[:K])
    return found


def _recall(case: Case, answers: Sequence[tuple[Question, Sequence[int]]]) -> float:
    """The share of the answers that are as near as the K nearest are; ties all count."""
    wanted = min(K, len(case.segment) - 1)
    right = [
        (case.divergences(question, rows) <= case.farthest(question)).sum() / wanted
        for question, rows in answers
        if rows
    ]
    return round(float(sum(right)) / len(answers), 4)


# ------------------------------------------------------------------------------------ times


def _kind(case: Case, kind: str, questions: Sequence[Question]) -> dict[str, Any]:
    """One question after the other, then in batches."""
    hits, stride = _truth(case, questions)
    searches, others = case.providers(), case.others()
    asked = [Questions([question]) for question in questions]
    recall = {}
    for name, call in searches.items():
        answers = [
            (each.each[0], case.rows(call(each), each)[0]) for each in asked[:: stride[name]]
        ]
        recall[name] = _recall(case, answers)
    say(f"  {kind}: recall {recall}")
    times = _interleaved(searches | others, asked, stride)
    providers = {
        name: {"recall": recall[name], **_beside(each, times[CERTIFIED])}
        for name, each in times.items()
        if name in searches
    }
    certificates = [each.certificate for each in hits if each.certificate is not None]
    rates = _rates(case, times)
    line = {name: each["ms"]["median"] for name, each in providers.items()}
    say(f"  {kind}: ms {line}")
    return {
        "providers": providers,
        "certified": {
            "checked_with_exact": len(asked[:: stride[EXACT]]),
            "compared": report.spread([each.compared for each in certificates]),
            "second": report.spread([each.second for each in certificates]),
            "closed_by": dict(Counter(each.closed_by for each in certificates)),
            "with_intervals": _beside(times[INTERVALS], times[CERTIFIED]),
            "first_pass_ms": report.spread([1e3 * each for each in times[FIRST_PASS].values()]),
        },
        "rates": rates,
        "batch": _batches(case, questions, stride),
    }


def _interleaved(
    calls: dict[str, Ask], asked: Sequence[Questions], stride: dict[str, int]
) -> dict[str, dict[int, float]]:
    """Seconds of each provider by question; another one is the first each time."""
    times: dict[str, dict[int, float]] = {name: {} for name in calls}
    names = list(calls)
    for at, each in enumerate(asked):
        for name in names[at % len(names) :] + names[: at % len(names)]:
            if at % stride.get(name, 1) == 0:
                time.sleep(SETTLE_SECONDS)
                times[name][at] = _seconds(calls[name], each)
    return times


def _seconds(call: Ask, asked: Questions) -> float:
    start = time.perf_counter()
    found = call(asked)
    seconds = time.perf_counter() - start
    return found if isinstance(found, float) else seconds  # a read tells its own time


def _beside(own: dict[int, float], certified: dict[int, float]) -> dict[str, Any]:
    both = [at for at in own if at in certified]
    return {
        "calls": len(own),
        "ms": report.spread([1e3 * each for each in own.values()]),
        "over_certified": report.paired([own[at] for at in both], [certified[at] for at in both]),
    }


def _rates(case: Case, times: dict[str, dict[int, float]]) -> dict[str, Any]:
    """What memory gives, and how much of it the reading providers reach."""
    read = statistics.median(case.plan.read_bytes / each for each in times[READ].values())
    found = {
        "read_gb_a_second": report.spread(
            [case.plan.read_bytes / each / 1e9 for each in times[READ].values()]
        ),
        # Of the same bytes by as many threads: at 100,000 models they fit into many an L3.
        "first_pass_share_of_read": report.paired(
            list(times[READ_FIRST].values()), list(times[FIRST_PASS].values())
        ),
    }
    nbytes = case.segment.rows.points.nbytes
    for name in (EXACT, "faiss Flat"):
        if name in times:
            shares = [nbytes / each / read for each in times[name].values()]
            found[f"{name}, share of read"] = report.spread(shares)
    return found


def _batches(
    case: Case, questions: Sequence[Question], stride: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Several questions in one call."""
    size = min(BATCH, len(questions))
    starts = range(0, len(questions) - size + 1, size)[:BATCHES]
    asked = [Questions(questions[at : at + size]) for at in starts]
    searches = case.providers()
    if case.plan.budget is None:  # so many models that a scan of them takes half a minute
        del searches[EXACT]
    recall = {}
    for name, call in searches.items():
        answers: list[tuple[Question, list[int]]] = []
        for each in asked[:1] if stride[name] > 1 or name == EXACT else asked:
            answers += zip(each.each, case.rows(call(each), each), strict=True)
        recall[name] = _recall(case, answers)
    times = _interleaved(searches, asked, {})
    found = {}
    a_question = {
        name: {at: seconds / size for at, seconds in each.items()} for name, each in times.items()
    }
    for name, each in a_question.items():
        beside = _beside(each, a_question[CERTIFIED])
        found[name] = {
            "recall": recall[name],
            "questions": size,
            "calls": beside["calls"],
            "ms_a_question": beside["ms"],
            "over_certified": beside["over_certified"],
        }
    return found


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


def quiet() -> None:
    """Without warnings of peers' modules, and of new models that are worse than the others."""
    warnings.filterwarnings("ignore", ".* are below the clip of this space", LlfastWarning)
    warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)

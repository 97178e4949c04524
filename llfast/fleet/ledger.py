"""What a store has of one text set, by model, kept up to date at the cost of what is new."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from llfast.checkpoint import TOKENIZER_FILES
from llfast.files import as_utf8
from llfast.model_list import ModelRequest
from llfast.remote import AnyPath, map_paths, with_bytes
from llfast.results import ResultKey
from llfast.runs import SCORING_VERSION
from llfast.shards import RowState, read_states
from llfast.store import Store

_COMMIT = re.compile("[0-9a-f]{40}")
_PARTS = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "*.py", *TOKENIZER_FILES)
_PART = re.compile("|".join(map(fnmatch.translate, _PARTS)))  # of a model's folder
_WORDS = 4  # of `asked_of`
_DECODER, _ASKED = json.JSONDecoder(), re.compile(r'"asked":\s*')  # of provenance
Asked: TypeAlias = tuple[str, tuple[str | None, ...] | None]  # a name, and `asked_of` it


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a model has no result.

    Attributes:
        reason: in one line.
        attempts: how often it was tried.
        is_lasting: whether the same is to be expected of another try.
        asked: what was asked for, by `asked_of`; None where the failure does not say.
        created_us: when, in microseconds since 1970, UTC.
    """

    reason: str
    attempts: int
    is_lasting: bool
    asked: tuple[str | None, ...] | None
    created_us: int


class Ledger:
    """Results and failures on one text set under one convention; layers are passed over.

    Rows may come in any order and in any portions: a compaction meanwhile changes nothing.
    """

    def __init__(self, store: Store, textset_digest: str, convention: str) -> None:
        self._store, self._digest, self._convention = store, textset_digest, convention
        self._shards: set[str] = set()
        self._completed: dict[ResultKey, int] = {}
        self._removed: dict[ResultKey, int] = {}
        self._failures: dict[str, dict[tuple[ResultKey, int, int], Failure]] = {}
        self._by_name: dict[str, list[ResultKey]] = {}
        self._words: dict[ResultKey, tuple[str | None, ...]] = {}  # where results say theirs
        self._failed: dict[Asked, int] = {}  # how often, when last tried, as far as was noted

    def refresh(self) -> None:
        """Read what has come since."""
        is_moving = True
        while is_moving:
            is_moving = False
            folder, sizes = self._store.partition(self._digest), self._store.shards(self._digest)
            names = [name for name in sizes if name not in self._shards]
            new = [with_bytes(folder / name, sizes[name]) for name in names]
            for shard, states in zip(new, map_paths(_states, new), strict=True):
                if states is None:  # merged with others: the next listing has these
                    is_moving = True
                    continue
                self._shards.add(shard.name)
                for state in states:
                    self._enter(state)

    def add(self, key: ResultKey) -> None:
        """Count a row that was written just now; it will be read with the next shards."""
        self._enter(RowState(key, "complete", time.time_ns() // 1000, None, None))

    def note(self, request: ModelRequest, dtype: str, failed: int) -> None:
        """Take in what came of a try: results of other branches do not make up for a failure.

        Args:
            request: the model.
            dtype: unless it has its own.
            failed: how often it has failed, this time included; 0 if it has not.
        """
        asked = name_of(request), asked_of(request, dtype)
        if failed:
            self._failed[asked] = failed
        else:
            self._failed.pop(asked, None)

    def __contains__(self, key: ResultKey) -> bool:
        """Whether there is a complete row."""
        created = self._completed.get(key)
        return created is not None and created >= self._removed.get(key, created)

    def completed_us(self) -> dict[ResultKey, int]:
        """When each complete row was written, in microseconds since 1970."""
        return {key: when for key, when in self._completed.items() if key in self}

    def failure(self, request: ModelRequest, dtype: str) -> Failure | None:
        """The last failure of what is asked for, unless it was done or its folder written since."""
        name, asked = name_of(request), asked_of(request, dtype)
        commit = request.revision if _COMMIT.fullmatch(request.revision or "") else None
        keys = self._keys(request, dtype)
        results = [self._completed[key] for key in keys if commit in (None, key.revision)]
        done = max(results, default=0)
        # What a branch or tag has become is not known: any result may be its, unless it was tried
        # since, whatever clocks say. A failure of more attempts was before that.
        failed = self._failed.get((name, asked), 0) if self.has(request, dtype) is None else 0
        found = [
            each
            for each in self._counting(name, _changed_us(request))
            if each.asked in (None, asked) and (each.created_us > done or each.attempts <= failed)
        ]
        return max(found, key=_order, default=None)

    def tries(self, requests: Sequence[ModelRequest], dtype: str) -> dict[Asked, int]:
        """How often models were tried whose failures count now: what no longer counts begins anew.

        Args:
            requests: the models.
            dtype: unless one has its own.
        """
        found = [(name_of(each), self.failure(each, dtype)) for each in requests]
        return {(name, each.asked): each.attempts for name, each in found if each is not None}

    def failures(self) -> dict[str, Failure]:
        """The last failure of each name that has had no result since."""
        found: dict[str, Failure] = {}
        for name in self._failures:
            done = max((self._completed[key] for key in self._by_name.get(name, ())), default=0)
            if counting := self._counting(name, done):
                found[name] = max(counting, key=_order)
        return found

    def has(self, request: ModelRequest, dtype: str, *, by_name: bool = False) -> bool | None:
        """Whether a model's result is there; None where its name alone does not tell.

        That is so of a branch or tag of the Hub, and of other tokenizers and adapters. If these are
        to go `by_name`, they have the results that were asked for in the same words, whatever the
        words mean now, and without a revision those that do not say. A folder that was written
        since has none.
        """
        revision = request.revision
        is_plain = request.tokenizer is None and request.adapter_base is None
        keys = [key for key in self._keys(request, dtype) if key in self]
        if is_plain and (revision is None or _COMMIT.fullmatch(revision)):
            keys = [key for key in keys if revision in (None, key.revision)]
        elif by_name:
            words = _words(asked_of(request, dtype))
            unknown = words if revision is None else None
            keys = [key for key in keys if self._words.get(key, unknown) == words]
        else:
            return None
        if not keys:
            return False
        return _changed_us(request) <= max(self._completed[key] for key in keys)

    def settled(
        self,
        request: ModelRequest,
        dtype: str,
        attempts: int,
        forgiven: Mapping[Asked, int] | None = None,
    ) -> bool | None:
        """Whether nothing is to be done: a result is there, or no other try is due.

        Args:
            request: the model.
            dtype: unless it has its own.
            attempts: how often a model is tried.
            forgiven: tries that do not count, of `tries`.

        Returns: None where only a look at the model tells.
        """
        failure = self.failure(request, dtype)
        if failure is not None:
            same = [(name_of(request), asked) for asked in (None, failure.asked)]
            before = max((forgiven or {}).get(each, 0) for each in same)
            if failure.attempts > before:
                return failure.is_lasting or failure.attempts - before >= attempts
        return self.has(request, dtype)

    # ------------------------------------------------------------------ inside

    def _counting(self, name: str, since_us: int) -> list[Failure]:
        """Failures of a name after a time, but for what was done or removed."""
        return [
            each
            for (key, *_), each in self._failures.get(name, {}).items()
            if key not in self and each.created_us > max(since_us, self._removed.get(key, 0))
        ]

    def _keys(self, request: ModelRequest, dtype: str) -> list[ResultKey]:
        """Complete rows of a name in the dtype asked for, also those that were removed since."""
        dtype = request.dtype or dtype
        keys = self._by_name.get(name_of(request), ())
        return [key for key in keys if dtype in ("auto", key.dtype)]

    def _enter(self, state: RowState) -> None:
        key = state.key
        own = (key.layer, key.convention, key.scoring_version)
        if own != (None, self._convention, SCORING_VERSION):
            return
        if state.status == "removed":
            self._removed[key] = max(state.created_us, self._removed.get(key, state.created_us))
        elif state.status == "complete":
            if key not in self._completed:
                self._by_name.setdefault(key.model, []).append(key)
            self._completed[key] = max(state.created_us, self._completed.get(key, 0))
            if (asked := _asked_in(state.facts or "")) is not None:
                self._words[key] = _words(asked)
        else:
            failure = _failure(state)
            self._failures.setdefault(key.model, {})[key, *_order(failure)] = failure


def _states(shard: AnyPath) -> list[RowState] | None:
    try:
        return read_states(shard)
    except FileNotFoundError:
        return None


def name_of(request: ModelRequest) -> str:
    """What a model's rows are kept under."""
    return as_utf8(request.name or os.path.normpath(request.model))


def asked_of(request: ModelRequest, dtype: str) -> tuple[str | None, ...]:
    """What tells requests of one name apart."""
    return request.revision, request.dtype or dtype, request.tokenizer, request.adapter_base


def _words(asked: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The same without the dtype; whoever names no revision is given main by the Hub."""
    revision, _, *others = asked
    return revision or "main", *others


def _asked_in(provenance: str) -> tuple[str | None, ...] | None:
    """What a result says that it was asked for; nothing else of its provenance is parsed."""
    key = _ASKED.search(provenance)
    if key is None:
        return None
    try:
        return _asked(_DECODER.raw_decode(provenance, key.end())[0])
    except (ValueError, RecursionError):
        return None


def _asked(asked: Any) -> tuple[str | None, ...] | None:
    """What was asked for, as JSON gives it; None where it is nothing of the kind."""
    if not isinstance(asked, list) or len(asked) != _WORDS:
        return None
    return tuple(asked) if all(isinstance(each, str | None) for each in asked) else None


def _order(failure: Failure) -> tuple[int, int]:
    """The last one has the most attempts, whatever the clocks of workers say."""
    return failure.attempts, failure.created_us


def _failure(state: RowState) -> Failure:
    metadata: Any = {}
    with contextlib.suppress(ValueError, RecursionError):
        metadata = json.loads(state.facts or "{}")
    metadata = metadata if isinstance(metadata, dict) else {}
    attempts = metadata.get("attempts")
    return Failure(
        reason=state.error or "",
        attempts=max(attempts, 1) if isinstance(attempts, int) else 1,
        is_lasting=metadata.get("is_lasting") is True,
        asked=_asked(metadata.get("asked")),
        created_us=state.created_us,
    )


def _changed_us(request: ModelRequest) -> int:
    """When a model's folders were last written to, in microseconds since 1970; 0 if it has none.

    A date that is yet to come says nothing, or a failure would not count until then.
    """
    newest, now = 0, time.time_ns()
    for folder in (request.model, request.tokenizer, request.adapter_base):
        with contextlib.suppress(OSError, ValueError), os.scandir(folder or "") as entries:
            for entry in entries:
                if _PART.match(entry.name) and (changed := entry.stat().st_mtime_ns) <= now:
                    newest = max(newest, changed // 1000)
    return newest

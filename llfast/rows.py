"""Rows of a store without their numbers, and which of them count."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .errors import StoreError
from .remote import AnyPath
from .results import LogLikelihoods, ResultKey, plain_metadata

_MOST_LISTED = 20  # rows in an error, which is one line
_OWN_NAME = re.compile(r"[0-9]{20}-[0-9a-f]{16}\.parquet")  # as `shards.write_shard` gives them


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRow:
    """One row of a store, without its numbers.

    Attributes:
        key: what it is a result of.
        status: "complete"; "failed"; or "removed", which takes away all older rows of the key.
        error: why it failed; None if it did not.
        created: when it was written, in UTC.
        provenance: what else decided its bits.
        metadata: the caller's own columns.
        shard: the file that holds it.
        position: its place there.
    """

    key: ResultKey
    status: str
    error: str | None
    created: datetime
    provenance: Mapping[str, Any]
    metadata: Mapping[str, Any]
    shard: AnyPath
    position: int

    @property
    def subject(self) -> tuple[Any, ...]:
        """The key without revision, dtype and version."""
        key = self.key
        return key.model, key.textset_digest, key.convention, key.layer

    @property
    def label(self) -> str:
        """The name that it is shown under."""
        return self.key.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What rows mean to somebody who knows the complete ones among older rows.

    Attributes:
        new: complete rows that count from now on, one a key: of keys that were not known, or newer
            than what was.
        stale: known keys whose rows count no more; those that are replaced are in `new`, too.
        removed: when each key was removed last. It must be remembered for the next time.
    """

    new: Sequence[StoredRow]
    stale: Sequence[ResultKey]
    removed: Mapping[ResultKey, datetime]


def newest(rows: Iterable[StoredRow]) -> list[StoredRow]:
    """One row a key: the newest complete one, else the newest failure; none if it was removed."""
    rows = list(rows)
    removed = _removals(rows)
    best: dict[ResultKey, StoredRow] = {}
    # A failure may lack the revision and dtype that a later success has: compare without them.
    # What was removed since counts here, too, or older failures would come up again.
    done: dict[tuple[Any, ...], datetime] = {}
    for row in rows:
        if row.status == "complete":
            done[row.subject] = max(row.created, done.get(row.subject, row.created))
        if row.status == "removed" or row.created < removed.get(row.key, row.created):
            continue
        other = best.get(row.key)
        if other is None or _rank(row) > _rank(other):
            best[row.key] = row
    counting = (
        row
        for row in best.values()
        if row.error is None or row.subject not in done or done[row.subject] < row.created
    )
    return sorted(counting, key=lambda row: (row.label, row.created))


def lasting(rows: Iterable[StoredRow], *, forget_before: datetime | None) -> list[StoredRow]:
    """The rows that a compaction keeps: those that count, and what keeps others away.

    The last removal of a key stays, lest a row that it hides turns up again: it may be in a shard
    that another compaction is writing, or that is damaged and will be mended.

    Args:
        rows: of all shards that can be read.
        forget_before: removals of that time that hide none of the rows are left out. None: keep
            all.
    """
    rows = list(rows)
    removed = _removals(rows)
    hiding = {row.key for row in rows if row.created < removed.get(row.key, row.created)}
    removals = {
        row.key: row
        for row in sorted(rows, key=_rank)
        if row.status == "removed"
        and row.created == removed[row.key]
        and (row.key in hiding or forget_before is None or row.created >= forget_before)
    }
    return newest(rows) + list(removals.values())


def changes(
    known: Mapping[ResultKey, datetime],
    rows: Iterable[StoredRow],
    removed: Mapping[ResultKey, datetime] | None = None,
    *,
    homeless: Collection[ResultKey] = (),
) -> Changes:
    """What rows of new shards change, without a look at the old ones.

    One after the other, in any order and in any portions, rows lead to the complete ones that
    `newest` finds among all of them.

    Args:
        known: keys of the complete rows that count so far, and when each was created.
        rows: of all shards that are new, as `Store.read_shards` gives them.
        removed: as the last `Changes` had it.
        homeless: known keys whose shards are gone, as they are after a compaction: stale if `rows`
            do not have them either.
    """
    rows = list(rows)
    removed = dict(removed or {})
    for key, when in _removals(rows).items():
        removed[key] = max(when, removed.get(key, when))
    best: dict[ResultKey, StoredRow] = {}
    for row in rows:
        if row.status == "complete" and row.created >= removed.get(row.key, row.created):
            other = best.get(row.key)
            if other is None or _rank(row) > _rank(other):
                best[row.key] = row
    away = set(homeless)
    new = [
        row
        for key, row in best.items()
        if key not in known
        or row.created > known[key]
        or (key in away and row.created < known[key])
    ]
    stale = {row.key for row in new if row.key in known}
    stale.update(key for key, when in removed.items() if key in known and known[key] < when)
    stale.update(key for key in away if key in known and key not in best)
    return Changes(new=new, stale=sorted(stale, key=repr), removed=removed)


def one_row_a_model(
    rows: Iterable[StoredRow],
    convention: str | None,
    dtype: str | None,
    models: Sequence[str] | None,
    duplicates: str,
    layers: bool,
) -> tuple[str, list[StoredRow]]:
    """Choose complete rows as `Store.matrix` says.

    Returns: the convention, and the rows ordered by model and layer; none if none is left.

    Raises:
        StoreError: if there is more than one convention or row to choose from, or a model is not
            there.
    """
    rows = [
        row
        for row in rows
        if row.status == "complete"
        and (layers or row.key.layer is None or row.label in (models or ()))
    ]
    convention = convention or _only_convention({row.key.convention for row in rows})
    rows = [
        row for row in rows if row.key.convention == convention and dtype in (None, row.key.dtype)
    ]
    if models is not None:
        rows = named(rows, models)
    chosen = {row.label: row for row in sorted(rows, key=lambda row: row.created)}
    if duplicates == "error" and len(chosen) < len(rows):
        _refuse_several(rows)
    return convention, sorted(chosen.values(), key=_by_layer)


def named(
    rows: Sequence[StoredRow], models: Sequence[str], *, layers: bool = False
) -> list[StoredRow]:
    """The rows of some models, given as `name` or `name@revision` (the beginning of it).

    Args:
        rows: to choose from.
        models: which; layers are models of their own, `name@layer=i`.
        layers: those of a model are the model's, too.

    Raises:
        StoreError: if there are none of one of them.
        TypeError: if they are a single name, whose letters would be taken for names.
    """
    if isinstance(models, str):
        raise TypeError(f"models must be several names, got {models!r}; give [{models!r}]")
    by_name: defaultdict[str, list[StoredRow]] = defaultdict(list)
    for row in rows:
        for name in {row.label, row.key.model} if layers else {row.label}:
            by_name[name].append(row)
    chosen: dict[ResultKey, StoredRow] = {}
    for name in models:
        found = by_name.get(name, [])
        if not found and "@" in name:
            model, _, revision = name.rpartition("@")
            found = [row for row in by_name.get(model, []) if row.key.revision.startswith(revision)]
        if not found:
            raise StoreError(f"models must be in the store, got {name!r}")
        chosen |= {row.key: row for row in found}
    return list(chosen.values())


def refuse_incomplete(row: StoredRow) -> None:
    """Raise ValueError if a row has no numbers."""
    if row.status != "complete":
        what = f"failure of {row.label}: {row.error}" if row.error else f"removal of {row.label}"
        raise ValueError(f"row must be complete, got the {what}")


def matrix_metadata(row: StoredRow | LogLikelihoods) -> dict[str, Any]:
    """The caller's own columns, whether the tokenizer adds BOS if that is known, and the layer."""
    found, adds_bos = dict(plain_metadata(row.metadata)), row.provenance.get("adds_bos")
    if adds_bos is not None:
        found["adds_bos"] = adds_bos
    if row.key.layer is not None:
        found |= {"layer": row.key.layer, "layer_of": row.key.model}
    return found


def _by_layer(row: StoredRow) -> tuple[str, int]:
    return row.key.model, -1 if row.key.layer is None else row.key.layer


def order_of(name: str) -> tuple[bool, str]:
    """Where a shard's name comes among others: a copy of rows comes after what it was made of."""
    return is_own_name(name), name


def is_own_name(name: str) -> bool:
    """Whether a shard's name is one of llfast's own, which begins with when it was written, ns."""
    return _OWN_NAME.fullmatch(name) is not None


def _rank(row: StoredRow) -> tuple[bool, datetime, tuple[bool, str]]:
    return row.status == "complete", row.created, order_of(row.shard.name)


def _removals(rows: Iterable[StoredRow]) -> dict[ResultKey, datetime]:
    """When each key was removed last."""
    removed: dict[ResultKey, datetime] = {}
    for row in rows:
        if row.status == "removed":
            removed[row.key] = max(row.created, removed.get(row.key, row.created))
    return removed


def _only_convention(conventions: set[str]) -> str:
    if "paper" in conventions or not conventions:
        return "paper"
    if len(conventions) > 1:
        raise StoreError(
            "convention must be named where a store has several, got "
            f"{', '.join(sorted(conventions))}; choose with --convention"
        )
    return conventions.pop()


def _refuse_several(rows: Sequence[StoredRow]) -> None:
    """Raise an error that lists all rows of the models that have more than one."""
    counts = Counter(row.label for row in rows)
    listed = [
        f"{row.label}@{row.key.revision[:12] or '(none)'} in {row.key.dtype or 'no dtype'} of "
        f"{row.created:%Y-%m-%d %H:%M:%S}"
        for row in rows
        if counts[row.label] > 1
    ]
    more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
    raise StoreError(
        f"matrix must have one row a model, got {', '.join(listed[:_MOST_LISTED])}{more}; choose "
        "with --dtype or --newest (in Python also models=['name@revision'], duplicates='newest')"
    )

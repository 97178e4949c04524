"""Which shards are new, and what their rows change for somebody who knows the others."""

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llfast import Store
from llfast.errors import LlfastWarning
from llfast.results import ResultKey
from llfast.rows import StoredRow, changes, newest
from tests.stores import DIGEST, make_result, numbers, store_shards

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def make_row(model, status, minute, shard="0"):
    return StoredRow(
        key=ResultKey(model, "r1", DIGEST, "paper", "float32", None, 1),
        status=status,
        error="no memory" if status == "failed" else None,
        created=START + timedelta(minutes=minute),
        provenance={},
        metadata={},
        shard=Path(f"{shard}.parquet"),
        position=0,
    )


def complete(rows):
    """What counts among rows, by the definition, a key at a time: when each was created."""
    found = {}
    for key in {row.key for row in rows}:
        ends = [row.created for row in rows if (row.key, row.status) == (key, "removed")]
        end = max(ends, default=START - timedelta(days=1))
        left = [row.created for row in rows if (row.key, row.status) == (key, "complete")]
        if left and max(left) >= end:
            found[key] = max(left)
    return found


ROWS = st.lists(
    st.builds(
        make_row,
        st.sampled_from("abc"),
        st.sampled_from(["complete", "complete", "removed", "failed"]),
        st.integers(0, 9),
        st.sampled_from("xyz"),
    ),
    max_size=14,
)


# ------------------------------------------------------------------------------ which rows count


@given(rows=ROWS)
def test_what_was_removed_is_hidden_until_a_newer_row_comes(rows):
    found = newest(rows)
    assert {row.key: row.created for row in found if row.status == "complete"} == complete(rows)
    assert len({row.key for row in found}) == len(found)
    for row in found:
        assert row.status != "removed"
        after = [other for other in rows if other.key == row.key and other.created > row.created]
        assert not any(other.status == "removed" for other in after)
        if row.status == "failed":
            assert not any(
                other.status == "complete" and other.created >= row.created
                for other in rows
                if other.key == row.key
            )


def test_a_failure_that_a_success_has_replaced_does_not_come_up_after_its_removal():
    failure = dataclasses.replace(
        make_row("a", "failed", 1),
        key=ResultKey("a", "", DIGEST, "paper", "auto", None, 1),
    )
    rows = [failure, make_row("a", "complete", 2)]
    assert [row.status for row in newest(rows)] == ["complete"]
    assert newest([*rows, make_row("a", "removed", 3)]) == []
    later = dataclasses.replace(failure, created=START + timedelta(minutes=4))
    assert newest([*rows, make_row("a", "removed", 3), later]) == [later]


# ------------------------------------------------------------------------------ changes


def follow(known, removed, rows, homeless=()):
    """Apply changes as an index does."""
    found = changes(known, rows, removed, homeless=homeless)
    assert set(found.stale) <= set(known)
    replaced = {row.key for row in found.new} & set(known)
    assert replaced <= set(found.stale)
    known = {key: when for key, when in known.items() if key not in found.stale}
    assert not set(known) & {row.key for row in found.new}
    return known | {row.key: row.created for row in found.new}, dict(found.removed)


@given(portions=st.lists(ROWS, max_size=6))
def test_portions_in_any_order_lead_to_what_all_rows_mean(portions):
    known, removed = {}, {}
    for rows in portions:
        known, removed = follow(known, removed, rows)
    everything = [row for rows in portions for row in rows]
    assert known == complete(everything)
    assert known == {row.key: row.created for row in newest(everything) if row.error is None}
    assert follow(known, removed, everything, homeless=list(known))[0] == known, "compacted"
    assert follow(known, removed, [], homeless=list(known))[0] == {}, "all moved away"


@given(old=ROWS, new=ROWS, away=st.sets(st.sampled_from("xyz")))
def test_shards_that_were_taken_away_take_their_rows_along(old, new, away):
    known, removed = follow({}, {}, old)
    names = {f"{name}.parquet" for name in away}
    homeless = {
        row.key for row in old if known.get(row.key) == row.created and row.shard.name in names
    }
    found, _ = follow(known, removed, new, homeless)
    for key in homeless & set(found):
        assert any(row.key == key and row.created == found[key] for row in new)
    without = changes(known, new, removed)
    assert {row.key for row in without.new} <= {
        row.key for row in changes(known, new, removed, homeless=homeless).new
    }


# ------------------------------------------------------------------------------ shards


def test_an_index_follows_a_store_by_its_new_shards_alone(store, monkeypatch):
    for model in "abc":
        store.add(make_result(model))
    seen = store.shards(DIGEST)
    assert seen == {path.name: path.stat().st_size for path in store_shards(store)}
    assert list(seen) == sorted(seen)
    rows = store.read_shards(DIGEST, seen)
    known, removed = follow({}, {}, rows)
    assert {key.model for key in known} == set("abc")

    store.add(make_result("b", loglikelihoods=numbers("newer")))
    store.add(make_result("d"))
    store.add_failure(make_result("e").key, "no memory")
    now = store.shards(DIGEST)
    rows = store.read_shards(DIGEST, set(now) - set(seen))
    assert sorted((row.key.model, row.status, row.error) for row in rows) == [
        ("b", "complete", None),
        ("d", "complete", None),
        ("e", "failed", "no memory"),
    ]
    found = changes(known, rows, removed)
    assert sorted(row.key.model for row in found.new) == ["b", "d"]
    assert [key.model for key in found.stale] == ["b"]
    for part, values in store.scan(found.new):
        for number, value in zip(part, values, strict=True):
            name = {"b": "newer", "d": "d"}[found.new[number].key.model]
            np.testing.assert_array_equal(value, numbers(name))
    known, removed = follow(known, removed, rows)

    store.compact()
    (merged,) = set(store.shards(DIGEST)) - set(now)
    rows = store.read_shards(DIGEST, [merged])
    found = changes(known, rows, removed, homeless=list(known))
    assert (found.new, found.stale) == ([], []), "a compaction changes nothing"
    assert known == {row.key: row.created for row in store.rows() if row.error is None}
    with pytest.raises(FileNotFoundError):
        store.read_shards(DIGEST, seen)


def test_a_damaged_shard_has_no_rows_and_is_named(store):
    store.add(make_result("a"))
    store.add(make_result("b"))
    damaged = store_shards(store)[0]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.warns(LlfastWarning, match="left out of the store") as caught:
        rows = store.read_shards(DIGEST, store.shards(DIGEST))
    assert [row.key.model for row in rows] == ["b"]
    assert str(damaged) in str(caught[0].message)


def test_only_shards_are_listed(store):
    assert store.shards(DIGEST) == {}
    store.add(make_result("a"))
    (shard,) = store_shards(store)
    shard.with_name(f".{shard.name}.0123.tmp").write_bytes(b"PAR1")
    assert list(store.shards(DIGEST)) == [shard.name]
    assert store.shards("e" * 64) == {}
    assert json.loads(shard.with_name("_texts.json").read_text())["ids"]


def test_a_listing_that_misses_a_compaction_is_not_believed(store, monkeypatch):
    for model in "abc":
        store.add(make_result(model))
    old = store_shards(store)
    store.compact()
    (merged,) = store_shards(store)
    scandir = __import__("os").scandir
    listings = [[old[0]], []]  # all but one was gone when it came there, then the merged one, too

    class Listing(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    class Entry:
        def __init__(self, path):
            self.name, self.stat = path.name, merged.stat

    def listed(folder):
        if listings:
            return Listing(Entry(path) for path in listings.pop(0))
        return scandir(folder)

    monkeypatch.setattr("os.scandir", listed)
    assert list(store.shards(DIGEST)) == [merged.name]

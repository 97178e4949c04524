"""Merging shards loses and changes nothing, whoever reads, writes or dies meanwhile."""

import pyarrow.dataset as ds
import pytest

from llfast import Store, StoreError
from tests.stores import DIGEST, make_result, numbers, store_contents, store_shards


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_compaction_changes_nothing_that_is_read(store):
    for model in ("a", "b", "c"):
        store.add(make_result(model, metadata={"family": model}))
    store.add(make_result("a", loglikelihoods=numbers("newer")))
    store.add_failure(make_result("d").key, "truncated")
    store.add_failure(make_result("b").key, "stale")
    store.add(make_result("e", textset_digest="e" * 64))
    before = store_contents(store)
    held = store.rows()
    assert store.compact() == 6, "the other text set has one shard"
    assert len(store_shards(store)) == 2
    assert store_contents(store) == before
    assert ds.dataset(store_shards(store)[0]).to_table().num_rows == 4, "what is replaced is gone"
    # Rows that were read before know where their numbers have gone.
    assert [store.load(row).values.tolist() for row in held if not row.error] == [
        each[-1] for each in before if not each[1]
    ]
    assert store.compact() == 0
    store.add(make_result("f"))
    assert store.compact() == 2
    assert store.matrix(DIGEST).models == ("a", "b", "c", "f")


def test_a_row_that_is_gone_is_said_to_be(store):
    store.add(make_result("a"))
    (row,) = store.rows()
    row.shard.unlink()
    with pytest.raises(StoreError, match="must hold the result of a, got none any more"):
        store.load(row)


@pytest.mark.parametrize("torn", [[], ["d"]], ids=["all missed", "all but one missed"])
def test_a_listing_that_misses_a_compaction_is_noticed(store, monkeypatch, torn):
    # A folder is not listed in one moment: the listing may miss the merged shard, made after it
    # has passed that place, as well as the old ones, removed before it gets there.
    for model in ("a", "b", "c"):
        store.add(make_result(model))
    store.compact()
    merged = store_shards(store)
    for model in torn:
        store.add(make_result(model))
    listings = [[path for path in store_shards(store) if path not in merged]]
    glob = type(store.folder).glob

    def listed(folder, pattern):
        if pattern == "*.parquet" and listings:
            return iter(listings.pop())
        return glob(folder, pattern)

    monkeypatch.setattr(type(store.folder), "glob", listed)
    assert [row.key.model for row in store.rows(DIGEST)] == ["a", "b", "c", *torn]


def test_a_store_that_is_not_there_is_not_nothing_to_merge(tmp_path):
    with pytest.raises(StoreError, match="typo must be a store, got no such folder"):
        Store(tmp_path / "typo").compact()
    assert not (tmp_path / "typo").exists()

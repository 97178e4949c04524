"""Merges: better directions for more models, segments of other builders, and compacted stores."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from llfast import KLIndex, Store
from llfast.search import contents, listing
from llfast.search.building import only_builder
from llfast.storefiles import write_texts
from tests.indexes import N, assert_right, index_result, make_store, name

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


@pytest.fixture(autouse=True)
def _lists(monkeypatch):
    """Also for few models."""
    monkeypatch.setattr(listing, "LEAST_ROWS", 20)
    monkeypatch.setattr(listing, "_HELD_OUT", 4)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def grow(store, index, count):
    """Have so many more models."""
    for number in range(len(index), len(index) + count):
        store.add(index_result(number))
    index.refresh()
    index.merge()


def test_directions_are_found_again_for_twice_as_many_models(store):
    index = KLIndex.build(store, "certified")
    first = index.segment
    grow(store, index, 23)
    assert index.segment.facts["fitted"] == 24
    assert index.segment.projection.directions.tobytes() == first.projection.directions.tobytes()
    grow(store, index, 1)
    assert index.segment.facts["fitted"] == 48
    assert len(index.segment.projection.directions) > len(first.projection.directions)
    assert index.basis.digest == first.basis.digest
    assert_right(index, store)
    assert_right(KLIndex.build(store), store)


def test_an_index_that_was_small_gets_bounds_when_it_is_not(store, monkeypatch):
    index = KLIndex.build(store)
    assert index.mode == "exact"
    basis = index.basis.digest
    monkeypatch.setattr(contents, "_EXACT_BYTES", 4 * 40 * 30)
    grow(store, index, 5)
    assert index.segment.projection is None
    grow(store, index, 5)
    assert index.segment.projection is not None
    assert_right(index, store)
    opened = KLIndex.build(store)
    assert (opened.mode, opened.basis.digest) == ("certified", basis)
    assert_right(opened, store)


def test_a_segment_of_another_builder_is_used_not_replaced(store):
    index = KLIndex.build(store, "certified")
    grown = [index_result(number) for number in range(24, 28)]
    for result in grown[:2]:
        store.add(result)
    index.refresh()
    other = KLIndex.build(Store(store.folder), "certified", refit=True)
    assert other.basis.digest != index.basis.digest
    for result in grown[2:]:
        store.add(result)
    index.refresh()
    index.merge()
    assert index.basis.digest == other.basis.digest
    assert len(index) == 28
    assert_right(index, store)
    assert_right(KLIndex.build(store), store)


def test_a_segment_that_does_not_serve_is_replaced(store):
    index = KLIndex.build(store, "certified")
    store.add(index_result(24))
    index.refresh()
    KLIndex.build(Store(store.folder), "exact", refit=True)
    index.merge()
    assert index.segment.projection is not None
    assert_right(index, store)


@pytest.mark.parametrize("links", [True, False])
def test_after_a_compaction_points_are_not_written_again(store, monkeypatch, links):
    index = KLIndex.build(store, "certified")
    grow(store, index, 3)
    before = index.segment
    inode = (before.folder / "points.f32").stat().st_ino
    if not links:

        def refuse(*_):
            raise PermissionError("no links here")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert store.compact()
    opened = KLIndex.build(store)
    assert opened.segment.folder.name != before.folder.name
    assert opened.segment.facts["shards"] == store.shards(store.find_textset())
    assert ((opened.segment.folder / "points.f32").stat().st_ino == inode) == links
    facts = dict(opened.segment.facts)
    del facts["shards"]
    assert facts.items() <= before.facts.items()
    opened.segment.verify()
    assert_right(opened, store)
    read = []
    whole = Store.read_shards

    def spy(self, textset, shards):
        read.extend(shards)
        return whole(self, textset, shards)

    monkeypatch.setattr(Store, "read_shards", spy)
    again = KLIndex.build(store)
    assert not read, "all shards are known"
    again.merge()
    assert again.segment.folder.name == opened.segment.folder.name
    again.remove(name(3))
    assert_right(again, store)


def test_a_point_that_was_placed_in_another_basis_is_placed_again(store, monkeypatch):
    """A merge in another thread takes over a new basis while a model is added."""
    index = KLIndex.build(store, "certified")
    for number in (24, 25):
        store.add(index_result(number))
    KLIndex.build(Store(store.folder), "certified", refit=True)
    add = Store.add

    def merge_first(self, result):
        index.merge()
        return add(self, result)

    monkeypatch.setattr(Store, "add", merge_first)
    before = index.basis.digest
    index.add(index_result(26))
    assert index.basis.digest != before
    assert_right(index, store)


def test_opening_does_not_wait_for_a_builder_to_merge(store):
    index = KLIndex.build(store, "certified")
    for number in range(24, 30):
        store.add(index_result(number))
    with only_builder(index.folder):
        opened = KLIndex.build(store)
    assert len(opened._added) == 6
    assert_right(opened, store)


def test_a_segment_whose_folder_is_gone_is_written_again(store):
    index = KLIndex.build(store, "certified")
    grow(store, index, 3)
    shutil.rmtree(index.folder)
    store.compact()
    index.refresh()
    index.merge()
    assert_right(index, store)
    assert_right(KLIndex.build(store), store)


def test_an_index_of_which_all_is_gone_is_opened_empty(store):
    KLIndex.build(store, "certified")
    store.remove([name(number) for number in range(24)])
    store.compact()
    opened = KLIndex.build(store, "certified")
    assert len(opened) == 0


@pytest.mark.parametrize("way", ["refresh", "open", "merge", "add bounds", "compact"])
def test_documents_that_a_later_result_is_the_first_to_know_count_in_intervals(store, way):
    index = KLIndex.build(store, "exact")
    digest, before = index.basis.digest, index.search(name(0), 1)[0].estimate
    groups = tuple(f"document {row // 8}" for row in range(N))
    store.add(index_result(24, groups=groups))
    if way == "compact":  # the models that are left are those of the segment
        store.remove([name(24)])
        store.compact()
    if way in ("refresh", "merge"):
        index.refresh()
    else:
        index = KLIndex.build(store, "certified" if way == "add bounds" else "exact")
    if way == "merge":
        index.merge()
    bases = [index.basis] if way in ("refresh", "open") else [index.basis, index.segment.basis]
    for basis in bases:
        assert (basis.digest, basis.groups) == (digest, groups)
    after = index.search(name(0), 1)[0].estimate
    assert after.value == before.value
    assert after.interval != before.interval
    assert_right(index, store)


@pytest.mark.parametrize("way", ["refresh", "open", "merge"])
def test_documents_that_came_without_a_result_count_in_intervals(store, way):
    """A writer that was killed, or an older llfast, can have left them behind."""
    index = KLIndex.build(store, "exact")
    groups = tuple(f"document {row // 8}" for row in range(N))
    texts = store.texts("texts")
    path = store.partition("texts") / "_texts.json"
    write_texts(path, texts["ids"], np.array(texts["text_bytes"]), groups)
    if way == "open":
        index = KLIndex.build(store, "exact")
    assert index.refresh() == 0
    if way == "merge":
        index.merge()
        assert index.segment.basis.groups == groups
    assert index.basis.groups == groups
    assert_right(index, store)

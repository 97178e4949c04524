"""A model that is removed is gone for every reader, and back once it is scored again."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow.dataset as ds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llfast import Store, StoreError, shards
from llfast.results import ResultKey
from tests.stores import DIGEST, add_together, make_result, numbers, store_contents, store_shards


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_a_removed_model_is_gone_at_once_and_its_key_is_not_done(store):
    for model in ("a", "b", "c"):
        store.add(make_result(model))
    rows = {row.label: row for row in store.rows()}
    kept = store_shards(store)
    assert store.remove(["b"]) == 1
    assert set(kept) < set(store_shards(store)), "nothing is rewritten"
    assert [row.label for row in store.rows()] == ["a", "c"]
    assert {key.model for key in store.completed()} == {"a", "c"}
    assert store.matrix().models == ("a", "c")
    with pytest.raises(StoreError, match="models must be in the store, got 'b'"):
        store.matrix(models=["b"])
    assert sorted(row.status for row in store.read_shards(DIGEST, store.shards(DIGEST))) == [
        *["complete"] * 3,
        "removed",
    ]
    # Who has listed it before can still read it, until a compaction.
    assert store.load(rows["b"]).values.tolist() == numbers("b").tolist()
    store.compact()
    with pytest.raises(StoreError, match="must hold the result of b, got none any more"):
        store.load(rows["b"])
    with pytest.raises(StoreError, match="must hold the result of b, got none any more"):
        list(store.scan([rows["a"], rows["b"]]))
    assert ds.dataset(store_shards(store)[0]).to_table()["status"].to_pylist() == [
        "complete",
        "complete",
        "removed",
    ]


def test_scoring_again_brings_a_model_back(store):
    for shift in (0, 1):
        store.add(make_result("a", loglikelihoods=numbers("a") + shift))
    store.remove(["a"])
    assert store.rows() == []
    with pytest.raises(StoreError, match="must hold complete results"):
        store.matrix()
    store.add(make_result("a", loglikelihoods=numbers("a") + 2))
    np.testing.assert_array_equal(store.matrix().row("a"), numbers("a") + 2)
    store.compact()
    np.testing.assert_array_equal(store.matrix().row("a"), numbers("a") + 2)
    assert store.remove(["a"]) == 1
    assert store.rows() == []


def test_names_and_revisions_are_those_of_a_matrix(store):
    for revision in ("r1", "r2"):
        store.add(make_result("a", revision=revision))
    store.add(make_result("a", layer=3))
    store.add(make_result("b", convention="always-bos"))
    store.add(make_result("b", textset_digest="e" * 64))
    assert store.remove(["a@r2"]) == 1
    assert [(row.label, row.key.revision) for row in store.rows(DIGEST)] == [
        ("a", "r1"),
        ("a@layer=3", "r1"),
        ("b", "r1"),
    ]
    assert store.remove(["b", "b"]) == 2, "under all conventions, on all texts, and once"
    assert store.remove(["a@layer=3"]) == 1
    assert [row.label for row in store.rows()] == ["a"]


def test_layers_go_with_their_model(store):
    for revision in ("r1", "r2"):
        for layer in (None, 0, 1):
            store.add(make_result("a", revision=revision, layer=layer))
    store.add(make_result("b", layer=0))  # of which there is nothing else
    assert store.remove(["a@r2"]) == 3
    assert {row.key.revision for row in store.rows()} == {"r1"}
    assert store.remove(["a@layer=1"]) == 1
    assert store.remove(["a", "b"]) == 3
    assert store.rows() == []
    with pytest.raises(StoreError, match="models must be in the store, got 'b'"):
        store.remove(["b"])


def test_nothing_is_removed_where_a_name_is_not_known(store):
    store.add(make_result("a"))
    before = store_shards(store)
    for names in (["a", "x"], ["a@r2"], [""]):
        with pytest.raises(StoreError, match="models must be in the store, got "):
            store.remove(names)
    with pytest.raises(TypeError, match=r"models must be several names, got 'a'; give \['a'\]"):
        store.remove("a")
    assert store.remove([]) == 0
    assert store_shards(store) == before


def test_failures_are_removed_too_and_later_ones_are_news(store):
    early = ResultKey("a", "", DIGEST, "paper", "auto", None, 1)
    store.add_failure(early, "no such folder")
    store.add(make_result("a"))
    store.add_failure(make_result("b").key, "no memory")
    assert store.remove(["a", "b"]) == 2
    assert store.rows() == [], "nor does what a success had replaced come up again"
    store.compact()
    assert store.rows() == []
    store.add_failure(make_result("b").key, "no memory again")
    assert [row.error for row in store.rows()] == ["no memory again"]
    with pytest.raises(ValueError, match="must be complete, got the removal of a"):
        next(
            store.load(row)
            for row in store.read_shards(DIGEST, store.shards(DIGEST))
            if (row.key.model, row.status) == ("a", "removed")
        )


@pytest.mark.parametrize("hours", [-3, 3])
def test_clocks_that_disagree_do_not_keep_a_model_from_being_removed(store, hours, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=hours)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "datetime", Clock)
        store.add(make_result("a"))
    (row,) = store.rows()
    assert abs(row.created - datetime.now(UTC)) > timedelta(hours=2)
    assert store.remove(["a"]) == 1
    assert store.rows() == []


def test_a_matrix_is_read_again_if_a_model_is_removed_meanwhile(store, monkeypatch):
    for model in "abc":
        store.add(make_result(model))
    texts, other = store.texts, Store(store.folder)

    def remove_first(digest):
        if len(store.rows()) == 3:
            other.remove(["b"])
            other.compact()
        return texts(digest)

    monkeypatch.setattr(store, "texts", remove_first)  # which comes between listing and reading
    matrix = store.matrix()
    assert matrix.models == ("a", "c")
    np.testing.assert_array_equal(matrix.values, [numbers("a"), numbers("c")])


def test_many_models_of_one_shard(store):
    models = [f"m{each:03}" for each in range(300)]
    add_together(store, models)
    assert store.remove(models[::2]) == 150
    assert store.matrix().models == tuple(models[1::2])
    assert len(store_shards(store)) == 2, "one shard for all removals"


# ------------------------------------------------------------------------------ any order

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abc")),
        st.tuples(st.just("fail"), st.sampled_from("abc")),
        st.tuples(st.just("remove"), st.sampled_from("abc")),
        st.tuples(st.just("compact"), st.none()),
    ),
    max_size=12,
)


@given(actions=ACTIONS)
@settings(max_examples=30, deadline=None)
def test_any_order_of_actions_leaves_what_a_dictionary_would_have(tmp_path_factory, actions):
    store, expected = Store(tmp_path_factory.mktemp("actions") / "store"), {}
    store.prepare()
    for number, (action, model) in enumerate(actions):
        if action == "add":
            store.add(make_result(model, loglikelihoods=numbers(f"{number}")))
            expected[model] = number
        elif action == "fail":
            store.add_failure(make_result(model).key, "no memory")
            expected.setdefault(model, None)
        elif action == "remove" and model in expected:
            assert store.remove([model]) == 1
            del expected[model]
        elif action == "compact":
            before = store_contents(store)
            store.compact()
            assert store_contents(store) == before
        found = {row.key.model: row.error for row in store.rows()}
        assert found == {
            model: None if number is not None else "no memory" for model, number in expected.items()
        }
    for row in store.rows():
        if row.error is None:
            values = store.load(row).values
            np.testing.assert_array_equal(values, numbers(f"{expected[row.key.model]}"))


def test_a_text_set_whose_results_are_all_removed_need_not_be_told_from_others(store):
    store.add(make_result("a"))
    store.add(make_result("b", textset_digest="other"))
    with pytest.raises(StoreError, match="must be named where a store has several, got .*other"):
        store.find_textset()
    store.remove(["b"])
    assert store.find_textset() == DIGEST
    assert store.matrix().models == ("a",)
    store.add_failure(make_result("b", textset_digest="other").key, "no memory")
    store.compact()
    assert store.find_textset() == DIGEST, "a failure is no result"
    store.add(make_result("b", textset_digest="other"))
    with pytest.raises(StoreError, match="must be named where a store has several, got .*other"):
        store.find_textset()
    store.remove(["a", "b"])
    with pytest.raises(StoreError, match="must hold results, got none"):
        store.find_textset()

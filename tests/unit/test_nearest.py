"""From a store and a name to nearest models, with an index and without one."""

import math
import re

import numpy as np
import pytest

from llfast import KLIndex, ModelSpace, SearchError, Store, StoreError, TextSet, nearest
from llfast.nearest import build_index, find_kl, find_nearest
from tests.indexes import N, index_result, make_store, model_values, name
from tests.spaces import make_matrix

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("created > now() - to_days(1)", 23),
        ("created > '2026-01-01' and number < 3", 2),
        ("year(created) < 2026", 0),
    ],
)
def test_when_a_model_came_is_known_with_an_index_and_without_one(store, where, count):
    def found():
        return find_nearest(name(0), store.folder, k=50, where=where)[1]

    assert len(found()) == count
    build_index(store.folder)
    assert len(found()) == count


def test_a_model_came_with_the_result_that_is_searched(store):
    """Not with another version's, nor with the failure of one."""
    rows = {row.key.model: row for row in store.rows()}
    last = max(row.created for row in rows.values())
    store.add(index_result(4, scoring_version=1))
    store.add_failure(rows[name(3)].key._replace(scoring_version=1), "out of memory")
    where = f"created > '{last:%Y-%m-%d %H:%M:%S.%f}'"

    def found():
        hits = find_nearest(name(0), store.folder, k=50, where=where, newest=True)[1]
        return [hit.model for hit in hits]

    assert found() == [name(4)]
    build_index(store.folder, newest=True)
    assert found() == [name(4)]


def test_a_kl_is_the_one_that_a_search_tells(store):
    """Also in the basis of an index that was built before other models came."""

    def kls():
        _, hits = find_nearest(name(0), store.folder, k=50)
        return [(hit.model, hit.estimate) for hit in hits]

    for build in (False, True):
        if build:
            build_index(store.folder)
            store.add(index_result(24, values=model_values(24) - 300))
        found = kls()
        assert len(found) == 23 + build
        for model, estimate in found[:2] + found[-2:]:
            assert find_kl(name(0), model, store.folder) == (name(0), model, estimate)
        kl = find_kl(name(1), name(1), store.folder, unit="nats_per_text")[2]
        assert (kl.value, kl.unit) == (0, "nats_per_text")
        with pytest.raises(SearchError, match="must be in the store, got 'model 99'; did you mean"):
            find_kl(name(0), "model 99", store.folder)


def test_a_space_that_knows_no_times_has_no_condition_on_them(store):
    index = KLIndex.build(ModelSpace.fit(store.matrix()))
    with pytest.raises(SearchError, match='"created" not found'):
        index.search(name(0), where="created > '2026-01-01'")


def test_texts_that_are_given_say_which_text_set_of_a_store_is_meant(tmp_path, store):
    texts = TextSet.from_texts(["one", "two", "three"])
    texts.save(tmp_path / "texts.jsonl")
    values = np.array([[-1.0, -2, -3], [-3, -1, -2]])
    models, given = [name(0), "other"], {"ids": texts.ids, "textset_digest": texts.digest}
    store.add_matrix(make_matrix(values, models=models, **given))
    _, hits = find_nearest(name(0), store.folder, texts=tmp_path / "texts.jsonl")
    assert [hit.model for hit in hits] == ["other"]


def test_other_texts_than_the_store_has_are_refused_for_a_model_that_it_has(tmp_path, store):
    TextSet.from_texts(["one"]).save(tmp_path / "texts.jsonl")
    with pytest.raises(SearchError, match="must be the texts that the store's models were scored"):
        find_nearest(name(0), store.folder, texts=tmp_path / "texts.jsonl")


@pytest.mark.filterwarnings("ignore:models ran in")
def test_a_dtype_that_came_after_an_index_was_built_says_what_is_noise(store):
    values, rng = model_values(100), np.random.default_rng(0)

    def add(model, revision, dtype, noise):
        own = values + noise * rng.standard_normal(N)
        store.add(index_result(100, model=model, revision=revision, dtype=dtype, values=own))

    def flags(index):
        return {hit.model: hit.estimate.below_noise_floor for hit in index.search("whole", 2)}

    add("whole", "one", "float32", 0)
    add("like it", "other", "bfloat16", 0.01)
    index = KLIndex.build(store, "certified")
    assert flags(index)["like it"] is False
    add("half", "one", "bfloat16", 1)
    index.refresh()
    truth = {"like it": True, "half": False}
    assert flags(index) == flags(KLIndex.build(ModelSpace.fit(store.matrix()))) == truth


@pytest.mark.filterwarnings("ignore:models ran in")
def test_another_layer_of_a_model_in_another_dtype_is_no_noise(store):
    values, rng = model_values(100), np.random.default_rng(0)
    half = {"dtype": "bfloat16", "values": values + rng.standard_normal(N)}
    store.add(index_result(100, model="whole", revision="one", dtype="float32"))
    for layer in range(2):
        own = {"layer": layer, "values": values + 50 * rng.standard_normal(N)}
        store.add(index_result(100, model="whole", revision="one", dtype="float32", **own))
    index = KLIndex.build(ModelSpace.fit(store.matrix(layers=True)))
    index.add(index_result(100, model="half", revision="one", **half))
    flags = {hit.model: hit.estimate.below_noise_floor for hit in index.search("half", 50)}
    assert [flags[f"whole@layer={layer}"] for layer in range(2)] == [False, False]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_model_cannot_be_scored_as_an_imported_matrix_was(tmp_path, indexed):
    texts = TextSet.from_texts(["text"] * N)
    texts.save(tmp_path / "texts.jsonl")
    store = Store(tmp_path / "store")
    given = {"ids": texts.ids, "textset_digest": texts.digest, "text_bytes": texts.text_bytes}
    store.add(index_result(0, convention="imported", **given))
    if indexed:
        build_index(store.folder)
    for options in ({}, {"texts": tmp_path / "texts.jsonl"}):
        with pytest.raises(SearchError, match="cannot be scored as these are, under 'imported'; "):
            find_nearest("other", store.folder, **options)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "bits"}, "unit must be one of bits_per_byte, nats_per_text, got 'bits'"),
        ({"where": "famly = 'llama'"}, "where must be a SQL condition over model, "),
        ({"radius": math.nan}, "radius must be at least 0, got nan"),
        ({"k": 0}, "k must be at least 1, got 0"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_before_a_model_runs(
    tmp_path, monkeypatch, indexed, options, message
):
    texts = TextSet.from_texts(["text"] * N)
    texts.save(tmp_path / "texts.jsonl")
    store = Store(tmp_path / "store")
    given = {"ids": texts.ids, "textset_digest": texts.digest, "text_bytes": texts.text_bytes}
    store.add(index_result(0, **given))
    if indexed:
        build_index(store.folder)
    monkeypatch.setattr(nearest, "score", lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises((ValueError, SearchError), match=re.escape(message)):
        find_nearest("other", store.folder, texts=tmp_path / "texts.jsonl", **options)


def test_with_an_index_the_rows_of_a_store_are_not_read(store, monkeypatch):
    """Of 100,000 models that takes seconds, for one question."""
    truth = find_nearest(name(0), store.folder)[1]
    build_index(store.folder)
    monkeypatch.setattr(Store, "rows", lambda *_: pytest.fail("rows were read"))
    assert [hit.model for hit in find_nearest(name(0), store.folder)[1]] == [
        hit.model for hit in truth
    ]
    assert find_kl(name(0), truth[0].model, store.folder)[2].value == pytest.approx(truth[0].kl)


def test_an_adapter_is_found_by_its_name_and_scored_by_another_command(store, tmp_path):
    """Of its folder alone, nobody knows the model that it was trained on."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = "must be in the store, .* Score an adapter first, with `llfast score --adapter-base`"
    with pytest.raises(SearchError, match=message):
        find_nearest(str(adapter), store.folder)
    store.add(index_result(40, model="elsewhere/adapter"))
    with pytest.raises(SearchError, match="did you mean elsewhere/adapter"):
        find_nearest(str(adapter), store.folder)
    store.add(index_result(41, model=str(adapter)))
    assert find_nearest(f"{adapter}/", store.folder)[0] == str(adapter)


def test_an_index_is_of_no_convention_where_one_must_be_named(tmp_path):
    store = Store(tmp_path / "store")
    store.add(index_result(0, convention="imported"))
    KLIndex.build(store)
    store.add(index_result(1, convention="lm-eval"))
    for build in (store.matrix, lambda: KLIndex.build(store)):
        with pytest.raises(StoreError, match="convention must be named where a store has several"):
            build()
    assert len(KLIndex.build(store, convention="imported")) == 1


def test_where_no_convention_is_named_an_index_follows_the_stores_own_choice(tmp_path):
    """Models of a published matrix, an index, and then those that are scored here."""
    store = Store(tmp_path / "store")
    for number in range(6):
        store.add(index_result(number, convention="imported"))
    assert build_index(store.folder)["models"] == 6
    before = KLIndex.build(store)
    for number in range(20, 24):
        store.add(index_result(number))
    assert (before.refresh(), len(before)) == (0, 6), "one that is open goes on with its own"
    for _ in range(2):
        found = find_nearest(name(20), store.folder)[1]
        assert {hit.model for hit in found} == set(store.matrix().models) - {name(20)}
    assert len(KLIndex.build(store, convention="imported")) == 6


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("size > 1", {1}),
        ("size is null", {2, 3}),
        ("cast(step as varchar) = '3'", {1}),  # whole numbers with gaps stay whole
        ("family is null", {2, 3}),
        ("not family = 'f'", set()),
    ],
)
def test_what_tables_write_as_nan_a_model_lacks(tmp_path, indexed, where, expected):
    store = Store(tmp_path / "store")
    lacking = {"size": math.nan, "step": math.nan, "family": math.nan}
    every = [{"family": "g"}, {"size": 2.5, "step": 3, "family": "f"}, lacking, {}]
    for number, metadata in enumerate(every):
        store.add(index_result(number, metadata=metadata))
    if indexed:
        build_index(store.folder)
    hits = find_nearest(name(0), store.folder, k=9, where=where)[1]
    assert {hit.model for hit in hits} == {name(number) for number in expected}
    assert all(hit.metadata.get("size", 0) == hit.metadata.get("size", 0) for hit in hits), "no NaN"

"""What a store keeps and which rows count; compaction and faults have files of their own."""

import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from llfast import LogLikelihoodMatrix, ModelSpace, Store, StoreError, shards
from llfast.errors import LlfastWarning
from llfast.results import ResultKey
from tests.stores import DIGEST, N, make_result, numbers, store_shards


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# ------------------------------------------------------------------------------ add and load


def test_a_result_comes_back_as_it_was(store):
    odd = np.array([-0.0, -5e-324, -1e308, -1 / 3, -np.pi, -1.0, -2.0, -3.0])
    given = make_result(
        "org/model",
        layer=3,
        loglikelihoods=odd,
        groups=tuple("aabbccdd"),
        provenance={"head": "fused", "threads": 2, "adds_bos": None},
        metadata={"family": "fämily", "parameters": 7, "tags": ["x"]},
    )
    store.add(given)
    (row,) = Store(store.folder).rows()
    loaded = store.load(row)
    assert loaded.key == given.key == row.key
    assert loaded.values.view(np.int64).tolist() == odd.view(np.int64).tolist(), "to the bit"
    for name in ("token_counts", "text_bytes", "truncated", "token_budgets"):
        assert getattr(loaded, name).tolist() == getattr(given, name).tolist()
        assert getattr(loaded, name).dtype == getattr(given, name).dtype
    assert (loaded.ids, loaded.groups) == (given.ids, given.groups)
    assert (loaded.provenance, loaded.metadata) == (given.provenance, given.metadata)
    assert row.label == "org/model@layer=3"


def test_rows_can_be_asked_for_by_text_set(store):
    store.add(make_result("a"))
    store.add(make_result("b", textset_digest="e" * 64))
    assert [row.key.model for row in store.rows()] == ["a", "b"]
    assert [row.key.model for row in store.rows("e" * 64)] == ["b"]
    assert store.rows("f" * 64) == []
    assert store.completed() == {row.key for row in store.rows()}
    assert store.textsets() == [DIGEST, "e" * 64]


def test_reading_a_store_that_is_not_there_makes_none(store):
    assert store.rows() == []
    assert store.completed() == set()
    with pytest.raises(StoreError, match="must hold results, got no such folder"):
        store.matrix()
    assert not store.folder.exists()


def test_a_matrix_has_a_row_a_model(store):
    for model in ("b", "c", "a"):
        store.add(
            make_result(
                model,
                revision=f"rev {model}",
                groups=tuple("aabbccdd"),
                metadata={"family": model.upper()},
                provenance={"adds_bos": model == "a", "threads": 2},
            )
        )
    matrix = store.matrix(DIGEST)
    assert matrix.models == ("a", "b", "c")
    np.testing.assert_array_equal(matrix.values, [numbers(m) for m in "abc"])
    assert matrix.text_bytes.tolist() == make_result("a").text_bytes.tolist()
    assert matrix.ids == make_result("a").ids
    assert matrix.groups == tuple("aabbccdd")
    assert (matrix.textset_digest, matrix.convention) == (DIGEST, "paper")
    assert matrix.revisions == ("rev a", "rev b", "rev c")
    assert matrix.dtypes == ("float32",) * 3
    assert matrix.metadata[0] == {"family": "A", "adds_bos": True}
    assert store.matrix(models=["c", "a", "c"]).models == ("a", "c")
    with pytest.raises(TypeError, match=r"models must be several names, got 'ab'; give \['ab'\]"):
        store.matrix(models="ab")
    with pytest.raises(StoreError, match="models must be in the store, got 'd'"):
        store.matrix(models=["a", "d"])


def test_a_matrix_of_nobody_knows_which_texts_is_refused(store):
    for model in ("a", "b"):  # of other texts, for all that anybody can tell
        with pytest.raises(ValueError, match="textset_digest must name the matrix's texts, got ''"):
            store.add_matrix(LogLikelihoodMatrix([model], numbers(model)[None], [1.0] * 8))
    assert not store.folder.exists()


def test_groups_are_kept_by_whoever_knows_them_first(store):
    """They are no part of a text set's digest, and widen intervals."""
    store.add(make_result("a"))
    assert store.matrix().groups is None
    store.add(make_result("b", groups=tuple("aabbccdd")))
    assert store.matrix().groups == tuple("aabbccdd")
    store.add(make_result("c"))
    assert store.matrix().groups == tuple("aabbccdd")


def test_hidden_layers_are_no_models_of_a_matrix(store):
    store.add(make_result("a"))
    store.add(make_result("a", layer=0, loglikelihoods=numbers("hidden")))
    assert store.matrix().models == ("a",)
    assert [row.label for row in store.rows()] == ["a", "a@layer=0"]


def test_layers_are_rows_of_a_matrix_where_they_are_asked_for(store):
    for model in ("b", "a"):
        store.add(make_result(model, metadata={"family": "f"}))
    for layer in (10, 2):
        values = numbers(f"a {layer}")
        store.add(
            make_result(
                "a", layer=layer, loglikelihoods=values, metadata={"family": "f", "layer": "x"}
            )
        )
    matrix = store.matrix(layers=True)
    assert matrix.models == ("a", "a@layer=2", "a@layer=10", "b")
    np.testing.assert_array_equal(matrix.row("a@layer=10"), numbers("a 10"))
    assert matrix.metadata == (
        {"family": "f"},
        {"family": "f", "layer": 2, "layer_of": "a"},
        {"family": "f", "layer": 10, "layer_of": "a"},
        {"family": "f"},
    )
    for layers in (False, True):
        named = store.matrix(models=["a@layer=2", "b"], layers=layers)
        assert named.models == ("a@layer=2", "b")
        assert store.matrix(models=["a"], layers=layers).models == ("a",)
    store.add(make_result("a", layer=2, revision="r2", loglikelihoods=numbers("a r2")))
    with pytest.raises(StoreError, match="a@layer=2@r1 in float32.*a@layer=2@r2 in float32"):
        store.matrix(layers=True)
    assert store.matrix().models == ("a", "b")
    chosen = store.matrix(models=["a@layer=2@r2"], layers=True)
    np.testing.assert_array_equal(chosen.row("a@layer=2"), numbers("a r2"))


def test_results_are_kept_together_or_not_at_all(store, monkeypatch):
    results = [make_result("a", layer=n, loglikelihoods=numbers(f"a {n}")) for n in range(5)]
    store.add_all(results)
    (shard,) = store_shards(store)
    for result, row in zip(results, store.rows(), strict=True):
        assert row.key == result.key
        assert row.shard == shard
        np.testing.assert_array_equal(store.load(row).values, result.values)
    others = [*results, make_result("b", textset_digest="e" * 64)]
    for given, count in (([], 0), (others, 2)):
        with pytest.raises(ValueError, match=f"results must be on one text set, got {count}"):
            store.add_all(given)
    monkeypatch.setattr(shards, "GROUP_BYTES", 2 * 17 * N)
    other = Store(store.folder.parent / "other")
    other.add_all(results)
    (shard,) = store_shards(other)
    assert pq.ParquetFile(shard).num_row_groups == 3
    assert [row.key for row in other.rows()] == [result.key for result in results]


def test_a_matrix_from_elsewhere_is_kept(store):
    bytes_ = [972.3188, 10.0, 20.0]
    matrix = LogLikelihoodMatrix(
        ["a", "b"],
        -np.arange(1.0, 7.0).reshape(2, 3),
        bytes_,
        [{"family": "f"}, {}],
        textset_digest="e" * 64,
        convention="imported",
        dtypes=["unknown"] * 2,
        revisions=["import:1"] * 2,
    )
    store.add_matrix(matrix)
    again = store.matrix()
    np.testing.assert_array_equal(again.values, matrix.values)
    assert again.text_bytes.tolist() == bytes_
    assert again.ids == ("0", "1", "2")
    assert again.metadata == matrix.metadata
    loaded = store.load(store.rows()[1])
    assert loaded.values.tolist() == [-4, -5, -6]
    assert loaded.token_counts.tolist() == [0, 0, 0]
    assert loaded.text_bytes.tolist() == bytes_


def test_layers_of_a_matrix_from_another_store_stay_layers(store):
    other = Store(store.folder.parent / "other")
    for layer in (None, 0, 1):
        other.add(make_result("a", loglikelihoods=numbers(f"a {layer}"), layer=layer))
    other.add(make_result("a copy", metadata={"layer": 0, "layer_of": "a"}))  # by its own account
    matrix = other.matrix(layers=True)
    store.add_matrix(matrix)
    assert store.matrix().models == ("a", "a copy")
    again = store.matrix(layers=True)
    assert (again.models, again.metadata) == (matrix.models, matrix.metadata)
    np.testing.assert_array_equal(again.values, matrix.values)


# ------------------------------------------------------------------------------ which row counts


def test_the_newest_row_of_a_key_counts(store):
    for shift in (0.0, 1.0, 2.0):
        store.add(make_result("a", loglikelihoods=numbers("a") + shift))
    # The time in the row decides, and not the order of the files.
    first, *_ = store_shards(store)
    first.rename(first.with_name("99999999999999999999-0.parquet"))
    np.testing.assert_array_equal(store.matrix().row("a"), numbers("a") + 2)
    (row,) = store.rows()
    np.testing.assert_array_equal(store.load(row).values, numbers("a") + 2)


def test_several_rows_of_a_model_are_refused_and_listed(store):
    store.add(make_result("other"))
    for revision, dtype in (("r1", "float32"), ("r2", "float32"), ("r2", "bfloat16")):
        values = numbers(revision + dtype)
        store.add(make_result("a", revision=revision, dtype=dtype, loglikelihoods=values))
    with pytest.raises(StoreError) as caught:
        store.matrix()
    message = str(caught.value)
    assert "\n" not in message
    for row in ("a@r1 in float32", "a@r2 in float32", "a@r2 in bfloat16", "duplicates='newest'"):
        assert row in message
    assert "other@" not in message
    np.testing.assert_array_equal(store.matrix(duplicates="newest").row("a"), numbers("r2bfloat16"))
    chosen = store.matrix(models=["a@r1", "other"])
    np.testing.assert_array_equal(chosen.row("a"), numbers("r1float32"))
    assert chosen.models == ("a", "other")
    np.testing.assert_array_equal(store.matrix(dtype="bfloat16").row("a"), numbers("r2bfloat16"))
    with pytest.raises(StoreError, match="a@r2 in float32.*a@r2 in bfloat16"):
        store.matrix(models=["a@r2"])
    with pytest.raises(StoreError, match="under convention 'paper' in float16, got none"):
        store.matrix(dtype="float16")
    with pytest.raises(ValueError, match="duplicates must be error or newest, got 'first'"):
        store.matrix(duplicates="first")


def test_a_long_list_of_rows_is_cut(store):
    for model in range(15):
        for revision in ("r1", "r2"):
            store.add(make_result(f"m{model:02}", revision=revision))
    with pytest.raises(StoreError, match=r"m00@r1 .* m09@r2 .* and 10 more; choose"):
        store.matrix()


def test_mixed_dtypes_are_warned_of_with_the_noise_floor(store):
    noise = 0.01 * np.random.default_rng(0).standard_normal(N)
    store.add(make_result("a in fp32"))
    store.add(
        make_result("a in bf16", dtype="bfloat16", loglikelihoods=numbers("a in fp32") + noise)
    )
    store.add(make_result("b", revision="r2"))
    matrix = store.matrix()
    assert matrix.dtypes == ("bfloat16", "float32", "float32")
    with pytest.warns(LlfastWarning, match="bfloat16 and float32") as caught:
        space = ModelSpace.fit(matrix, clip_quantile=None)
    floor = noise.var() / 2  # nats a text
    assert f"{floor:.3g} nats" in str(caught[0].message)
    bits_per_byte = floor / (matrix.text_bytes.mean() * np.log(2))
    assert space.noise_floor() == pytest.approx(bits_per_byte, rel=1e-9)


# ------------------------------------------------------------------------------ what is not mixed


def test_text_sets_are_not_mixed(store):
    store.add(make_result("a", textset_digest="d1" + "0" * 62))
    store.add(make_result("b", textset_digest="d2" + "0" * 62, n=5))
    with pytest.raises(StoreError, match="must be named where .* d10000000000, d20000000000"):
        store.matrix()
    assert store.matrix("d2").models == ("b",)
    with pytest.raises(StoreError, match="must be named"):
        store.matrix("d")
    with pytest.raises(StoreError, match="must hold results on text set e, got none"):
        store.matrix("e")
    store.add(make_result("c", textset_digest="d"))  # as matrices may name their texts
    assert store.matrix("d").models == ("c",)


def test_a_failure_on_other_texts_does_not_ask_which_texts_are_meant(store):
    store.add(make_result("a"))
    store.add_failure(make_result("a", textset_digest="e" * 64).key, "no memory")
    assert store.textsets() == [DIGEST]
    assert store.matrix().models == ("a",)
    assert len(store.rows()) == 2


def test_conventions_are_not_mixed(store):
    store.add(make_result("a", convention="lm-eval"))
    assert store.matrix().convention == "lm-eval"
    store.add(make_result("b", convention="always-bos"))
    with pytest.raises(StoreError, match="several, got always-bos, lm-eval"):
        store.matrix()
    assert store.matrix(convention="always-bos").models == ("b",)
    store.add(make_result("c"))
    assert store.matrix().models == ("c",), "paper is the default"
    with pytest.raises(StoreError, match="under convention 'other', got none"):
        store.matrix(convention="other")


@pytest.mark.parametrize(
    "changes", [{"n": 9}, {"ids": tuple("abcdefgh")}, {"text_bytes": np.ones(N, dtype=int)}]
)
def test_other_texts_under_the_same_digest_are_refused(store, changes):
    store.add(make_result("a"))
    with pytest.raises(StoreError, match=r"(ids|text_bytes) must be those in .*_texts\.json"):
        store.add(make_result("b", **changes))
    assert store.matrix().models == ("a",)


# ------------------------------------------------------------------------------ failures


def test_a_failure_gives_way_to_a_later_success(store):
    key = make_result("a").key
    store.add_failure(key, "out of memory")
    (row,) = store.rows()
    assert (row.key, row.error) == (key, "out of memory")
    assert store.completed() == set()
    with pytest.raises(StoreError, match="must hold results, got none"):
        store.matrix()
    with pytest.raises(ValueError, match="must be complete, got the failure of a: out of memory"):
        store.load(row)
    store.add(make_result("a"))
    (row,) = store.rows()
    assert row.error is None
    assert store.completed() == {key}
    np.testing.assert_array_equal(store.matrix().row("a"), numbers("a"))


def test_a_failure_never_hides_numbers(store):
    store.add(make_result("a"))
    store.add_failure(make_result("a").key, "interrupted")
    assert [row.error for row in store.rows()] == [None]
    # Another revision that fails later is news, and is listed beside them.
    store.add_failure(make_result("a", revision="r2").key, "truncated")
    assert [row.error for row in store.rows()] == [None, "truncated"]
    np.testing.assert_array_equal(store.matrix().row("a"), numbers("a"))


def test_a_failure_before_anything_was_known_gives_way_too(store):
    store.add_failure(
        ResultKey("a", "", DIGEST, "paper", "auto", None, 1), "there is no such folder"
    )
    store.add_failure(ResultKey("b", "", DIGEST, "paper", "auto", None, 1), "neither here")
    store.add(make_result("a", revision="r2", dtype="bfloat16"))
    assert [(row.key.model, row.error) for row in store.rows()] == [
        ("a", None),
        ("b", "neither here"),
    ]


# ------------------------------------------------------------------------------ other readers


def test_any_tool_reads_the_store_as_it_is(store):
    store.add(make_result("a", metadata={"family": "f", "size": math.nan}))
    store.add(make_result("b", textset_digest="e" * 64, layer=2))
    store.add_failure(make_result("c").key, "truncated")
    partial = store.partial_path(make_result("d").key)
    partial.parent.mkdir()
    partial.write_bytes(b"not a shard")
    table = ds.dataset(store.folder, partitioning="hive").to_table()
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "model": "string",
        "revision": "string",
        "convention": "string",
        "dtype": "string",
        "layer": "int32",
        "scoring_version": "int32",
        "status": "string",
        "error": "string",
        "created": "timestamp[us, tz=UTC]",
        "loglikelihoods": "list<element: double>",
        "token_counts": "list<element: int32>",
        "truncated": "list<element: bool>",
        "token_budgets": "list<element: int32>",
        "provenance": "string",
        "metadata": "string",
        "textset": "string",
    }
    rows = {row["model"]: row for row in table.to_pylist()}
    assert rows["a"]["loglikelihoods"] == numbers("a").tolist()
    assert rows["a"]["token_counts"] == list(range(5, 5 + N))
    assert (rows["a"]["textset"], rows["b"]["textset"]) == (DIGEST, "e" * 64)
    assert (rows["a"]["layer"], rows["b"]["layer"]) == (None, 2)
    assert (rows["a"]["status"], rows["a"]["error"]) == ("complete", None)
    assert (rows["c"]["status"], rows["c"]["error"]) == ("failed", "truncated")
    assert rows["c"]["loglikelihoods"] is None
    assert rows["a"]["metadata"] == '{"family": "f", "size": null}', "NaN is no JSON"
    assert pa.types.is_timestamp(table.schema.field("created").type)
    assert re.fullmatch(r"_partial/[0-9a-f]{64}\.npz", str(partial.relative_to(store.folder)))

"""Every command, from its arguments to what it prints, against what the library returns."""

import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest

import llfast
from llfast import KLIndex, Store, TextSet
from tests.tiny import TEXTS


def test_warnings_go_to_standard_error(command, filled):
    run = command("kl", "gpt2", "llama", "--store", filled, "--json")
    assert run.err.startswith("llfast: warning: 1 of the tokenizers add BOS and 2 do not")
    assert run.err.count("\n") == 1
    assert set(run.json) == {"a", "b", "kl"}


def test_score_stores_and_prints_what_the_library_returns(
    command, checkpoints, texts, texts_file, tmp_path
):
    folders = [checkpoints / "gpt2", checkpoints / "llama"]
    where = ("--texts", texts_file, "--store", tmp_path / "store")
    run = command("score", *folders, *where)
    assert (run.code, run.err) == (0, "")
    store = Store(tmp_path / "store")
    rows = {row.key.model: row for row in store.rows(texts.digest)}
    lines = dict(re.findall(r"^scored   (.*?): (.*)$", run.out, re.MULTILINE))
    assert len(run.out.splitlines()) == len(folders)
    for folder in folders:
        expected = llfast.score(folder, texts)
        stored = store.load(rows[str(folder)])
        assert stored.values.tobytes() == expected.values.tobytes()
        assert stored.key == expected.key
        bits, tokens = f"{expected.mean_bits_per_byte:.4f}", f"{expected.token_counts.sum():,}"
        assert lines[str(folder)].startswith(f"{bits} bits/byte, {tokens} tokens in ")
        assert lines[str(folder)].endswith(f" in {expected.dtype}")
    again = command("score", *folders, checkpoints / "gpt2-finetune", *where, "--json")
    assert [each["status"] for each in again.json] == ["skipped", "skipped", "scored"]
    finetune = llfast.score(checkpoints / "gpt2-finetune", texts)
    assert again.json[2]["bits_per_byte"] == finetune.mean_bits_per_byte
    assert again.json[2]["tokens"] == finetune.token_counts.sum()
    assert len(store.rows()) == 3, "what was skipped was not stored again"
    assert not list(store.partial_path(expected.key).parent.glob("*"))


def test_a_plain_list_and_arguments_go_together(command, checkpoints, texts_file, tmp_path):
    listed = tmp_path / "models.txt"
    mark = "\ufeff"  # as some editors put before all
    listed.write_text(
        f"{mark}# two models\n\n{checkpoints / 'gpt2'}\n  {checkpoints / 'llama'}  \n"
    )
    where = ("--texts", texts_file, "--store", tmp_path / "store", "--json")
    run = command("score", checkpoints / "gpt2-finetune", "--list", listed, *where)
    assert run.code == 0, run.err
    names = [str(checkpoints / name) for name in ("gpt2-finetune", "gpt2", "llama")]
    assert [each["model"] for each in run.json] == names
    assert {each["status"] for each in run.json} == {"scored"}


def test_a_list_of_objects_says_dtype_name_and_metadata(command, checkpoints, texts, tmp_path):
    rows = [
        {"model": str(checkpoints / "gpt2"), "name": "full", "family": "g", "size": 43392},
        {"model": str(checkpoints / "gpt2"), "name": "half", "dtype": "bfloat16"},
        {"model": str(checkpoints / "llama"), "name": "l", "metadata": {"family": "x", "y": [1]}},
    ]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts.save(tmp_path / "t.jsonl")
    store = Store(tmp_path / "store")
    where = ("--texts", tmp_path / "t.jsonl", "--store", store.folder)
    run = command("score", "--list", tmp_path / "l.jsonl", *where)
    assert run.code == 0, run.err
    found = {row.key.model: row for row in store.rows()}
    assert {name: row.key.dtype for name, row in found.items()} == {
        "full": "float32",
        "half": "bfloat16",
        "l": "float32",
    }
    assert [dict(found[name].metadata) for name in ("full", "half", "l")] == [
        {"family": "g", "size": 43392},
        {},
        {"family": "x", "y": [1]},
    ]
    expected = llfast.score(checkpoints / "gpt2", texts, dtype="bfloat16")
    assert store.load(found["half"]).values.tobytes() == expected.values.tobytes()
    run = command("score", "--list", tmp_path / "l.jsonl", *where, "--json")
    assert [each["status"] for each in run.json] == ["skipped"] * 3


def test_a_model_that_fails_stops_no_other(command, checkpoints, texts_file, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    where = ("--texts", texts_file, "--store", tmp_path / "store")
    run = command("score", checkpoints / "gpt2", f"{broken}/", checkpoints / "llama", *where)
    assert run.code == 1
    assert [line.split()[0] for line in run.out.splitlines()] == ["scored", "failed", "scored"]
    reason = f"{broken} must be a checkpoint folder, got one without config.json"
    assert reason in run.out
    assert run.err == "llfast: 1 of 3 models failed; the store has why\n"
    store = Store(tmp_path / "store")
    assert {row.label: row.error for row in store.rows()} == {
        str(checkpoints / "gpt2"): None,
        str(checkpoints / "llama"): None,
        str(broken): reason,
    }
    run = command("score", broken, *where, "--json")
    assert (run.code, run.json[0]["status"], run.json[0]["error"]) == (1, "failed", reason)
    # A model that was mended takes the place of its failure.
    for file in (checkpoints / "gpt2").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    assert command("score", broken, *where).code == 0
    assert [row.error for row in store.rows()] == [None] * 3
    matrix = store.matrix()
    assert len(matrix.models) == 3


def test_a_folder_whose_name_is_not_utf8_stops_no_other(command, checkpoints, texts_file, tmp_path):
    folder = shutil.copytree(checkpoints / "gpt2", tmp_path / "m\udcfc")
    where = ("--texts", texts_file, "--store", tmp_path / "store")
    command("score", tmp_path / "none\udcfc", folder, checkpoints / "llama", *where)
    found = {row.label: row.error for row in Store(tmp_path / "store").rows()}
    assert set(found) == {f"{tmp_path}/none\\udcfc", f"{tmp_path}/m\\udcfc", f"{checkpoints}/llama"}
    assert found[f"{tmp_path}/none\\udcfc"].endswith("no folder")
    assert found[f"{checkpoints}/llama"] is None


def test_a_given_name_need_not_be_utf8(command, checkpoints, texts_file, tmp_path):
    given = (checkpoints / "gpt2", "--name", "m\udcfc", "--texts", texts_file)
    for _ in range(2):
        assert command("score", *given, "--store", tmp_path / "store").code == 0
    assert [row.label for row in Store(tmp_path / "store").rows()] == ["m\\udcfc"]


@pytest.mark.parametrize("weights", ["auto", "paged"])
def test_what_verifying_took_is_told(command, checkpoints, texts_file, tmp_path, weights):
    path = checkpoints / "llama" / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "sums").write_text(f"{digest}  {path.name}\n")

    def score(store, *options):
        arguments = ("score", path.parent, "--texts", texts_file, "--weights", weights, "--store")
        return command(*arguments, tmp_path / store, *options)

    verified = ("--manifest", tmp_path / "sums")
    (facts,) = score("json", *verified, "--json").json
    assert set(facts["verified"]) == {"bytes", "seconds", "waited_seconds"}
    assert facts["verified"]["bytes"] == path.stat().st_size
    assert 0 < facts["verified"]["seconds"] < facts["seconds"]
    assert 0 < facts["verified"]["waited_seconds"] < facts["seconds"]
    assert ("paged" in facts) == (weights == "paged")
    told = r", [\d.]+ KiB verified meanwhile in [\d.]+ s, waited [\d.]+ s for that\n$"
    assert re.search(told, score("lines", *verified).out)
    assert "verified" not in score("plain-json", "--json").json[0]
    assert "verified" not in score("plain").out


def test_search_finds_what_the_index_finds(command, filled, space):
    index = KLIndex.build(space)
    hits = index.search("gpt2", k=10)
    run = command("search", "gpt2", "--store", filled, "-k", 100, "--json")
    assert run.json["hits"] == [hit.summary() for hit in hits]
    assert [hit.model for hit in hits] == ["gpt2-finetune", "llama"]
    assert (run.json["model"], run.json["unit"]) == ("gpt2", "bits_per_byte")
    table = command("search", "gpt2", "--store", filled)
    rows = [line.split("│")[1:-1] for line in table.out.splitlines() if line.startswith("│")]
    shown = [[cell.strip() for cell in row] for row in rows]
    assert "Nearest to gpt2" in table.out
    assert [row[0] for row in shown] == ["gpt2-finetune", "llama"]
    assert [row[1] for row in shown] == [f"{hit.kl:.4g}" for hit in hits]
    assert [row[2] for row in shown] == [f"{hit.standard_error:.4g}" for hit in hits]
    assert [row[4] for row in shown] == ["g", "l"]
    one = command("search", "gpt2", "--store", filled, "-k", 1, "--unit", "nats_per_text", "--json")
    assert one.json["hits"] == [index.search("gpt2", k=1, unit="nats_per_text")[0].summary()]
    radius = (hits[0].kl + hits[1].kl) / 2
    assert run.json["certificate"]["compared"] == len(hits)
    assert run.json["recall_at_10"] is None
    for mode in ("exact", "certified", "approximate"):
        other = command("search", "gpt2", "--store", filled, "--mode", mode, "--json").json
        assert other["hits"] == run.json["hits"]
    wrong = command("search", "gpt2", "--store", filled, "--mode", "hnsw")
    assert (wrong.code, wrong.out) == (1, "")
    assert "mode must be auto, exact, certified, approximate, got 'hnsw'" in wrong.error
    near = command("search", "gpt2", "--store", filled, "--radius", radius, "--json")
    assert [hit["model"] for hit in near.json["hits"]] == ["gpt2-finetune"]
    none = command("search", "gpt2", "--store", filled, "--radius", hits[0].kl / 2)
    assert none.code == 0
    assert "gpt2-finetune" not in none.out


def test_a_model_that_the_store_lacks_is_scored_first(
    command, checkpoints, filled, space, texts, texts_file
):
    mixture = checkpoints / "mixtral"
    before = sorted(filled.rglob("*"))
    run = command("search", mixture, "--store", filled, "--texts", texts_file, "--json")
    expected = KLIndex.build(space).search(llfast.score(mixture, texts), k=10)
    assert run.json["model"] == str(mixture)
    assert run.json["hits"] == [hit.summary() for hit in expected]
    assert len(expected) == 3
    assert sorted(filled.rglob("*")) == before, "searching stores nothing"


def test_a_folder_counts_as_the_stored_model_with_its_weights(command, checkpoints, filled):
    by_name = command("search", "gpt2", "--store", filled, "--json").json
    assert command("search", checkpoints / "gpt2", "--store", filled, "--json").json == by_name
    kl = command("kl", "gpt2", "llama", "--store", filled, "--json").json["kl"]
    folders = (checkpoints / "gpt2", f"{checkpoints / 'llama'}/")
    run = command("kl", *folders, "--store", filled, "--json")
    assert run.json == {"a": "gpt2", "b": "llama", "kl": kl}


def test_other_texts_are_refused_before_a_model_runs(command, filled, nan_checkpoint, tmp_path):
    other = tmp_path / "other.jsonl"
    TextSet.from_texts(["other", "texts"]).save(other)
    run = command("search", nan_checkpoint, "--store", filled, "--texts", other)
    assert f"{other} must be the texts that the store's models were scored on" in run.error


def test_kl_is_that_of_the_space(command, filled, space):
    expected = space.kl("gpt2", "llama")
    run = command("kl", "gpt2", "llama", "--store", filled)
    assert run.out == f"KL(gpt2, llama) = {expected}\n"
    found = command("kl", "llama", "gpt2", "--store", filled, "--unit", "nats_per_text", "--json")
    nats = space.kl("gpt2", "llama", unit="nats_per_text")
    assert found.json["kl"] == dataclasses.asdict(nats) | {"interval": list(nats.interval)}


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gpt3", "did you mean gpt2"),
        ("zoo/llama", "did you mean llama?"),
        ("xyz", "it has gpt2, gpt2-finetune, llama"),
    ],
)
def test_an_unknown_model_is_answered_with_those_that_are_there(command, filled, name, advice):
    for run in (
        command("kl", "gpt2", name, "--store", filled),
        command("kl", name, "gpt2", "--store", filled),
        command("search", name, "--store", filled),
    ):
        assert (run.code, run.out) == (1, "")
        last = run.err.splitlines()[-1]
        assert last.startswith(f"llfast: error: model must be in the store, got '{name}'; {advice}")
    assert "--texts" in last, "search can score it"


def test_kl_of_one_of_two_text_sets_conventions_and_dtypes(
    command, checkpoints, texts, texts_file, tmp_path
):
    """A store that was added to three times gives each time's numbers, when it is told which."""
    other = TextSet.from_texts([text[::-1] for text in TEXTS])
    other.save(tmp_path / "other.jsonl")
    folders = [str(checkpoints / "gpt2"), str(checkpoints / "gpt2-finetune")]
    store = tmp_path / "store"

    def score(*options):
        assert command("score", *folders, "--store", store, *options).code == 0

    def kl(*options):
        return command("kl", *folders, "--store", store, "--json", *options)

    def truth(of, **options):
        a, b = (llfast.score(folder, of, **options).values for folder in folders)
        clip = np.quantile(np.stack([a, b]), 0.02)
        difference = np.maximum(a, clip) - np.maximum(b, clip)
        return difference.var() / 2 / (of.text_bytes.mean() * np.log(2))

    score("--texts", texts_file)
    score("--texts", texts_file, "--convention", "always-bos")
    assert kl().json["kl"]["value"] == pytest.approx(truth(texts), rel=1e-9)
    bos = kl("--convention", "always-bos").json["kl"]["value"]
    assert bos == pytest.approx(truth(texts, convention="always-bos"), rel=1e-9)
    score("--texts", texts_file, "--dtype", "bfloat16")
    assert "must have one row a model" in kl().error
    assert "choose with --dtype or --newest" in kl().error
    half = kl("--dtype", "bfloat16").json["kl"]["value"]
    assert half == pytest.approx(truth(texts, dtype="bfloat16"), rel=1e-9)
    assert kl("--newest").json["kl"]["value"] == half
    score("--texts", tmp_path / "other.jsonl")
    assert "the text set must be named where a store has several" in kl("--newest").error
    assert kl("--newest").error.endswith("; choose with --textset")
    reversed_ = kl("--textset", other.digest[:8]).json["kl"]["value"]
    assert reversed_ == pytest.approx(truth(other), rel=1e-9)


def test_compact_merges_shards_and_keeps_every_number(command, models_list, texts_file, tmp_path):
    store = tmp_path / "store"
    where = ("--texts", texts_file, "--store", store)
    assert command("score", "--list", models_list, *where).code == 0
    before = Store(store).matrix()
    assert len(list(store.glob("*/*.parquet"))) == 3
    assert command("compact", "--store", store).out == "3 shards merged\n"
    assert len(list(store.glob("*/*.parquet"))) == 1
    after = Store(store).matrix()
    assert after.models == before.models
    assert after.values.tobytes() == before.values.tobytes()
    assert command("compact", "--store", store).out == "nothing to merge\n"
    again = command("score", "--list", models_list, *where, "--json")
    assert [each["status"] for each in again.json] == ["skipped"] * 3


def test_a_removed_model_is_scored_again_when_it_is_asked_for(
    command, models_list, store, texts_file, filled
):
    assert command("remove", "gpt2", "llama", "--store", store).out == "2 results removed\n"
    assert Store(store).matrix().models == ("gpt2-finetune",)
    run = command("remove", "gpt2-finetune", "gpt2", "--store", store)
    assert run.error.endswith("models must be in the store, got 'gpt2'")
    assert command("compact", "--store", store).out == "4 shards merged\n"
    run = command("score", "--list", models_list, "--texts", texts_file, "--store", store, "--json")
    assert {each["model"]: each["status"] for each in run.json} == {
        "gpt2": "scored",
        "gpt2-finetune": "skipped",
        "llama": "scored",
    }
    matrix = Store(store).matrix()
    assert matrix.values.tobytes() == Store(filled).matrix().values.tobytes()
    run = command("remove", "gpt2-finetune", "--store", store, "--json")
    assert run.json == {"removed": 1}

"""`llfast layers`: a model at each of its layers, in a store and in a table."""

import re

import numpy as np
import pytest

import llfast
from llfast import SpaceError, Store, TextSet, nearest, stored_layers
from tests.architectures import build
from tests.stores import run_with_mount
from tests.tiny import make_adapter, make_tokenizer, save


@pytest.fixture
def layers(command, checkpoints, texts_file, store):
    """`layers("gpt2", ...)` runs the command on a checkpoint."""

    def run(model, *arguments):
        given = ("--name", model, "--texts", texts_file, "--store", store, *arguments)
        return command("layers", checkpoints / model, *given)

    return run


def test_layers_are_stored_and_shown(layers, store, checkpoints, texts):
    shards = len(list(store.glob("textset=*/*.parquet")))
    shown = layers("gpt2")
    assert (shown.code, shown.err) == (0, "")
    assert len(list(store.glob("textset=*/*.parquet"))) == shards + 1
    expected = llfast.score_layers(checkpoints / "gpt2", texts, name="gpt2")
    rows = [row for row in Store(store).rows() if row.key.layer is not None]
    assert [row.label for row in rows] == [f"gpt2@layer={layer}" for layer in range(3)]
    for row, result in zip(rows, expected, strict=True):
        assert row.key == result.key
        np.testing.assert_array_equal(Store(store).load(row).values, result.values)
    found = layers("gpt2", "--json").json
    assert (found["model"], found["status"], found["dtype"]) == ("gpt2", "skipped", "float32")
    assert [each["layer"] for each in found["layers"]] == [0, 1, 2]
    assert found["layers"][2]["kl_to_output"] is None
    for each, result in zip(found["layers"], expected, strict=True):
        assert each["bits_per_byte"] == result.mean_bits_per_byte
        line = re.search(rf"^│ +{result.layer} │.*$", shown.out, re.MULTILINE)[0]
        assert f" {each['bits_per_byte']:.4g} " in line
        for name in ("kl_to_next", "kl_to_output"):
            if kl := each[name]:
                assert f" {kl['value']:.4g} ± {kl['standard_error']:.2g} " in line


def test_what_the_store_has_is_skipped_until_a_part_is_missing(layers, store, content):
    first = layers("llama")
    before = content(store)
    again = layers("llama")
    line, *table = again.out.splitlines()
    assert line == "skipped  llama at 3 layers: in the store already"
    assert table == first.out.splitlines()
    assert content(store) == before
    for layer in range(3):  # without the last, too, those before it are not all
        Store(store).remove([f"llama@layer={layer}"])
        assert layers("llama", "--json").json["status"] == "scored"
        found = layers("llama", "--json").json
        assert (found["status"], len(found["layers"])) == ("skipped", 3)
    for option in (("--dtype", "bfloat16"), ("--convention", "always-bos"), ("--name", "other")):
        assert layers("llama", *option, "--json").json["status"] == "scored"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_read_out_at_the_layers_of_its_base(layers, checkpoints, texts, tmp_path):
    adapter, base = make_adapter(tmp_path / "adapter"), str(checkpoints / "llama")
    run = layers(adapter)
    assert "got a LoRA adapter; pass the model it was trained on with --adapter-base" in run.error
    assert layers("llama", "--adapter-base", base).error.endswith("which is none; leave it out")
    found = layers(adapter, "--adapter-base", base, "--json").json
    assert (found["status"], len(found["layers"])) == ("scored", 3)
    expected = llfast.score_layers(adapter, texts, adapter_base=base)
    merged = llfast.score(adapter, texts, adapter_base=base)
    assert found["revision"] == merged.revision == expected[0].revision
    np.testing.assert_array_equal(expected[-1].values, merged.values)
    assert (merged.values != llfast.score(base, texts).values).all()
    numbers = [each["bits_per_byte"] for each in found["layers"]]
    assert numbers == [each.mean_bits_per_byte for each in expected]
    assert layers(adapter, "--adapter-base", base, "--json").json["status"] == "skipped"


def test_models_are_compared_as_before_where_layers_are_stored(layers, command, store):
    questions = [
        ("kl", "gpt2", "llama"),
        ("search", "gpt2"),
        ("search", "gpt2", "--mode", "certified"),
    ]

    def answers():
        return [command(*each, "--store", store, "--json").json for each in questions]

    before = answers()
    assert layers("gpt2").code == 0
    assert answers() == before
    assert command("index", "build", "--store", store, "--mode", "certified").code == 0
    before = answers()
    assert layers("llama").code == 0
    assert answers() == before


def test_layers_make_no_index_worth_having(layers, command, store, monkeypatch):
    monkeypatch.setattr(nearest, "_MOST_IN_MEMORY", 8 * 3 * 12)  # of three models, on 12 texts
    layers("gpt2")
    assert command("search", "gpt2", "--store", store).code == 0
    assert not (store / "_index").exists()


def test_info_has_one_line_for_all_layers(layers, command, store):
    layers("gpt2")
    facts = command("info", store, "--json").json
    assert (facts["complete"], facts["failed"], facts["layers"]) == (3, 0, 3)
    names = ["gpt2", "gpt2 at 3 layers", "gpt2-finetune", "llama"]
    assert [row["model"] for row in facts["rows"]] == names
    assert re.search(r"│ gpt2 at 3 layers +│ [0-9a-f]{12} .* complete ", command("info", store).out)


def test_what_cannot_be_read_out_is_said_in_one_line(layers, command, store, texts_file, content):
    before = content(store)
    assert "convention must be one of" in layers("gpt2", "--convention", "papers").error
    assert "dtype must be auto, float32" in layers("gpt2", "--dtype", "float8").error
    run = command("layers", "no-such-model", "--texts", texts_file, "--store", store)
    assert "model must be a checkpoint folder or Hub id, got no-such-model" in run.error
    assert content(store) == before


def test_a_command_that_fails_leaves_no_new_store(
    layers, command, checkpoints, nan_checkpoint, texts_file, tmp_path
):
    tokenizer = make_tokenizer(adds_bos=False, vocabulary=290)
    normless = save(build("openai-gpt"), tokenizer, tmp_path / "normless")
    new = tmp_path / "made" / "new"
    for model, options, message in (
        (normless, (), "model must have a final norm between its last layer and its head"),
        (nan_checkpoint, (), "model must give finite numbers, got nan from layer 1 on"),
        (
            checkpoints / "gpt2",
            ("--token-budget", 9999999),
            "Invalid value for '--token-budget'",
        ),
    ):
        run = command("layers", model, "--texts", texts_file, "--store", new, *options)
        assert message in run.error
        assert not new.parent.exists()
    assert command("layers", checkpoints / "gpt2", "--texts", texts_file, "--store", new).code == 0
    assert len(Store(new).rows()) == 3


@pytest.mark.parametrize("words", [("a", "b"), ("", "")])
def test_texts_without_a_scored_token_are_no_grounds_for_a_comparison(
    command, checkpoints, tmp_path, words
):
    """Layers that have said nothing are not equal."""
    texts, new = TextSet.from_texts(words), tmp_path / "new"
    texts.save(tmp_path / "t.jsonl")
    arguments = ("layers", checkpoints / "gpt2", "--texts", tmp_path / "t.jsonl", "--store", new)
    message = (
        "texts must have a scored token for layers to be compared, got none in 2 texts; give "
        "longer ones, or score their first token, too, with convention 'always-bos'"
    )
    assert message in command(*arguments).error
    assert not new.exists()
    with pytest.raises(SpaceError, match=message):
        stored_layers.compare_layers(llfast.score_layers(checkpoints / "gpt2", texts))
    if any(words):
        assert command(*arguments, "--convention", "always-bos").code == 0


def test_a_store_that_cannot_be_made_is_found_out_before_a_model_runs(
    command, checkpoints, texts_file, monkeypatch
):
    monkeypatch.setattr(stored_layers, "score_layers", lambda *_, **__: 1 / 0)
    store = texts_file / "store"  # in a file
    run = command("layers", checkpoints / "gpt2", "--texts", texts_file, "--store", store)
    assert f"Not a directory: '{store}'" in run.error


def test_a_read_only_store_is_refused_before_a_model_runs(
    layers, store, checkpoints, texts_file, content
):
    """What it has is shown all the same."""
    assert layers("gpt2").code == 0
    before = content(store)
    code = f"""
import sys
from llfast import stored_layers
from llfast.__main__ import main
stored_layers.score_layers = lambda *_, **__: 1 / 0
options = ["--texts", {str(texts_file)!r}, "--store", sys.argv[1]]
for name in ("gpt2", "llama"):
    sys.argv = ["llfast", "layers", {str(checkpoints)!r} + "/" + name, "--name", name, *options]
    try:
        main()
    except SystemExit as leave:
        print("code", leave.code)
"""
    run = run_with_mount('mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"', code, store)
    assert run.stdout.startswith("skipped  gpt2 at 3 layers: in the store already")
    assert [line for line in run.stdout.splitlines() if line.startswith("code")] == ["code 1"]
    (line,) = run.stderr.splitlines()
    assert line.endswith(f"The store cannot be written to: '{store}'")
    assert content(store) == before

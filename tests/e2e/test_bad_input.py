"""Whatever is wrong: one clear line, an exit status, and nothing lost of what was there."""

import json
import shutil

import numpy as np
import pytest
import torch

import llfast
from llfast import SpaceError, Store, TextSet
from llfast.fleet import score_models, score_share
from llfast.model_list import read_model_list
from tests.tiny import TEXTS, make_model, make_tokenizer, save


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must hold at least one text, got an empty file"),
        (b"\n \n", "must hold at least one text, got an empty file"),
        (b'{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n', "got 'x' for texts 0 and 1"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 must be UTF-8, got byte 0xff at offset 10"),
        (b"a plain text\n", "line 1 must be a JSON object"),
        (b'{"text": "cut\n', "line 1 must be a JSON object"),
        (b'["text"]\n', 'line 1 must be an object with a string "text"'),
        (b'{"text": null}\n', 'line 1 must be an object with a string "text"'),
        (None, "No such file or directory"),
    ],
    ids="empty blank duplicate-id not-utf8 not-json half-a-line a-list no-text missing".split(),
)
def test_a_text_set_that_cannot_be_used(command, checkpoints, store, tmp_path, data, message):
    path = tmp_path / "bad.jsonl"
    if data is not None:
        path.write_bytes(data)
    for arguments in (
        ("score", checkpoints / "gpt2", "--texts", path, "--store", store),
        ("score", checkpoints / "gpt2", "--texts", path, "--store", tmp_path / "new"),
        ("search", checkpoints / "mixtral", "--texts", path, "--store", store),
        ("texts", "show", path),
    ):
        run = command(*arguments)
        assert (run.code, run.out) == (1, "")
        assert str(path) in run.error
        assert message in run.error
    assert not (tmp_path / "new").exists()


def test_an_id_or_group_that_is_null_is_none(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "id": null}\n{"text": "b", "id": null, "group": null}\n')
    texts = TextSet.load(path)
    assert texts.ids == ("0", "1")
    assert texts.groups is None
    path.write_text('{"text": "a", "group": null}\n{"text": "b", "group": "d"}\n{"text": "c"}\n')
    assert len(set(TextSet.load(path).groups)) == 3


def test_a_text_longer_than_the_model_takes_is_cut_counted_and_named(command, tmp_path):
    model, tokenizer = make_model("gpt2", n_positions=32), make_tokenizer(adds_bos=True)
    folder = save(model, tokenizer, tmp_path / "short")
    texts = TextSet.from_texts([TEXTS[0], *[TEXTS[9]] * 5, TEXTS[1]], ids="a b c d e f g".split())
    texts.save(tmp_path / "t.jsonl")
    arguments = ("score", folder, "--texts", tmp_path / "t.jsonl", "--store")
    run = command(*arguments, tmp_path / "one")
    assert (run.code, run.err) == (0, "")
    assert run.out.endswith(", 5 texts truncated (b, c, d, ...)\n")
    facts = command(*arguments, tmp_path / "two", "--json").json[0]
    assert facts["truncated_texts"] == 5
    assert facts["truncated_ids"] == ["b", "c", "d", "e", "f"]
    assert command(*arguments[:4], "--dry-run", "--json").json[0]["truncated_texts"] == 5
    (row,) = Store(tmp_path / "one").rows()
    stored = Store(tmp_path / "one").load(row)
    cut = tokenizer.decode(tokenizer(TEXTS[9], add_special_tokens=False)["input_ids"][:31])
    short = llfast.score(folder, [cut])
    np.testing.assert_allclose(stored.values[1:6], short.values[0], rtol=0, atol=1e-4)
    assert stored.truncated_ids == ("b", "c", "d", "e", "f")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--convention papers", "convention must be one of paper, always-bos, lm-eval"),
        ("--dtype float8", "dtype must be auto, float32, bfloat16, float16, got 'float8'"),
        ("--device meta", "device must be auto, cpu or cuda, got 'meta'"),
        ("--device gpu", "device must be auto, cpu or cuda, got 'gpu'"),
        ("--device cuda:x", "device must be auto, cpu or cuda, got 'cuda:x'"),
    ],
)
def test_an_option_that_does_not_exist(command, checkpoints, store, texts_file, options, message):
    models = (checkpoints / "gpt2", checkpoints / "mixtral")
    run = command("score", *models, "--texts", texts_file, "--store", store, *options.split())
    assert (run.code, run.out) == (1, "")
    assert message in run.error
    run = command("score", *models, "--texts", texts_file, "--dry-run", *options.split())
    assert message in run.error


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("words", "run"), [("score --list", score_models), ("fleet score", score_share)]
)
def test_a_token_budget_that_is_none_is_refused_once(
    command, models_list, store, texts, texts_file, words, run
):
    where = ("--texts", texts_file, "--store", store)
    for budget in (0, 1_048_577):
        found = command(*words.split(), models_list, *where, "--token-budget", budget)
        assert (found.code, found.out) == (2, "")
        assert "Invalid value for '--token-budget'" in found.error
        message = f"token_budget must be a whole number from 1 to 1,048,576, got {budget}"
        with pytest.raises(ValueError, match=message):
            run(read_model_list(models_list), texts, Store(store), token_budget=budget)


@pytest.mark.usefixtures("untouched")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there(command, checkpoints, store, texts_file):
    arguments = ("score", checkpoints / "mixtral", "--texts", texts_file, "--store", store)
    run = command(*arguments, "--device", "cuda")
    assert "device must be there, got 'cuda' where torch sees no CUDA device" in run.error


@pytest.mark.usefixtures("untouched")
def test_questions_that_a_store_cannot_answer(command, store, tmp_path):
    for options, message in (
        ("--unit bits", "unit must be one of bits_per_byte, nats_per_text, got 'bits'"),
        ("--textset 0000", "must hold results on text set 0000, got none"),
        ("--convention lm-eval", "under convention 'lm-eval', got none"),
        ("--dtype float16", "in float16, got none"),
    ):
        for words in (("kl", "gpt2", "llama"), ("search", "gpt2")):
            run = command(*words, "--store", store, *options.split())
            assert (run.code, run.out) == (1, "")
            assert message in run.err.splitlines()[-1]
            assert run.err.splitlines()[-1].startswith("llfast: error: ")
    run = command("kl", "a", "b", "--store", tmp_path / "none")
    assert "none must hold results, got no such folder" in run.error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"model": 3}', 'line 2 must be an object with a string "model"'),
        ("gpt2", "line 2 must be a JSON object"),
        ('{"model": "gpt2", "revision": 3}', "line 2: revision must be a string, got 3"),
        ('{"model": "gpt2", "metadata": 5}', "line 2: metadata must be an object, got 5"),
        ('{"model": "gpt2", "dtype": "int4"}', "dtype must be auto, float32, bfloat16, float16"),
        (b"\xff", "must be UTF-8"),
        (None, "No such file"),
    ],
    ids="no-model not-json revision metadata dtype not-utf8 missing".split(),
)
@pytest.mark.usefixtures("untouched")
def test_a_list_of_models_that_cannot_be_used(
    command, checkpoints, store, texts_file, tmp_path, line, message
):
    path = tmp_path / "models.jsonl"
    if line is not None:
        first = json.dumps({"model": str(checkpoints / "mixtral")}).encode()
        path.write_bytes(first + b"\n" + (line if isinstance(line, bytes) else line.encode()))
    run = command("score", "--list", path, "--texts", texts_file, "--store", store)
    assert (run.code, run.out) == (1, "")
    assert message in run.error


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("option", ["--name", "--revision", "--tokenizer", "--adapter-base"])
def test_an_option_that_a_list_would_not_obey(command, models_list, store, texts_file, option):
    where = ("--texts", texts_file, "--store", store)
    run = command("score", "--list", models_list, option, "x", *where)
    assert run.code == 2
    assert f"{option} goes with " in run.error


def test_texts_and_conventions_are_never_mixed_in_one_space(command, checkpoints, filled, space):
    other = llfast.score(checkpoints / "gpt2", TEXTS[:-1])
    under = llfast.score(checkpoints / "gpt2", TEXTS, convention="always-bos")
    with pytest.raises(SpaceError, match="textset_digest of .* must be that of the space"):
        space.project(other)
    with pytest.raises(SpaceError, match="convention of .* must be that of the space"):
        space.kl("gpt2", under)
    from llfast import KLIndex

    with pytest.raises(SpaceError, match="score it under the same convention"):
        KLIndex.build(space).search(under)


@pytest.mark.usefixtures("untouched")
def test_the_parts_of_a_mixed_store_stay_apart(command, checkpoints, store, tmp_path):
    mixed = shutil.copytree(store, tmp_path / "mixed")
    TextSet.from_texts(TEXTS[:-1]).save(tmp_path / "other.jsonl")
    where = ("--texts", tmp_path / "other.jsonl", "--store", mixed)
    assert command("score", checkpoints / "mixtral", *where).code == 0
    run = command("kl", "gpt2", "llama", "--store", mixed)
    assert run.code == 1
    assert "the text set must be named where a store has several, got " in run.error
    digests = Store(mixed).textsets()
    for digest in digests:
        assert digest[:12] in run.error
    own = TextSet.from_texts(TEXTS).digest
    expected = command("kl", "gpt2", "llama", "--store", store).out
    assert command("kl", "gpt2", "llama", "--store", mixed, "--textset", own[:6]).out == expected
    run = command("kl", "gpt2", checkpoints / "mixtral", "--store", mixed, "--textset", own[:6])
    assert "must be in the store" in run.error


def test_ctrl_c_before_a_command_has_begun(command, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llfast.__main__.app", interrupted)
    done = command("info")
    assert (done.code, done.out) == (130, "")
    assert done.err.startswith("llfast: interrupted; what is done is kept")
    assert done.err.count("\n") == 1

"""What commands print, and where: help, JSON, a line a mistake, nothing to drive a terminal."""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import typer.main

import llfast
from llfast import TextSet
from llfast.cli import app
from llfast.output import print_facts, print_table
from tests.indexes import make_store
from tests.terminals import on_a_terminal
from tests.tiny import TEXTS


def leaves(group=None, path=()):
    """(words, command) of every command that does something."""
    for name, each in (group or typer.main.get_command(app)).commands.items():
        if hasattr(each, "commands"):
            yield from leaves(each, (*path, name))
        else:
            yield (*path, name), each


COMMANDS = {" ".join(path): each for path, each in leaves()}


@pytest.mark.parametrize("path", ["", "texts", "bench", "index", *COMMANDS])
def test_every_command_has_help_and_so_has_every_parameter(command, path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = command(*path.split(), "--help")
    assert (run.code, run.err) == (0, "")
    assert path in run.out
    if path not in COMMANDS:
        for name, each in leaves():
            if len(name) == 1 and not path:
                assert re.search(rf" {name[0]} .*{re.escape(each.help.split()[0])}", run.out)
        return
    assert len(COMMANDS[path].help or "") > 20, f"{path} must say what it does"
    assert COMMANDS[path].help.splitlines()[0][:60] in run.out
    for parameter in COMMANDS[path].params:
        assert len(parameter.help or "") > 5, f"{path}: {parameter.name} must say what it is"
        for option in parameter.opts:
            assert option in run.out or parameter.param_type_name == "argument"


@pytest.fixture
def examples(checkpoints, filled, models_list, texts_file, tmp_path, monkeypatch):
    """Arguments with which each command prints a result."""

    def run_demo(out, *, say):
        say("training")
        return {"families_found": True, "models": ["a"]}

    filled = shutil.copytree(filled, tmp_path / "filled")  # for some of them change it

    # Their own tests run them for real; what is removed is not there to be removed again.
    monkeypatch.setattr("llfast.demo.run_demo", run_demo)
    monkeypatch.setattr("llfast.store.Store.remove", lambda _, models: len(models))
    (tmp_path / "m.csv").write_text("id,a,b\nx,1.0,1.1\ny,1.2,1.5\nz,2.0,1.0\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "doc.txt").write_text("a word or two " * 200)
    made = make_store(tmp_path / "scored", 12)
    scores = ((model, number % 5) for number, model in enumerate(made.matrix().models))
    lines = [f"{model},{score}\n" for model, score in scores]
    (tmp_path / "scores.csv").write_text("model,arc\n" + "".join(lines))
    score = f"--texts {texts_file} --store {tmp_path / 'store'}"
    series = f"{checkpoints / 'gpt2'} {checkpoints / 'gpt2-finetune'}"
    imported = f"--store {tmp_path / 'imported'} --unit bits_per_byte --text-bytes 100"
    return {
        "texts build": f"texts build {tmp_path / 'doc.txt'} --out {tmp_path / 't.jsonl'} --n 2",
        "texts show": f"texts show {texts_file}",
        "score": f"score --list {models_list} {score}",
        "import": f"import {tmp_path / 'm.csv'} {imported}",
        "fleet score": f"fleet score --models {models_list} {score} --no-wait",
        "fleet status": f"fleet status --store {filled} --models {models_list}",
        "search": f"search gpt2 --store {filled}",
        "index build": f"index build --store {filled} --mode certified",
        "layers": f"layers {checkpoints / 'gpt2'} {score}",
        "predict": f"predict --store {made.folder} --scores {tmp_path / 'scores.csv'} --alone",
        "map": f"map --store {made.folder} --out {tmp_path / 'map.html'} --method pca",
        "compare": f"compare --store {filled}",
        "trajectory": f"trajectory --checkpoints {series} --steps 0,9 {score}",
        "kl": f"kl gpt2 llama --store {filled}",
        "info": f"info {filled}",
        "compact": f"compact --store {tmp_path / 'empty'}",
        "remove": f"remove gpt2 --store {filled}",
        "demo": f"demo --out {tmp_path / 'demo'}",
        "bench kernel": "bench kernel --device cpu --dtype float32 --tokens 2",
        "bench search": "bench search --models 60 --texts 30 --questions 4",
        "bench loading": f"bench loading {checkpoints / 'llama'} --tokens 40 --repetitions 1",
        "bench throughput": f"bench throughput --model {checkpoints / 'llama'} --texts 2",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_all_that_a_command_prints_where_it_is_asked_for(command, examples, name):
    arguments = examples[name].split()
    assert set(examples) == set(COMMANDS), "a new command needs an example"
    run = command(*arguments, "--json")
    assert run.code == 0, run.err
    assert run.json
    assert all(line.startswith("llfast: ") or name == "demo" for line in run.err.splitlines())
    assert command(*arguments).out, "without --json people are told"


def test_the_version_is_printed(command):
    run = command("--version")
    assert (run.code, run.out, run.err) == (0, f"llfast {llfast.__version__}\n", "")
    assert llfast.__version__ == "0.1.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("score", "Missing option '--texts'; see `"),
        ("scor", "No such command 'scor'"),
        ("score --texts t --nope", "No such option"),
        ("score --texts t", "give at least one MODEL, or --list FILE"),
        ("kl a --store s", "Missing argument '"),
        ("search a --store s -k 0", "Invalid value for '-k'"),
        ("search a --store s --radius -1", "Invalid value for '--radius'"),
        ("search a --store s --radius 1 -k 5", "-k goes without --radius"),
        ("predict --store s --scores f --alone --group g", "--group goes without --alone"),
        ("score m --texts t --token-budget 0", "Invalid value for '--token-budget'"),
        ("texts show t --rows x", "Invalid value for '--rows'"),
        ("bench throughput --texts 0", "Invalid value for '--texts'"),
        ("fleet score --texts t --store s --models m --cpus 2", "--cpus goes with --ray"),
        (
            "fleet score --texts t --store s --models m --ray auto --rank 0",
            "--rank and --world-size go without --ray",
        ),
    ],
)
def test_misuse_is_one_line_and_status_2(command, arguments, message):
    run = command(*arguments.split())
    assert run.code == 2
    assert run.out == ""
    assert run.error.startswith(f"llfast: error: {message}")


def test_a_shape_that_nobody_knows_is_one_line(command):
    run = command("bench", "throughput", "--shape", "GPT-5")
    assert (run.code, run.out) == (1, "")
    assert run.error.startswith("llfast: error: shape must be one of stories15M, GPT-2, ")


def test_a_store_is_asked_for_where_one_is_needed(command, checkpoints, texts_file):
    run = command("score", checkpoints / "gpt2", "--texts", texts_file)
    assert run.code == 2
    assert "--store DIR is needed" in run.error
    two = (checkpoints / "gpt2", checkpoints / "llama")
    run = command("score", *two, "--name", "x", "--texts", texts_file, "--store", "s")
    assert run.code == 2
    assert "--name goes with one MODEL" in run.error


@pytest.mark.parametrize("words", [[], ["texts"], ["bench"]])
def test_no_words_print_the_help(command, words):
    run = command(*words)
    assert "Usage:" in run.out
    assert (run.code, run.err) == (2, "")


def shell(*arguments, program=(sys.executable, "-m", "llfast"), **options):
    return subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_the_module_and_the_console_command_are_one_program(texts_file):
    console = Path(sys.executable).with_name("llfast")
    assert console.exists(), "installed with the package"
    for arguments in (("--version",), ("texts", "show", texts_file), ("texts", "show", "no-file")):
        runs = [shell(*arguments), shell(*arguments, program=(console,))]
        assert len({(run.returncode, run.stdout, run.stderr) for run in runs}) == 1
    assert runs[0].returncode == 1
    assert runs[0].stderr == "llfast: error: [Errno 2] No such file or directory: 'no-file'\n"
    assert shell("texts", "show").returncode == 2


@pytest.mark.parametrize("count", [1, 3000], ids=["less", "more"])
def test_a_pipe_that_is_closed_early_is_no_error_to_tell_of(tmp_path, count):
    """More, and less, than fits into the buffers between two programs."""
    TextSet.from_texts(["x" * 90] * count).save(tmp_path / "t.jsonl")
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ["-m", "llfast", "texts", "show", str(tmp_path / "t.jsonl"), "--rows", "3000"]
    with os.fdopen(writing, "w") as out:
        run = subprocess.run(
            [sys.executable, *arguments],
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (run.returncode, run.stderr) == (1, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_is_closed_is_no_error(texts_file, closed):
    script = f'exec "$0" -m llfast texts show "$1" {closed}'
    run = shell("-ec", script, sys.executable, texts_file, program=("sh",))
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("reason", ["Unable to allocate 8.00 GiB", ""])
def test_too_little_memory_is_one_line(command, tmp_path, monkeypatch, reason):
    def run_out(*_):
        raise MemoryError(reason)

    store = make_store(tmp_path / "store")
    monkeypatch.setattr("llfast.nearest.ModelSpace.fit", run_out)
    run = command("kl", "model 000", "model 001", "--store", store.folder)
    assert (run.code, run.out) == (1, "")
    assert run.error == f"llfast: error: memory has run out{reason and ': ' + reason}"


def test_a_terminal_of_few_letters_is_told_as_well_as_it_can_be(tmp_path):
    TextSet.from_texts(["漢字 ± 🙂"]).save(tmp_path / "t.jsonl")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = shell("texts", "show", tmp_path / "t.jsonl", env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert r"\u6f22\u5b57 \xb1 \U0001f642" in run.stdout


# What the name of a folder, in a list file or in metadata may hold: colours, a new title for the
# window, a cleared screen, a line of its own, text from right to left, rich's markup.
EVIL = "\x1b[31mred\x1b]0;title\x07\x1b[2J\nfailed: all\r\u202e\x9b1m[bold]b[/bold][i]l[/]"


def check_harmless(run):
    for stream in (run.out, run.err):
        for character in stream.replace("\n", ""):
            assert unicodedata.category(character)[0] != "C", (repr(character), stream)
    assert "\\x1b[31mred" in run.out + run.err, "it is shown, not left out"
    shown = re.sub(r"[\s│]", "", run.out + run.err)  # a table may fold it
    assert "[bold]b[/bold][i]l[/]" in shown, "and no markup is taken out"
    return run


def test_names_and_metadata_cannot_drive_the_terminal(command, checkpoints, tmp_path):
    (tmp_path / EVIL).mkdir(parents=True)
    texts = tmp_path / "t.jsonl"
    TextSet.from_texts([EVIL, *TEXTS], ids=[EVIL, *map(str, range(12))]).save(texts)
    rows = [
        {"model": str(checkpoints / "gpt2"), "name": EVIL, "family": EVIL},
        {"model": str(checkpoints / "llama"), "name": "llama", "family": EVIL},
        {"model": EVIL},
    ]
    listed = tmp_path / "models.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = tmp_path / "store"
    run = check_harmless(command("score", "--list", listed, "--texts", texts, "--store", store))
    assert run.code == 1
    assert len(run.out.splitlines()) == 3, "a name has no line of its own"
    for arguments in (
        ("search", EVIL, "--store", store),
        ("search", "llama", "--store", store),
        ("kl", EVIL, "llama", "--store", store),
        ("kl", f"x{EVIL}", "llama", "--store", store),
        ("info", store),
        ("remove", f"x{EVIL}", "--store", store),
        ("info", tmp_path / EVIL),
        ("texts", "show", texts),
        ("score", checkpoints / "gpt2", "--name", EVIL, "--texts", texts, "--dry-run"),
        ("layers", checkpoints / "gpt2", "--name", EVIL, "--texts", texts, "--store", store),
        ("compact", f"--{EVIL}"),
        (EVIL,),
    ):
        run = check_harmless(command(*arguments))
    found = command("search", EVIL, "--store", store, "--json").json
    assert found["model"] == EVIL, "JSON has the name itself"
    assert found["hits"][0]["metadata"]["family"] == EVIL


def test_numbers_of_a_table_stay_whole_in_a_narrow_terminal(command, tmp_path, monkeypatch):
    store = make_store(tmp_path / "store")
    arguments = ("search", "model 000", "--store", store.folder)
    numbers = [f"{hit['kl']:.4g}" for hit in command(*arguments, "--json").json["hits"]]
    monkeypatch.setattr("llfast.output._WIDTH_OF_A_PIPE", 36)
    shown = command(*arguments).out
    for number in [*numbers, "KL"]:
        assert f" {number} " in shown


def test_numbers_that_a_terminal_has_no_room_for_are_folded_and_not_cut(capsys, monkeypatch):
    monkeypatch.setattr("llfast.output._WIDTH_OF_A_PIPE", 80)
    print_table(["name", *(f"ms {i}" for i in range(12))], [("model", *[1.25e30] * 12)])
    shown = capsys.readouterr().out
    assert [shown.count(each) for each in ("5", "+", "ms")] == [12 + 1, 12, 12]
    assert "".join(shown.split("│")[1::14]).replace(" ", "") == "model"


def test_facts_are_in_a_column_whatever_their_names_and_unknown_ones_are_not_told(capsys):
    print_facts({"a": 1, "a_name_of_more_characters": 2, "unknown": None}, [])
    first, second = capsys.readouterr().out.splitlines()
    assert first.index("1") == second.index("2")


def test_numbers_are_to_the_right_also_where_some_are_not_known(capsys):
    print_table(["KL"], [(None,), (1.5,), (10.25,)])  # as the first step of a trajectory has none
    assert "│   1.5 │" in capsys.readouterr().out


def test_a_terminal_shows_progress_and_a_pipe_does_not(checkpoints, texts, monkeypatch, capfd):
    def score(name="\x1b[2J\x1b]0;t\x07[bold]b", progress=None):
        llfast.score(checkpoints / "gpt2", texts, name=name, progress=progress)

    shown = on_a_terminal(monkeypatch, score)
    assert "12/12" in shown
    assert re.search(r"texts [\d,]+ tokens/s", shown)
    assert "0:00:00" in shown, "time left"
    assert r"\x1b[2J\x1b]0;t\x07[bold]b" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]0;" not in shown
    assert on_a_terminal(monkeypatch, lambda: score(progress=False)) == ""
    capfd.readouterr()
    score()
    assert capfd.readouterr().err == ""
    score(name="/a/long/path" * 9 + "/model", progress=True)
    assert re.match(r"….*/model .* 12/12 texts .* tokens/s", capfd.readouterr().err)


def test_the_bar_begins_where_the_last_run_stopped(monkeypatch):
    from llfast.progress import progress_bar

    def run():
        with progress_bar("m", done=3, total=10, show=None) as advance:
            advance(2, 50)

    assert "5/10" in on_a_terminal(monkeypatch, run)

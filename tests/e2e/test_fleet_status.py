"""`llfast fleet status`: what a store and its leases say, as a table that lives and as JSON."""

import json
import shutil

import pytest

from llfast import Store, cli_fleet_status
from llfast.fleet import fleet_status, score_models, score_share, status
from llfast.fleet.leases import Leases
from llfast.fleet.status import Watch
from llfast.model_list import ModelRequest, read_model_list
from tests.terminals import on_a_terminal, screen

NOTHING = {"models_an_hour": None, "tokens_a_second": None, "seconds_left": None}
EVIL = "\x1b]0;title\x07\x1b[2J[bold]b[/bold]\u202e"


@pytest.fixture
def words(tmp_path, models_list):
    return ("fleet", "status", "--store", tmp_path / "store", "--models", models_list)


def test_zeros_before_anything_has_come(command, words, tmp_path, texts):
    """Before there is a store, then before the first model of it is done."""
    nothing = {"done": 0, "to_do": 3, "running": [], "failed": {}, **NOTHING}
    run = command(*words)
    assert run.json == nothing
    assert run.err == f"llfast: there is no store at {tmp_path / 'store'} yet\n"
    assert command(*words, "--textset", "abc").json == nothing
    assert command("fleet", "status", "--store", tmp_path / "store").json["to_do"] is None
    assert not (tmp_path / "store").exists(), "looking makes nothing"
    score_share([], texts, Store(tmp_path / "store"))
    facts = {"rank": 0, "textset": texts.digest, "convention": "paper"}
    with Leases(tmp_path / "store" / "_leases", seconds=60, facts=facts) as leases:
        run = command(*words)
        assert (run.json, run.err) == (nothing, "")
        assert leases.take(f"gpt2 {texts.digest} paper", model="gpt2")
        found = command(*words).json
        assert [each["model"] for each in found.pop("running")] == ["gpt2"]
        assert found == {name: each for name, each in nothing.items() if name != "running"}
        shown = command(*words, "--once").out
        assert "0 done, 3 to do, 1 running, 0 failed" in shown
        assert "known from the second result on" in shown
        run = command(*words, "--textset", "abc")
        assert "must hold results on text set abc, got none" in run.error
    gone = [ModelRequest(model=str(tmp_path / "gone"), name="gone")]
    score_share(gone, texts, Store(tmp_path / "store"))
    found = command(*words).json
    assert (found["done"], list(found["failed"])) == (0, ["gone"])


def test_json_where_no_terminal_is_or_it_is_asked_for(command, filled, models_list, monkeypatch):
    words = ("fleet", "status", "--store", filled, "--models", models_list)
    found = command(*words).json
    assert (found["done"], found["to_do"], found["running"]) == (3, 0, [])
    assert found["models_an_hour"] > 0
    assert found["tokens_a_second"] > 0
    assert found["seconds_left"] == 0
    plain = fleet_status(Store(filled), Store(filled).find_textset())
    assert (plain.to_do, plain.seconds_left) == (None, None)

    def look(*more, term="xterm"):
        return on_a_terminal(monkeypatch, lambda: command(*words, *more), "stdout", term)

    for shown in (look("--json"), look("--json", term="dumb"), look(term="dumb")):
        assert json.loads(shown)["done"] == 3
    shown = look("--once")
    assert "3 done, 0 to do, 0 running, 0 failed" in shown
    assert "\x1b[?25l" not in shown, "nothing is replaced"


def test_a_table_lives_until_nothing_is_left(
    command, words, tmp_path, texts, models_list, monkeypatch
):
    """Between two looks, the workers begin, one model is done, one fails, and all are done."""
    store = tmp_path / "store"
    requests = read_model_list(models_list)
    bad = ModelRequest(model=str(tmp_path / EVIL), name=EVIL)
    steps = [
        lambda: score_share(requests[:1], texts, Store(store)),
        lambda: score_share([bad], texts, Store(store)),
        lambda: score_models(requests, texts, Store(store), progress=False),
    ]
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if seconds >= 2:
            steps[len(slept) - 1]()

    monkeypatch.setattr(cli_fleet_status.time, "sleep", sleep)
    runs = []
    shown = on_a_terminal(monkeypatch, lambda: runs.append(command(*words)), "stdout")
    assert runs[0].code == 0
    assert len(slept) == 3, "it ends by itself"
    assert min(slept) >= 2
    places = [
        shown.index(f"{done} done, {left} to do, 0 running, {failed} failed")
        for done, left, failed in ((0, 3, 0), (1, 2, 0), (1, 2, 1), (3, 0, 1))
    ]
    assert places == sorted(places)
    first, second, *table = screen(shown)
    assert first == "3 done, 0 to do, 0 running, 1 failed", "what lived is replaced"
    assert "models an hour" in second
    assert sum(line.startswith("┏") for line in table) == 1
    assert "[bold]b[/bold]" in "".join(table), "no markup is taken out"
    assert "\x1b]0" not in shown
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown


def test_another_look_reads_what_is_new_alone(tmp_path, texts, models_list, monkeypatch):
    store, requests = Store(tmp_path / "store"), read_model_list(models_list)
    score_models(requests[:2], texts, store, progress=False)
    watch, read = Watch(store, texts.digest, "paper"), []
    own = status.read_batches

    def read_batches(path, *arguments, **options):
        read.append(path.name)
        return own(path, *arguments, **options)

    monkeypatch.setattr(status, "read_batches", read_batches)
    first = fleet_status(store, texts.digest, watch=watch)
    assert len(read) == 1, "the first one began before"
    score_models(requests, texts, store, progress=False)
    second = fleet_status(store, texts.digest, watch=watch)
    assert read == sorted(store.shards(texts.digest))[1:], "each once"
    afresh = fleet_status(store, texts.digest)
    assert second.tokens_a_second == pytest.approx(afresh.tokens_a_second)
    assert (first.done, second.done) == (2, 3)
    store.compact()
    merged = fleet_status(store, texts.digest, watch=watch)
    assert merged.tokens_a_second == pytest.approx(second.tokens_a_second)


def test_token_counts_are_summed_without_a_python_number_each(filled, monkeypatch):
    """Of 25,000 models on 10,000 texts, which a compaction has just merged, they are many."""
    store, own = Store(filled), status.read_batches
    expected = fleet_status(store, store.find_textset()).tokens_a_second

    class Batch:
        def __init__(self, batch):
            self.select, self.column = batch.select, batch.column

    def read_batches(*arguments, **options):
        return ((start, Batch(batch)) for start, batch in own(*arguments, **options))

    monkeypatch.setattr(status, "read_batches", read_batches)
    found = fleet_status(store, store.find_textset()).tokens_a_second
    assert found == pytest.approx(expected)


def test_shards_that_others_have_named_count_as_well(command, filled, tmp_path):
    store = shutil.copytree(filled, tmp_path / "store")
    words = ("fleet", "status", "--store", store)
    own = command(*words).json
    assert own["tokens_a_second"] > 0
    shards = sorted(store.rglob("*.parquet"))
    for number, shard in enumerate(shards):
        shard.rename(shard.with_name(f"part-{number}.parquet"))
    found = command(*words)
    assert found.code == 0, found.error
    for name in ("done", "models_an_hour", "tokens_a_second"):
        assert found.json[name] == own[name]


def test_a_table_ends_where_workers_try_no_more(command, tmp_path, texts, monkeypatch):
    """With fewer attempts than usual, what has failed is left alone sooner."""
    # What may pass: a folder whose weights are still being written.
    broken = tmp_path / "broken"
    broken.mkdir()
    path = tmp_path / "models.txt"
    path.write_text(f"{broken}\n")
    monkeypatch.setattr("llfast.fleet.session.is_lasting", lambda _: False)
    score_share(read_model_list(path), texts, Store(tmp_path / "store"), attempts=1)
    words = ("fleet", "status", "--store", tmp_path / "store", "--models", path)
    assert command(*words, "--json").json["to_do"] == 1
    assert command(*words, "--attempts", 1, "--json").json["to_do"] == 0
    monkeypatch.setattr(cli_fleet_status.time, "sleep", lambda _: pytest.fail("it goes on"))
    shown = on_a_terminal(monkeypatch, lambda: command(*words, "--attempts", 1), "stdout")
    assert "0 done, 0 to do, 0 running, 1 failed" in shown


def test_models_with_another_tokenizer_are_done_by_their_names(
    command, checkpoints, tmp_path, texts
):
    """As adapters are: nothing is looked up for a status, and a table that lives has an end."""
    path, store = tmp_path / "models.jsonl", Store(tmp_path / "store")
    own = {"model": str(checkpoints / "gpt2"), "tokenizer": str(checkpoints / "gpt2-finetune")}
    path.write_text(json.dumps(own) + "\n")
    words = ("fleet", "status", "--store", store.folder, "--models", path, "--json")
    assert command(*words).json["to_do"] == 1
    shared = score_share(read_model_list(path), texts, store)
    assert [each.status for each in shared.outcomes] == ["scored"]
    found = command(*words).json
    assert (found["done"], found["to_do"]) == (1, 0)
    again = score_share(read_model_list(path), texts, store)
    assert [each.status for each in again.outcomes] == ["skipped"], "workers do look"


@pytest.mark.parametrize("name", ["time.sleep", "_parts"])
def test_ctrl_c_ends_it_without_an_error(command, words, monkeypatch, name):
    """While it waits, and before it has shown anything."""
    own, calls = cli_fleet_status._parts, []

    def interrupt(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return own(*arguments, **options)

    monkeypatch.setattr(f"llfast.cli_fleet_status.{name}", interrupt)
    runs = []
    shown = on_a_terminal(monkeypatch, lambda: runs.append(command(*words)), "stdout")
    assert runs[0].code == 0
    assert screen(shown)[0] == "0 done, 3 to do, 0 running, 0 failed"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is back"


def test_only_the_last_failures_are_in_a_table_that_lives(command, tmp_path, texts, monkeypatch):
    store = Store(tmp_path / "store")
    score_models(
        [
            ModelRequest(model=str(tmp_path / "none"), name=f"bad-{number:02}")
            for number in range(12)
        ],
        texts,
        store,
        progress=False,
    )
    found = fleet_status(store, texts.digest)
    for most, count in ((None, 12), (10, 10)):
        *_, table = (
            each for each in cli_fleet_status._parts(found, most) if not isinstance(each, str)
        )
        assert table.row_count == count
    assert cli_fleet_status._parts(found, 10)[-1] == "and 2 that failed before"

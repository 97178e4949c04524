"""A ledger says what the store's own readers say, however rows come."""

import contextlib
import json
import os
import random
from datetime import datetime, timedelta

import pytest

from llfast import Store, shards
from llfast.fleet.ledger import Ledger, asked_of
from llfast.model_list import ModelRequest
from llfast.results import ResultKey
from llfast.shards import read_rows, read_states
from tests.stores import DIGEST, make_result, store_shards

M = ModelRequest(model="m")
NAMES = ["org/a", "org/b", "../c", "d<b>", "é"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def an_hour_ago(monkeypatch):
    """What is stored within is an hour old."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(hours=1)

    @contextlib.contextmanager
    def within():
        with monkeypatch.context() as patch:
            patch.setattr(shards, "datetime", Clock)
            yield

    return within


def key_of(name, revision="r1", **changes):
    fields = {"textset_digest": DIGEST, "convention": "paper", "dtype": "float32", "layer": None}
    return ResultKey(
        **{"model": name, "revision": revision, "scoring_version": 1} | fields | changes
    )


def change(store, rng, names):
    """One of all that happens to stores; a result has another one's place now and then."""
    name, revision = rng.choice(names), rng.choice(["r1", "r2"])
    what = rng.choice(["add", "add", "add", "fail", "fail again", "remove", "compact", "others"])
    if what == "add":
        store.add(make_result(name, revision=revision))
    elif what == "fail":
        store.add_failure(key_of(name, ""), "at once", attempts=1, is_lasting=True)
    elif what == "fail again":
        store.add_failure(key_of(name, revision), "later", attempts=rng.randrange(1, 4))
    elif what == "remove" and name in {row.label for row in store.rows()}:
        store.remove([name])
    elif what == "compact" and store.folder.is_dir():
        store.compact()
    elif what == "others":
        store.add(make_result(name, convention="always-bos"))
        store.add(make_result(name, layer=1))
        store.add(make_result(f"{name} of old", scoring_version=0))


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_it_says_what_the_store_says(store, seed):
    rng = random.Random(seed)
    late, followed = Ledger(store, DIGEST, "paper"), Ledger(store, DIGEST, "paper")
    for _ in range(30):
        change(store, rng, NAMES)
        followed.refresh()
        rows = [row for row in store.rows() if row.key.convention == "paper"]
        own = [row for row in rows if row.key.layer is None and row.key.scoring_version == 1]
        complete = {row.key: row for row in own if row.error is None}
        late = Ledger(store, DIGEST, "paper")
        late.refresh()
        for ledger in (late, followed):
            for name in NAMES:
                for revision in ("r1", "r2"):
                    key = key_of(name, revision)
                    assert (key in ledger) == (key in complete)
            assert set(ledger.completed_us()) == set(complete)
    reasons = {row.key.model: row.error for row in own if row.error is not None}
    for ledger in (late, followed):
        found = {name: each.reason for name, each in ledger.failures().items()}
        assert found.keys() == reasons.keys()


def test_the_last_failure_counts_until_a_result_comes(store):
    ledger = Ledger(store, DIGEST, "paper")
    store.add_failure(key_of("m", ""), "first", attempts=1)
    store.add_failure(key_of("m"), "second", attempts=2, is_lasting=True)
    ledger.refresh()
    failure = ledger.failure(M, "auto")
    assert (failure.reason, failure.attempts, failure.is_lasting) == ("second", 2, True)
    store.add(make_result("m"))
    ledger.refresh()
    assert ledger.failure(M, "auto") is None
    assert ledger.failures() == {}


def test_failures_are_of_what_was_asked_for(store):
    def fail(revision, dtype, **metadata):
        asked = (revision, dtype, None, None)
        key = key_of("m", revision or "", dtype=dtype)
        store.add_failure(key, f"{revision} {dtype}", asked=asked, **metadata)

    fail(None, "float16", is_lasting=True)
    fail("step1", "auto", attempts=3)
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()

    def settled(dtype, **fields):
        return ledger.settled(ModelRequest(model="m", **fields), dtype, 3)

    assert settled("float16") is True
    assert settled("float32") is settled("auto") is False
    assert settled("auto", revision="step1") is True
    assert settled("auto", revision="step2") is None
    store.add(make_result("m", dtype="float32"))
    ledger.refresh()
    assert settled("float16") is True, "another dtype's result is none of this one"
    assert settled("float32") is settled("auto") is True


def test_a_failure_of_one_commit_counts_after_a_result_of_another(store):
    a, b = "a" * 40, "b" * 40
    store.add_failure(key_of("m", a), "so", is_lasting=True, asked=(a, "auto", None, None))
    store.add(make_result("m", revision=b))
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()
    settled = [ledger.settled(ModelRequest(model="m", revision=each), "auto", 3) for each in (a, b)]
    assert settled == [True, True]
    assert ledger.failure(ModelRequest(model="m", revision=a), "auto").reason == "so"
    assert ledger.failure(ModelRequest(model="m", revision=b), "auto") is None


@pytest.mark.parametrize(
    "part", ["config.json", "tokenizer.json", "qwen.tiktoken", "adapter_config.json", "code.py"]
)
@pytest.mark.parametrize("of", ["model", "tokenizer", "adapter_base"])
def test_a_folder_that_was_mended_is_tried_again(store, tmp_path, an_hour_ago, part, of):
    folder = tmp_path / "model"
    request = ModelRequest(**{"model": "elsewhere", "name": "m", of: str(folder)})
    asked = asked_of(request, "auto")
    with an_hour_ago():
        store.add_failure(key_of("m", ""), "no such folder", is_lasting=True, asked=asked)
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()
    assert ledger.settled(request, "auto", 3)
    folder.mkdir()
    (folder / "README.md").write_text("so")
    assert ledger.settled(request, "auto", 3)
    (folder / part).write_text("{}")
    assert not ledger.settled(request, "auto", 3)


@pytest.mark.parametrize("how", ["mended", "removed"])
def test_what_fails_again_after_it_was_tried_often_counts(store, tmp_path, an_hour_ago, how):
    """Though those tries were more, and count no more."""
    folder = tmp_path / "model"
    folder.mkdir()
    request = ModelRequest(model=str(folder), name="m")
    with an_hour_ago():
        store.add_failure(key_of("m", ""), "no room", attempts=3)
    if how == "removed":
        store.remove(["m"])
    else:
        (folder / "config.json").write_text("{}")
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()
    assert ledger.settled(request, "auto", 3) is False
    forgiven = ledger.tries([request], "auto")
    store.add_failure(key_of("m", ""), "no weights", attempts=1, is_lasting=True)
    ledger.refresh()
    assert ledger.failure(request, "auto").reason == "no weights"
    assert ledger.settled(request, "auto", 3) is True
    assert ledger.settled(request, "auto", 3, forgiven) is True


def test_a_date_that_has_not_come_is_not_after_anything(store, tmp_path):
    """Or what fails there would be tried without an end, until that day."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os.utime(folder / "config.json", (2**33, 2**33))
    request = ModelRequest(model=str(folder), name="m")
    store.add_failure(key_of("m", ""), "so", is_lasting=True)
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()
    assert ledger.settled(request, "auto", 3)
    store.add(make_result("m"))
    ledger.refresh()
    assert ledger.has(request, "auto")


def test_the_last_failure_has_the_most_attempts_whatever_clocks_say(store, monkeypatch):
    for attempts in (1, 3, 2):
        store.add_failure(key_of("m"), f"try {attempts}", attempts=attempts)
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()
    assert ledger.failure(M, "auto").reason == "try 3"


@pytest.mark.parametrize("metadata", [{}, {"attempts": "many"}, {"is_lasting": 1}])
def test_a_failure_that_does_not_say_how_often(store, metadata):
    store.add_failure(key_of("m"), "so", **metadata)
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()
    failure = ledger.failure(M, "auto")
    assert (failure.attempts, failure.is_lasting) == (1, False)


def test_what_a_list_asks_for(store, tmp_path):
    commit = "c" * 40
    store.add(make_result("org/m", revision=commit))
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()

    def has(dtype="auto", **fields):
        return ledger.has(ModelRequest(**{"model": "org/m"} | fields), dtype)

    assert has()
    assert has("float32")
    assert not has("bfloat16")
    assert not has(dtype="float32", revision="d" * 40)
    assert has(revision=commit)
    assert has(revision="main") is None, "what a branch has become is not known"
    assert has(tokenizer="another") is None
    assert has(adapter_base="base") is None
    for own in ({"tokenizer": "another"}, {"adapter_base": "base"}):
        request = ModelRequest(model="org/m", **own)
        assert ledger.has(request, "auto", by_name=True)
        assert not ledger.has(request, "bfloat16", by_name=True)
    branch = ModelRequest(model="org/m", revision="main", tokenizer="another")
    assert ledger.has(branch, "auto", by_name=True) is False
    assert not has(model="org/n")
    assert has(model="elsewhere", name="org/m")
    assert ledger.has(ModelRequest(model="org/m", dtype="float32"), "bfloat16")


def test_results_say_what_they_were_asked_for(store):
    def add(letter, *asked, dtype="float32"):
        provenance = {"asked": list(asked), "threads": 2}
        store.add(make_result("org/m", revision=letter * 40, dtype=dtype, provenance=provenance))

    add("a", "step1", "auto", None, None)
    add("b", None, "auto", None, None)
    add("c", "c" * 40, "auto", "tokenizer", None)
    add("d", "v1.0", "auto", None, "base", dtype="bfloat16")
    store.compact()
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()

    def has(by_name=True, dtype="auto", **fields):
        return ledger.has(ModelRequest(model="org/m", **fields), dtype, by_name=by_name)

    assert has(revision="step1")
    assert has(revision="step1", dtype="float32")
    assert has(revision="step1", dtype="bfloat16") is False
    assert has(revision="step1", by_name=False) is None, "a branch moves"
    assert has(revision="step2") is False
    assert has(revision="main"), "which is what no revision is"
    assert has(revision="c" * 40, tokenizer="tokenizer")
    assert has(revision="c" * 40, tokenizer="tokenizer", by_name=False) is None
    assert has(revision="c" * 40, tokenizer="other") is False
    assert has(revision="a" * 40, tokenizer="tokenizer") is False
    assert has(tokenizer="tokenizer") is has(adapter_base="base") is False, "of main none are"
    assert has(revision="v1.0", adapter_base="base")
    store.remove(["org/m@aaaa"])
    ledger.refresh()
    assert has(revision="step1") is False


@pytest.mark.parametrize("asked", [None, "step1", [], ["step1", [], None, None], {"revision": 1}])
def test_what_others_write_is_nothing_that_was_asked_for(store, asked):
    store.add(make_result("m", provenance={"asked": asked}))
    store.add_failure(key_of("m"), "so", asked=asked)
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()
    assert ledger.has(ModelRequest(model="m", revision="step1"), "auto", by_name=True) is False
    assert ledger.has(ModelRequest(model="m", tokenizer="t"), "auto", by_name=True)
    assert ledger.tries([M], "auto").keys() <= {("m", None)}


@pytest.mark.parametrize(
    "facts",
    ["", "{", "[]", "null", "7", '{"asked": ', '{"asked": ' + "[" * 100_000, '{"attempts":-1}'],
)
def test_facts_of_any_kind_are_taken(store, monkeypatch, facts):
    with monkeypatch.context() as patched:
        patched.setattr("llfast.shards.json.dumps", lambda _: facts)
        store.add(make_result("m"))
        store.add_failure(key_of("n"), "so")
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()
    assert ledger.has(ModelRequest(model="m"), "auto")
    assert ledger.failure(ModelRequest(model="n"), "auto").attempts == 1


def test_a_folder_that_was_written_since_is_to_be_looked_at_again(store, tmp_path, an_hour_ago):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os.utime(folder / "config.json", (1, 1))
    with an_hour_ago():
        store.add(make_result(str(folder)))
    ledger = Ledger(store, DIGEST, "paper")
    ledger.refresh()
    assert ledger.has(ModelRequest(model=f"{folder}/"), "auto")
    (folder / "model.safetensors").write_bytes(b"new")
    assert not ledger.has(ModelRequest(model=str(folder)), "auto")


def test_only_new_shards_are_read(store, monkeypatch):
    store.add_all([make_result(f"m{number}") for number in range(5)])
    ledger = Ledger(store, DIGEST, "paper")
    read = []
    own = read_states
    monkeypatch.setattr(
        "llfast.fleet.ledger.read_states", lambda shard: read.append(shard.name) or own(shard)
    )
    for number in range(3):
        store.add(make_result(f"new {number}"))
        ledger.refresh()
        ledger.refresh()
    assert sorted(read) == sorted(shard.name for shard in store_shards(store))
    assert len(ledger.completed_us()) == 8


def test_states_are_what_rows_say(store):
    store.add_all(
        [
            make_result(f"m{number}", layer=number or None, provenance={"threads": number % 2})
            for number in range(3)
        ]
    )
    store.add_failure(key_of("x"), "so", attempts=2)
    store.remove(["m0"])
    for shard in store_shards(store):
        for state, row in zip(read_states(shard), read_rows(shard), strict=True):
            assert (state.key, state.status, state.error) == (row.key, row.status, row.error)
            assert state.created_us == round(row.created.timestamp() * 1e6)
            facts = row.metadata if row.status == "failed" else row.provenance
            assert json.loads(state.facts or "{}") == facts

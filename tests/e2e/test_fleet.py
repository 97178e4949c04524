"""`llfast fleet` with many workers, some of whom are killed, on models of which some cannot be."""

import json
import os
import random
import signal
from datetime import datetime, timedelta

import pytest

from llfast import CheckpointError, Store, TextSet
from llfast.fleet import fleet_status, score_models, score_share
from llfast.model_list import ModelRequest, read_model_list
from tests import processes
from tests.fleets import check_all_stored, make_list, score_alone
from tests.stores import make_result, store_shards
from tests.tiny import one_thread

MODELS = 12
OPTIONS = ("--token-budget", 64, "--dtype", "float32")


@pytest.fixture(scope="module")
def made(checkpoints, nan_checkpoint, texts, tmp_path_factory):
    """A list of twelve models that are right, one of NaNs and one that is not there; the truth."""
    folder = tmp_path_factory.mktemp("fleet")
    name = "org/{kind}..{number}/é <b>"
    others = {
        3: {"model": str(nan_checkpoint), "name": "poisoned"},
        7: {"model": str(folder / "gone"), "name": "../../missing"},
    }
    path = make_list(folder, checkpoints, MODELS, name, others=others)
    truth = score_alone(path, texts, folder / "truth")
    return folder, path, truth


class Fleet:
    """Workers on a store of their own."""

    def __init__(self, made, folder, world_size):
        self.made, self.folder, self.size = made, folder, world_size
        self.store = folder / "store"
        self.workers, self.started = {}, 0

    def start(self, rank, *options):
        self.started += 1
        log = self.folder / f"log {self.started}"
        words = ("fleet", "score", "--models", self.made[1], "--store", self.store, *OPTIONS)
        words += ("--texts", self.made[0] / "texts.jsonl", "--rank", rank)
        words += ("--world-size", self.size, "--log", self.folder / "events", *options)
        self.workers[rank] = processes.start(words, log, save_seconds=0.0)
        return log

    def kill(self, rank):
        process = self.workers.pop(rank)
        process.kill()
        process.join()
        return process.exitcode

    def finish(self):
        return {rank: processes.finish(process) for rank, process in self.workers.items()}

    @property
    def events(self):
        path = self.folder / "events"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def check(self):
        """Every healthy model once, to the bit; the others with their reasons; nothing else."""
        store = Store(self.store)
        failed = {"poisoned", "../../missing"}
        check_all_stored(store, self.made[2], count=MODELS, failed=failed)
        assert [path.name for path in self.store.parent.iterdir() if "missing" in path.name] == []
        kept = {store.partial_path(row.key) for row in store.rows() if row.error is not None}
        # What killed workers were writing is removed in an hour: its writer might be alive.
        assert set(self.store.glob("_*/[!.]*")) <= kept


@pytest.fixture
def fleet(made, tmp_path):
    fleet = Fleet(made, tmp_path, 8)
    yield fleet
    for process in fleet.workers.values():
        process.kill()


def test_eight_workers_share_a_list(fleet):
    for rank in range(8):
        fleet.start(rank)
    assert set(fleet.finish().values()) == {1}, "two models have no result"
    fleet.check()
    assert sum(event["event"] == "scored" for event in fleet.events) == MODELS
    assert sum(event["event"] == "failed" for event in fleet.events) == 2
    assert not [event for event in fleet.events if event["event"] == "taken over"]


def kill_at_random(fleet, seed, kills, *, restart):
    rng = random.Random(seed)
    for rank in range(8):
        fleet.start(rank)
    killed = 0
    while killed < kills and any(process.is_alive() for process in fleet.workers.values()):
        next(iter(fleet.workers.values())).join(rng.uniform(0.0, 0.4))
        rank = rng.choice([rank for rank, each in fleet.workers.items()])
        killed += fleet.kill(rank) == -signal.SIGKILL
        if restart:
            fleet.start(rank)
    codes = fleet.finish()
    assert codes
    assert set(codes.values()) == {1}, "two models have no result"
    fleet.check()
    return killed


@pytest.mark.parametrize("restart", [False, True])
def test_workers_are_killed_at_random_moments(fleet, restart):
    assert kill_at_random(fleet, 5 + restart, 3, restart=restart) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_workers_are_killed_at_many_random_moments(fleet, seed):
    kill_at_random(fleet, seed, 5, restart=seed % 2)


def test_a_worker_that_is_told_to_end_gives_its_model_back(fleet):
    """As schedulers do before they kill."""
    fleet.size = 1
    fleet.start(0)
    while not any(event["event"] == "began" for event in fleet.events):
        assert fleet.workers[0].is_alive()
    os.kill(fleet.workers[0].pid, signal.SIGTERM)
    assert fleet.finish() == {0: 128 + signal.SIGTERM}
    assert list((fleet.store / "_leases").iterdir()) == []
    fleet.start(0)
    assert fleet.finish() == {0: 1}
    fleet.check()


def test_a_model_that_kills_its_workers_is_left_alone_in_the_end(fleet, made):
    """Its lease is taken over and over."""
    requests, texts = read_model_list(made[1])[:2], TextSet.load(made[0] / "texts.jsonl")
    leases = fleet.store / "_leases"
    with one_thread():
        score_share(requests[:1], texts, Store(fleet.store), token_budget=64)
        # Two workers have died at the second.
        from llfast.fleet.leases import Leases

        name = requests[1].name
        with Leases(leases, seconds=60) as holder:
            holder.take(f"{name} {texts.digest} paper")
            (path,) = leases.iterdir()
            dead = json.loads(path.read_text()) | {"born": -1}
            path.rename(path.with_suffix(".2"))
        path.with_suffix(".2").write_text(json.dumps(dead))
        options = {"token_budget": 64, "attempts": 2, "wait": False}
        (outcome,) = score_share(requests, texts, Store(fleet.store), **options).outcomes
        assert outcome.status == "failed"
        assert "got 2 that ended without a word" in outcome.error
        again = score_share(requests, texts, Store(fleet.store), **options)
        assert (again.outcomes, list(again.failed)) == ((), [name])
        last = score_share(requests, texts, Store(fleet.store), retry_failed=True, **options)
    assert [each.status for each in last.outcomes] == ["scored"]
    assert last.failed == {}


def test_a_failure_that_may_pass_is_tried_again(made, tmp_path, monkeypatch):
    from llfast.fleet import session

    requests, texts = read_model_list(made[1])[:1], TextSet.load(made[0] / "texts.jsonl")
    own, calls = session.score, []

    def score(*arguments, **options):
        calls.append(True)
        if len(calls) < 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return own(*arguments, **options)

    monkeypatch.setattr(session, "score", score)
    store = Store(tmp_path / "store")
    monkeypatch.setattr("llfast.fleet.share._MOST_POLL_SECONDS", 0.0)
    shared = score_share(requests, texts, store, attempts=2)
    assert [each.status for each in shared.outcomes] == ["failed", "failed"]
    assert shared.failed[requests[0].name].attempts == 2
    assert score_share(requests, texts, store, attempts=2).outcomes == ()
    assert [each.status for each in score_share(requests, texts, store).outcomes] == ["scored"]


def test_what_is_tried_again_is_tried_so_often_and_no_more(made, tmp_path, monkeypatch):
    """Also where it had failed for good; what is counted goes on from there."""
    from llfast.fleet import session

    requests, texts = read_model_list(made[1])[:1], TextSet.load(made[0] / "texts.jsonl")
    store, calls = Store(tmp_path / "store"), []

    def score(*arguments, **options):
        calls.append(True)
        if len(calls) > 12:
            raise SystemExit("without an end")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(session, "score", score)
    options = {"token_budget": 64, "attempts": 3, "lease_seconds": 0.1}
    for tried in (3, 3, 6):
        is_again = tried > 3
        shared = score_share(requests, texts, store, retry_failed=is_again, **options)
        assert len(calls) == tried
        assert shared.failed[requests[0].name].attempts == tried


def test_what_escapes_a_model_is_its_own_failure(made, tmp_path, monkeypatch):
    """A panic in a tokenizer, which is no Exception, or a package that only it needs."""
    from llfast.errors import MissingDependencyError
    from llfast.fleet import session

    class PanicError(BaseException):
        pass

    requests, texts = read_model_list(made[1])[:3], TextSet.load(made[0] / "texts.jsonl")
    errors = {requests[0].name: PanicError("deep"), requests[1].name: MissingDependencyError("p")}
    own = session.Session.open

    def open_(self, request):
        if request.name in errors:
            raise errors[request.name]
        return own(self, request)

    monkeypatch.setattr(session.Session, "open", open_)
    monkeypatch.setattr("llfast.fleet.share._MOST_POLL_SECONDS", 0.0)
    shared = score_share(requests, texts, Store(tmp_path / "s"), attempts=1)
    assert [each.status for each in shared.outcomes] == ["failed", "failed", "scored"]
    assert shared.failed[requests[0].name].reason == "PanicError: deep"


def test_revisions_of_one_name_are_each_scored(made, tmp_path, monkeypatch, checkpoints):
    from llfast.fleet import session

    own = session.open_model

    def open_model(model, *, revision, **options):
        return own(checkpoints / revision, revision=None, **{**options, "name": model})

    monkeypatch.setattr(session, "open_model", open_model)
    names = ("gpt2", "gpt2-finetune", "llama")
    requests = [ModelRequest(model="org/m", revision=each) for each in names]
    texts, store = TextSet.load(made[0] / "texts.jsonl"), Store(tmp_path / "s")
    found = score_share(requests, texts, store)
    assert [each.status for each in found.outcomes] == ["scored"] * 3
    assert len({row.key.revision for row in store.rows()}) == 3
    again = score_share(requests, texts, store)
    assert [each.status for each in again.outcomes] == ["skipped"] * 3


@pytest.mark.parametrize("ahead", [False, True])
def test_a_revision_that_fails_is_told_whatever_becomes_of_others(
    made, tmp_path, monkeypatch, checkpoints, ahead
):
    """Also if clocks have these come later, of machines that are ahead."""
    from llfast import shards
    from llfast.fleet import session

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=1)

    own, tried, is_there = session.open_model, [], []

    def open_model(model, *, revision, **options):
        if revision == "gone" and not is_there:
            tried.append(True)
            if len(tried) > 5:
                raise SystemExit("without an end")
            raise CheckpointError("revision must be one of org/m's, got 'gone'")
        folder = "gpt2-finetune" if revision == "gone" else revision
        return own(checkpoints / folder, revision=None, **{**options, "name": model})

    monkeypatch.setattr(session, "open_model", open_model)
    names = ("gpt2", "gone", "llama")
    requests = [ModelRequest(model="org/m", revision=each) for each in names]
    texts, store = TextSet.load(made[0] / "texts.jsonl"), Store(tmp_path / "s")
    if ahead:
        with monkeypatch.context() as patch:
            patch.setattr(shards, "datetime", Clock)
            score_share(requests[:1], texts, store)
    shared = score_share(requests, texts, store, lease_seconds=0.1)
    assert len(tried) == 1
    assert shared.failed["org/m"].reason == "revision must be one of org/m's, got 'gone'"
    is_there.append(True)
    assert score_share(requests, texts, store).failed == {}


def test_a_model_without_a_revision_is_not_done_with_another_ones_result(
    made, tmp_path, monkeypatch, checkpoints
):
    from llfast.fleet import session

    own = session.open_model

    def open_model(model, *, revision, **options):
        folder = "llama" if revision in (None, "main") else revision
        return own(checkpoints / folder, revision=None, **{**options, "name": model})

    monkeypatch.setattr(session, "open_model", open_model)
    requests = [ModelRequest(model="org/m", revision="gpt2"), ModelRequest(model="org/m")]
    texts, store = TextSet.load(made[0] / "texts.jsonl"), Store(tmp_path / "s")
    for status in ("scored", "skipped"):
        shared = score_share(requests, texts, store)
        assert [each.status for each in shared.outcomes] == [status] * 2
    assert len({row.key.revision for row in store.rows()}) == 2
    status = fleet_status(store, texts.digest, requests=requests)
    assert (status.done, status.to_do) == (2, 0)
    assert score_share(requests[1:], texts, store).outcomes == (), "alone it goes by its name"


def test_what_is_done_on_other_texts_is_not_read(made, tmp_path):
    """There may be a million models: here it would warn of a damaged shard."""
    store, texts = Store(tmp_path / "s"), TextSet.load(made[0] / "texts.jsonl")
    store.add(make_result("x"))
    store_shards(store)[0].write_bytes(b"PAR1")
    for status in ("scored", "skipped"):
        (outcome,) = score_models(read_model_list(made[1])[:1], texts, store)
        assert outcome.status == status


def test_two_models_of_one_name_are_refused(made, tmp_path):
    texts = TextSet.load(made[0] / "texts.jsonl")
    for other in (ModelRequest(model="b", name="a"), ModelRequest(model="a", tokenizer="t")):
        with pytest.raises(ValueError, match="names must be of one model each, got two called a"):
            score_share([ModelRequest(model="a"), other], texts, Store(tmp_path / "s"))


def test_a_run_that_leaves_models_without_results_says_so(command, made, tmp_path):
    words = ("fleet", "score", "--models", made[1], "--store", tmp_path / "s", *OPTIONS)
    words += ("--texts", made[0] / "texts.jsonl", "--no-wait")
    for _ in range(2):
        run = command(*words)
        assert run.code == 1
        assert "2 of 14 models have failed; the store has why, and --retry-failed" in run.err
    from llfast.fleet.leases import Leases

    digest = TextSet.load(made[0] / "texts.jsonl").digest
    Store(tmp_path / "s").remove([read_model_list(made[1])[0].name])
    with Leases(tmp_path / "s" / "_leases", seconds=60) as others:
        assert others.take(f"{read_model_list(made[1])[0].name} {digest} paper")
        run = command(*words, "--json")
    assert (run.code, run.json["left"]) == (1, [read_model_list(made[1])[0].name])
    assert "others are at 1 of 14 models" in run.err


def test_secrets_are_told_nobody(made, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HF_TOKEN", "a secret of my own")
    token = "hf_" + "A1b2" * 8

    def open_model(*_, **__):
        what = f"https://me:pass@host/f?X-Amz-Signature=sekrit with {token}, a secret of my own"
        raise RuntimeError(f"401 for {what}")

    monkeypatch.setattr("llfast.fleet.session.open_model", open_model)
    words = ("fleet", "score", "--models", made[1], "--store", tmp_path / "s", "--log")
    words += (tmp_path / "events", "--texts", made[0] / "texts.jsonl", "--attempts", 1)
    run = command(*words)
    assert run.code == 1
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    told = [run.out.encode(), run.err.encode(), *written]
    for secret in (token, "a secret of my own", "pass@host", "sekrit"):
        assert not [each for each in told if secret.encode() in each]
    assert "401 for https://[hidden]@host/f?[hidden] with [hidden], [hidden]" in run.out


def test_code_of_a_checkpoint_needs_the_list_owners_word(made, tmp_path, monkeypatch):
    asked = {}

    def open_model(model, *, trust_remote_code, **_):
        asked[model] = trust_remote_code
        raise RuntimeError("that is all")

    monkeypatch.setattr("llfast.fleet.session.open_model", open_model)
    requests = [ModelRequest(model="a"), ModelRequest(model="b", trust_remote_code=True)]
    texts = TextSet.load(made[0] / "texts.jsonl")
    score_share(requests, texts, Store(tmp_path / "s"), attempts=1)
    assert asked == {"a": False, "b": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", 2, "--world-size", 2), "rank must be in [0, 2), got 2"),
        (("--rank", 0), "must both be known, got rank 0 of None"),
        (("--world-size", 0), "Invalid value for '--world-size'"),
        (("--lease-seconds", 0.5), "Invalid value for '--lease-seconds'"),
        (("--convention", "none"), "convention must be one of"),
        (("--log", "/none/events"), "No such file or directory: '/none/events'"),
    ],
)
def test_bad_words_are_one_line(command, made, tmp_path, words, message):
    texts = ("--texts", made[0] / "texts.jsonl")
    run = command("fleet", "score", "--models", made[1], "--store", tmp_path / "s", *texts, *words)
    assert message in run.error

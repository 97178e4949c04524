"""`llfast fleet` with branches of the Hub, which move, beside what the store knows of them."""

from datetime import datetime, timedelta

import pytest

from llfast import Store, shards
from llfast.fleet import fleet_status, score_models, score_share, session
from llfast.model_list import ModelRequest

BRANCH = ModelRequest(model="org/m", revision="step1")


class Hub:
    """Branches of org/m: each a folder, or the error that looking it up ends with."""

    def __init__(self, monkeypatch, **branches):
        self.branches, self.tried, self._own = branches, [], session.open_model
        monkeypatch.setattr(session, "open_model", self._open)
        monkeypatch.setattr("llfast.fleet.share._MOST_POLL_SECONDS", 0.0)

    def _open(self, model, *, revision, **options):
        self.tried.append(revision)
        if len(self.tried) > 20:
            raise SystemExit("without an end")
        found = self.branches[revision or "main"]
        if isinstance(found, Exception):
            raise found
        return self._own(found, revision=None, **{**options, "name": model})


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_result_outdates_the_failures_before_it(
    monkeypatch, tmp_path, checkpoints, texts, ahead, again
):
    """Also if the clock of the machine that has scored it is ahead of those it fails on."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=1)

    store, gone = Store(tmp_path / "s"), RuntimeError("the Hub is away")
    hub = Hub(monkeypatch, step1=gone)
    assert len(score_share([BRANCH], texts, store).outcomes) == 3
    hub.branches["step1"] = checkpoints / "gpt2"
    with monkeypatch.context() as patch:
        if ahead:
            patch.setattr(shards, "datetime", Clock)
        (outcome,) = score_share([BRANCH], texts, store, retry_failed=True).outcomes
    assert outcome.status == "scored"
    hub.branches["step1"] = gone
    shared = score_share([BRANCH], texts, store, retry_failed=again)
    assert [each.status for each in shared.outcomes] == ["failed"] * 3
    assert shared.failed["org/m"].attempts == 3


@pytest.mark.parametrize("alone", [False, True])
def test_a_branch_is_done_once_it_was_scored_and_is_looked_up_each_time(
    monkeypatch, tmp_path, checkpoints, texts, alone
):
    store = Store(tmp_path / "s")
    hub = Hub(monkeypatch, step1=checkpoints / "gpt2", step2=checkpoints / "llama")
    hub.branches["main"] = checkpoints / "gpt2"
    other = ModelRequest(model="org/m", revision="step2")

    def score(*requests):
        run = score_models if alone else score_share
        found = run(requests, texts, store)
        return [each.status for each in (found if alone else found.outcomes)]

    def status():
        found = fleet_status(store, texts.digest, requests=[BRANCH, other])
        return found.done, found.to_do

    assert status() == (0, 2)
    assert score(BRANCH) == ["scored"]
    assert status() == (1, 1), "by its own name"
    assert score(other) == ["scored"]
    assert status() == (2, 0)
    hub.branches["step1"] = checkpoints / "gpt2-finetune"
    assert status() == (2, 0), "nothing is looked up"
    assert score(BRANCH, other) == ["scored", "skipped"]
    assert len(store.completed()) == 3


def test_a_result_says_what_was_asked_for(monkeypatch, tmp_path, checkpoints, texts):
    """Its columns of metadata stay what the list says, and its numbers what they are alone."""
    store = Store(tmp_path / "s")
    Hub(monkeypatch, step1=checkpoints / "gpt2")
    tokenizer = str(checkpoints / "gpt2-finetune")
    request = ModelRequest(
        model="org/m", revision="step1", tokenizer=tokenizer, metadata={"family": "gpt2"}
    )
    (outcome,) = score_share([request], texts, store, dtype="float32").outcomes
    (row,) = store.rows()
    assert row.provenance["asked"] == ["step1", "float32", tokenizer, None]
    assert row.provenance == outcome.result.provenance
    assert row.metadata == {"family": "gpt2"}
    status = fleet_status(store, texts.digest, requests=[request], dtype="float32")
    assert (status.done, status.to_do) == (1, 0)

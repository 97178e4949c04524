"""`llfast fleet` with branches of the Hub, which move, beside what the store knows of them."""

from datetime import datetime, timedelta

import pytest

from llfast import Store, shards
from llfast.fleet import score_share, session
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
def test_a_result_outdates_the_failures_before_it(monkeypatch, tmp_path, checkpoints, texts, ahead):
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
    shared = score_share([BRANCH], texts, store)
    assert [each.status for each in shared.outcomes] == ["failed"] * 3
    assert shared.failed["org/m"].attempts == 3

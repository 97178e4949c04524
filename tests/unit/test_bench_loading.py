"""The benchmark of loading, on a checkpoint of a few kilobytes."""

import json

import pytest

import llfast
from llfast.bench import loading
from llfast.checkpoint import Checkpoint
from tests.tiny import make_model, make_tokenizer, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "llama"
    return save(make_model("llama"), make_tokenizer(adds_bos=True), folder)


@pytest.fixture(scope="module")
def found(folder):
    return loading.measure(str(folder), tokens=600, repetitions=2, device="cpu")


def test_every_rate_is_measured(found, folder):
    assert found["tokens"] == 600
    assert found["model"]["weight_bytes"] == Checkpoint.open(folder).weight_bytes
    assert set(found["ceilings"]) == {"disk", "memory copy"}
    for rate in (
        *found["ceilings"].values(),
        *(run["read_rate"] for run in found["runs"].values()),
    ):
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    stored = sum(each.end - each.begin for each in Checkpoint.open(folder).tensors.values())
    for run in found["runs"].values():
        assert run["waves"]["median"] == 1
        # The small embedding is kept, the head is read for itself.
        assert run["bytes"]["median"] == pytest.approx(stored, rel=1e-3)
    assert found["runs"]["warm"]["cached_bytes"]["min"] > 0
    json.dumps(found)


def test_rates_are_shown_side_by_side(found, capsys):
    loading.show(found)
    printed = capsys.readouterr().out
    for word in ("disk", "memory copy", "weights, cold", "weights, warm", "600 tokens in"):
        assert word in printed


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(llfast.CheckpointError, match="must be a checkpoint folder"):
        loading.measure(str(tmp_path / "nothing"))

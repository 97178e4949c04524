"""A store filled with relatives together is one filled with each of them alone."""

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from llfast import LlfastWarning, Store, TextSet
from llfast.fleet import score_models, session
from llfast.model_list import ModelRequest
from llfast.paging.pages import Pages
from tests.families import age, make_family
from tests.tiny import TEXTS, make_model, make_tokenizer, save

pytestmark = pytest.mark.usefixtures("on_one_thread")  # models are tiny


@pytest.fixture
def texts():
    return TextSet.from_texts(TEXTS)


@pytest.fixture
def folders(tmp_path):
    """Four relatives, and a stranger in their middle."""
    tokenizer = make_tokenizer(adds_bos=False)
    changes = [(seed, lambda name: "layers.1." in name) for seed in range(3)]
    family = make_family(tmp_path, "llama", tokenizer, changes)
    stranger = save(make_model("gpt2"), tokenizer, tmp_path / "stranger")
    return [*family[:2], stranger, *family[2:]]


def requests(folders, **fields):
    return [
        ModelRequest(model=str(each), name=f"m{number}", metadata={"number": number}, **fields)
        for number, each in enumerate(folders)
    ]


def rows(store, texts):
    """What a store says of each model: all that it keeps, but not how weights came."""
    found = {}
    complete = (row for row in store.rows(texts.digest) if row.error is None)
    for result in map(store.load, complete):
        provenance = {**result.provenance, "weights": ""}
        facts = result.revision, result.metadata, provenance
        found[result.model] = result.values.tobytes(), *facts
    return found


def run(folders, texts, folder, **options):
    store, reported = Store(folder), []
    outcomes = score_models(
        folders, texts, store, progress=False, report=reported.append, **options
    )
    return store, outcomes, reported


def test_the_same_store(folders, texts, tmp_path):
    one, outcomes, reported = run(requests(folders), texts, tmp_path / "one", together=True)
    other, alone, _ = run(requests(folders), texts, tmp_path / "other")
    assert rows(one, texts) == rows(other, texts)
    assert len(rows(one, texts)) == 5
    assert [each.status for each in outcomes] == [each.status for each in alone] == ["scored"] * 5
    assert [each.request.name for each in outcomes] == [f"m{number}" for number in range(5)]
    assert sorted(each.request.name for each in reported) == [f"m{number}" for number in range(5)]
    assert [each.relatives for each in outcomes] == [3, 3, 0, 3, 3]
    paged = outcomes[0].summary()["paged"]
    assert paged["relatives"] == 3
    assert paged["shared_bytes"] > 0
    assert "relatives" not in (outcomes[2].summary().get("paged") or {})
    assert not list((tmp_path / "one").rglob("*.npz")), "nothing is left of what was unfinished"


def test_what_is_in_the_store_is_not_scored_again(folders, texts, tmp_path):
    run(requests(folders)[1:2], texts, tmp_path / "store")
    store, outcomes, _ = run(requests(folders), texts, tmp_path / "store", together=True)
    assert [each.status for each in outcomes] == ["scored", "skipped", *["scored"] * 3]
    assert [each.relatives for each in outcomes] == [2, 0, 0, 2, 2]
    assert len(rows(store, texts)) == 5
    _, outcomes, _ = run(requests(folders), texts, tmp_path / "store", together=True)
    assert {each.status for each in outcomes} == {"skipped"}


def test_a_model_twice_in_the_list(folders, texts, tmp_path):
    twice = [*requests(folders[:2]), *requests(folders[:2])]
    _, outcomes, _ = run(twice, texts, tmp_path / "store", together=True)
    assert [each.status for each in outcomes] == ["scored", "scored", "skipped", "skipped"]


def test_one_that_is_poisoned_and_one_that_is_missing(folders, texts, tmp_path):
    """The others are scored, and have the same numbers."""
    weights = load_file(folders[1] / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][:] = np.nan
    save_file(weights, folders[1] / "model.safetensors", metadata={"format": "pt"})
    age(folders[1])
    (folders[3] / "config.json").unlink()
    one, outcomes, _ = run(requests(folders), texts, tmp_path / "one", together=True)
    assert [each.status for each in outcomes] == ["scored", "failed", "scored", "failed", "scored"]
    assert "nan" in outcomes[1].error.lower()
    assert "config.json" in outcomes[3].error
    other, _, _ = run(requests(folders), texts, tmp_path / "other")
    assert rows(one, texts) == rows(other, texts)
    assert len(rows(one, texts)) == 3


def test_a_file_that_cannot_be_compared(folders, texts, tmp_path, monkeypatch):
    """It fails alone, with its own reason."""
    own = session.find_relatives

    def cut(*arguments, **options):
        path = folders[1] / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-2000])
        return own(*arguments, **options)

    monkeypatch.setattr(session, "find_relatives", cut)
    _, outcomes, _ = run(requests(folders), texts, tmp_path / "store", together=True)
    assert [each.status for each in outcomes] == ["scored", "failed", *["scored"] * 3]


def test_what_it_took_to_find_out_is_told_once(folders, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("LLFAST_CACHE", str(tmp_path / "cache"))
    _, outcomes, _ = run(requests(folders), texts, tmp_path / "store", together=True)
    compared = [each.loading.compared_bytes for each in outcomes]
    assert compared[2] == 0
    assert 0 < compared[0] < 4 * 1.1 * (folders[0] / "model.safetensors").stat().st_size
    assert outcomes[0].summary()["paged"]["compared_bytes"] == compared[0]


def test_one_after_the_other_is_told_as_such(folders, texts, tmp_path):
    with pytest.warns(LlfastWarning, match="one after the other, for memory_budget must hold"):
        _, outcomes, _ = run(
            requests(folders), texts, tmp_path / "store", together=True, memory_budget=150_000
        )
    assert {each.relatives for each in outcomes} == {0}


def test_dtypes_go_apart(folders, texts, tmp_path):
    mixed = [*requests(folders[:2], dtype="float32"), *requests(folders[3:], dtype="bfloat16")]
    _, outcomes, _ = run(mixed, texts, tmp_path / "store", together=True)
    assert [each.relatives for each in outcomes] == [1] * 4
    assert [each.result.dtype for each in outcomes] == ["float32"] * 2 + ["bfloat16"] * 2


def test_interrupted_and_taken_up_again(folders, texts, tmp_path, monkeypatch):
    taken, own = [], Pages.take

    def stop(self, page, **options):
        taken.append(page.name)
        if taken.count("rows 0 of the head") == 3:
            raise KeyboardInterrupt
        return own(self, page, **options)

    monkeypatch.setattr("llfast.paging.waves._MOST_FORWARDS", 3)
    options = {"together": True, "weights": "paged", "token_budget": 64}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pages, "take", stop)
        run(requests(folders), texts, tmp_path / "one", **options)
    kept = list((tmp_path / "one").rglob("*.npz"))
    assert kept
    one, outcomes, _ = run(requests(folders), texts, tmp_path / "one", **options)
    assert {each.status for each in outcomes} == {"scored"}
    other, _, _ = run(requests(folders), texts, tmp_path / "other", **options | {"together": False})
    assert rows(one, texts) == rows(other, texts)


def test_a_full_disk_stops_the_run(folders, texts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "add", full)
    with pytest.raises(OSError, match="No space left"):
        run(requests(folders), texts, tmp_path / "store", together=True)

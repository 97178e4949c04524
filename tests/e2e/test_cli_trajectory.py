"""`llfast trajectory` on checkpoints of a small model that walks at random."""

import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import llfast
from llfast import LlfastWarning, Store
from llfast.model_list import ModelRequest
from llfast.trajectory import follow
from llfast.trajectory_scoring import trajectory_of
from tests.tiny import copy_checkpoint, make_adapter, make_model, make_tokenizer, save

COUNT = 6


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Folders step10, step20, ...: each a little further in a direction of its own."""
    folder = tmp_path_factory.mktemp("series")
    generator = torch.Generator().manual_seed(0)
    made = [save(make_model("gpt2"), make_tokenizer(adds_bos=False), folder / "step10")]
    for number in range(1, COUNT):

        def move(_, weight):
            return weight + 0.01 * torch.randn(weight.shape, generator=generator)

        made.append(copy_checkpoint(made[-1], folder / f"step{10 * (number + 1)}", move))
    return made


@pytest.fixture
def call(command, texts_file, tmp_path):
    """`call(folders)` follows them, in a store that is kept from call to call."""

    def run(folders, *options, store=tmp_path / "store"):
        first = ("--checkpoints", *folders) if folders else ()
        return command("trajectory", *first, "--texts", texts_file, "--store", store, *options)

    return run


def weights(folders):
    points = [
        torch.cat([each.double().flatten() for each in load_file(f / "model.safetensors").values()])
        for f in folders
    ]
    return np.array([[float((a - b).square().sum()) for b in points] for a in points])


def test_a_series_is_scored_and_followed(call, series, tmp_path):
    shuffled = [series[number] for number in (3, 0, 5, 1, 4, 2)]
    run = call(shuffled, "--drop", "0.1", "--plot", tmp_path / "t.png", "--json")
    assert (run.code, run.err) == (0, "")
    found = run.json
    assert found["models"] == [str(each) for each in series]
    assert found["steps"] == [10, 20, 30, 40, 50, 60]
    assert len(found["dropped"]) == 1
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    store = Store(tmp_path / "store")
    matrix = store.matrix()
    assert [row["step"] for row in matrix.metadata] == [10, 20, 30, 40, 50, 60]
    assert {row["run"] for row in matrix.metadata} == {str(series[0].parent)}
    expected = follow(matrix, drop_share=0.1, weight_distances=weights(series))
    for name in ("diffusion", "weight_diffusion"):
        np.testing.assert_allclose(
            found[name]["exponents"], getattr(expected, name).exponents, rtol=1e-6
        )
    assert found["weight_diffusion"]["median"] == pytest.approx(1, abs=0.1)
    estimates = [each["value"] for each in found["kl_from_previous"]]
    np.testing.assert_allclose(estimates, [each.value for each in expected.from_previous])
    results = [row.metadata["step"] for row in store.rows()]
    again = call(shuffled, "--no-weights")
    assert again.out.count("in the store already") == COUNT
    assert [row.metadata["step"] for row in store.rows()] == results


def test_only_weights_within_a_window_are_compared(series, texts, tmp_path):
    requests = [ModelRequest(model=str(each)) for each in series]
    store = Store(tmp_path / "store")
    found = trajectory_of(requests, texts, store, steps=[0, 5, 3, 1, 6, 4], window=3)
    passed = [series[number] for number in (0, 3, 2, 5, 1, 4)]
    assert found.models == tuple(map(str, passed))
    within = np.abs(np.subtract.outer(range(COUNT), range(COUNT))) <= 3
    np.testing.assert_array_equal(np.isfinite(found.weight_distances), within)
    np.testing.assert_allclose(found.weight_distances[within], weights(passed)[within], rtol=1e-6)


def test_people_are_told_the_same(call, series):
    run = call(series, "--drop", "0.2")
    assert (run.code, run.err) == (0, "")
    found = call(series, "--drop", "0.2", "--json").json
    third = next(line for line in run.out.splitlines() if re.match("│ +30 ", line))
    near, far = found["kl_from_previous"][1], found["kl_from_start"][1]
    numbers = [30, found["bits_per_byte"][2]]
    numbers += [each[name] for each in (near, far) for name in ("value", "standard_error")]
    assert [float(cell) for cell in third.split("│")[1:-1]] == pytest.approx(numbers, rel=1e-3)
    assert "Steps, KL in bits/byte with standard errors" in run.out
    for words in (
        "√(bits/byte), straight",
        "exponent, log-likelihood ",
        "exponent, weight ",
        "3 starts",
        "of log-likelihoods, at -",
        "2 of 12 texts, for jumps from step 0 on (",
    ):
        assert words in run.out
    plain = call(series, "--drop", "0", "--clip-quantile", "0", "--no-weights").out
    assert "dropped" not in plain
    assert "clipped" not in plain
    assert "exponent, weight" not in plain


def test_steps_may_be_given_and_are_remembered(call, series, tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    for folder, made in zip(folders, series, strict=False):
        shutil.copytree(made, folder)
    run = call(folders)
    assert f"the step of '{folders[0]}' must be a natural number, got None" in run.error
    assert not (tmp_path / "store").exists(), "nothing is scored, nor made, before it is known"
    assert call(folders, "--steps", "4,3,2,1", "--json").json["steps"] == [1, 2, 3, 4]
    assert call(folders, "--json").json["models"] == [str(each) for each in folders[::-1]]
    assert call(folders, "--steps", "9,8,7,6", "--json").json["steps"] == [6, 7, 8, 9]
    assert call(folders, "--json").json["steps"] == [6, 7, 8, 9]
    assert "steps must be different, got 1 for" in call(folders, "--steps", "1,1,2,3").error
    assert "one a checkpoint (4), got 2" in call(folders, "--steps", "1,2").error
    assert "--steps must be whole numbers with commas" in call(folders, "--steps", "1,x").error


def test_a_step_is_remembered_of_weights_and_not_of_a_name(call, series, tmp_path):
    folders = [shutil.copytree(series[number], tmp_path / "ab"[number]) for number in range(2)]
    assert call(folders, "--steps", "1,2").code == 0
    shutil.rmtree(folders[1])
    shutil.copytree(series[2], folders[1])
    assert f"the step of '{folders[1]}' must be a natural number" in call(folders).error


def test_what_another_command_has_scored_is_told_its_run_and_step(
    call, command, series, texts_file, tmp_path
):
    store = tmp_path / "store"
    assert command("score", *series, "--texts", texts_file, "--store", store).code == 0
    before = Store(store).matrix()
    assert call(series, "--no-weights").out.count("in the store already") == COUNT
    after = Store(store).matrix()
    np.testing.assert_array_equal(after.values, before.values)
    assert {row["run"] for row in after.metadata} == {str(series[0].parent)}
    (found,) = command("compare", "--store", store, "--json").json
    assert (found["relation"], found["pairs"]) == ("adjacent steps", COUNT - 1)


def test_runs_side_by_side_are_told_apart_by_their_names(call, command, series, tmp_path):
    for number, made in enumerate(series):
        shutil.copytree(made, tmp_path / "zoo" / f"{'ab'[number % 2]}-{made.name}")
    for run in "ab":
        assert call(sorted((tmp_path / "zoo").glob(f"{run}-*")), "--no-weights").code == 0
    store = tmp_path / "store"
    runs = {row.metadata["run"] for row in Store(store).rows()}
    assert runs == {str(tmp_path / "zoo" / run) for run in "ab"}
    (found,) = command("compare", "--store", store, "--json").json
    assert (found["relation"], found["pairs"]) == ("adjacent steps", 4)


@pytest.fixture
def hub(series, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out, in which `org/tiny` has six revisions."""
    root = tmp_path / "hub" / "models--org--tiny"
    (root / "refs").mkdir(parents=True)
    for made in series:
        commit = hashlib.sha1(made.name.encode()).hexdigest()
        (root / "refs" / made.name).write_text(commit)
        shutil.copytree(made, root / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("hub")
def test_revisions_of_a_hub_id(call, series, tmp_path):
    revisions = ",".join(each.name for each in series)
    found = call((), "org/tiny", "--revisions", revisions, "--json").json
    assert found["models"] == [f"org/tiny@{each.name}" for each in series]
    assert found["steps"] == [10, 20, 30, 40, 50, 60]
    folders = call(series, "--json", store=tmp_path / "other").json
    assert found["diffusion"] == folders["diffusion"]
    assert found["weight_diffusion"] == folders["weight_diffusion"]
    assert {row.metadata["run"] for row in Store(tmp_path / "store").rows()} == {"org/tiny"}


@pytest.mark.usefixtures("hub")
def test_a_revision_that_is_not_there_stops_all(call, tmp_path):
    run = call((), "org/tiny", "--revisions", "step10,step15,step20")
    assert "got org/tiny at revision 'step15'" in run.error
    assert (run.code, run.out) == (1, "")
    assert not (tmp_path / "store").exists()


def test_what_cannot_be_followed_is_one_line_and_nothing_is_scored(call, series, tmp_path):
    other = save(make_model("gpt2", n_layer=1), make_tokenizer(adds_bos=False), tmp_path / "step70")
    folder = tmp_path / "t.png"
    folder.mkdir()
    for folders, options, message in (
        (series[:1], (), "a trajectory must have at least two checkpoints, got 1"),
        ([series[0], series[0]], (), f"must be different ones, got {series[0]} twice"),
        ([*series, other], (), "must hold weights of the names and shapes of"),
        ([*series, tmp_path / "step80"], (), "must be a checkpoint folder or Hub id, got"),
        (series, ("--warm-up", "100"), "warm_up must leave two checkpoints"),
        (series, ("--drop", "2"), "drop_share must be in [0, 1), got 2.0"),
        (series, ("--drop", "0.95"), "drop_share must leave two texts, got 0.95 of 12"),
        (series, ("--plot", "t.gif"), "must end in .png, .svg or .pdf"),
        (series, ("--plot", tmp_path / "none" / "t.png"), "There is no such folder: "),
        (series, ("--plot", folder), "A picture is written to a file: "),
    ):
        run = call(folders, *options)
        assert (run.code, run.out) == (1, "")
        assert message in run.error
    assert not (tmp_path / "store").exists()
    assert call([*series, other], "--no-weights").code == 0


def test_without_matplotlib_nothing_is_scored_for_a_picture(call, series, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = call(series, "--plot", tmp_path / "t.png")
    assert "drawing needs matplotlib; run `pip install 'llfast[map]'`" in run.error
    assert not (tmp_path / "store").exists()


def test_checkpoints_may_lack_a_tokenizer_and_be_pickles(call, series, tmp_path):
    folders = [shutil.copytree(each, tmp_path / each.name) for each in series[:2]]
    for folder in folders:
        for path in folder.glob("tokenizer*"):
            path.unlink()
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert "pass --allow-pickle if you trust them" in call(folders).error
    assert "leave these distances out (--no-weights)" in call(folders, "--allow-pickle").error
    run = call(folders, "--allow-pickle", "--no-weights")
    assert "pass one with --tokenizer" in run.error
    given = ("--allow-pickle", "--no-weights", "--tokenizer", series[0])
    assert call(folders, *given, "--json").json["steps"] == [10, 20]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_followed_on_their_base(call, checkpoints, texts, tmp_path):
    steps, base = (10, 20, 30), str(checkpoints / "llama")
    folders = [make_adapter(tmp_path / f"step{step}", seed=step) for step in steps]
    assert "got a LoRA adapter; pass the model it was trained on" in call(folders).error
    options = ("--adapter-base", base)
    line = call(folders, *options).error
    assert "must be a whole checkpoint for distances between weights, got an adapter" in line
    assert line.endswith("; leave these distances out (--no-weights)")
    error = call([*folders, base], *options, "--no-weights").error
    assert error.endswith("which is none; leave it out")
    assert not (tmp_path / "store").exists()
    found = call(folders, *options, "--no-weights", "--json").json
    assert found["steps"] == list(steps)
    scores = [llfast.score(each, texts, adapter_base=base) for each in folders]
    assert found["bits_per_byte"] == [each.mean_bits_per_byte for each in scores]
    assert len(set(found["bits_per_byte"])) == 3
    again = call(folders, *options, "--no-weights")
    assert again.out.count("in the store already") == 3


def test_a_checkpoint_that_cannot_be_scored(call, series, nan_checkpoint, tmp_path):
    spoilt = shutil.copytree(nan_checkpoint, tmp_path / "step70")
    run = call([*series, spoilt], "--no-weights", "--json")
    assert (run.code, run.out) == (1, "")
    assert f"must be scored, got 1 failures, the first of {spoilt}: " in run.error
    run = call([*series, spoilt])
    assert (run.code, len(run.err.splitlines())) == (1, 1)


def test_two_checkpoints_and_one_six_times_have_no_exponent(call, series, tmp_path):
    run = call(series[:2], "--json")
    assert run.code == 0
    assert run.err.count("\n") == 1
    assert "warning: there is no diffusion exponent in log-likelihood and weight space" in run.err
    assert run.json["diffusion"] is None
    copies = [shutil.copytree(series[0], tmp_path / f"step{number}") for number in range(6)]
    run = call(copies, "--plot", tmp_path / "t.svg")
    assert run.code == 0
    assert run.err.count("\n") == 1
    assert "15 distances of 0 among them" in run.err
    assert "exponent" not in run.out
    line = next(line for line in run.out.splitlines() if line.startswith("path "))
    assert line.endswith(" straight 0: all checkpoints say the same")
    drawn = (tmp_path / "t.svg").read_text()
    assert "<!-- KL is 0 between all checkpoints -->" in drawn
    assert "<!-- all distances in log-likelihood and weight space are 0 -->" in drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give either MODEL --revisions A,B or --checkpoints DIR DIR"),
        ("a", "give either MODEL --revisions"),
        ("a --revisions r --checkpoints b", "give either MODEL --revisions"),
        ("a --revisions r,,s", "--revisions must be names with commas, got 'r,,s'"),
        ("a --revisions r,", "--revisions must be names with commas, got 'r,'"),
        ("--revisions r", "--revisions goes with one MODEL, got 0"),
        ("a b --revisions r", "--revisions goes with one MODEL, got 2"),
    ],
)
def test_misuse_is_one_line_and_status_2(call, words, message):
    run = call((), *words.split())
    assert (run.code, run.out) == (2, "")
    assert message in run.error


def test_the_dtype_of_the_run_is_the_one_that_is_followed(call, series):
    assert call(series, "--json").code == 0
    low = call(series, "--dtype", "bfloat16", "--json").json
    plain = call(series, "--json").json
    assert low["bits_per_byte"] != plain["bits_per_byte"]
    assert json.dumps(call(series, "--dtype", "bfloat16", "--json").json) == json.dumps(low)


def test_each_checkpoint_is_followed_in_the_dtype_that_it_runs_in(
    call, series, tmp_path, monkeypatch
):
    # As on a processor that is fast in bf16.
    monkeypatch.setattr("llfast.models.fast_dtype", lambda stored, _: stored)

    def to_bf16(_, weight):
        return weight.to(torch.bfloat16)

    mixed = [*series[:3], copy_checkpoint(series[3], tmp_path / "step40", to_bf16)]
    first = call(mixed, "--json")
    assert "models ran in bfloat16 and float32" in first.err
    for dtype in ("float32", "bfloat16"):
        assert call(mixed, "--dtype", dtype, "--json").json != first.json
    assert call(mixed, "--json").json == first.json


def test_a_checkpoint_may_ask_for_a_dtype_of_its_own(series, texts, tmp_path):
    requests = [ModelRequest(model=str(each)) for each in series]
    requests[1] = replace(requests[1], dtype="bfloat16")
    store = Store(tmp_path / "store")
    with pytest.warns(LlfastWarning, match="models ran in bfloat16 and float32"):
        trajectory_of(requests, texts, store)
    assert sorted(row.key.dtype for row in store.rows()) == ["bfloat16"] + 5 * ["float32"]

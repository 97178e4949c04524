"""The demo on models of a few steps: what it reports is what its own store says."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import llfast
from llfast import ScoringError
from llfast.demo import next_commands, run_demo
from llfast.drawing import PALETTE


def distances(report):
    """(models, KL in bits/byte) by plain numpy, from the log-likelihoods in the store."""
    texts = llfast.TextSet.load(report["texts"])
    matrix = llfast.Store(report["store"]).matrix(texts.digest)
    values = np.maximum(matrix.values, np.quantile(matrix.values, 0.02))
    values = values - values.mean(axis=1, keepdims=True)
    squares = ((values[:, None] - values) ** 2).mean(axis=2) / 2
    return list(matrix.models), squares / (matrix.text_bytes.mean() * np.log(2))


def test_distances_and_neighbours(small_demo):
    _, report, *_ = small_demo
    models, kl = distances(report)
    assert report["models"] == models
    assert len(models) == 10  # two bases, two checkpoints, four fine-tunes, a merge, a heavy one
    np.testing.assert_allclose(report["kl_bits_per_byte"], kl, rtol=1e-9, atol=1e-12)
    for row, model in enumerate(models):
        order = [models[other] for other in np.argsort(kl[row]) if other != row]
        assert [hit["model"] for hit in report["nearest"][model]] == order[:3]


def test_checks_pass_over_the_own_run_and_say_whose_family_is_nearest(small_demo):
    _, report, *_ = small_demo
    models, kl = distances(report)
    assert {check["model"] for check in report["checks"]} == {
        *("gpt2-prose", "gpt2-code", "llama-prose", "llama-code", "llama-heavy")
    }
    for check in report["checks"]:
        row = models.index(check["model"])
        nearest = models[np.argsort(kl[row])[1]]  # a fine-tune has no other checkpoint of its run
        assert check["nearest"] == nearest
        assert check["same_family"] == (nearest.split("-")[0] == check["model"].split("-")[0])
        assert check["light"] == (check["model"] != "llama-heavy")
    light = [check["same_family"] for check in report["checks"] if check["light"]]
    assert report["families_found"] == all(light)


def test_checkpoints_and_descendants_are_linked(small_demo):
    _, report, *_ = small_demo
    parents = report["parents"]
    assert parents["gpt2-base"] == ["gpt2-step20"]
    assert parents["gpt2-step20"] == ["gpt2-step10"]
    assert list(parents["gpt2-prose"]) == ["gpt2-base"]
    assert list(parents["llama-merge"]) == ["llama-prose", "llama-code"]
    assert "gpt2-step10" not in parents


def test_the_map_is_a_picture_with_every_family_in_it(small_demo):
    _, report, *_ = small_demo
    picture = imread(report["map"])
    assert picture.shape[0] > 600
    colours = {tuple(c) for c in (picture[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in PALETTE[:2]} <= colours
    page = Path(report["page"]).read_text()
    assert all(model in page for model in report["models"])


def test_a_second_run_trains_and_scores_nothing(small_demo):
    folder, report, first, config = small_demo
    lines = []
    again = run_demo(folder, config=config, texts=40, say=lines.append)
    assert again == report
    assert sum("trained " in line and "(" in line for line in first) == 10
    assert not any("(1/10)" in line for line in lines)
    assert "scored 0 models on 40 texts, 10 were in the store" in lines


def test_a_model_that_cannot_be_scored_is_named_with_the_reason(small_demo, tmp_path):
    folder, _, _, config = small_demo
    shutil.copytree(folder / "zoo", tmp_path / "zoo")
    weights = tmp_path / "zoo" / "llama-code" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ScoringError, match=r"10 models .* 1 failures, the first of llama-code: .*"):
        run_demo(tmp_path, config=config, texts=40)


def test_commands_to_try_next_can_be_pasted(tmp_path):
    out = tmp_path / "two words"
    for command in next_commands(out, "a", "b"):
        assert str(out / "store") in shlex.split(command)

"""`llfast score --dry-run`: says and refuses what the run then does."""

import hashlib
import json
import shutil

import llfast
from llfast import Store


def test_dry_run_counts_what_scoring_then_does(command, checkpoints, texts, texts_file, tmp_path):
    names = ["gpt2", "llama", "mixtral"]
    arguments = ("score", *(checkpoints / name for name in names), "--texts", texts_file)
    estimates = command(*arguments, "--dry-run", "--json").json
    assert [each["model"] for each in estimates] == [str(checkpoints / name) for name in names]
    for each in estimates:
        result = llfast.score(each["model"], texts)
        weights = checkpoints / each["model"] / "model.safetensors"
        assert each["tokens"] == result.token_counts.sum() <= each["padded_tokens"]
        assert (each["dtype"], each["device"]) == ("float32", "cpu")
        assert each["read_bytes"] == weights.stat().st_size
        assert each["memory_bytes"] > 4 * each["parameters"] > 0.9 * each["read_bytes"] - 10_000
        assert 0 < each["seconds"] < 60
        work = 2 * each["parameters"] * each["padded_tokens"]
        assert 0.5 * work <= each["seconds"] * each["matmul_flops"] <= work * (1 + 1e-9)
    run = command(*arguments, "--dry-run")
    for each in estimates:
        line = next(line for line in run.out.splitlines() if f" {each['model']} " in line)
        for shown in (f"{each['parameters']:,}", f"{each['tokens']:,}", "KiB", " 0.0 s "):
            assert shown in line
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_dry_run_says_which_way_the_run_then_goes(command, checkpoints, texts_file, tmp_path):
    arguments = ["score", checkpoints / "llama", "--texts", texts_file]
    ways = {"--weights paged": "paged", "--weights resident": "resident", "": "kept"}
    for options, way in ways.items():
        estimate = command(*arguments, "--dry-run", "--json", *options.split()).json[0]
        assert estimate["weights"] == way
        store = Store(tmp_path / way)
        assert command(*arguments, "--store", store.folder, *options.split()).code == 0
        assert store.load(store.rows()[0]).provenance["weights"] == way
        shown = command(*arguments, "--dry-run", *options.split()).out
        assert f" {way} " in shown
        assert ("a wave" in shown, " over " in shown) == (way == "paged",) * 2
        if way == "paged":
            least = estimate["weights_bytes"]
    for budget, taken in ((least, False), (least + 1, True)):
        given = ("--weights", "paged", "--memory-budget", budget)
        runs = (
            command(*arguments, "--dry-run", *given),
            command(*arguments, "--store", tmp_path / str(budget), *given),
        )
        assert [run.code for run in runs] == [0 if taken else 1] * 2
        if not taken:
            reason = runs[0].error.removeprefix("llfast: error: ")
            assert f"got {least:,}; it takes more than {least:,}" in reason
            assert reason in runs[1].out
    run = command(*arguments, "--dry-run", "--weights", "resident", "--memory-budget", "1GiB")
    assert "memory_budget must be left out with resident weights" in run.error


def test_dry_run_of_a_list_takes_each_model_as_the_run_does(
    command, checkpoints, texts_file, tmp_path
):
    """With the weights, budget and trust of its own that a model has there."""
    code = shutil.copytree(checkpoints / "llama", tmp_path / "code")
    config = json.loads((code / "config.json").read_text())
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (code / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (code / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    llama = {"model": str(checkpoints / "llama")}
    budget = {"weights": "paged", "memory_budget": "64MiB"}
    models = [
        {**llama, "name": "plain"},
        {**llama, "name": "resident", "weights": "resident"},
        {**llama, "name": "paged", **budget},
        {"model": str(code), "name": "code", "trust_remote_code": True},
    ]

    def score(models, *options):
        path = tmp_path / "models.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in models))
        return command("score", "--list", path, "--texts", texts_file, *options)

    for options in ((), ("--memory-budget", "32MiB")):
        found = score(models, "--dry-run", "--json", *options)
        assert found.code == 0, found.error
        store = Store(tmp_path / f"store{len(options)}")
        assert score(models, "--store", store.folder, *options).code == 0
        ways = {row.key.model: store.load(row).provenance["weights"] for row in store.rows()}
        assert {each["model"]: each["weights"] for each in found.json} == ways
        assert (ways["resident"], ways["paged"]) == ("resident", "paged")
    for own, message in (
        ({"weights": "some"}, "weights must be auto, resident, paged, got 'some'"),
        ({"weights": "resident", "memory_budget": "1GiB"}, "must be left out with resident"),
        ({"memory_budget": "much"}, "memory_budget must be"),
    ):
        for options in (("--dry-run",), ("--store", tmp_path / "none")):
            run = score([*models, {**llama, "name": "wrong", **own}], *options)
            assert (run.code, run.out) == (1, "")
            assert message in run.error
    refused = score([{**models[3], "trust_remote_code": False}], "--dry-run")
    assert "brings its own code" in refused.error


def test_dry_run_refuses_what_cannot_be_verified(command, checkpoints, texts_file, tmp_path):
    weights = checkpoints / "llama" / "model.safetensors"
    arguments = ("score", checkpoints / "llama", "--texts", texts_file)
    line = f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  {{}}\n"
    for name, content, message in (
        ("right", line.format(weights.name), None),
        ("torn", "no digest\n", "line 1 must be a sha256 and a file name"),
        ("other", line.format("other.safetensors"), "must have a sha256 to be verified, got none"),
        ("missing", None, "No such file"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        dry = command(*arguments, "--dry-run", "--manifest", path)
        run = command(*arguments, "--store", tmp_path / f"{name}-store", "--manifest", path)
        assert [dry.code, run.code] == [1 if message else 0] * 2
        assert message is None or (message in dry.error and message in run.out + run.err)
    run = command(*arguments, "--dry-run", "--verify")
    assert "must have a sha256 to be verified, got none from the Hub's cache" in run.error

"""`llfast info`: what is in a store and a checkpoint, and what this machine is."""

import re

import pytest

import llfast
from llfast import Store
from tests.tiny import make_adapter


def test_info_of_a_store(command, filled, texts):
    run = command("info", filled, "--json")
    rows = Store(filled).rows()
    assert (run.json["complete"], run.json["failed"]) == (3, 0)
    assert run.json["texts"] == {texts.digest: len(texts)}
    assert [row["model"] for row in run.json["rows"]] == ["gpt2", "gpt2-finetune", "llama"]
    assert [row["revision"] for row in run.json["rows"]] == [row.key.revision for row in rows]
    shown = command("info", filled)
    assert f"{texts.digest[:12]} (12 texts)" in shown.out
    for row in rows:
        line = next(line for line in shown.out.splitlines() if f"│ {row.label} " in line)
        for cell in (row.key.revision[:12], "paper", "float32", "fused", "complete"):
            assert f" {cell} " in line


def test_info_of_a_checkpoint(command, checkpoints):
    weights = checkpoints / "llama" / "model.safetensors"
    facts = command("info", checkpoints / "llama", "--json").json
    source = llfast.score(checkpoints / "llama", ["a"])
    assert facts["revision"] == source.revision
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["stored dtype"] == "F32"
    assert facts["weight bytes"] == weights.stat().st_size
    from safetensors.numpy import load_file

    assert facts["parameters"] == sum(each.size for each in load_file(weights).values())
    shown = command("info", checkpoints / "llama").out
    assert f"{facts['parameters']:,}" in shown
    assert re.search(r"weight bytes +\d+\.\d KiB\n", shown)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_info_of_an_adapter_and_the_model_that_it_belongs_to(command, checkpoints, tmp_path):
    adapter, base = make_adapter(tmp_path / "adapter"), checkpoints / "llama"
    asked = command("info", adapter)
    assert (asked.code, asked.out) == (1, "")
    assert asked.error.endswith("pass the model it was trained on with --adapter-base")
    facts = command("info", adapter, "--adapter-base", base, "--json").json
    assert (facts["model"], facts["adapter base"]) == (str(adapter), str(base))
    assert facts["revision"] == llfast.score(adapter, ["a"], adapter_base=str(base)).revision
    for given in ((), (base,)):
        run = command("info", *given, "--adapter-base", base)
        assert (run.code, run.out) == (1 if given else 2, "")
    line = command("info", "s3://bucket/store", "--adapter-base", base).error
    assert "model must be a checkpoint folder or Hub id, got s3://bucket/store" in line


def test_info_of_nothing_tells_of_this_machine(command):
    facts = command("info", "--json").json
    import torch

    assert facts["llfast"] == llfast.__version__
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["rows"] == []

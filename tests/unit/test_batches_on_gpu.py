"""The benchmark of batches on a GPU, as far as there is none."""

import json
import sys

from llfast.batches import ladder_length
from tests.conftest import ROOT


def test_all_of_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scoring_on_gpu

    words = ["--device", "cpu", "--quick", "--repetitions", "1", "--out", str(tmp_path / "o.json")]
    monkeypatch.setattr(sys, "argv", ["scoring_on_gpu.py", *words])
    code = scoring_on_gpu.main()
    (found,) = json.loads((tmp_path / "o.json").read_text())["models"].values()
    names = {f"llfast {budget}" for budget in found["tokens_run"]} | {"papers", "padded loop"}
    assert found["over_default"].keys() == found["tokens_a_second"].keys() == names
    assert found["over_default"][f"llfast {found['default_budget']}"]["median"] == 1
    # A row a batch is all padding and no dummies.
    assert found["tokens_run"]["256"] % ladder_length(1) == 0
    assert found["tokens"] < found["tokens_run"]["256"] <= found["tokens_run"]["512"]
    assert found["differences"].keys() == names
    assert found["agree"]
    best = min(found["over_default"][f"llfast {budget}"]["median"] for budget in (256, 512))
    assert code == (0 if best * 1.1 >= 1 else 1)
    assert f"{found['tokens']:,} tokens" in capsys.readouterr().out

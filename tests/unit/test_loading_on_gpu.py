"""The benchmark of paging to a GPU, as far as there is none."""

import json
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import loading_on_gpu

    return loading_on_gpu


def test_what_is_done_at_once(bench):
    kernels = [(0.0, 1.0), (0.5, 2.0), (3.0, 4.0)]
    copies = [(1.5, 3.5), (3.5, 3.75), (10.0, 11.0)]
    found = bench.overlap(kernels, copies)
    assert found == {"kernel_seconds": 3.0, "copy_seconds": 3.25, "both_seconds": 0.5 + 0.75}
    assert bench.overlap([], copies)["both_seconds"] == 0
    assert bench.busy([(1.0, 2.0), (0.0, 5.0)]) == 5


def test_all_of_it_runs(bench, tmp_path, monkeypatch, capsys):
    words = ["--device", "cpu", "--quick", "--repetitions", "2", "--out", str(tmp_path / "o.json")]
    monkeypatch.setattr(sys, "argv", ["loading_on_gpu.py", *words])
    bench.main()
    found = json.loads((tmp_path / "o.json").read_text())
    assert {name: len(runs) for name, runs in found["runs"].items()} == {
        "cold": 2,
        "cached": 2,
        "resident": 2,
    }
    texts, tokens = found["texts"]
    rates = [texts * tokens / run["seconds"] for run in found["runs"]["cold"]]
    assert found["tokens_a_second"]["cold"]["max"] == pytest.approx(max(rates), rel=1e-3)
    assert found["same_bits"] is True
    for run in (*found["runs"]["cold"], *found["runs"]["cached"]):
        assert run["nbytes"] >= 0.9 * found["weight_bytes"]
    shares = [run["cached_bytes"] / run["nbytes"] for run in found["runs"]["cold"]]
    assert found["cold_share_cached"]["max"] == pytest.approx(max(shares), rel=1e-3)
    out = capsys.readouterr().out
    assert "cold over resident" in out
    assert "% of them cached" in out

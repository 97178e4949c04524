"""The benchmark of the output head, as far as a CPU can run it."""

import json
import types

import pytest
import torch

from llfast.bench import cases, heads, kernel, report
from llfast.bench.aims import judged, summed_up
from llfast.bench.bits import same_bits
from llfast.bench.cases import NOT_MEASURED
from llfast.bench.problems import make_problem
from llfast.bench.table import show
from llfast.bench.timing import interleaved
from llfast.bench.truth import Truth
from tests.conftest import ROOT
from tests.heads import INTERPRETED, mend_interpreter

FEW = {"tokens": [2, 40], "heads": ["small, softcap"], "case_seconds": 0.01}


def few(**options):
    return kernel.measure(device="cpu", dtype="float32", quick=True, **{**FEW, **options})


@pytest.fixture
def without_bits(monkeypatch):
    """Without the comparison of bits, which takes the longest."""
    monkeypatch.setattr(kernel, "SAME_BITS_HEADS", ())


def test_every_column_is_there_and_the_error_was_checked():
    saved = []
    found = few(save=lambda each: saved.append(len(each["cases"])))
    assert saved[:2] == [1, 2], "after every case"
    assert [(case["T"], case["V"], case["D"]) for case in found["cases"]] == [
        (2, 1024, 128),
        (40, 1024, 128),
    ]
    has_operator = hasattr(torch.nn.functional, "linear_cross_entropy")
    for case in found["cases"]:
        assert set(NOT_MEASURED) < set(case)
        assert case["errors"]["llfast"]["mean"] <= case["errors"]["llfast"]["max"] < 1e-4
        assert case["errors"]["product in fp32"]["max"] < 1e-4
        assert case["failed"] == {}
        assert {"Liger-Kernel", "cut-cross-entropy", heads.FUSED_READ} < set(case["skipped"])
        why = "softcap" if has_operator else "2.13 has"
        assert why in case["skipped"]["linear_cross_entropy"]
        assert set(case["ms"]) == {"llfast", *case["llfast_over"]}
        assert set(case["ms"]) | set(case["skipped"]) == set(heads.PROVIDERS)
        assert case["tflops"]["median"] > 0
        ratio = case["llfast_over"]["matmul"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert case["share_of_copy"]["median"] > 0
        assert case["extra_mib"] == dict.fromkeys(case["ms"]), "memory is not measured on a CPU"
    (bits,) = found["same_bits"]
    assert bits["all_same"]
    assert len(bits["same"]) == 8
    assert json.loads(json.dumps(found)) == found


def test_a_provider_that_raises_is_recorded(monkeypatch, without_bits):
    def fail(problem):
        raise torch.OutOfMemoryError("no room for the logits\nnor for more")

    monkeypatch.setitem(heads.PROVIDERS, "cross_entropy", fail)
    found = few()
    for case in found["cases"]:
        assert case["failed"] == {"cross_entropy": "OutOfMemoryError: no room for the logits"}
        assert "cross_entropy" not in case["ms"]
        assert case["llfast_over"]["matmul"]["median"] > 0


def test_where_llfast_is_wrong_the_case_says_so(monkeypatch, without_bits):
    right = heads.run_llfast

    def wrong(problem):
        return right(problem) + (1e-2 if len(problem.hidden) == 2 else 0.0)

    monkeypatch.setitem(heads.PROVIDERS, "llfast", wrong)
    found = few()
    bad, good = found["cases"]
    assert "0.01" in bad["wrong"]
    assert good["wrong"] is None
    (line,) = kernel.wrong_cases(found)
    assert "softcap, T 2: llfast's error must be at most" in line


def test_a_nan_is_wrong():
    truth = Truth.of(make_problem((3, 50, 16), torch.float32), 64)
    assert truth.why_wrong(float("nan"))
    assert truth.why_wrong(truth.fp32_error) is None


def test_what_does_not_fit_into_the_time_is_left_out(monkeypatch, without_bits):
    monkeypatch.setattr(kernel, "_estimated_seconds", lambda problem, _: len(problem.hidden))
    found = few(most_seconds=20.0)
    assert [case["T"] for case in found["cases"]] == [2]
    (left_out,) = found["left_out"]
    assert left_out["T"] == 40
    assert left_out["reason"].startswith("40 s needed, ")


def test_large_logits_are_not_built(monkeypatch, without_bits):
    monkeypatch.setattr(cases, "MOST_LOGITS_BYTES", 40 * 1024 * 4)
    small, large = few()["cases"]
    assert "matmul + log_softmax + gather" not in small["skipped"]
    assert "its logits would take" in large["skipped"]["matmul + log_softmax + gather"]
    assert "matmul" in large["ms"], "it holds them once"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ["GPT-5"]}, "heads must be among small, small, softcap, got 'GPT-5'"),
        ({"dtype": "int8"}, "dtype must be among float32, bfloat16, float16, got 'int8'"),
        ({"tokens": [0]}, r"tokens must be positive, got \[0\]"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
        ({"device": "cuda:99"}, "device must be there, got 'cuda:99'"),
    ],
)
def test_what_is_not_known_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kernel.measure(**{"device": "cpu", "quick": True, **options})


def mixed(index):
    """SplitMix64, in Python's integers."""
    bits = index * 0x9E3779B97F4A7C15 % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> shift)) * factor % 2**64
    return bits


def test_problems_are_the_same_everywhere_and_normal(monkeypatch):
    problem = make_problem((256, 300, 64), torch.float32, has_bias=True)
    targets = [mixed(index + 2 * 2**40) % 2**62 % 300 for index in range(256)]
    assert problem.targets.tolist() == targets
    fields = mixed(7).to_bytes(8, "little")
    total = sum(int.from_bytes(fields[i : i + 2], "little") for i in range(0, 8, 2))
    assert problem.hidden[0, 7].item() == pytest.approx((total - 131070) / 37837.2, rel=1e-6)
    logits = problem.hidden @ problem.lm_head.T
    assert 3.8 < logits.std() < 4.2
    assert problem.bias.shape == (300,)
    monkeypatch.setattr("llfast.bench.problems._PIECES", {"cpu": 100})
    pieces = make_problem((256, 300, 64), torch.float32)
    assert torch.equal(pieces.hidden, problem.hidden)
    assert torch.equal(pieces.lm_head, problem.lm_head)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_providers_agree_where_they_take_every_option(softcap):
    problem = make_problem((9, 130, 32), torch.float32, has_bias=True, scale=0.5, softcap=softcap)
    truth = Truth.of(problem, 64)
    skipped = heads.why_skipped(problem)
    for name, run in heads.PROVIDERS.items():
        if name != "matmul" and name not in skipped:
            assert truth.errors_of(run(problem))["max"] < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 5, 4096, 4097])
@pytest.mark.skipif(not INTERPRETED, reason="runs where LLFAST_REQUIRE_GPU is not set")
def test_the_fused_read_is_a_softmax(vocabulary, dtype, monkeypatch):
    from llfast.bench.softmax_triton import logprobs_of_products

    mend_interpreter(monkeypatch)
    random = torch.Generator().manual_seed(vocabulary)
    products = (6 * torch.randn(3, vocabulary, generator=random)).to(dtype)
    targets = torch.randint(vocabulary, (3,), generator=random)
    bias = torch.randn(vocabulary, generator=random)
    for options in ({}, {"softcap": 3.0}, {"bias": bias, "scale": 0.5, "softcap": 30.0}):
        logits = (products.double() + options.get("bias", torch.zeros(1))) * options.get("scale", 1)
        if "softcap" in options:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        truth = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        found = logprobs_of_products(products, targets, **options)
        assert (found - truth).abs().max() < 1e-5, options


def test_bits_that_differ_are_named(monkeypatch):
    problem = make_problem((70, 40, 8), torch.float32)
    right = heads.run_llfast

    def few_rows_differ(problem):
        return right(problem) + (1e-6 if len(problem.hidden) == 3 else 0.0)

    monkeypatch.setattr("llfast.bench.bits.run_llfast", few_rows_differ)
    found = same_bits(problem)
    assert [name for name, same in found["same"].items() if not same] == ["first 3 rows"]
    assert not found["all_same"]


def test_slow_calls_are_made_less_often(monkeypatch):
    seconds = {"slow": 1.0, "fast": 0.001}

    def pretend(call, calls, device):
        order.append((call, calls))
        return seconds[call]

    order = []
    monkeypatch.setattr("llfast.bench.timing.seconds_a_call", pretend)
    times = interleaved({name: name for name in seconds}, torch.device("cpu"), 1.0)
    assert times.calls == {"slow": 1, "fast": 166}
    assert times.repetitions == 3
    assert [call for call, _ in order[2:]] == ["slow", "fast", "fast", "slow", "slow", "fast"]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A report as if the CPU's figures were a GPU's."""
    monkeypatch.delitem(heads.PROVIDERS, "linear_cross_entropy, chunked")  # it is slow here
    found = few(tokens=[2, 40, 200])
    found |= {"device": "cuda", "command": "python benchmarks/bench_kernel.py"}
    found["hardware"] |= {"gpu": "NVIDIA H200", "l2_mib": 0.0}
    for case in found["cases"]:
        case |= {"dtype": "bfloat16", "D": 4096, "extra_mib": {"llfast": 65.0}}
        case["T"] = 4096 if case["T"] == 200 else case["T"]
    found["aims"] = judged(found)
    return found


def test_aims_are_judged_and_summed_up(on_a_gpu):
    on_a_gpu["cases"][0]["share_of_copy"]["median"] = 0.9
    for case in on_a_gpu["cases"]:
        case["llfast_over"] = {"matmul": {"median": 1.1}, "cross_entropy": {"median": 0.5}}
        case["error_ratio"] = 1.5
    by_name = {each["aim"]: each for each in summed_up(judged(on_a_gpu))}
    met = {name: (each["met_in"], each["cases"]) for name, each in by_name.items()}
    assert met["time over torch.mm at most 1.05"] == (0, 1)
    assert met["time over torch.mm at most 1.25"] == (1, 1)
    assert met["time over any other way at most 1"] == (3, 3)
    assert met["error over fp32 product's at most 2"] == (1, 1)
    assert met["extra MiB at most 64"] == (0, 3)
    share = by_name["share of a copy's rate at least 0.85"]
    assert (share["cases"], share["met"]) == (2, False)
    assert share["figure"] < 0.85, "the worst is the least"


def test_people_and_the_readme_are_told(on_a_gpu, capsys, monkeypatch):
    on_a_gpu["cases"][0]["failed"] = {"Liger-Kernel": "OutOfMemoryError: x"}
    on_a_gpu["stopped"] = "the device does not answer any more"
    show(on_a_gpu)
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out
    assert "failed Liger-Kernel: OutOfMemoryError: x [small, softcap, T 2]" in out
    assert "MISSED extra MiB at most 64: in 0 of 3 cases, worst 65" in out
    assert "bits of small, softcap, T 2048: the same" in out
    assert "STOPPED: the device" in out
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    lines = readme.kernel(json.loads(json.dumps(on_a_gpu)))
    rows = [line for line in lines if line.startswith("| small")]
    assert len(rows) == 3
    assert sum(" % |" in row for row in rows) == 2, "few tokens beside a copy's rate"
    columns = {line.count("|") for line in lines[:3]}
    assert len(columns) == 1
    assert "at most 65.0 MiB" in lines[-1]
    assert "Command: `python benchmarks/bench_kernel.py`." in lines[-1]


def test_a_report_is_written_whole(tmp_path):
    report.write({"a": "é"}, tmp_path / "new" / "r.json")
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == {"a": "é"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


def test_the_commit_is_that_of_a_clone_only(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    assert report.commit() == ""
    monkeypatch.setattr(report, "_ROOT", ROOT)
    if (ROOT / ".git").exists():
        assert len(report.commit()) >= 7
    missing = types.SimpleNamespace(run=lambda *_, **__: (_ for _ in ()).throw(OSError("no git")))
    monkeypatch.setattr(report, "subprocess", missing)
    assert report.commit() == ""


def test_versions_are_of_what_is_installed():
    found = report.versions("torch", "llfast", "no-such-package")
    assert set(found) == {"python", "torch", "llfast"}

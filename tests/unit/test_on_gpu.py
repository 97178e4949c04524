"""The script that runs all that needs a GPU, as far as there is none."""

import sys

from tests.conftest import ROOT

# As pytest-xdist leaves it when it is stopped: of what still ran, there is no name.
STOPPED = """<testsuites><testsuite>
<testcase classname="a" name="passes" /><testcase time="0.000" /><testcase time="0.000" />
<testcase classname="a" name="skips"><skipped message="s" /></testcase>
<testcase classname="a" name="fails"><failure message="f">why</failure></testcase>
</testsuite></testsuites>"""


def test_what_had_not_ended_is_not_counted_as_passed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import on_gpu

    path = tmp_path / "tests.xml"
    path.write_text(STOPPED)
    counts, failures = on_gpu._counted(path)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "unfinished": 2}
    assert failures == [{"name": "a::fails", "message": "f", "text": "why"}]
    part = {"part": "tests", **counts, "failures": [], "code": None, "seconds": 9, "limit": 9}
    assert on_gpu.summary([part])[1] == "1 passed, 1 failed, 1 skipped, 2 unfinished"


def test_parts_share_the_time(tmp_path, monkeypatch, capsys):
    """The kernel's cases may take what is left; a part that is alone may take all."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import on_gpu

    given = {}

    def take(part, seconds):
        given[part] = round(seconds)
        return {"part": part, "code": 0, "seconds": 0, "limit": seconds, "tail": "", "failures": []}

    monkeypatch.setattr(on_gpu, "run_build", lambda seconds: take("build", seconds))
    monkeypatch.setattr(on_gpu, "run_tests", lambda _, seconds: take("tests", seconds))
    monkeypatch.setattr(on_gpu, "run_kernel", lambda _, seconds: take("kernel", seconds))
    monkeypatch.setattr(on_gpu, "run_benchmark", lambda part, _, seconds: take(part, seconds))
    for words, expected in (
        ("", {"build": 120, "tests": 150, "kernel": 220, "loading": 370, "scoring": 470}),
        ("--only build tests kernel --seconds 430", {"build": 120, "tests": 280, "kernel": 430}),
        ("--only tests --seconds 300", {"tests": 300}),
        ("--only loading scoring --seconds 260", {"loading": 160, "scoring": 260}),
        ("--only kernel --seconds 5", {"kernel": 70}),
    ):
        given.clear()
        command = ["on_gpu.py", "--device", "cpu", "--out", str(tmp_path), *words.split()]
        monkeypatch.setattr(sys, "argv", command)
        assert on_gpu.main() == 0
        assert given == expected, words
    capsys.readouterr()

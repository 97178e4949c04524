"""The script that runs all that needs a GPU, as far as there is none."""

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

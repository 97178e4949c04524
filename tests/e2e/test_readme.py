"""What the README and docs tell to type runs, and their tables are what the JSON says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
# What other checks run: CI installs in an empty folder and runs `make demo` and `make test` there;
# the demo itself is run by this test, but with smaller models.
RUN_ELSEWHERE = ("python3 -m venv", "pip install", "llfast demo", "make ", "python benchmarks/")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands():
    """Each once."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    found = dict.fromkeys(line for line in lines if line)
    return [line for line in found if not line.startswith(RUN_ELSEWHERE)]


@pytest.fixture
def folder(tmp_path, small_demo):
    """A folder like a clone in which a small demo has run."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "demo").symlink_to(small_demo[0])
    return tmp_path


def run(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_runs(folder):
    found = commands()
    assert sum(command.startswith("llfast ") for command in found) >= 6
    for command in found:
        done = run(["bash", "-ec", command], folder)
        assert done.returncode == 0, (command, done.stderr)
        if command.startswith("llfast search"):
            asked = Path(shlex.split(command)[2]).name
            assert asked.replace("prose", "base") in done.stdout
    for code in blocks("python"):
        script = folder / "quick_start.py"
        script.write_text(code)
        done = run([sys.executable, str(script)], folder)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) >= 3


def test_tables_are_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    pages = [path.read_text() for path in readme.PAGES]
    assert sum(page.count("<!-- table: ") for page in pages) == len(readme.TABLES)
    for page in pages:
        assert readme.with_tables(page) == page


def test_what_verifying_costs_is_told_once_it_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    def told(verify):
        found = {name: each for name, each in readme.load("loading").items() if name != "verify"}
        return readme.loading(found if verify is None else {**found, "verify": verify})[-1]

    case = {
        "tokens": 4096,
        "over_plain": {"median": 1.234, "min": 1.1, "max": 1.301},
        "verify_seconds": {"median": 4.26, "min": 4.0, "max": 5.0},
        "wait_seconds": {"median": 0.51, "min": 0.0, "max": 0.6},
    }
    assert "--verify" not in told(None)
    line = "4,096 tokens take 1.23 (1.10 to 1.30) of what they take without, and wait 0.5 s for "
    assert f"(`--verify`), {line}digests that take 4.3 s. torch" in told([case])
    assert told([case, {**case, "tokens": 16}]).count("and wait 0.5 s") == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_are_there(page):
    text = page.read_text()
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / name).is_file(), name
    if page.name == "README.md":
        for other in PAGES[1:]:
            assert f"docs/{other.name}" in text, "every page can be found"

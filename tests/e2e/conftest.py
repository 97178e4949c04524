"""Commands run in this process as a shell runs them, and small models and texts for them."""

import json
import shutil
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch

from llfast import ModelSpace, Store, TextSet
from llfast.errors import LlfastWarning
from tests.tiny import TEXTS, copy_checkpoint, one_thread


@dataclass(frozen=True, slots=True)
class Run:
    """What a shell sees of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """Standard output as one strict JSON document; NaN and anything besides it are refused."""

        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def error(self):
        """The only line on standard error, where a command that failed says why."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert self.code in (1, 2), self
        assert lines[0].startswith("llfast: error: "), self.err
        return lines[0]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="session")
def nan_checkpoint(checkpoints, tmp_path_factory):
    """gpt2 with a NaN among its weights: it can be opened and loaded, but not scored."""

    def spoil(name, weight):
        return weight.index_fill(0, torch.tensor([3]), torch.nan) if "mlp.c_fc" in name else weight

    return copy_checkpoint(checkpoints / "gpt2", tmp_path_factory.mktemp("nan") / "nan", spoil)


@pytest.fixture
def command(capfd, monkeypatch):
    """`command("score", folder, ...)` does what the console command does, and returns a `Run`."""
    from llfast.__main__ import main

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer sets it, this puts it back

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llfast", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        with warnings.catch_warnings():
            try:
                main()
            except SystemExit as leave:
                code = leave.code or 0
        return Run(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def texts():
    return TextSet.from_texts(TEXTS)


@pytest.fixture(scope="session")
def texts_file(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts.save(path)
    return path


MEMBERS = {"gpt2": "g", "gpt2-finetune": "g", "llama": "l"}


@pytest.fixture(scope="session")
def models_list(checkpoints, tmp_path_factory):
    """A list file that names three models and says of each which family it is of."""
    path = tmp_path_factory.mktemp("lists") / "models.jsonl"
    rows = [
        {"model": str(checkpoints / name), "name": name, "family": family}
        for name, family in MEMBERS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def filled(models_list, texts, tmp_path_factory):
    """A store with three models, which no test changes."""
    from llfast.fleet import score_models
    from llfast.model_list import read_model_list

    folder = tmp_path_factory.mktemp("stores") / "filled"
    with one_thread():
        outcomes = score_models(read_model_list(models_list), texts, Store(folder))
    assert [outcome.status for outcome in outcomes] == ["scored"] * 3
    return folder


@pytest.fixture(scope="session")
def space(filled):
    """What a user of the library makes of that store."""
    with pytest.warns(LlfastWarning, match="1 of the tokenizers add BOS and 2 do not"):
        return ModelSpace.fit(Store(filled).matrix())


@pytest.fixture(scope="session")
def content():
    """`content(folder)` is what all its files hold, by their names in it."""

    def read(folder):
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read


@pytest.fixture
def store(filled, tmp_path):
    """A store with three models, to be put at risk."""
    return shutil.copytree(filled, tmp_path / "store")


@pytest.fixture
def unharmed(store, content):
    """Afterwards, what was in the store is there to the byte; only new files may have come."""
    before = content(store)
    yield
    assert content(store).items() >= before.items()


@pytest.fixture
def untouched(store, content):
    """Afterwards, the store is as it was, to the byte."""
    before = content(store)
    yield
    assert content(store) == before

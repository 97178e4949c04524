"""A pipe in the place of a file is refused: nobody may ever write to it."""

import os

import pytest

from llfast import CheckpointError
from llfast.checkpoint import Checkpoint, check_adapter
from llfast.verify import read_manifest
from tests.tiny import make_model, save

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return save(make_model("llama"), None, tmp_path / "m")


def refused(path, call):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"{path} must be a regular file, got something els"):
        call()


def test_config(folder):
    refused(folder / "config.json", lambda: Checkpoint.open(folder))


def test_index(folder):
    (folder / "model.safetensors").unlink()
    refused(folder / INDEX, lambda: Checkpoint.open(folder))


def test_adapter(folder):
    refused(folder / "adapter_config.json", lambda: check_adapter(folder))


def test_tokenizer(folder):
    """Its content is a part of the model's name."""
    refused(folder / "tokenizer.json", lambda: Checkpoint.open(folder).digest())


def test_manifest(tmp_path):
    """It is read more than once, so one that a shell fills would be empty the second time."""
    refused(tmp_path / "sums", lambda: read_manifest(tmp_path / "sums"))

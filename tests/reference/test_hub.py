"""Models of the Hub: what its cache has, what is downloaded, and under which revision."""

import errno
import hashlib
import shutil

import pytest
import torch
from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import filter_repo_objects

from llfast.models import open_model
from tests.opening import CPU, refused, same_weights
from tests.tiny import make_adapter, make_model

# Of peft's, where it asks transformers for something that has got another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
MAIN, TAG = "a" * 40, "b" * 40


@pytest.fixture
def hub(checkpoints, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out, in which `org/tiny` has `main` and `v1`."""
    root = tmp_path / "hub" / "models--org--tiny"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    for ref, commit, kind in (("main", MAIN, "llama"), ("v1", TAG, "gpt2")):
        (root / "refs" / ref).write_text(commit)
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in (checkpoints / kind).iterdir():
            blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return root


@pytest.mark.parametrize(
    ("revision", "commit", "kind"),
    [(None, MAIN, "llama"), ("main", MAIN, "llama"), ("v1", TAG, "gpt2"), (TAG, TAG, "gpt2")],
)
def test_a_cached_model_goes_by_its_id_and_commit(hub, revision, commit, kind):
    source = open_model("org/tiny", revision=revision)
    assert (source.name, source.revision) == ("org/tiny", commit)
    assert same_weights(source.load(torch.float32, CPU), make_model(kind))
    assert len(source.tokenizer()) > 256


@pytest.mark.parametrize("revision", ["v2", "c" * 40, MAIN[:8], "../../refs/main"])
def test_a_revision_that_is_not_there_is_refused(hub, revision):
    line = refused("org/tiny", revision=revision)
    assert f"got org/tiny at revision {revision!r}: there is no such folder, and the Hub " in line
    assert "HF_HUB_OFFLINE" in line


@pytest.mark.parametrize("name", ["org/other", "tiny", "org/tiny2"])
def test_a_model_that_is_not_cached_is_refused_without_the_hub(hub, name):
    line = refused(name)
    assert f"must be a checkpoint folder or Hub id, got {name}: there is no such folder" in line
    assert "HF_HUB_OFFLINE" in line


def test_a_download_that_is_not_complete_is_refused(hub):
    weights = hub / "snapshots" / MAIN / "model.safetensors"
    blob = weights.resolve()
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    assert "is the download complete?" in refused("org/tiny")
    weights.unlink()
    assert "got none; is the download complete?" in refused("org/tiny")


class ConnectError(Exception):
    """As httpx calls it, and httpx2, of which huggingface_hub takes one or the other."""


@pytest.mark.parametrize("error", [errors.OfflineModeIsEnabled("offline"), ConnectError("no")])
def test_a_cached_commit_will_do_where_the_hub_cannot_be_asked(hub, monkeypatch, error):
    """huggingface_hub 1 asks for a commit's list of files, and hands on what comes of that."""
    own = snapshot_download

    def download(*given, local_files_only=False, **options):
        if not local_files_only:
            raise error
        return own(*given, local_files_only=True, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_model("org/tiny", revision=TAG).revision == TAG


def test_a_download_that_broke_off_is_not_taken_from_the_cache(hub, monkeypatch):
    """It may have left half of a commit there."""

    def download(*_, local_files_only=False, **__):
        assert not local_files_only
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "No space left on device" in refused("org/tiny", revision=TAG)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_weights_are_downloaded_once(monkeypatch, allow_pickle):
    """Not once more in another format, as Mistral's repositories and some others have them."""
    wanted = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    others = ["consolidated.safetensors", "original/model.safetensors", "metal/model.bin"]
    found = []

    def snapshot_download(_, *, revision, **patterns):
        assert revision is None
        found.extend(filter_repo_objects([*wanted, *others, "README.md"], **patterns))
        raise OSError("that is all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert "that is all" in refused("org/new", allow_pickle=allow_pickle)
    assert found == wanted


def test_an_adapter_from_the_hub_goes_by_its_base_too(checkpoints, hub, tmp_path):
    for path in make_adapter(tmp_path / "adapter").iterdir():
        shutil.copy(path, hub / "snapshots" / TAG)
    for name in ("config.json", "model.safetensors"):
        (hub / "snapshots" / TAG / name).unlink()
    bases = [str(checkpoints / "llama"), str(checkpoints / "gpt2")]
    revisions = {
        open_model("org/tiny", revision="v1", adapter_base=base).revision for base in bases
    }
    assert len(revisions) == 2
    assert TAG not in revisions

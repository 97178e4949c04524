"""Stores that are none, damaged, full, read-only, or written to by two at once."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import llfast
from llfast import ModelSpace, Store
from tests import processes


@pytest.mark.parametrize("words", ["score", "kl", "search", "info", "compact", "remove", "import"])
def test_a_folder_that_is_no_store(command, checkpoints, texts_file, tmp_path, content, words):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "m.csv").write_text("id,a\nx,1.0\n")
    imported = (tmp_path / "m.csv", "--unit", "bits_per_byte", "--text-bytes", 3)
    arguments = {
        "score": (checkpoints / "gpt2", "--texts", texts_file, "--store", folder),
        "kl": ("a", "b", "--store", folder),
        "search": ("a", "--store", folder),
        "info": (folder,),
        "compact": ("--store", folder),
        "remove": ("a", "--store", folder),
        "import": (*imported, "--store", folder),
    }[words]
    run = command(words, *arguments)
    assert f"{folder} must be a store or an empty folder, got one with other things" in run.error
    assert content(folder) == {"cat.jpg": b"\xff\xd8"}
    file = folder / "cat.jpg"
    run = command(words, *(file if each == folder else each for each in arguments))
    assert str(file) in run.error
    assert content(folder) == {"cat.jpg": b"\xff\xd8"}


def test_a_store_that_cannot_be_made(command, checkpoints, texts_file, monkeypatch):
    monkeypatch.setattr("llfast.fleet.session.open_request", lambda *_: 1 / 0)
    for store in (texts_file / "store", texts_file / "a" / "store"):
        run = command("score", checkpoints / "gpt2", "--texts", texts_file, "--store", store)
        assert f"Not a directory: '{store}'" in run.error


def test_a_run_that_fails_before_anything_is_stored_leaves_no_new_store(
    command, checkpoints, texts_file, tmp_path, monkeypatch
):
    adapter, new = tmp_path / "adapter", tmp_path / "new"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    arguments = ("--texts", texts_file, "--store", new)
    gpt2, other = checkpoints / "gpt2", checkpoints / "gpt2-finetune"
    series = ("--checkpoints", gpt2, other, "--steps", "1,2")
    for words, message in (
        (("score", gpt2, "--device", "cuda"), "where torch sees no CUDA device"),
        (("score", gpt2, other, "--together", "--device", "cuda"), "torch sees no CUDA device"),
        (("trajectory", *series, "--device", "cuda"), "where torch sees no CUDA device"),
        (("score", adapter, "--adapter-base", gpt2), "needs peft; run `pip install"),
    ):
        assert message in command(*words, *arguments).error
        assert not new.exists()
    dry = ("--adapter-base", gpt2, "--dry-run", "--json", "--texts", texts_file)
    assert command("score", adapter, *dry).code == 0  # nothing is merged
    assert command("score", gpt2, *arguments).code == 0
    assert len(Store(new).rows()) == 1


def test_a_half_written_shard_costs_one_model(
    command, models_list, store, texts_file, space, content
):
    shards = sorted(store.glob("textset=*/*.parquet"))
    lost = next(row.label for row in Store(store).rows() if row.shard == shards[1])
    shards[1].write_bytes(shards[1].read_bytes()[: shards[1].stat().st_size // 2])
    others = content(store)
    run = command("info", store)
    assert run.code == 0
    assert run.err.startswith("llfast: warning: ")
    assert str(shards[1]) in run.err
    assert run.err.count("\n") == 1
    assert f"│ {lost} " not in run.out
    left = [name for name in space.models if name != lost]
    assert "±" in command("kl", *left, "--store", store).out
    run = command("score", "--list", models_list, "--texts", texts_file, "--store", store, "--json")
    status = {each["model"]: each["status"] for each in run.json}
    assert status == {name: "scored" if name == lost else "skipped" for name in space.models}
    assert content(store).items() >= others.items(), "the damaged shard is left to its owner"
    expected = space.kl(*left)
    found = command("kl", *left, "--store", store, "--json")
    assert found.json["kl"]["value"] == expected.value, "the space is as it was before"


NAMESPACE = r"""
import os, subprocess, sys
store, first, second, texts = sys.argv[1:]

def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)

def command(*words):
    from llfast.__main__ import main
    sys.argv = ["llfast", *words]
    code = 0
    try:
        main()
    except SystemExit as leave:
        code = leave.code
    print(code, "---", sep="\n", flush=True)
    print("---", file=sys.stderr, flush=True)

def score(*models):
    command("score", *models, "--texts", texts, "--store", store)

mount("-t", "tmpfs", "-o", "size=256k", "none", store)
score(first)
with open(os.path.join(store, ".filler"), "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
score(first, second)
command("kl", first, first, "--store", store)
os.remove(os.path.join(store, ".filler"))
score(first, second)
mount("-o", "remount,ro", store)
score(first, second)
command("score", second, "--texts", texts, "--store", store, "--convention", "always-bos")
command("search", first, "--store", store)
command("compact", "--store", store)
"""


def test_a_full_disk_and_a_read_only_one(checkpoints, texts_file, tmp_path):
    """On a file system of 256 KiB in a mount namespace; root, too, cannot write to this one."""
    where = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, to mount a small file system of its own")
    trial = subprocess.run(
        [*where, "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, check=False
    )
    if trial.returncode:
        pytest.skip(f"this machine lets nobody mount a tmpfs: {trial.stderr.decode()[:80]}")
    store = tmp_path / "store"
    store.mkdir()
    first, second = str(checkpoints / "gpt2"), str(checkpoints / "gpt2-finetune")
    script = [sys.executable, "-c", NAMESPACE, str(store), first, second, str(texts_file)]
    run = subprocess.run(
        [*where, *script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    *outputs, _ = run.stdout.split("---\n")
    *errors, _ = run.stderr.split("---\n")
    codes = [int(each.splitlines()[-1]) for each in outputs]
    assert codes == [0, 1, 0, 0, 0, 1, 0, 1], run.stdout + run.stderr
    status = [[line.split()[0] for line in each.splitlines()[:-1]] for each in outputs]

    assert errors[1].startswith(f"llfast: error: [Errno 28] No space left on device: '{store}")
    assert errors[1].count("\n") == 1
    assert status[:2] == [["scored"], ["skipped"]], "the disk's fault is not noted as the model's"
    assert f"KL({first}, {first}) = 0 " in outputs[2], "what was there can be read"
    assert status[3] == ["skipped", "scored"], "there is space again"

    assert status[4] == ["skipped", "skipped"], "nothing had to be written"
    for number in (5, 7):
        assert errors[number].startswith("llfast: error: "), "a read-only file system"
        assert str(store) in errors[number]
        assert errors[number].count("\n") == 1
    assert f" {second} " in outputs[6], "and it can be searched"


def test_two_writers_at_once_lose_nothing(checkpoints, texts, texts_file, tmp_path):
    """They score the same models, into a store that neither finds there when it begins."""
    folders = [checkpoints / name for name in ("gpt2", "gpt2-finetune", "mixtral")]
    arguments = ["score", *folders, "--texts", texts_file, "--store", tmp_path / "store"]
    meet = processes.barrier(2)
    pair = [
        processes.start(order, tmp_path / f"log{number}", meet=meet, save_seconds=0)
        for number, order in enumerate((arguments, ["score", *folders[::-1], *arguments[4:]]))
    ]
    logs = [(processes.finish(each), tmp_path / f"log{n}") for n, each in enumerate(pair)]
    assert [code for code, _ in logs] == [0, 0], [log.read_text() for _, log in logs]
    store = Store(tmp_path / "store")
    matrix = store.matrix()
    assert matrix.models == tuple(sorted(str(folder) for folder in folders))
    for row, name in enumerate(matrix.models):
        assert matrix.values[row].tobytes() == llfast.score(name, texts).values.tobytes()
    assert len(ModelSpace.fit(matrix)) == 3
    assert sorted({path.suffix for path in store.folder.rglob("*") if path.is_file()}) == [
        ".json",
        ".parquet",
    ], "no partial result and no temporary file is left"
    store.compact()
    again = store.matrix()
    assert again.values.tobytes() == matrix.values.tobytes()

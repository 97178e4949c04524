"""Workers at s3:// of whom one is killed, and commands as a shell runs them."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter

import numpy as np
import pytest

from llfast import RemoteError, Store, s3
from tests import processes
from tests.fleets import make_list, score_alone
from tests.s3 import SECRET, keys, s3_server
from tests.stores import ROOT, make_result, run_python


@pytest.fixture
def url(bucket):
    return f"{bucket}/store"


# ------------------------------------------------------------------------------ workers

OPTIONS = ("--token-budget", 64, "--dtype", "float32")


@pytest.fixture(scope="module")
def made(checkpoints, texts, tmp_path_factory):
    """A folder with a list of six models, their texts, and the truth in a store on disk."""
    folder = tmp_path_factory.mktemp("fleet")
    path = make_list(folder, checkpoints, 6)
    score_alone(path, texts, folder / "truth")
    return folder


def test_three_workers_of_whom_one_is_killed_score_each_model_once(made, url, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment["LLFAST_CACHE"] = str(tmp_path / "cache")
    workers = []
    for rank in range(3):
        words = ("fleet", "score", "--models", made / "list.jsonl", "--store", url, *OPTIONS)
        words += ("--texts", made / "texts.jsonl", "--rank", rank, "--world-size", 3)
        words += ("--log", tmp_path / f"events {rank}")
        log = tmp_path / f"log {rank}"
        workers.append(processes.start(words, log, save_seconds=0.0, environment=environment))
    while '"began"' not in _text(tmp_path / "events 0"):
        assert workers[0].is_alive(), _text(tmp_path / "log 0")
    workers[0].kill()
    workers[0].join()
    assert [processes.finish(each) for each in workers[1:]] == [0, 0]
    store, truth = Store(url), Store(made / "truth")
    found, expected = store.matrix(), truth.matrix()
    assert found.models == expected.models
    assert found.values.tobytes() == expected.values.tobytes()
    (digest,) = store.textsets()
    stored = Counter(row.key.model for row in store.read_shards(digest, store.shards(digest)))
    assert set(stored.values()) == {1}
    assert not [key for key in keys(url) if key.startswith(("_leases", "_partial"))]
    assert workers[0].exitcode == -signal.SIGKILL


def _text(path):
    return path.read_text() if path.exists() else ""


# ------------------------------------------------------------------------------ commands


def test_commands_at_s3(made, url, command, tmp_path):
    texts, model = made / "texts.jsonl", made / "gpt2-0"
    run = command("score", model, made / "llama-1", "--texts", texts, "--store", url, *OPTIONS)
    assert (run.code, run.err) == (0, "")
    again = command("score", model, "--texts", texts, "--store", url, *OPTIONS)
    assert "skipped" in again.out
    here = Store(made / "truth").matrix(models=["org/gpt2-0"])
    there = Store(url).matrix(models=[str(model)])
    assert here.values.tobytes() == there.values.tobytes()
    found = command("info", url, "--json").json
    assert (found["store"], found["complete"], found["failed"]) == (url, 2, 0)
    words = ("fleet", "score", "--models", made / "list.jsonl", "--texts", texts)
    assert command(*words, "--store", url, *OPTIONS).code == 0
    words = ("fleet", "status", "--models", made / "list.jsonl", "--store", url)
    found = command(*words, "--dtype", "float32", "--json").json
    assert (found["done"], found["to_do"], found["running"]) == (6, 0, [])
    found = command("search", "org/gpt2-0", "--store", url, "-k", 1, "--json").json
    assert found["hits"][0]["model"] == str(model)
    assert "KL(" in command("kl", "org/gpt2-0", "org/llama-1", "--store", url).out
    assert command("map", "--store", url, "--out", tmp_path / "m.html").code == 0
    assert command("compare", "--store", url, "--json").code == 0
    assert "shards merged" in command("compact", "--store", url).out
    assert "1 results removed" in command("remove", str(model), "--store", url).out
    assert command("index", "build", "--store", url, "--json").json["models"] == 7
    assert command("layers", model, "--texts", texts, "--store", url).code == 0
    matrix = tmp_path / "matrix.csv"
    matrix.write_text("model,a,b\nx,-1.0,-2.0\ny,-2.0,-1.5\n")
    words = ("import", matrix, "--store", url, "--unit", "nats", "--text-bytes", 10)
    assert command(*words).out.startswith(f"2 models on 2 texts in {url}, ")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The files of finished texts, which are kept after every batch."""
    monkeypatch.setenv("LLFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("llfast.partial._SECONDS_BETWEEN_SAVES", 0.0)
    return lambda: list((tmp_path / "cache").rglob("partial/*/*.npz"))


def test_a_result_that_cannot_be_stored_ends_a_run_and_is_not_lost(
    made, url, command, cached, monkeypatch
):
    words = ("score", made / "gpt2-0", "--texts", made / "texts.jsonl", "--store", url, *OPTIONS)
    endpoint, put = os.environ["AWS_ENDPOINT_URL"], s3._write
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def fail(method, place, **arguments):
        if place.key.endswith(".parquet"):
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        return put(method, place, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(s3, "_write", fail)
        run = command(*words)
    assert ".parquet cannot be written: Could not connect to the endpoint URL" in run.error
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert Store(url).rows() == [], "it is no fault of the model"
    (kept,) = cached()
    with np.load(kept) as arrays:
        assert np.isfinite(arrays["loglikelihoods"]).all()
    assert command(*words).code == 0
    assert cached() == []
    assert not [key for key in keys(url) if "partial" in key]


def test_a_store_that_cannot_be_written_is_found_out_before_a_model_runs(
    made, url, command, monkeypatch
):
    Store(url).add(make_result("a"))

    def refuse(method, place, **_):
        raise RemoteError(f"{place} cannot be written: Access Denied")

    monkeypatch.setattr(s3, "_write", refuse)
    monkeypatch.setattr("llfast.fleet.session.score", lambda *_, **__: 1 / 0)
    words = ("--texts", made / "texts.jsonl", "--store", url, *OPTIONS)
    assert "cannot be written: Access Denied" in command("score", made / "gpt2-0", *words).error
    run = command("fleet", "score", "--models", made / "list.jsonl", *words)
    assert "cannot be written: Access Denied" in run.error


WRONG = {
    "no bucket": ({}, "s3://no-such-bucket/x", "The specified bucket does not exist"),
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        None,
        "Unable to locate credentials; set AWS_ACCESS_KEY_ID and",
    ),
    "no endpoint": (
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"},
        None,
        "Could not connect to the endpoint URL: ",
    ),
    "password of an endpoint": (
        {"AWS_ENDPOINT_URL": "http://me:pass-word@127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"},
        None,
        "cannot be listed: ",
    ),
    "no url": ({"AWS_ENDPOINT_URL": "nonsense"}, None, "Invalid endpoint: nonsense"),
    "no store": ({}, None, "must be a store, got nothing there"),
    "not s3": ({}, "gs://bucket/x", "store must be a folder or s3://bucket/prefix, got gs://"),
    "password": ({}, "s3://me:pass-word@bucket/x", "got s3://[hidden]@bucket/x"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_in_a_line_without_secrets(wrong, url, command, monkeypatch):
    changes, target, expected = WRONG[wrong]
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    run = command("info", target or url)
    assert run.code == 1
    assert expected in run.error
    for secret in (SECRET, "AKIANOBODY0123456789", "pass-word"):
        assert secret not in run.err
    assert run.out == ""


def test_keys_that_nobody_has_given_out(bucket, url, command, monkeypatch):
    """On a server of its own, which looks at them from now on."""
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        address = f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        ask = urllib.request.Request(address, b"0", {"Content-Type": "text/plain"})
        urllib.request.urlopen(ask).close()
        run = command("info", "s3://bucket-of-others/x")
        assert "check the credentials, and what they allow" in run.error
        for secret in (SECRET, environment["AWS_ACCESS_KEY_ID"]):
            assert secret not in run.err


def test_a_process_of_its_own_ends_by_itself(url):
    store = Store(url)
    store.add(make_result("a"))
    words = [sys.executable, "-m", "llfast", "info", url]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert "complete" in run.stdout
    assert run.stderr == ""


def test_a_missing_package_is_asked_for(url, command, monkeypatch):
    monkeypatch.setattr(s3, "_filesystems", {})
    monkeypatch.setitem(sys.modules, "s3fs", None)
    run = command("info", url)
    assert "stores at s3:// need s3fs; run: pip install 'llfast[s3]'" in run.error


def test_a_store_on_disk_loads_nothing_for_s3(tmp_path):
    code = """
import sys
from llfast import Store
from tests.stores import make_result
Store(sys.argv[1]).add(make_result("a"))
assert not {"s3fs", "fsspec", "botocore", "aiohttp"} & set(sys.modules)
"""
    run_python(code, tmp_path / "store")

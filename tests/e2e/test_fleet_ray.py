"""`llfast fleet score --ray`: a cluster of three machines of which one is lost, and more."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llfast import Store, TextSet
from llfast.cache import tokenizer_fingerprint
from llfast.model_list import read_model_list
from tests.extents import cached_bytes, make_cold
from tests.fleets import OPTIONS, check_all_stored, make_list, score_alone

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'llfast[ray]'")

MODELS = 30


@pytest.fixture(scope="module")
def made(checkpoints, nan_checkpoint, tmp_path_factory):
    """Thirty models that are right, one of NaNs and one that is not there; the truth."""
    folder = tmp_path_factory.mktemp("ray")
    others = {
        3: {"model": str(nan_checkpoint), "name": "poisoned"},
        7: {"model": str(folder / "gone"), "name": "missing"},
    }
    path = make_list(folder, checkpoints, MODELS, others=others)
    words = "the quick brown fox jumps over the lazy dog and runs away".split()
    texts = [" ".join(words[(i + j) % len(words)] for j in range(5 + i % 40)) for i in range(60)]
    text_set = TextSet(tuple(str(number) for number in range(len(texts))), tuple(texts))
    truth = score_alone(path, text_set, folder / "truth")
    return folder, path, truth


@pytest.fixture
def cluster(monkeypatch):
    """Three machines of one core each, which are processes of this one."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # a lost machine is noticed soon
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LLFAST_CACHE", "/dev/null/none")  # which machines do not share
    size = {"num_cpus": 1, "memory": 4 << 30, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**size)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Chaos:
    """Kills once models have come, while others are running."""

    def __init__(self, store, cluster):
        self.store, self.cluster = store, cluster
        self.events, self.killed = [], []
        self._lock = threading.Lock()

    def log(self, event, **facts):
        self.events.append((event, facts))
        scored = sum(name == "scored" for name, _ in self.events)
        if event == "scored" and scored in (3, 12):
            act = self.kill_a_worker if scored == 3 else self.kill_a_machine
            threading.Thread(target=act).start()

    def a_running_one(self, parents):
        """The process of a worker on one of these machines while it is at a model."""
        stop = time.monotonic() + 60
        while time.monotonic() < stop:
            for path in (self.store / "_leases").glob("[!.]*"):
                try:
                    facts = json.loads(path.read_text())
                    if not facts["model"].startswith("org/"):
                        continue
                    pid = facts["pid"]
                    parent = int(
                        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                    )
                except (OSError, ValueError):
                    continue
                if parent in parents:
                    return pid, parent
        raise AssertionError("nobody is at any model")

    def kill_a_worker(self):
        pid, _ = self.a_running_one(raylets(self.cluster))
        os.kill(pid, signal.SIGKILL)
        self.killed.append("worker")

    def kill_a_machine(self):
        others = raylets(self.cluster)
        del others[next(pid for pid, node in others.items() if node is self.cluster.head_node)]
        pid, parent = self.a_running_one(others)
        os.kill(parent, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        self.killed.append("machine")


def raylets(cluster):
    return {node.all_processes["raylet"][0].process.pid: node for node in cluster.list_all_nodes()}


def is_beginning(event, facts, lost):
    return event == "began" and facts["model"] == lost["model"]


def test_a_machine_and_a_worker_are_lost(made, cluster, tmp_path):
    from llfast.fleet.ray_driver import score_on_ray

    store = Store(tmp_path / "store")
    chaos = Chaos(store.folder, cluster)
    texts = TextSet.load(made[0] / "texts.jsonl")
    shared = score_on_ray(
        read_model_list(made[1]), texts, store, address=cluster.address, log=chaos.log, **OPTIONS
    )
    assert sorted(chaos.killed) == ["machine", "worker"]
    lost = [facts for event, facts in chaos.events if event == "worker lost" and facts["model"]]
    assert len(lost) == 2
    assert {each["reason"] for each in lost} & {"its machine is gone", "it cannot be reached"}
    for each in lost:
        begun = [facts for event, facts in chaos.events if is_beginning(event, facts, each)]
        first, again = begun
        # One whose process ended may have been killed for want of memory.
        times = 2 if each["reason"] == "its process has ended" else 1
        assert again["memory"] == times * first["memory"]
        assert int(again["memory_budget"]) == int(first["memory_budget"]) // times
    (ended,) = [facts for event, facts in chaos.events if event == "ended"]
    folders = {made[0] / "gpt2-0", made[0] / "llama-1"}
    tokenizers = {tokenizer_fingerprint(AutoTokenizer.from_pretrained(each)) for each in folders}
    assert ended["tokenised"] == len(tokenizers)
    check_all_stored(store, made[2], count=MODELS, failed={"poisoned", "missing"})
    assert shared.failed.keys() == {"poisoned", "missing"}
    assert shared.left == ()


KILLER = """
import os, signal
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = "mine"
    def __init__(self, **options):
        if os.path.exists({0!r}):
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(**options)
"""


@pytest.fixture(scope="module")
def killer(checkpoints, tmp_path_factory):
    """A checkpoint whose own code kills its process."""
    folder = tmp_path_factory.mktemp("killer") / "mine"
    shutil.copytree(checkpoints / "llama", folder)
    (folder / "configuration_mine.py").write_text(KILLER.format(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_a_command_says(command, made, killer, tmp_path):
    """On a cluster that it starts: a model that no worker outlives, and untrusted code."""
    models = tmp_path / "list.jsonl"
    lines = [{"model": str(made[0] / "gpt2-0"), "name": "right"}]
    lines.append({"model": str(killer), "name": "deadly", "trust_remote_code": True})
    lines.append({"model": str(killer), "name": "untrusted"})
    models.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = tmp_path / "store"
    words = ("fleet", "score", "--models", models, "--texts", made[0] / "texts.jsonl")
    words += ("--store", store, "--dtype", "float32", "--attempts", 2, "--log", tmp_path / "log")
    run = command(*words, "--ray", "local", "--cpus", 1, "--json")
    assert run.code == 1
    assert run.json["failed"] == ["deadly", "untrusted"]
    assert [each["status"] for each in run.json["outcomes"]].count("scored") == 1
    reasons = {row.key.model: row.error for row in Store(store).rows()}
    assert reasons["right"] is None
    assert (
        "deadly must leave its worker alive, got 2 that ended without a word" in reasons["deadly"]
    )
    assert "brings its own code" in reasons["untrusted"]
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [e["model"] for e in events if e["event"] == "worker lost"] == ["deadly", "deadly"]
    words = ("fleet", "status", "--store", store, "--models", models, "--dtype", "float32")
    status = command(*words, "--json").json
    assert (status["done"], status["to_do"], status["running"]) == (1, 0, [])


def test_a_command_that_is_told_to_end_gives_its_model_back(made, tmp_path):
    words = ("fleet", "score", "--models", made[1], "--texts", made[0] / "texts.jsonl")
    words += ("--store", tmp_path / "store", "--ray", "local", "--log", tmp_path / "log")
    command, log = [sys.executable, "-m", "llfast", *map(str, words)], tmp_path / "log"
    stop = time.monotonic() + 120
    with (tmp_path / "err").open("w") as err, subprocess.Popen(command, stderr=err) as process:
        try:
            while not log.exists() or '"scored"' not in log.read_text():
                assert process.poll() is None
                assert time.monotonic() < stop
                time.sleep(0.05)
            process.terminate()
            code = process.wait(60)
        finally:
            process.kill()
    said = (tmp_path / "err").read_text()
    assert code == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert [each.name for each in (tmp_path / "store" / "_leases").glob("[!.]*")] == []


@pytest.mark.parametrize("raised", ["SystemExit(1)", "KeyboardInterrupt()"])
def test_what_ray_makes_of_the_end_is_not_the_exit_status(made, tmp_path, raised):
    """Where a signal comes while Ray waits, it catches what the handler raises."""
    program = f"""
import os, signal, time
from llfast.__main__ import main
from llfast.fleet import ray_driver

def score_on_ray(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except SystemExit:
        raise {raised} from None

ray_driver.score_on_ray = score_on_ray
main()
"""
    words = ("fleet", "score", "--models", made[1], "--texts", made[0] / "texts.jsonl")
    words += ("--store", tmp_path / "store", "--ray", "local")
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ray", "auto"), "a Ray cluster must be at 'auto', got none"),
        (("--ray", "127.0.0.1:1"), "a Ray cluster must be at '127.0.0.1:1', got none"),
        (("--ray", "ray://127.0.0.1:1"), "a Ray cluster must be reached from one of its machines"),
        (("--ray", "auto", "--dtype", "int3"), "dtype must be"),
    ],
)
def test_what_cannot_be(command, made, tmp_path, words, said):
    own = ("--texts", made[0] / "texts.jsonl", "--store", tmp_path / "store")
    assert said in command("fleet", "score", "--models", made[1], *own, *words).error


def test_files_are_in_memory_before_it_is_their_turn(made, tmp_path):
    from llfast.fleet.prefetch import Prefetch

    requests = read_model_list(made[1])
    # Workers of other tests may still read or map what they were given.
    folder = Path(shutil.copytree(requests[0].model, tmp_path / "model"))
    path = folder / "model.safetensors"
    make_cold([path])
    if cached_bytes(path) > 0:  # where files are in memory anyway, there is nothing to see
        pytest.skip("temporary files are in memory here; runs where they are on a disk")
    prefetch = Prefetch(trust_remote_code=False, allow_pickle=False)
    prefetch.begin(replace(requests[0], model=str(folder)))
    stop = time.monotonic() + 20
    while cached_bytes(path) < path.stat().st_size and time.monotonic() < stop:
        time.sleep(0.01)
    assert cached_bytes(path) == path.stat().st_size
    prefetch.begin(requests[7])  # that is not there
    prefetch.end()

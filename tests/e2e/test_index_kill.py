"""Processes that build, add to, merge and search one index at once, and are killed at it."""

from __future__ import annotations

import random
import time

import pytest

from llfast import KLIndex, Store
from tests.indexes import assert_right, index_result, make_store, name
from tests.stores import process, tell

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")

DEADLINE_SECONDS = 60


# A process that forks others, and kills them: before the n-th change that they make to a file, or
# after so many seconds. Threads of torch and faiss do not outlive a fork, so they have one.
KILLED = """
import os, signal, sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
from llfast import KLIndex, Store
from llfast.search import listing
from llfast.search.flat import import_faiss
from tests.indexes import index_result, name
from tests.stores import die_before
import_faiss().omp_set_num_threads(1)
listing.LEAST_ROWS, listing._HELD_OUT = 20, 4  # lists also of few models
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})


def act(folder, what, number):
    store = Store(folder)
    if what == "build":
        KLIndex.build(store, "certified")
    elif what == "refit":
        KLIndex.build(store, "certified", refit=True)
    elif what == "merge":
        KLIndex.build(store, "certified").merge()
    elif what == "remove":
        KLIndex.build(store, "certified").remove(name(number))
        os.write(1, b"returned\\n")
    else:
        KLIndex.build(store, "certified").add(index_result(number))
        os.write(1, b"returned\\n")
    os._exit(0)


print("ready", flush=True)
for line in sys.stdin:
    folder, what, number, moment = line.rstrip("\\n").split("|")
    child = os.fork()
    if not child:
        if moment.startswith("step"):
            left = [int(moment.removeprefix("step"))]
            for place, call in ((os, "fsync"), (os, "open"), (os, "mkdir"), (os, "unlink"),
                                (os, "rmdir"), (Path, "open"), (Path, "replace"),
                                (Path, "rename"), (Path, "mkdir"), (Path, "unlink")):
                die_before(place, call, left)
        act(folder, what, int(number))
    if not moment.startswith("step"):
        signal.sigtimedwait({signal.SIGCHLD}, float(moment))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    while signal.sigtimedwait({signal.SIGCHLD}, 0):
        pass
    print("killed" if os.WIFSIGNALED(status) else f"finished {status}", flush=True)
"""


@pytest.fixture
def store(tmp_path, untyped):
    return make_store(tmp_path / "store")


every_step = pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def killing():
    with process(KILLED) as running:
        yield running


@pytest.fixture
def killer(store, killing):
    """Runs an act in a process that is killed; whether it was, and whether the call returned."""

    def kill(what, moment, number=0):
        tell(killing, f"{store.folder}|{what}|{number}|{moment}")
        returned, outcome = False, killing.stdout.readline()
        if outcome == "returned\n":
            returned, outcome = True, killing.stdout.readline()
        assert outcome in ("killed\n", "finished 0\n"), "it ended in an error"
        return outcome == "killed\n", returned

    return kill


def folder_of(store):
    (folder,) = (store.folder / "_index").iterdir()
    return folder


def left_over(store):
    """What is in the index's folder that no reader needs."""
    current = (folder_of(store) / "current").read_text()
    found = {path.name for path in folder_of(store).iterdir()}
    return found - {"lock", "current", current}


def forget(store):
    """Have the next one build the index from nothing, but for what a killed builder left."""
    (folder_of(store) / "current").unlink(missing_ok=True)


@every_step
def test_a_kill_at_any_step_of_a_build_leaves_no_index_or_a_whole_one(store, killer, stride):
    step, killed = 0, True
    while killed:
        killed, _ = killer("build", f"step{step}")
        # A reader, or the next builder, with what is there.
        assert_right(KLIndex.build(store, "certified"), store)
        KLIndex.build(store, "certified", refit=True)
        assert not left_over(store)
        forget(store)
        step += stride
    assert step > 24, "there are steps at which to be killed"


@every_step
@pytest.mark.parametrize("what", ["merge", "refit"])
def test_a_kill_at_any_step_of_a_new_segment_leaves_the_old_or_the_new(store, killer, what, stride):
    index = KLIndex.build(store, "certified")
    step, killed, new, bases = 0, True, 0, {index.basis.digest}
    while killed:
        store.add(index_result(24 + step % 3))
        before = (folder_of(store) / "current").read_text()
        killed, _ = killer(what, f"step{step}")
        after = (folder_of(store) / "current").read_text()
        new += after != before
        again = KLIndex.build(store, "certified")
        if what == "merge":
            assert again.basis.digest in bases, "no kill costs the basis"
        assert_right(again, store)
        index.refresh()
        assert_right(index, store)  # who has the old one open goes on
        store.remove([name(24 + step % 3)])
        store.compact()
        step += stride
    assert step > 24, "there are steps at which to be killed"
    assert 0 < new < step
    KLIndex.build(store, "certified", refit=True)
    assert not left_over(store)


@pytest.mark.parametrize("what", ["add", "remove"])
def test_a_kill_at_every_step_of_a_change_loses_nothing_that_returned(store, killer, what):
    KLIndex.build(store, "certified")
    step, killed, counts = 0, True, {"returned": 0, "done": 0}
    while killed:
        number = 40 + step
        if what == "remove":
            store.add(index_result(number))
        killed, returned = killer(what, f"step{step}", number)
        done = (name(number) in store.matrix().models) == (what == "add")
        assert done or not returned
        counts["returned"] += returned
        counts["done"] += done
        index = KLIndex.build(store, "certified")
        assert_right(index, store)
        step += 1
    assert step > 4, "there are steps at which to be killed"
    assert counts["returned"] >= 1
    assert counts["done"] < step


def kill_at_random(store, killer, kills):
    rng = random.Random(0)
    store.add(index_result(24))
    start = time.monotonic()
    assert killer("refit", DEADLINE_SECONDS) == (False, False)
    seconds = time.monotonic() - start
    killed_at_all, promised = 0, {}
    for each in range(kills):
        what = rng.choice(["build", "refit", "merge", "add", "add", "remove"])
        number = 24 + each
        if what == "build":
            forget(store)
        elif what == "remove":
            store.add(index_result(number))
        elif what == "merge":
            store.add(index_result(5000 + each % 5))
        killed, returned = killer(what, f"{rng.uniform(0, seconds):.6f}", number)
        killed_at_all += killed
        seconds *= 1.1 if killed else 0.8  # other processes come and go
        if returned:
            promised[name(number)] = what == "add"
        if each % 10 == 0:
            store.compact()
        if each % 3 == 0:
            assert_right(KLIndex.build(store, "certified"), store)
    models = set(store.matrix().models)
    assert all((model in models) == there for model, there in promised.items())
    assert killed_at_all > kills / 4
    index = KLIndex.build(store, "certified", refit=True)
    assert_right(index, store)
    assert not left_over(store)


def test_kills_at_random_moments_lose_nothing(store, killer):
    kill_at_random(store, killer, 25)


@pytest.mark.slow
def test_a_thousand_kills_at_random_moments_lose_nothing(store, killer):
    kill_at_random(store, killer, 1000)


# ------------------------------------------------------------------ at once

BUILD = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from llfast import KLIndex, Store
from tests.indexes import assert_right, index_result
store, number = Store(sys.argv[1]), int(sys.argv[2])
KLIndex.build(store, "certified", folder=sys.argv[1] + f"-warm {number}")
print("ready", flush=True)
input()
index = KLIndex.build(store, "certified")
for step in range(6):
    index.add(index_result(number + step))
    index.merge()
    KLIndex.build(store, "certified", refit=step % 2 == 0)
    index = KLIndex.build(store, "certified")
print(len(index), flush=True)
"""


def test_builders_at_once_take_turns(store):
    with process(BUILD, store.folder, 100) as one, process(BUILD, store.folder, 200) as other:
        tell(one)
        tell(other)
        counts = [int(each.stdout.readline()) for each in (one, other)]
    assert max(counts) == 36
    assert min(counts) >= 30
    index = KLIndex.build(store, "certified")
    assert_right(index, store)
    index.add(index_result(50))
    index.merge()
    assert not left_over(store)


READ = """
import os, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from llfast import KLIndex, Store
from tests.indexes import name
store, enough = Store(sys.argv[1]), Path(sys.argv[1] + "-enough")
expected = None
print("ready", flush=True)
input()
opened = 0
while opened < 3 or not enough.exists():
    index = KLIndex.build(store, "certified")
    # Model 5 has none nearer than those of its family, whoever else comes and goes.
    hits = index.search(name(5), 3)
    assert {hit.model for hit in hits} <= {name(0), name(10), name(15), name(20)}, hits
    kls = [hit.kl for hit in index.search(name(0), 99)]
    assert len(kls) == len(index) - 1 and kls == sorted(kls)
    opened += 1
print(opened, flush=True)
"""

REBUILD = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from llfast import KLIndex, Store
from tests.indexes import index_result, name
store, enough = Store(sys.argv[1]), Path(sys.argv[1] + "-enough")
print("ready", flush=True)
input()
rounds = 0
while rounds < 3 or not enough.exists():
    # Of other families than model 5's.
    index = KLIndex.build(store, "certified", refit=rounds % 2 == 0)
    index.add(index_result(101 + 5 * (rounds % 7)))
    index.merge()
    if rounds % 3 == 2:
        index.remove(name(101 + 5 * (rounds % 7)))
        store.compact()
    rounds += 1
print(rounds, flush=True)
"""


def test_readers_are_right_while_another_process_builds_all_the_time(store, tmp_path):
    KLIndex.build(store, "certified")
    enough = store.folder.with_name(store.folder.name + "-enough")
    with (
        process(REBUILD, store.folder) as builder,
        process(READ, store.folder) as one,
        process(READ, store.folder) as other,
    ):
        everybody = (builder, one, other)
        for each in everybody:
            tell(each)
        index = KLIndex.build(store, "certified")
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            index.refresh()
            assert index.search(name(5), 1)[0].model in {name(n) for n in (0, 10, 15, 20)}
        enough.touch()
        rounds = [int(each.stdout.readline() or -1) for each in everybody]
    assert all(each > 2 for each in rounds)
    assert_right(KLIndex.build(store, "certified"), store)


FORK = """
import os, sys
from llfast import KLIndex, Store
from llfast.search import flat
from tests.indexes import assert_right, index_result
flat._BLOCK_BYTES = 1 << 8  # many blocks, and so threads
store = Store(sys.argv[1])
print("ready", flush=True)
input()
index = KLIndex.build(store, "exact")
assert_right(index, store)
assert flat._threads(os.getpid())._threads
child = os.fork()
if not child:
    try:
        assert_right(index, store)
        index.add(index_result(30))
        assert_right(index, store)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)
print(os.waitpid(child, 0)[1], flush=True)
index.refresh()
assert_right(index, store)
print("done", flush=True)
"""


def test_a_fork_after_a_search_searches_with_threads_of_its_own(store):
    with process(FORK, store.folder) as running:
        tell(running)
        assert running.stdout.readline() == "0\n"
        assert running.stdout.readline() == "done\n"
    assert name(30) in Store(store.folder).matrix().models

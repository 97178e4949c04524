"""Several processes at one store, and processes that are killed at it."""

import random
import time

import numpy as np
import pyarrow.dataset as ds
import pytest

from llfast import Store
from tests.stores import N, make_result, numbers, process, store_shards, tell

DEADLINE_SECONDS = 60


WRITE = """
import sys
from llfast import Store
from tests.stores import make_result
folder, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
input()
for number in range(count):
    Store(folder).add(make_result(f"{name} {number}"))
    Store(folder).add(make_result("both"))
print("done", flush=True)
"""


def test_writers_at_once_lose_and_double_nothing(tmp_path):
    folder = tmp_path / "new"  # they make it at once, too
    with process(WRITE, folder, "x", 40) as one, process(WRITE, folder, "y", 40) as other:
        tell(one)
        tell(other)
        assert one.stdout.readline() == other.stdout.readline() == "done\n"
    expected = sorted(["both", *(f"{name} {number}" for name in "xy" for number in range(40))])
    matrix = Store(folder).matrix()
    assert sorted(matrix.models) == expected
    np.testing.assert_array_equal(matrix.values, [numbers(model) for model in matrix.models])
    written = ds.dataset(folder, partitioning="hive").to_table()["model"].to_pylist()
    assert sorted(written) == sorted([*expected, *["both"] * 79])
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


MANY = """
import os, sys
from llfast import Store
from tests.stores import make_result
folder, count = sys.argv[1], int(sys.argv[2])
begin, go = os.pipe()
children = []
for number in range(count):
    child = os.fork()
    if not child:
        os.close(go)
        os.read(begin, 1)  # until nobody holds the other end
        Store(folder).add(make_result(f"x {number}"))
        Store(folder).add(make_result("both"))
        os._exit(0)
    children.append(child)
print("ready", flush=True)
input()
os.close(go)
print(max(os.waitpid(child, 0)[1] for child in children), flush=True)
"""


def test_two_hundred_writers_and_a_reader(tmp_path):
    folder = tmp_path / "store"
    with process(MANY, folder, 200) as writers:
        tell(writers)
        store, seen = Store(folder), set()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(seen) < 201 and time.monotonic() < deadline:
            if not store.rows():
                continue
            matrix = store.matrix()
            np.testing.assert_array_equal(matrix.values, [numbers(m) for m in matrix.models])
            assert seen <= set(matrix.models), "what was there once stays there"
            seen = set(matrix.models)
        assert writers.stdout.readline() == "0\n"
    assert sorted(seen) == sorted(["both", *(f"x {number}" for number in range(200))])
    written = ds.dataset(folder, partitioning="hive").to_table()["model"].to_pylist()
    assert sorted(written) == sorted([*seen, *["both"] * 199])
    assert store.compact() == 400
    assert len(store_shards(store)) == 1
    assert set(store.matrix().models) == seen


MAKE = """
import os, sys, time
from pathlib import Path
from llfast import Store
from tests.stores import make_result
folder, name, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
print("ready", flush=True)
input()
for number in range(30):
    (folder / f"{number}.{name}").touch()
    deadline = time.monotonic() + 30
    while not (folder / f"{number}.{other}").exists() and time.monotonic() < deadline:
        pass
    Store(folder / str(number)).add(make_result(name))
print("done", flush=True)
"""


def test_a_store_that_is_being_made_is_no_foreign_folder(tmp_path):
    with process(MAKE, tmp_path, "x", "y") as one, process(MAKE, tmp_path, "y", "x") as other:
        tell(one)
        tell(other)
        assert one.stdout.readline() == other.stdout.readline() == "done\n"
    for number in range(30):
        assert Store(tmp_path / str(number)).matrix().models == ("x", "y")


COMPACT = """
import sys
from llfast import Store
store, merged = Store(sys.argv[1]), 0
print("ready", flush=True)
input()
while not (store.folder.parent / "enough").exists():
    merged += store.compact()
print(merged, flush=True)
"""


def test_readers_and_writers_go_on_while_two_compact(tmp_path):
    folder = tmp_path / "store"
    store = Store(folder)
    for model in ("both", *(f"old {number}" for number in range(10))):
        store.add(make_result(model))
    held = store.rows()
    seen, reads = set(), 0
    with (
        process(WRITE, folder, "new", 60) as writer,
        process(COMPACT, folder) as one,
        process(COMPACT, folder) as other,
    ):
        for each in (one, other, writer):
            tell(each)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(seen) < 71 and time.monotonic() < deadline:
            matrix = store.matrix()
            np.testing.assert_array_equal(matrix.values, [numbers(m) for m in matrix.models])
            assert seen <= set(matrix.models), "what was there once stays there"
            seen = set(matrix.models)
            row = held[reads % len(held)]
            np.testing.assert_array_equal(store.load(row).values, numbers(row.key.model))
            reads += 1
        assert writer.stdout.readline() == "done\n"
        (tmp_path / "enough").touch()
        assert int(one.stdout.readline()) + int(other.stdout.readline()) > 10
    assert len(seen) == 71
    store.compact()
    assert len(store_shards(store)) == 1
    assert set(store.matrix().models) == seen


REMOVE = """
import sys
from llfast import Store
from tests.stores import make_result
store = Store(sys.argv[1])
print("ready", flush=True)
input()
for number in range(20):
    store.remove([f"old {number}"])
    store.remove(["both"])
    store.add(make_result("both"))
print("done", flush=True)
"""


def test_readers_go_on_while_models_are_removed_and_two_compact(tmp_path):
    folder = tmp_path / "store"
    store = Store(folder)
    names = [f"{kind} {number}" for kind in ("kept", "old") for number in range(20)]
    for model in ("both", *names):
        store.add(make_result(model))
    kept = [row for row in store.rows() if row.label.startswith("kept")]
    seen, reads = set(names), 0
    with (
        process(REMOVE, folder) as remover,
        process(COMPACT, folder) as one,
        process(COMPACT, folder) as other,
    ):
        for each in (one, other, remover):
            tell(each)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(seen) > 20 and time.monotonic() < deadline:
            matrix = store.matrix()
            np.testing.assert_array_equal(matrix.values, [numbers(m) for m in matrix.models])
            found = set(matrix.models) - {"both"}
            assert found <= seen, "what was removed stays away"
            assert len([name for name in found if name.startswith("kept")]) == 20
            seen = found
            scanned = []
            for part, values in store.scan(kept, block_bytes=3 * 8 * N):
                expected = [numbers(kept[number].label) for number in part]
                np.testing.assert_array_equal(values, expected)
                scanned += part
            assert sorted(scanned) == list(range(20))
            reads += 1
        assert remover.stdout.readline() == "done\n"
        (tmp_path / "enough").touch()
        assert int(one.stdout.readline()) + int(other.stdout.readline()) > 10
    assert reads > 2
    store.compact()
    assert store.matrix().models == ("both", *sorted(names[:20]))
    assert {row.key.model for row in store.rows()} == {"both", *names[:20]}


# A process that forks others, and kills them: each fork is in a second what a start is in minutes.
KILLED = """
import os, signal, sys
from pathlib import Path
from llfast import Store, compaction
from tests.stores import die_before, make_result
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})


def act(what):
    store = Store(sys.argv[1])
    if what.startswith("compact"):
        if what == "compact-small":
            compaction.GROUP_BYTES, compaction.SHARD_BYTES = 600, 1
        store.compact()
    elif what.startswith("remove:"):
        store.remove([what.removeprefix("remove:")])
    else:
        store.add(make_result(what))
    os._exit(0)


print("ready", flush=True)
for line in sys.stdin:
    what, moment = line.split()
    child = os.fork()
    if not child:
        if moment.startswith("step"):
            left = [int(moment.removeprefix("step"))]
            for place, name in ((os, "fsync"), (os, "open"), (Path, "open"), (Path, "replace"),
                                (Path, "mkdir"), (Path, "unlink")):
                die_before(place, name, left)
        act(what)
    if not moment.startswith("step"):
        signal.sigtimedwait({signal.SIGCHLD}, float(moment))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    while signal.sigtimedwait({signal.SIGCHLD}, 0):
        pass
    print("killed" if os.WIFSIGNALED(status) else "finished", flush=True)
"""


def contents(store):
    """By key: when it was made, and its numbers."""
    rows = store.rows()
    matrix = store.matrix() if rows else None
    return {row.key: (row.created, matrix.row(row.label).tolist()) for row in rows}


@pytest.fixture
def killer(tmp_path):
    with process(KILLED, tmp_path / "store") as running:

        def kill(what, moment):
            tell(running, f"{what} {moment}")
            outcome = running.stdout.readline()
            assert outcome in ("killed\n", "finished\n"), "the process itself died"
            return outcome == "killed\n"

        yield kill


def test_a_kill_at_every_step_of_a_compaction_into_several_leaves_every_row(tmp_path, killer):
    store = Store(tmp_path / "store")
    step, killed = 0, True
    while killed:
        for model in "abcdefg":  # the same ones, for a kill at each step of the same work
            store.add(make_result(model))
        store.add(make_result("a", loglikelihoods=numbers("newer")))
        store.remove(["b"])
        before = contents(store)
        killed = killer("compact-small", f"step{step}")
        assert contents(store) == before
        store.compact()
        assert contents(store) == before
        step += 1
    assert step > 20, "there are steps at which to be killed"


def test_a_kill_at_every_step_of_a_compaction_leaves_every_row(tmp_path, killer):
    store = Store(tmp_path / "store")
    step, killed = 0, True
    while killed:
        for changes in ({"loglikelihoods": numbers("old")}, {}):
            store.add(make_result(f"m{step}", **changes))
        before = contents(store)
        killed = killer("compact", f"step{step}")
        assert contents(store) == before
        store.compact()
        assert contents(store) == before
        assert len(store_shards(store)) == 1
        step += 1
    assert step > 4, "there are steps at which to be killed"
    np.testing.assert_array_equal(store.matrix().row("m2"), numbers("m2"))


def test_a_kill_at_every_step_of_a_compaction_brings_nothing_back(tmp_path, killer):
    store = Store(tmp_path / "store")
    store.add(make_result("kept"))
    step, killed = 0, True
    while killed:
        for shift in (0, 1):
            store.add(make_result(f"m{step}", loglikelihoods=numbers("old") + shift))
        if step % 2:  # what is removed may be in a merged shard
            store.compact()
        store.remove([f"m{step}"])
        killed = killer("compact", f"step{step}")
        assert [row.label for row in store.rows()] == ["kept"]
        store.compact()
        assert [row.label for row in store.rows()] == ["kept"]
        step += 1
    assert step > 4, "there are steps at which to be killed"


def test_a_kill_at_every_step_of_a_removal_removes_a_model_or_nothing(tmp_path, killer):
    store = Store(tmp_path / "store")
    store.add(make_result("kept"))
    step, killed, left = 0, True, 0
    while killed:
        store.add(make_result(f"m{step}"))
        before = contents(store)
        killed = killer(f"remove:m{step}", f"step{step}")
        after = contents(store)
        assert after.items() <= before.items()
        gone = {key.model for key in before} - {key.model for key in after}
        assert gone <= {f"m{step}"}
        left += not gone
        step += 1
    assert gone, "the last one was not killed"
    assert left > 2, "there are steps at which to be killed"


def test_a_kill_at_every_step_of_an_addition_leaves_the_row_or_nothing(tmp_path, killer):
    folder = tmp_path / "store"
    step, killed, lost = 0, True, 0
    while killed:
        before = contents(Store(folder))
        killed = killer(f"m{step}", f"step{step}")
        after = contents(Store(folder))  # which is a store still, or not yet one
        added = {key.model for key in after} - {key.model for key in before}
        assert added <= {f"m{step}"}
        assert before.items() <= after.items()
        lost += not added
        step += 1
    assert added, "the last one was not killed"
    assert lost > 4, "there are steps at which to be killed"
    matrix = Store(folder).matrix()
    np.testing.assert_array_equal(matrix.values, [numbers(model) for model in matrix.models])


def test_kills_at_random_moments_of_compactions_leave_every_row(tmp_path, killer):
    store = Store(tmp_path / "store")
    rng = random.Random(0)
    seconds, kills = 0.0, 0
    for each in range(24):
        for number in range(3):
            store.add(make_result(f"{each} {number}"))
        before = contents(store)
        if each < 2:
            start = time.monotonic()
            assert not killer("compact", DEADLINE_SECONDS)
            seconds = time.monotonic() - start
        else:
            kills += killer("compact", f"{rng.uniform(0, seconds):.6f}")
        assert contents(store) == before
        if each % 4 == 0:
            store.compact()  # what several kills have left behind
    assert kills > 5
    store.compact()
    assert len(store_shards(store)) == 1
    assert contents(store) == before

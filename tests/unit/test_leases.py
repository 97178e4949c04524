"""One worker at a time at a subject, whatever becomes of workers."""

import errno
import json
import math
import os
import time

import pytest

from llfast.fleet import leases as module
from llfast.fleet.leases import Leases, read_leases
from tests.fleets import ask_at_once
from tests.stores import process

TAKE = """
import sys
from pathlib import Path
from llfast.fleet.leases import Leases
leases = Leases(Path(sys.argv[1]), seconds=60)
print("ready", flush=True)
lease = leases.take("model")
print("none" if lease is None else lease.generation, flush=True)
input()
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "leases"


def test_one_at_a_time(folder):
    one, other = Leases(folder, seconds=60), Leases(folder, seconds=60)
    with one.take("model") as lease:
        assert lease.generation == 1
        assert other.take("model") is None
        assert one.take("model") is None, "nor can its holder have it twice"
        with other.take("another"):
            assert len(read_leases(folder)) == 2
    with other.take("model") as lease:
        assert lease.generation == 1
    assert list(folder.iterdir()) == []


def test_a_lease_is_given_back_however_work_ends(folder):
    leases = Leases(folder, seconds=60)
    with pytest.raises(KeyboardInterrupt), leases.take("model"):
        raise KeyboardInterrupt
    assert list(folder.iterdir()) == []


def test_others_are_told_who_is_at_what(folder):
    leases = Leases(folder, seconds=60, facts={"rank": 3})
    with leases.take("subject", model="org/<b>x"):
        (held,) = read_leases(folder)
        assert (held.facts["rank"], held.facts["model"]) == (3, "org/<b>x")
        assert held.facts["pid"] == os.getpid()
        assert 0 <= time.time() - held.facts["since"] < 60


def test_the_lease_of_a_process_that_was_killed_is_taken_over_at_once(folder):
    leases = Leases(folder, seconds=3600)
    for generation in (1, 2, 3):
        with process(TAKE, folder) as holder:
            assert holder.stdout.readline() == f"{generation}\n"
            assert leases.take("model") is None
    with leases.take("model") as lease:
        assert lease.generation == 4, "so many have died at it"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [PermissionError, ProcessLookupError, OverflowError])
def test_a_process_that_others_are_not_shown_may_be_alive(folder, monkeypatch, error):
    """As another user's, where /proc hides these (hidepid)."""

    def kill(pid, number):
        assert number == 0
        raise error

    with process(TAKE, folder) as holder, monkeypatch.context() as patch:
        assert holder.stdout.readline() == "1\n"
        own, leases = module._born, Leases(folder, seconds=60)
        patch.setattr(module, "_born", lambda pid: None if pid == holder.pid else own(pid))
        patch.setattr(module.os, "kill", kill)
        taken = leases.take("model")
    assert (taken is None) == (error is PermissionError)


@pytest.fixture
def waits(monkeypatch):
    """What takes so many seconds to be sure that a holder is gone takes none; how often it did."""
    found = []
    monkeypatch.setattr(module.time, "sleep", found.append)
    return found


def elsewhere(folder, subject="model", *, silent_for=1000.0, **facts):
    """The lease of a worker on another machine; its path."""
    with Leases(folder, seconds=10).take(subject, model=subject):
        (held,) = [each for each in read_leases(folder) if each.facts.get("model") == subject]
        facts = {**held.facts, "machine": "another", "pid": 1, **facts}
        held.path.rename(folder / "kept")
    (folder / "kept").rename(held.path)
    held.path.write_text(json.dumps(facts))
    when = time.time() - silent_for
    os.utime(held.path, (when, when))
    return held.path


def test_a_worker_elsewhere_that_gives_no_sign_loses_its_lease(folder, waits):
    path = elsewhere(folder, silent_for=5)
    assert Leases(folder, seconds=10).take("model") is None
    os.utime(path, (1.0, 1.0))
    lease = Leases(folder, seconds=10).take("model")
    assert lease.generation == 2
    assert len(waits) == 1
    assert Leases(folder, seconds=10).take("model") is None, "it is somebody's again"


def test_who_gives_signs_less_often_is_given_as_long(folder, waits):
    elsewhere(folder, silent_for=50, seconds=60)
    assert Leases(folder, seconds=10).take("model") is None
    elsewhere(folder, "other", silent_for=50, seconds="x")
    assert Leases(folder, seconds=10).take("other").generation == 2


def test_a_sign_at_the_last_moment_counts(folder, monkeypatch):
    path = elsewhere(folder)
    monkeypatch.setattr(module.time, "sleep", lambda _: os.utime(path))
    assert Leases(folder, seconds=10).take("model") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": "x"}'])
def test_a_lease_that_cannot_be_read_is_one_all_the_same(folder, waits, content):
    path = elsewhere(folder)
    path.write_bytes(content)
    leases = Leases(folder, seconds=10)
    assert leases.take("model") is None
    os.utime(path, (1.0, 1.0))
    with leases.take("model") as lease:
        assert lease.generation == 2


def test_a_lease_that_may_not_be_read_is_one_all_the_same(folder, monkeypatch):
    elsewhere(folder, silent_for=0)

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(module.Path, "read_bytes", refuse)
    assert Leases(folder, seconds=10).take("model") is None


def test_a_folder_that_is_cleared_meanwhile_is_made_again(folder):
    leases = Leases(folder, seconds=10)
    folder.rmdir()
    with leases.take("model"):
        assert leases.take("model") is None


def test_a_holder_gives_signs(folder):
    with Leases(folder, seconds=0.04) as leases, leases.take("model"):
        (held,) = read_leases(folder)
        os.utime(held.path, (1.0, 1.0))
        deadline = time.monotonic() + 30
        while read_leases(folder)[0].changed_ns == 10**9 and time.monotonic() < deadline:
            pass
        assert read_leases(folder)[0].changed_ns > 10**18


@pytest.mark.parametrize("died", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_of_many_who_ask_at_once_one_has_it(folder, waits, monkeypatch, died, links):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(module.os, "link", refuse)
    lost = 0
    for round_ in range(50):
        if died:
            elsewhere(folder, f"model {round_}")
        taken = ask_at_once(folder, f"model {round_}", 8)
        (lease,) = [each for each in taken if each is not None] or [None]
        assert lease is None or lease.generation == 1 + died, "two may back off from one another"
        lost += lease is None
    assert lost < 5


@pytest.mark.parametrize("above", [False, True])
def test_who_was_slow_does_not_take_over_from_the_living(folder, waits, monkeypatch, above):
    """A lease that stood still was taken over, given back, and taken again in the meantime."""
    elsewhere(folder)
    slow, quick, third = (Leases(folder, seconds=10) for _ in range(3))
    make, held = slow._make, []

    def make_late(*arguments):
        with quick.take("model") as lease:
            assert lease.generation == 2
        if above:  # the slow one is quicker than the third
            assert make(*arguments)
        held.append(third.take("model"))
        return above or make(*arguments)

    monkeypatch.setattr(slow, "_make", make_late)
    assert slow.take("model") is None or held[0] is None
    assert len(read_leases(folder)) <= 1


def test_a_lease_may_be_for_ever(folder):
    with Leases(folder, seconds=math.inf) as leases, leases.take("model"):
        leases._thread.join(0.1)
        assert leases._thread.is_alive()
        assert Leases(folder, seconds=1).take("model") is None


def test_who_was_taken_over_from_harms_nobody(folder, waits):
    hung, other, third = (Leases(folder, seconds=10) for _ in range(3))
    lease = hung.take("model")
    (held,) = read_leases(folder)
    facts = json.loads(held.path.read_text()) | {"machine": "another"}
    held.path.write_text(json.dumps(facts))
    os.utime(held.path, (1.0, 1.0))
    with other.take("model"):
        pass
    later = third.take("model")
    assert later.generation == 1
    (mine,) = read_leases(folder)
    os.utime(mine.path, (1.0, 1.0))
    with lease:  # the one that hung goes on, and ends
        beats = iter([False, True])
        hung._stop.wait = lambda _: next(beats)
        hung._beat()
    assert read_leases(folder)[0].changed_ns == 10**9, "it gives no sign in the name of others"
    assert [each.path for each in read_leases(folder)] == [mine.path]


def test_what_was_being_taken_is_given_back(folder):
    """By a signal that came before anybody had it."""
    with Leases(folder, seconds=10) as leases:
        leases.take("model")
        assert len(read_leases(folder)) == 1
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Leases(tmp_path / "file" / "leases", seconds=1)
    with pytest.raises(ValueError, match="lease_seconds must be positive, got 0"):
        Leases(tmp_path, seconds=0)

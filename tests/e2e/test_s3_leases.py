"""Leases at s3://: one worker at a time at a subject, whatever becomes of workers."""

import json
import os
import subprocess
import sys
import threading

import pytest

from llfast import s3
from llfast.fleet import leases as module
from llfast.fleet.leases import Leases, read_leases
from llfast.remote import RemotePath, to_path
from tests.fleets import ask_at_once
from tests.s3 import keys
from tests.stores import ROOT


@pytest.fixture
def folder(bucket):
    return to_path(bucket) / "store" / "_leases"


def test_one_has_a_lease_at_a_time(bucket, folder):
    one, other = Leases(folder, seconds=60), Leases(folder, seconds=60)
    with one.take("model", model="m") as lease:
        assert lease.generation == 1
        assert other.take("model") is None
        (held,) = read_leases(folder)
        assert (held.facts["model"], held.facts["pid"]) == ("m", os.getpid())
        with other.take("another"):
            assert len(read_leases(folder)) == 2
    with other.take("model") as lease:
        assert lease.generation == 1
    assert keys(f"{bucket}/store") == []


def test_of_many_who_ask_at_once_one_has_it(folder):
    lost = 0
    for round_ in range(10):
        taken = ask_at_once(folder, f"model {round_}", 6)
        assert len(taken) == 6
        (lease,) = [each for each in taken if each is not None] or [None]
        lost += lease is None  # two may back off from one another
    assert lost < 3


def move_elsewhere(folder):
    """Make the only lease that of a worker on another machine."""
    (held,) = read_leases(folder)
    held.path.write_bytes(json.dumps({**held.facts, "machine": "another"}).encode())


@pytest.fixture
def later(monkeypatch):
    """`later(seconds)` is a leap of the server's clock."""
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    look_up = s3.look_up

    def leap(seconds):
        def look(place):
            facts = look_up(place)
            return facts._replace(now_ns=facts.now_ns + int(seconds * 1e9))

        monkeypatch.setattr(s3, "look_up", look)

    return leap


def test_who_gives_no_sign_is_taken_over_from_and_harms_nobody(folder, later):
    hung, other = Leases(folder, seconds=10), Leases(folder, seconds=10)
    lease = hung.take("model")
    move_elsewhere(folder)
    later(9)
    assert other.take("model") is None
    later(13)
    with other.take("model") as second:
        assert second.generation == 2
        with lease:
            pass  # the one that hung goes on, and ends
        assert [held.generation for held in read_leases(folder)] == [2]
    assert read_leases(folder) == []


def test_the_lease_of_a_process_that_has_ended_is_taken_over_at_once(folder):
    code = """
import os, sys
from llfast.fleet.leases import Leases
from llfast.remote import RemotePath, to_path
Leases(to_path(sys.argv[1]), seconds=3600).take("model")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)
    with Leases(folder, seconds=3600).take("model") as lease:
        assert lease.generation == 2


def test_a_sign_is_given_of_what_is_held_alone(folder, monkeypatch):
    leases, signs, write = Leases(folder, seconds=10), [], s3.write
    monkeypatch.setattr(s3, "write", lambda place, data: (signs.append(place), write(place, data)))

    def beat():
        beats = iter([False, True])
        leases._stop.wait = lambda _: next(beats)
        signs.clear()
        leases._beat()
        return len(signs)

    with leases.take("model"):
        (held,) = read_leases(folder)
        assert beat() == 1
        assert read_leases(folder)[0].facts == held.facts
        held.path.write_bytes(json.dumps({**held.facts, "token": "of another"}).encode())
        assert beat() == 0
    held.path.unlink()
    with leases.take("model"):
        (held,) = read_leases(folder)
        held.path.unlink()
        assert beat() == 0
    assert read_leases(folder) == [], "what is gone stays away"


def test_a_sign_that_is_just_being_given_does_not_bring_back_what_is_released(folder, monkeypatch):
    leases, reading, released = Leases(folder, seconds=10), threading.Event(), threading.Event()
    lease, read = leases.take("model"), RemotePath.read_bytes

    def read_late(path):
        content = read(path)
        if threading.current_thread() is giving:
            reading.set()
            released.wait(0.5)  # which it must not be now
        return content

    monkeypatch.setattr(RemotePath, "read_bytes", read_late)
    beats = iter([False, True])
    leases._stop.wait = lambda _: next(beats)
    giving = threading.Thread(target=leases._beat)
    giving.start()
    assert reading.wait(30)
    with lease:
        pass
    released.set()
    giving.join()
    assert read_leases(folder) == []


def test_where_a_server_ignores_conditions_two_may_work_and_neither_harms(folder, monkeypatch):
    one, other, also = Leases(folder, seconds=10), Leases(folder, seconds=10), []

    def create(place, data):
        if not also:
            also.append(None)
            also.append(other.take("model"))  # who asks at the same time
        s3.write(place, data)
        return True

    monkeypatch.setattr(s3, "create", create)
    lease = one.take("model")
    with also[1]:
        pass
    assert len(read_leases(folder)) == 1, "it is the other's"
    with lease:
        pass
    assert read_leases(folder) == []


def test_an_answer_that_was_lost_is_found_out(folder, monkeypatch):
    write = s3._write

    def twice(method, place, **arguments):
        write(method, place, **arguments)
        return write(method, place, **arguments)

    monkeypatch.setattr(s3, "_write", twice)
    with Leases(folder, seconds=10).take("model") as lease:
        assert lease.generation == 1
    assert (folder / "x").create(b"1")
    assert not (folder / "x").create(b"2")

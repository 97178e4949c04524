"""Who is at which model: files in a folder that all workers see, and no other coordinator.

A lease is a file `<subject>.<generation>`; that of the highest generation holds. It is taken by
making that file, which only one can do, and its holder changes its time now and then. One whose
time has stood still for too long, by the file system's own clock, or whose process on this machine
has ended, is taken over by making the next generation. A worker that was taken over from while it
lived, for it could not give a sign, does its work in vain, and no harm to others' leases.

At s3:// it is an object, written on the condition that there is none, and written again as a sign;
the clock is the server's. Where a server ignores the condition, two may have one, and do one work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llfast.errors import RemoteError
from llfast.remote import AnyPath, RemotePath, map_paths, sorted_glob

_BEATS = 4  # in the time after which a lease that stands still is taken over
# All are held up where the file system is: whoever lives is heard of as soon as it is back.
_LAST_CHANCE_SECONDS = 0.5
_REMOTE_TICK_NS = 1_000_000_000  # S3 says times to the second


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a lease's file says.

    Attributes:
        path: the file.
        generation: 1, and one more each time that it was taken over.
        facts: who holds it, since when, and what for; empty if that cannot be read.
        changed_ns: when its holder last gave a sign, by the file system's clock.
    """

    path: AnyPath
    generation: int
    facts: dict[str, Any]
    changed_ns: int

    @property
    def token(self) -> str:
        """What tells it from all others; its time where that cannot be read."""
        return str(self.facts.get("token", f"{self.path.name} {self.changed_ns}"))


class Lease:
    """The right to work at a subject, until it is released or its holder gives no sign.

    Attributes:
        generation: how many have held it in a row, this one included.
    """

    def __init__(self, leases: Leases, subject: str, path: AnyPath, generation: int) -> None:
        self._leases, self._subject, self._path = leases, subject, path
        self.generation = generation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it will go by itself, and must not hide other errors
            self._leases.release(self._subject, self._path)


class Leases:
    """The leases of a folder, for one worker; a thread keeps those alive that it holds.

    Workers of one `run` are told what to take by somebody who gives a subject to another one only
    when the first is gone: they take over from each other at once.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(
        self,
        folder: AnyPath,
        *,
        seconds: float,
        facts: dict[str, Any] | None = None,
        run: str | None = None,
    ) -> None:
        if not seconds > 0:
            raise ValueError(f"lease_seconds must be positive, got {seconds}")
        self._folder, self._seconds = folder, seconds
        self._run = run
        self._facts = {**(facts or {}), **_this_process(), "seconds": seconds, "run": run}
        self._held: dict[AnyPath, str] = {}  # and what is written in each
        self._lock = threading.Lock()
        self._stop = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._beat, name="llfast-leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for path in list(self._held):  # a signal came before anybody could hold it
            with contextlib.suppress(OSError):
                self.release(path.name.rpartition(".")[0], path)

    def take(self, subject: str, **facts: Any) -> Lease | None:
        """The lease of a subject; None if somebody holds it.

        Args:
            subject: what it is about.
            facts: what others are told of it.

        Raises:
            OSError: if it cannot be written.
        """
        name = _file_of(subject)
        before = read_leases(self._folder, name)
        if before and not self._is_stale(before[-1]):
            return None
        generation = before[-1].generation + 1 if before else 1
        path, token = self._folder / f"{name}.{generation}", secrets.token_hex(16)
        with self._lock:
            self._held[path] = token  # a signal may end this before it is known that it was made
        if not self._make(path, {**facts, "token": token}):
            with self._lock:
                del self._held[path]
            return None
        known = {each.token for each in before} | {token}
        if any(each.token not in known for each in read_leases(self._folder, name)):
            self.release(name, path)  # it was given back and taken by others meanwhile
            return None
        return Lease(self, name, path, generation)

    def is_held(self, subject: str) -> bool:
        """Whether somebody else holds a subject's lease, as it seems."""
        found = read_leases(self._folder, _file_of(subject))
        return bool(found) and not self._is_stale(found[-1])

    def release(self, name: str, path: AnyPath) -> None:
        """Let others have it: its file goes, and those of holders before, the newest last."""
        with self._lock:
            token = self._held.pop(path, None)
        found = read_leases(self._folder, name)
        if token not in {each.token for each in found if each.path == path}:
            return  # it has been taken over
        own = int(path.name.rpartition(".")[2])
        for each in found:
            if each.generation <= own:
                each.path.unlink(missing_ok=True)

    # ------------------------------------------------------------------ inside

    def _make(self, path: AnyPath, facts: dict[str, Any]) -> bool:
        """Whether this worker is the one that has made the file."""
        content = json.dumps(self._facts | facts | {"since": time.time()}).encode()
        if isinstance(path, RemotePath):
            return path.create(content)
        self._folder.mkdir(exist_ok=True)  # somebody may have cleared up
        temporary = _temporary(path.parent)
        try:
            temporary.write_bytes(content)
            try:
                os.link(temporary, path)  # whole from the start
            except FileExistsError:
                return False
            except OSError:  # of a file system without links
                with path.open("xb") as file:
                    try:
                        file.write(content)
                        file.flush()
                    except OSError:
                        path.unlink()
                        raise
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _is_stale(self, held: Held) -> bool:
        is_of_run = self._run is not None and held.facts.get("run") == self._run
        if is_of_run or _has_ended(held.facts):
            return True
        own = held.facts.get("seconds")
        seconds = max(self._seconds, own if isinstance(own, int | float) else 0.0)
        try:
            if _silent_ns(held) <= seconds * 1e9:
                return False
        except FileNotFoundError:  # released just now
            return False
        time.sleep(_LAST_CHANCE_SECONDS)
        with contextlib.suppress(OSError):
            return _changed_ns(held.path) == held.changed_ns
        return False

    def _beat(self) -> None:
        while not self._stop.wait(min(self._seconds / _BEATS, threading.TIMEOUT_MAX)):
            with self._lock:
                held = dict(self._held)
            for path, token in held.items():
                # Not while it is being released: at s3:// a sign would make its file again.
                with self._lock, contextlib.suppress(OSError):  # or it is gone, or taken over
                    if path in self._held:
                        _give_sign(path, token)


def _temporary(folder: Path) -> Path:
    return folder / f".{secrets.token_hex(8)}.tmp"


def _silent_ns(held: Held) -> int:
    """How long its holder has given no sign, by the file system's clock, that of all leases."""
    if isinstance(held.path, RemotePath):
        facts = held.path.facts()
        return facts.now_ns - facts.changed_ns - _REMOTE_TICK_NS
    temporary = _temporary(held.path.parent)
    try:
        temporary.touch()
        return temporary.stat().st_mtime_ns - held.changed_ns
    finally:
        temporary.unlink(missing_ok=True)


def _give_sign(path: AnyPath, token: str) -> None:
    """Change a file's time, if it is still that of this lease."""
    content = path.read_bytes()
    if _facts(content).get("token") != token:
        return
    if isinstance(path, RemotePath):
        path.write_bytes(content)
    else:
        os.utime(path)


def _file_of(subject: str) -> str:
    """The name of its leases' files, without the generation."""
    return hashlib.sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def read_leases(folder: AnyPath, name: str = "*") -> list[Held]:
    """The leases of a folder, or of one subject, by generation; what is no lease is passed over."""
    paths = [
        path
        for path in sorted_glob(folder, f"{name}.*")
        if not path.name.startswith(".") and path.name.rpartition(".")[2].isdecimal()
    ]
    found = [each for each in map_paths(_read_lease, paths) if each is not None]
    return sorted(found, key=lambda each: each.generation)


def _read_lease(path: AnyPath) -> Held | None:
    generation = int(path.name.rpartition(".")[2])
    with contextlib.suppress(FileNotFoundError):  # released just now
        facts = _read_facts(path)
        return Held(path=path, generation=generation, facts=facts, changed_ns=_changed_ns(path))
    return None


def _changed_ns(path: AnyPath) -> int:
    return path.facts().changed_ns if isinstance(path, RemotePath) else path.stat().st_mtime_ns


def _read_facts(path: AnyPath) -> dict[str, Any]:
    try:
        return _facts(path.read_bytes())
    except (FileNotFoundError, RemoteError):
        raise
    except OSError:  # perhaps it is another user's
        return {}


def _facts(content: bytes) -> dict[str, Any]:
    """What a file says; nothing if it is not what a lease says."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _this_process() -> dict[str, Any]:
    """What tells this process from all others, and others on this machine whether it is alive."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "machine": _machine(), "born": _born(pid)}


def _has_ended(facts: dict[str, Any]) -> bool:
    """Whether a process is known to have ended: only of those on this machine that can be known."""
    pid, machine = facts.get("pid"), _machine()
    if machine is None or facts.get("machine") != machine or not isinstance(pid, int):
        return False
    born = _born(pid)
    return born != facts.get("born") and not (born is None and _is_of_others(pid))


def _is_of_others(pid: int) -> bool:
    """Whether it is another user's process, of which /proc may say that there is none (hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _machine() -> str | None:
    """This boot of this machine, and this container on it; None where Linux does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _born(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None if it is not alive."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    is_dead = fields[0] in ("Z", "X")
    return None if is_dead else int(fields[19])

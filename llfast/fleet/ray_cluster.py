"""A Ray cluster: how it is reached, what it has, and what became of a worker."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llfast.errors import ScoringError, needed
from llfast.files import as_utf8
from llfast.redaction import without_secrets

from .failures import reason_of
from .needs import Machines
from .ray_workers import first_gpu_bytes

with needed("ray", "a Ray cluster needs Ray; pip install 'llfast[ray]'"):
    import ray

_CONNECT_SECONDS = 10.0
_ASK_SECONDS = 60.0


@contextmanager
def connected(address: str) -> Iterator[None]:
    """The cluster; a connection that there is already is used, and stays.

    Raises:
        ConnectionError: if there is none.
        ValueError: for the address of a Ray Client server.
    """
    if ray.is_initialized():
        yield
        return
    if address.startswith("ray://"):
        raise ValueError(
            f"a Ray cluster must be reached from one of its machines, got {address!r}; run this "
            "there, as a Ray job, with --ray auto"
        )
    # One that ends with the run needs no page of its own, which takes seconds of a core to start.
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():  # Ray itself tries for minutes, and then ends the process
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        with _same_end():
            ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConnectionError(
            f"a Ray cluster must be at {address!r}, got none ({reason_of(error)}); start one with "
            "`ray start --head`"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _same_end() -> Iterator[None]:
    """Keep the caller's handler of SIGTERM: Ray would set its own, which aborts after 3 s."""
    own = signal.getsignal(signal.SIGTERM)
    yield
    if callable(own) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, own)


def why_lost(error: Exception) -> tuple[str, bool]:
    """What became of a worker, and whether it may have been for want of memory."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its machine ran out of memory", True
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it cannot be reached", False
    if isinstance(error, ray.exceptions.RayTaskError):
        return reason_of(error.cause), False
    if isinstance(error, ray.exceptions.ActorDiedError):
        lines = str(error).strip().splitlines() or [""]
        if "error raised in its creation task" in lines[0]:
            return without_secrets(as_utf8(lines[-1])), False  # after the lines of a traceback
        # A process that memory has run out for is killed, and cannot say why.
        if "worker process has died" in str(error):
            return "its process has ended", True
        if "node" in str(error):
            return "its machine is gone", False
    return reason_of(error), False


def machines_of(device: str, cpus: float | None) -> Machines:
    """The largest machine's memory, the smallest GPU, and a worker's cores.

    Args:
        device: where models run; "cpu" leaves GPUs alone.
        cpus: cores of a worker; None for one where GPUs are used, else for a whole machine.

    Raises:
        ScoringError: if GPUs cannot be used.
        ValueError: if no machine has so many cores.
    """
    nodes = [each for each in ray.nodes() if each["Alive"]]
    with_gpus = [] if device == "cpu" else [each for each in nodes if each["Resources"].get("GPU")]
    resources = [each["Resources"] for each in with_gpus or nodes]
    cores = [each.get("CPU", 0.0) for each in resources]
    if cpus is not None and cpus > max(cores):
        raise ValueError(
            f"cpus must be at most what a machine has, got {cpus:g}; the largest has {max(cores):g}"
        )
    if cpus is None:
        cpus = 1.0 if with_gpus else min((each for each in cores if each), default=1.0)
    # Others, as a head that is not to work, are none that a worker could be on.
    able = [each for each in resources if each.get("CPU", 0.0) >= cpus] or resources
    return Machines(
        memory=int(max(each.get("memory", 0) for each in able)),
        gpu_bytes=_least_gpu_bytes([each["NodeID"] for each in with_gpus]),
        cpus=cpus,
    )


def _least_gpu_bytes(nodes: Sequence[str]) -> int:
    """Of some machines' GPUs; asks there, and leaves out those that are in use elsewhere."""
    if not nodes:
        return 0
    ask = ray.remote(max_calls=1)(first_gpu_bytes)
    own = {"num_cpus": 0, "num_gpus": 0.001}
    asked = [ask.options(**own, scheduling_strategy=on_node(node)).remote() for node in nodes]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_ASK_SECONDS)
    try:
        found: list[int] = ray.get(answered or ray.wait(asked)[0])
    except ray.exceptions.RayError as error:
        raise ScoringError(
            f"GPUs of the cluster must be seen by torch there, got {why_lost(error)[0]}; device "
            "'cpu' leaves them alone"
        ) from None
    return min(found)


def on_node(node: str) -> Any:
    """The strategy that places something on this machine of the cluster, and on no other."""
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)

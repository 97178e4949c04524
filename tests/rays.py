"""In place of a Ray cluster: workers that do what a test says, in an order that a test draws."""

import random
from types import SimpleNamespace

import ray

from llfast.fleet import ray_cluster, ray_dispatch, ray_driver, ray_workers


class _Reference:
    def __init__(self, actor, method, arguments):
        self.actor, self.method, self.arguments = actor, method, arguments


class _Actor:
    def __init__(self, cluster, kind, options, arguments):
        self.cluster, self.kind, self.options, self.arguments = cluster, kind, options, arguments
        if kind == "ScoringWorker":
            cluster.actors.append(self)

    def __getattr__(self, method):
        def remote(*arguments):
            if method == "attempt":
                self.cluster.running.append(arguments[0])
            return _Reference(self, method, arguments)

        return SimpleNamespace(remote=remote)


class StubCluster:
    """What `ray` is to llfast.

    Attributes:
        begin: of an actor; what it returns or raises has become of its beginning.
        attempt: of an actor and a request; likewise.
        machines: resources of each.
        actors: all there were.
        running: requests that workers are at.
        puts: what was put into the object store.
    """

    exceptions, util = ray.exceptions, ray.util

    def __init__(self, attempt, begin=lambda actor: None, machines=({"CPU": 4.0},), seed=0):
        self.attempt, self.begin, self.machines = attempt, begin, list(machines)
        self.actors, self.running, self.puts = [], [], []
        self._rng = random.Random(seed)

    def install(self, monkeypatch):
        for module in (ray_cluster, ray_driver, ray_dispatch, ray_workers):
            if hasattr(module, "ray"):
                monkeypatch.setattr(module, "ray", self)
        return self

    def is_initialized(self):
        return True

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: "0" * 56)

    def nodes(self):
        return [
            {"Alive": True, "NodeID": f"{number:056x}", "Resources": {"memory": 8 << 30, **each}}
            for number, each in enumerate(self.machines)
        ]

    def put(self, value):
        self.puts.append(value)
        return value

    def remote(self, kind):
        def options(**options):
            return SimpleNamespace(
                remote=lambda *arguments: _Actor(self, kind.__name__, options, arguments)
            )

        return SimpleNamespace(options=options)

    def wait(self, references, num_returns=1, timeout=None):
        known = [
            each for each in references if each.method == "attempt" or self.is_placed(each.actor)
        ]
        return ([self._rng.choice(known)] if known else []), []

    def is_placed(self, actor):
        return any(each.get("CPU", 0) >= actor.options["num_cpus"] for each in self.machines)

    def get(self, reference):
        if reference.method == "made":
            return 0
        if reference.method == "begin":
            return self.begin(reference.actor)
        request, _ = reference.arguments
        try:
            if not self.is_placed(reference.actor):  # any more
                raise ray.exceptions.ActorDiedError
            return self.attempt(reference.actor, request)
        finally:
            self.running.remove(request)

    def kill(self, actor):
        pass

"""Whatever becomes of workers, each model of a list is done once; with a stub in place of Ray."""

import asyncio
import gc
import random
import signal
import time
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="Ray is an extra: pip install 'llfast[ray]'")

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from llfast import ScoringError, Store, StoreError, TextSet
from llfast.fleet import ray_cluster, ray_dispatch, ray_workers
from llfast.fleet.leases import Leases
from llfast.fleet.ledger import asked_of
from llfast.fleet.ray_driver import score_on_ray
from llfast.fleet.ray_workers import Assignment, Broken, ScoringWorker, TokenIds
from llfast.fleet.worker import LEASES
from llfast.model_list import ModelRequest
from llfast.outcomes import Outcome
from llfast.results import ResultKey
from llfast.runs import SCORING_VERSION
from tests.rays import StubCluster
from tests.stores import make_result

TEXTS = TextSet(("a", "b"), ("one text", "and another"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No size is known, and no time passes, nor with collections of garbage."""
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(ray_dispatch, "size_of", lambda request: None)
    monkeypatch.setattr(ray_dispatch, "_WAIT_SECONDS", 0.0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def scored(request):
    return Outcome(request=request, status="scored")


def run(store, requests, **options):
    return score_on_ray(requests, TEXTS, store, **{"cpus": 1, "lease_seconds": 0.01} | options)


def requests_of(*names, **fields):
    return [ModelRequest(model=name, **fields) for name in names]


@pytest.mark.parametrize("own", [False, True])
def test_collections_pass_over_what_was_there_as_long_as_a_run_lasts(store, monkeypatch, own):
    gc.unfreeze()
    if own:
        gc.freeze()  # by whoever calls
    before, seen = gc.get_freeze_count(), []

    def attempt(actor, request):
        seen.append(gc.get_freeze_count())
        return scored(request)

    StubCluster(attempt).install(monkeypatch)
    run(store, requests_of("m"))
    assert seen[0] > 10_000
    assert gc.get_freeze_count() == before
    gc.unfreeze()


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_each_model_is_done_once(store, monkeypatch, seed):
    rng = random.Random(seed)
    requests = requests_of(*(f"m{rng.randrange(6)}" for _ in range(10)))
    requests += [ModelRequest(model="m1", revision=f"step{number}") for number in range(3)]
    done, lost = Counter(), Counter()

    def attempt(actor, request):
        at = Counter((each.model, each.revision) for each in cluster.running)
        assert at.most_common(1)[0][1] == 1, "two workers at one lease"
        what = rng.choice(["scored", "scored", "failed", "held", "settled", "lost", "cut off"])
        if what in ("held", "settled"):
            done[request.model, request.revision] += what == "settled"
            return what
        if what == "failed":
            return Outcome(request=request, status="failed", error="so", ran_out_of_memory=True)
        if what != "scored":
            lost[request.model, request.revision] += 1
            raise ActorDiedError() if what == "lost" else ActorUnavailableError("so", None)
        done[request.model, request.revision] += 1
        return scored(request)

    def begin(actor):
        if rng.random() < 0.2:
            raise ActorDiedError()

    cluster = StubCluster(attempt, begin, seed=seed).install(monkeypatch)
    shared = run(store, requests, attempts=5)
    given_up = {
        each.request.model for each in shared.outcomes if each.error and "alive" in each.error
    }
    named = {each.model for each in requests if each.revision is None} & {"m1"}
    expected = Counter(
        (each.model, each.revision or ("main" if each.model in named else None))
        for each in requests
    )
    for asked, count in expected.items():
        # What was given up in the store's ledger settles what is behind it, too.
        assert done[asked] == count or (asked[0] in given_up and lost[asked] >= 5)
    assert cluster.running == []
    assert shared.left == ()


def test_those_behind_a_model_of_others_are_left_with_it(store, monkeypatch):
    def attempt(actor, request):
        return "held" if request.model == "m" else scored(request)

    StubCluster(attempt).install(monkeypatch)
    requests = requests_of("m", "m") + requests_of("other")
    requests += [ModelRequest(model="m", revision="main"), ModelRequest(model="m", revision="v2")]
    assert sorted(run(store, requests, wait=False).left) == ["m"] * 4


def test_no_workers_are_started_to_see_that_others_are_at_a_model(store, monkeypatch):
    def attempt(actor, request):
        return "held" if list(leases.glob("*.1")) else scored(request)

    def sleep(seconds):
        slept.append(seconds)
        time.sleep(0.001)
        if len(slept) == 20:
            lease.__exit__()

    slept, leases = [], store.folder / LEASES
    monkeypatch.setattr(
        ray_dispatch, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    )
    cluster = StubCluster(attempt).install(monkeypatch)
    store.prepare()
    lease = Leases(leases, seconds=60).take(f"m {TEXTS.digest} paper")
    shared = run(store, requests_of("m"))
    assert [each.status for each in shared.outcomes] == ["scored"]
    assert len(slept) >= 20
    assert len(cluster.actors) == 2


def test_a_failure_is_told_beside_another_revision_that_has_none(store, monkeypatch):
    def attempt(actor, request):
        if request.revision == "b":
            raise ActorDiedError()
        return scored(request)

    StubCluster(attempt).install(monkeypatch)
    requests = [ModelRequest(model="m", revision=each) for each in "abc"]
    assert run(store, requests).failed.keys() == {"m"}


def test_a_failure_is_told_beside_a_later_result_of_another_revision(store, monkeypatch):
    tried = []

    def attempt(actor, request):
        tried.append(request)
        assert len(tried) == 1
        key = ResultKey("m", "b", TEXTS.digest, "paper", "auto", None, SCORING_VERSION)
        asked = asked_of(request, "auto")
        store.add_failure(key, "so", attempts=1, is_lasting=True, asked=asked)
        store.add(make_result("m", n=2, revision="c", textset_digest=TEXTS.digest))
        return Outcome(request=request, status="failed", error="so", attempts=1)

    StubCluster(attempt).install(monkeypatch)
    assert run(store, requests_of("m", revision="b")).failed["m"].reason == "so"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, StoreError])
def test_an_end_gives_models_back(store, monkeypatch, error):
    """At once, those of workers on other machines, too."""
    cluster = StubCluster(None).install(monkeypatch)
    draw = cluster.wait

    def wait(references, **options):
        if len(cluster.running) < 3:
            return draw([each for each in references if each.method == "begin"])
        (assignment,) = cluster.puts
        leases = Leases(store.folder / LEASES, seconds=60, run=assignment.run)
        for each in cluster.running:
            assert leases.take(f"{each.model} {TEXTS.digest} paper")
        raise error("so")

    cluster.wait = wait
    monkeypatch.setattr("llfast.fleet.leases._has_ended", lambda facts: False)
    with pytest.raises(error):
        run(store, requests_of(*"abcde"))
    assert list((store.folder / LEASES).iterdir()) == []


def test_a_machine_that_cannot_begin_does_not_end_what_others_are_at(store, monkeypatch):
    began = []

    def begin(actor):
        began.append(actor)
        return None if len(began) == 1 else Broken("no GPU is left", is_of_store=False)

    def attempt(actor, request):
        return scored(request)

    cluster = StubCluster(attempt, begin).install(monkeypatch)
    draw = cluster.wait

    def wait(references, **options):
        beginning = [each for each in references if each.method == "begin"]
        return draw(beginning if beginning and len(began) < 60 else references, **options)

    cluster.wait = wait
    assert len(run(store, requests_of(*"abcdef")).outcomes) == 6
    began.clear()
    cluster.begin = lambda actor: Broken("no GPU is left", is_of_store=False)
    with pytest.raises(ScoringError, match="got none that did: no GPU is left"):
        run(store, requests_of(*"abcdef"))


def test_what_no_machine_has_room_for_any_more(store, monkeypatch):
    monkeypatch.setattr(ray_dispatch, "_NO_ROOM_SECONDS", 0.0)

    def attempt(actor, request):
        cluster.machines.pop()
        return scored(request)

    cluster = StubCluster(attempt, machines=[{"CPU": 1.0}, {"CPU": 8.0}]).install(monkeypatch)
    with pytest.raises(ScoringError, match="a machine of the cluster must have .*'CPU': 8"):
        run(store, requests_of(*"ab"), cpus=8)


@pytest.mark.parametrize(("cpus", "said"), [(9, "got 9; the largest has 8"), (0, "got 0")])
def test_cores_that_no_machine_has(store, monkeypatch, cpus, said):
    StubCluster(None, machines=[{"CPU": 1.0}, {"CPU": 8.0}]).install(monkeypatch)
    with pytest.raises(ValueError, match=said):
        run(store, requests_of("a"), cpus=cpus)


def test_a_head_that_is_not_to_work_is_not_counted_on(monkeypatch):
    machines = [{"CPU": 0.0, "memory": 64 << 30}, {"CPU": 4.0}, {"CPU": 2.0, "memory": 16 << 30}]
    StubCluster(None, machines=machines).install(monkeypatch)
    for cpus, memory in ((None, 16), (4, 8)):
        assert ray_cluster.machines_of("auto", cpus).memory == memory << 30


def ask_of_gpus(monkeypatch, get, answered):
    """Ray without a cluster, which yet refuses options that there are not."""

    def remote(self, args=None, kwargs=None, **options):
        asked.append(options["scheduling_strategy"].node_id)
        return len(asked)

    def wait(references, *, num_returns=1, timeout=None):
        return (references[:1] if timeout is None else references[:answered]), []

    asked = []
    nodes = StubCluster(None, machines=[{"CPU": 2.0, "GPU": 1.0}] * 3).nodes()
    monkeypatch.setattr("ray.remote_function.RemoteFunction._remote", remote)
    for name, value in (("wait", wait), ("get", get), ("nodes", lambda: nodes)):
        monkeypatch.setattr(ray_cluster.ray, name, value)
    return asked


@pytest.mark.parametrize(("answered", "least"), [(3, 3), (2, 4), (0, 5)])
def test_machines_are_asked_for_their_gpus(monkeypatch, answered, least):
    asked = ask_of_gpus(monkeypatch, lambda references: [6 - each for each in references], answered)
    assert ray_cluster.machines_of("auto", None).gpu_bytes == least
    assert [int(node, 16) for node in asked] == [0, 1, 2]
    assert ray_cluster.machines_of("cpu", None).gpu_bytes == 0


def test_gpus_that_torch_does_not_see(monkeypatch):
    def get(references):
        raise RayTaskError("f", "trace", AssertionError("Torch not compiled with CUDA enabled"))

    ask_of_gpus(monkeypatch, get, 3)
    with pytest.raises(ScoringError, match=r"got AssertionError: Torch not compiled.*device 'cpu'"):
        ray_cluster.machines_of("auto", None)


@pytest.mark.parametrize(
    ("terms", "own", "expected"),
    [
        ({"weights": "resident"}, {}, ("resident", None)),
        ({"weights": "paged", "memory_budget": "1GiB"}, {}, ("paged", str(1 << 30))),
        ({"memory_budget": "1GiB"}, {"weights": "resident"}, ("resident", None)),
        ({"memory_budget": "1GiB"}, {"memory_budget": "2GiB"}, ("auto", "2GiB")),
        ({}, {}, ("auto", str(5 << 30))),  # of 6 GiB, one is for the process
    ],
)
def test_what_a_run_says_of_memory_goes_for_its_models(store, monkeypatch, terms, own, expected):
    size = ray_dispatch.size_of, SimpleNamespace(parameters=1 << 29, page=1 << 20, itemsize=4)
    monkeypatch.setattr(ray_dispatch, "size_of", lambda request: size[1])
    given = []
    StubCluster(lambda _, request: given.append(request) or scored(request)).install(monkeypatch)
    run(store, requests_of("m", **own), **terms)
    assert [(each.weights, each.memory_budget) for each in given] == [expected]


def test_a_request_to_end_goes_to_whom_it_went_before(monkeypatch):
    def init(**_):
        signal.signal(signal.SIGTERM, lambda *_: None)

    before = signal.getsignal(signal.SIGTERM)
    stub = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    monkeypatch.setattr(ray_cluster, "ray", stub)
    try:
        signal.signal(signal.SIGTERM, own := lambda *_: None)
        with ray_cluster.connected("local"):
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def died(text):
    error = ActorDiedError()
    error.error_msg = text
    return error


CREATION = """The actor died because of an error raised in its creation task, ray::A.__init__()
  File "/usr/node/a.py", line 6, in __init__
ModuleNotFoundError: No module named 'llfast' at https://me:password1@host/"""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (died("its worker process has died. Exit type"), ("its process has ended", True)),
        (died("The actor died because its node has died."), ("its machine is gone", False)),
        (ActorUnavailableError("x", None), ("it cannot be reached", False)),
        (
            died(CREATION),
            ("ModuleNotFoundError: No module named 'llfast' at https://[hidden]@host/", False),
        ),
        (RayTaskError("f", "trace", RuntimeError("so\nit is")), ("RuntimeError: so", False)),
    ],
)
def test_why_a_worker_was_lost(error, expected):
    assert ray_cluster.why_lost(error) == expected


def test_nobody_waits_for_token_ids_that_were_not_made():
    """A worker's tokenizer has failed, and the worker lives on."""

    async def both():
        tokens = TokenIds()
        assert await tokens.find("key", "worker 1") is None
        other = asyncio.create_task(tokens.find("key", "worker 2"))
        calls = []
        handle = SimpleNamespace(give_up_on=SimpleNamespace(remote=calls.append))
        terms = SimpleNamespace(trust_remote_code=False, allow_pickle=False)
        worker = ScoringWorker("worker 1", SimpleNamespace(terms=terms), handle, 0.0)
        request = ModelRequest(model="m")
        worker._worker = SimpleNamespace(attempt=scored)
        gc.unfreeze()
        assert worker.attempt(request, None).status == "scored"
        assert gc.get_freeze_count() > 10_000, "its modules are spared by collections"
        gc.unfreeze()
        for name in calls:
            await tokens.give_up_on(name)
        assert await asyncio.wait_for(other, 1) is None, "it is to make them"

    asyncio.run(both())


def test_a_folder_that_is_called_like_the_store_is_none_of_the_run(store, monkeypatch):
    """As where a shared disk is not mounted."""
    found = []

    def begin(actor):
        (assignment,) = cluster.puts
        worker = ScoringWorker(*actor.arguments)
        for folder in (assignment.folder, str(store.folder.with_name("other"))):
            own = {name: getattr(assignment, name) for name in assignment.__dataclass_fields__}
            worker._assignment = Assignment(**own | {"folder": folder})
            found.append(worker.begin())
            if worker._worker is not None:
                worker._worker.__exit__(None, None, None)
                worker._worker = None
        return found[-1]

    monkeypatch.setattr(ray_workers.cache, "share_with", lambda shared: None)
    Store(store.folder.with_name("other")).prepare()
    cluster = StubCluster(None, begin).install(monkeypatch)
    with pytest.raises(StoreError, match="store must be where all machines of the cluster see it"):
        run(store, requests_of("m"))
    assert found[0] is None
    assert list((store.folder / LEASES).iterdir()) == [], "its sign ends with the run"

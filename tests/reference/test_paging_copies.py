"""Pages that are copied to a device, which here is a part of this machine's memory.

Its streams do what they are given when somebody waits for it, but it computes at once: what comes
of a host that runs ahead of its device is in tests/gpu.
"""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

import llfast
from llfast.paging import pages, slots, states, units
from llfast.paging.slots import Slot
from tests.families import make_family
from tests.paging import LIMITS, check_same, least_budget, score_paged
from tests.tiny import TEXTS, make_model, make_tokenizer, save

pytestmark = pytest.mark.usefixtures("on_one_thread")

OPTIONS = {"token_budget": 64, "dtype": "float32"}


class Stream:
    """Of copies."""

    def __init__(self, *_):
        self.todo, self.done, self.lock = [], 0, threading.RLock()

    def add(self, act):
        with self.lock:
            self.todo.append(act)

    def wait_event(self, event):
        self.add(event.synchronize)

    def record_event(self):
        with self.lock:
            return Event(self, self.done + len(self.todo))


class Event:
    def __init__(self, stream, place):
        self.stream, self.place = stream, place

    def synchronize(self):
        with self.stream.lock:
            while self.stream.done < self.place:
                self.stream.done += 1
                self.stream.todo.pop(0)()


class Computing:
    """The stream that computes: whatever it is given is done at once."""

    def wait_event(self, event):
        event.synchronize()

    def record_event(self):
        return Event(Stream(), 0)


class Device:
    """What slots ask of torch and CUDA."""

    def __init__(self):
        self.registered, self.copies, self.made = {}, 0, []
        self.computing, self._own = Computing(), threading.local()

    def install(self, monkeypatch):
        cudart = SimpleNamespace(
            cudaHostRegister=self.register, cudaHostUnregister=self.registered.pop
        )
        fakes = {
            "Stream": Stream,
            "stream": self.on,
            "current_stream": lambda *_: self.computing,
            "synchronize": lambda *_: [each.record_event().synchronize() for each in self.made],
            "cudart": lambda: cudart,
            "check_error": lambda _: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(slots.torch.cuda, name, fake)
        monkeypatch.setattr(slots, "_empty_on", lambda _, nbytes: torch.full((nbytes,), 255).byte())
        monkeypatch.setattr(slots, "_copy", self.copy)
        live = states._live
        monkeypatch.setattr(states, "_live", lambda device: self.without_host(live(device)))
        own = pages.Pages._new_slot

        def new_slot(self, nbytes):
            with monkeypatch.context() as patch:
                patch.setattr(pages, "Slot", lambda n, _: Slot(n, SimpleNamespace(type="cuda")))
                return own(self, nbytes)

        monkeypatch.setattr(pages.Pages, "_new_slot", new_slot)

    def without_host(self, live):
        """What is pinned is no device's memory, but where the device is a part of the host's."""
        return {place: size for place, size in live.items() if place not in self.registered}

    def register(self, address, nbytes, _):
        self.registered[address] = nbytes

    @contextlib.contextmanager
    def on(self, stream):
        self._own.stream = stream
        self.made.append(stream)
        yield

    def copy(self, target, host):
        assert torch.is_inference_mode_enabled(), "torch refuses to write to the slot elsewhere"
        self.copies += 1
        self._own.stream.add(torch.inference_mode()(lambda: target.copy_(host)))


@pytest.fixture
def device(monkeypatch):
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)
    return Device()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_copied_pages_give_the_same_bits(kind, device, tmp_path, monkeypatch):
    """In one wave and in many, of as many texts as without copies."""
    folder = save(make_model(kind), make_tokenizer(adds_bos=True), tmp_path / "m")
    expected = llfast.score(folder, TEXTS, weights="resident", per_token=True, **OPTIONS)
    budgets = ["1GiB", 3 * least_budget(folder, TEXTS, **OPTIONS) // 2]
    plain = [score_paged(folder, TEXTS, memory_budget=each, **OPTIONS)[1] for each in budgets]
    device.install(monkeypatch)
    for budget, before in zip(budgets, plain, strict=True):
        result, statistics = score_paged(folder, TEXTS, memory_budget=budget, **OPTIONS)
        check_same(result, expected)
        assert statistics.waves == before.waves, "slots are no states of texts"
    assert plain[1].waves > 1
    assert device.copies >= sum(len(each.pages) for each in plain)
    assert device.registered == {}, "nothing stays pinned"


def test_relatives_together(device, tmp_path, monkeypatch):
    changes = [(seed, lambda name: "layers.1." in name) for seed in range(3)]
    folders = make_family(tmp_path, "llama", make_tokenizer(adds_bos=True), changes)
    expected = [llfast.score(each, TEXTS, weights="resident", **OPTIONS) for each in folders]
    device.install(monkeypatch)
    found = llfast.score_many(folders, TEXTS, weights="paged", **OPTIONS)
    for one, other in zip(found, expected, strict=True):
        assert one.values.tobytes() == other.values.tobytes()
    assert device.copies > 0
    assert device.registered == {}


def test_layers_that_stay(device, tmp_path, monkeypatch):
    folder = save(make_model("llama"), make_tokenizer(adds_bos=True), tmp_path / "m")
    expected = llfast.score(folder, TEXTS, weights="resident", per_token=True, **OPTIONS)
    device.install(monkeypatch)
    result = llfast.score(folder, TEXTS, per_token=True, **OPTIONS)
    assert result.provenance["weights"] == "kept"
    check_same(result, expected)
    assert device.registered == {}


def test_what_was_read_last_is_given_back_after_an_interrupt(device, tmp_path, monkeypatch):
    folder = save(make_model("llama"), make_tokenizer(adds_bos=True), tmp_path / "m")
    device.install(monkeypatch)
    own, taken = pages.Pages.take, []

    def take(self, page, **options):
        taken.append(page)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return own(self, page, **options)

    monkeypatch.setattr(pages.Pages, "take", take)
    with pytest.raises(KeyboardInterrupt):
        score_paged(folder, TEXTS, **OPTIONS)
    assert device.copies >= 2
    assert device.registered == {}

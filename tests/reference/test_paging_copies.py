"""Pages that are copied to a device, which here is a part of this machine's memory.

Its streams do what they are given when somebody waits for it, but it computes at once: what comes
of a host that runs ahead of its device is in tests/gpu.
"""

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import llfast
from llfast.checkpoint import Checkpoint
from llfast.paging import pages, slots, states, units
from llfast.paging.layout import Layout
from llfast.paging.slots import Slot
from tests.families import make_family
from tests.gpu import test_paging_on_gpu
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
        self.cudart = SimpleNamespace(
            cudaHostRegister=self.register, cudaHostUnregister=self.registered.pop
        )
        fakes = {
            "Stream": Stream,
            "stream": self.on,
            "current_stream": lambda *_: self.computing,
            "synchronize": lambda *_: [each.record_event().synchronize() for each in self.made],
            "cudart": lambda: self.cudart,
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


def test_memory_is_read_to_again_once_it_is_copied(device, monkeypatch):
    """And a slot is written to again once what computes with it has been given to the device."""
    device.install(monkeypatch)
    waited = []
    slot = Slot(4096, SimpleNamespace(type="cuda"))
    extents = np.array([[0, 0, 3000, 520]])
    layout = Layout(4096, extents, {"a": 520}, np.array([512]), {"a": 512})
    host = torch.frombuffer(slot.memory(), dtype=torch.uint8)
    host[520:3520] = 1
    slot.send(layout)
    assert slot.on_device[512] == 255, "nobody has waited yet"
    slot.memory()
    assert slot.on_device[512:3512].eq(1).all()
    assert slot.on_device[:512].eq(255).all()
    monkeypatch.setattr(device.computing, "record_event", lambda: waited, raising=False)
    slot.let_go()
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: event.append("waited"))
    slot.send(layout)
    assert waited == ["waited"]
    slot.close()
    assert device.registered == {}


def test_tensors_lie_on_whole_addresses_of_the_device(device, tmp_path, monkeypatch):
    """Wherever a header of any length has put them in their file."""
    folder = save(make_model("llama"), make_tokenizer(adds_bos=True), tmp_path / "m")
    (tensor, *_) = Checkpoint.open(folder).tensors.values()
    assert tensor.begin % 16, "or nothing would be moved"
    device.install(monkeypatch)
    own, found = Slot.tensor, []

    def tensor_of(self, layout, *arguments):
        tensor = own(self, layout, *arguments)
        found.append(
            (tensor.data_ptr() - self.on_device.data_ptr()) % 16 == 0 or not tensor.numel()
        )
        return tensor

    monkeypatch.setattr(Slot, "tensor", tensor_of)
    score_paged(folder, TEXTS, **OPTIONS)
    assert found
    assert all(found)


@pytest.mark.parametrize("slow", ["computing", "copying"])
def test_what_slows_a_gpu_down_in_its_tests_can_be_called(slow, device, tmp_path, monkeypatch):
    """They run where there is one; a change to slots or forwards has to be noticed elsewhere."""
    device.install(monkeypatch)
    monkeypatch.setitem(test_paging_on_gpu.OPTIONS, "device", "cpu")
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    test_paging_on_gpu.test_pages_wait_for_the_device(tmp_path, monkeypatch, slow)
    assert slept


def test_memory_that_cannot_be_pinned_is_too_little(device, monkeypatch):
    device.install(monkeypatch)

    def refuse(_):
        raise RuntimeError("out of memory (2)")

    monkeypatch.setattr(slots.torch.cuda, "check_error", refuse)
    with pytest.raises(MemoryError, match="not enough memory to pin 4,096 bytes"):
        Slot(4096, SimpleNamespace(type="cuda"))


def test_memory_that_a_system_never_pins_is_copied_more_slowly(device, tmp_path, monkeypatch):
    folder = save(make_model("llama"), make_tokenizer(adds_bos=True), tmp_path / "m")
    expected = llfast.score(folder, TEXTS, weights="resident", per_token=True, **OPTIONS)
    device.install(monkeypatch)
    monkeypatch.setattr(device.cudart, "cudaHostRegister", lambda *_: "refused")

    def refuse(result):
        if result == "refused":
            raise RuntimeError("operation not supported (801)")

    monkeypatch.setattr(slots.torch.cuda, "check_error", refuse)
    with pytest.warns(llfast.LlfastWarning, match="cannot be pinned: operation not supported"):
        result, _ = score_paged(folder, TEXTS, **OPTIONS)
    check_same(result, expected)
    assert device.copies > 0


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
            assert self._ahead is not None
            raise KeyboardInterrupt
        return own(self, page, **options)

    monkeypatch.setattr(pages.Pages, "take", take)
    with pytest.raises(KeyboardInterrupt):
        score_paged(folder, TEXTS, **OPTIONS)
    assert device.copies >= 2
    assert device.registered == {}

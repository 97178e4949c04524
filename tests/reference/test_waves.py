"""Waves of forwards: their size, what they leave behind, and what they refuse."""

import contextlib
import gc
import weakref
from contextlib import contextmanager

import greenlet
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import llfast
from llfast import models
from llfast.batches import given_tokens
from llfast.batchwise import plan_for
from llfast.borrowing import borrowed
from llfast.errors import CannotPageError, LlfastError, LlfastWarning
from llfast.paging import LoadingStatistics, PagedModel, Task, open_waves, questions, units, waves
from llfast.paging.pages import Pages
from llfast.paging.states import FORWARD_BYTES, StateMeter
from llfast.paging.weights import Weights
from tests.paging import LIMITS, check_same, least_budget, score_paged
from tests.tiny import make_model, save

pytestmark = pytest.mark.usefixtures("on_one_thread")  # models are tiny

IDS = [[(7 * row + place) % 290 + 5 for place in range(5 + 9 * row)] for row in range(8)]
OPTIONS = {"token_ids": IDS, "dtype": "float32", "token_budget": 32}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make_model("llama"), None, tmp_path_factory.mktemp("waves") / "llama")


@pytest.fixture(scope="module")
def expected(folder):
    return llfast.score(folder, weights="resident", per_token=True, **OPTIONS)


@pytest.fixture(params=[False, True], ids=["as ever", "all pages"])
def limits(request, monkeypatch):
    for limit in LIMITS if request.param else ():
        monkeypatch.setattr(units, limit, 0)


def make_paged(folder):
    source = models.open_model(folder)
    return PagedModel(source.checkpoint, source.config, dtype=torch.float32, device=CPU, name="m")


@contextmanager
def running(paged, memory_bytes=1 << 30):
    """(waves, batches)."""
    tokens = given_tokens(IDS, 256)
    with (
        borrowed(paged.model),
        open_waves(
            [paged],
            [tokens],
            [{}],
            memory_bytes=memory_bytes,
            may_keep=False,
            statistics=LoadingStatistics(),
        ) as found,
    ):
        yield found, [Task(0, batch) for batch in plan_for(paged.model, tokens, 32)]


def state(model):
    """All that hooks, replaced forwards and embeddings by rows change."""
    return [
        (
            name,
            "forward" in vars(module),
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            getattr(module, "padding_idx", None),
        )
        for name, module in model.named_modules()
    ]


@pytest.fixture
def forwards(monkeypatch):
    """All forwards that there were."""
    found = []

    class Watched(waves.Forward):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            found.append(self)

    for module in (waves, questions):
        monkeypatch.setattr(module, "Forward", Watched)
    return found


@pytest.mark.usefixtures("limits")
def test_a_model_without_its_weights_raises(folder):
    """Whatever is not there: nothing is computed with what memory happens to hold."""
    paged = make_paged(folder)
    assert all(parameter.numel() == 0 for parameter in paged.model.parameters())
    with torch.inference_mode():
        for layer in paged.model.model.layers:
            with pytest.raises(RuntimeError):
                layer.mlp(torch.randn(1, 4, 32))
        with pytest.raises(RuntimeError):
            paged.model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("forgotten", ["model.layers.0", "model.layers.1"])
def test_a_layer_that_was_forgotten_is_not_gone_into(folder, monkeypatch, forgotten):
    """Whether or not its operators would notice."""
    own = Weights.need

    def need(self, name, member=0):
        if name != forgotten:
            own(self, name, member)

    monkeypatch.setattr(Weights, "need", need)
    with (
        running(make_paged(folder)) as (found, batches),
        pytest.raises(AssertionError, match=f"{forgotten} must have its weights to be"),
    ):
        list(found.run(batches))


@pytest.mark.usefixtures("limits")
def test_only_one_layer_is_there_at_a_time(folder, monkeypatch):
    paged = make_paged(folder)
    layers = paged.model.model.layers
    seen = []
    own = LlamaAttention.forward

    def watch(self, *arguments, **options):
        there = [all(p.numel() for p in layer.parameters()) for layer in layers]
        nothing = [not any(p.numel() for p in layer.parameters()) for layer in layers]
        assert there[self.layer_idx]
        assert [not each for each in there] == nothing
        assert sum(there) == 1
        seen.append(self.layer_idx)
        return own(self, *arguments, **options)

    monkeypatch.setattr(LlamaAttention, "forward", watch)
    with running(paged) as (found, batches):
        (wave,) = found.run(batches)
    number = len(batches) + 2  # two forwards ask what the head is
    assert len(wave) == len(batches)
    assert sorted(seen) == [0] * number + [1] * number
    assert not any(p.numel() for layer in layers for p in layer.parameters())


@pytest.mark.usefixtures("limits")
def test_what_is_read_never_goes_where_a_layer_lies(folder, expected, monkeypatch):
    reads = []
    own = Pages._read

    def watch(self, page, slot):
        place = np.frombuffer(slot.memory(), np.uint8)
        begin, end = place.ctypes.data, place.ctypes.data + place.size
        for model in (reference() for reference in alive):
            for parameter in () if model is None else model.parameters():
                assert not begin <= parameter.data_ptr() < end
        reads.append(page.name)
        return own(self, page, slot)

    alive = []
    build = PagedModel.__init__

    def remember(self, *arguments, **options):
        build(self, *arguments, **options)
        alive.append(weakref.ref(self.model))

    least = least_budget(folder, **OPTIONS)
    monkeypatch.setattr(Pages, "_read", watch)
    monkeypatch.setattr(PagedModel, "__init__", remember)
    check_same(score_paged(folder, memory_budget=least, **OPTIONS)[0], expected)
    assert len(reads) > 9
    assert alive


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("when", ["between", "in the middle"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_nothing_is_left_of_a_run_that_ends_early(folder, forwards, monkeypatch, error, when):
    paged = make_paged(folder)
    before = state(paged.model)
    calls, held = [], []
    own = LlamaAttention.forward

    def fail(self, hidden_states, *arguments, **options):
        held.append(weakref.ref(hidden_states))
        calls.append(self.layer_idx)
        if when == "in the middle" and self.layer_idx == 1 and calls.count(1) > 3:
            raise error or StopAsyncIteration
        return own(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(LlamaAttention, "forward", fail)
    wanted = error or (GeneratorExit if when == "between" else StopAsyncIteration)
    with pytest.raises(wanted), running(paged, 600_000) as (found, batches):
        run = found.run(batches)
        try:
            next(run)
            raise wanted
        finally:
            if when == "between":
                run.close()
    assert len(forwards) > 4
    assert all(forward.dead for forward in forwards)
    assert state(paged.model) == before
    assert not any(p.numel() for p in paged.model.model.layers.parameters())
    del run, found
    forwards.clear()
    gc.collect()
    assert held
    assert [each() for each in held if each() is not None] == []


def test_a_model_can_be_gone_through_again_after_an_error(folder, expected):
    paged = make_paged(folder)
    with pytest.raises(KeyError), running(paged):
        raise KeyError
    totals = np.full(len(IDS), np.nan)
    with running(paged) as (found, batches):
        for each in (each for wave in found.run(batches) for each in wave):
            texts = each.batch.texts
            counts = [len(IDS[text]) - 1 for text in texts]
            for text, part in zip(texts, each.logprobs.split(counts), strict=True):
                totals[text] = part.double().sum()
    np.testing.assert_allclose(totals, expected.values, rtol=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_that_is_told_to_end_by_others_loses_no_text(folder, monkeypatch, layer):
    """Whatever throws `GreenletExit` into one: its batch must not be missing from the results."""
    own = LlamaAttention.forward
    calls, done, batches = [], None, []

    def fail(self, *arguments, **options):
        calls.append(self.layer_idx)
        if calls.count(layer) == 6:
            raise greenlet.GreenletExit
        return own(self, *arguments, **options)

    monkeypatch.setattr(LlamaAttention, "forward", fail)
    with (
        contextlib.suppress(greenlet.GreenletExit, LlfastError, AssertionError),
        running(make_paged(folder)) as (found, plan),
    ):
        batches += plan
        done = [each for wave in found.run(batches) for each in wave]
    assert calls.count(layer) >= 6
    assert done is None or len(done) == len(batches)


def visit_long_texts_twice(monkeypatch):
    own = LlamaDecoderLayer.forward

    def forward(self, hidden, *arguments, **options):
        mark = vars(self).setdefault("inside", [])
        if self.self_attn.layer_idx == 0 and hidden.shape[1] > 40 and not mark:
            mark.append(True)
            try:
                hidden = self(hidden, *arguments, **options)
            finally:
                mark.clear()
        return own(self, hidden, *arguments, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)


def test_forwards_that_go_different_ways_are_refused(folder, forwards, monkeypatch):
    visit_long_texts_twice(monkeypatch)
    message = "must go through its layers alike for all texts to be paged, got .*layers.0.*layers.1"
    with pytest.raises(CannotPageError, match=message):
        score_paged(folder, **OPTIONS)
    assert all(forward.dead for forward in forwards)


@pytest.mark.parametrize("budget", ["1GiB", 200_000])
def test_auto_loads_whole_what_goes_different_ways(folder, monkeypatch, budget):
    visit_long_texts_twice(monkeypatch)
    expected = llfast.score(folder, weights="resident", **OPTIONS)
    if budget == "1GiB":
        result = llfast.score(folder, memory_budget=budget, **OPTIONS)
    else:
        with pytest.warns(LlfastWarning, match="may not fit into memory is loaded whole, for a"):
            result = llfast.score(folder, memory_budget=budget, **OPTIONS)
    assert result.provenance["weights"] == "resident"
    assert result.values.tobytes() == expected.values.tobytes()


@pytest.mark.parametrize("most", [1, 5, 6])
def test_no_more_forwards_than_may_be(folder, expected, forwards, monkeypatch, most):
    monkeypatch.setattr(waves, "_MOST_FORWARDS", most)
    result, statistics = score_paged(folder, **OPTIONS)
    check_same(result, expected)
    if most == 1:
        assert statistics.waves > 5
    assert statistics.waves > 1
    batches = len(forwards) - 2
    assert statistics.waves >= batches / most


@pytest.mark.parametrize("most", [1, 64, 150])
def test_a_wave_that_outgrows_its_room_is_made_smaller(folder, expected, monkeypatch, most):
    """What is put back is scored later, and nothing is lost."""
    sheds = []
    monkeypatch.setattr(StateMeter, "begin", lambda *_: None)
    monkeypatch.setattr(StateMeter, "measure", lambda *_: True)
    monkeypatch.setattr(StateMeter, "has_room", lambda *_: True)
    monkeypatch.setattr(
        StateMeter, "overflows", lambda _, tokens, __: sheds.append(tokens) or tokens > most
    )
    result, statistics = score_paged(folder, **OPTIONS)
    check_same(result, expected)
    assert statistics.waves == 2, "the first is made smaller, and the second takes what is left"
    assert max(sheds) > most


def test_room_says_how_many_texts_a_wave_takes(folder, expected):
    least = least_budget(folder, **OPTIONS)
    small = score_paged(folder, memory_budget=least, **OPTIONS)[1]
    held = []
    for forwards, states in ((3, 30_000), (6, 60_000), (12, 120_000)):
        room = forwards * FORWARD_BYTES + states
        result, statistics = score_paged(folder, memory_budget=least + room, **OPTIONS)
        check_same(result, expected)
        assert statistics.state_bytes <= 1.1 * max(room, small.state_bytes)
        held.append(statistics.wave_tokens)
    assert small.wave_tokens <= held[0] <= held[1] <= held[2]
    assert held[0] < held[2]


def test_what_a_wave_holds_is_measured(folder):
    """A batch of T tokens holds its hidden states, twice for a Llama, and no weight."""
    least = least_budget(folder, **OPTIONS)
    statistics = score_paged(folder, memory_budget=least, **OPTIONS)[1]
    questions = 3 * 24
    tokens = statistics.wave_tokens
    held = statistics.state_bytes - 3 * FORWARD_BYTES
    assert 32 * 4 * tokens < held < 6 * 32 * 4 * (tokens + questions)


def test_a_forward_takes_room_beside_its_tensors():
    meter = StateMeter([make_model("llama")], 10 * FORWARD_BYTES, LoadingStatistics())
    assert meter.has_room(10**6, 10)
    assert not meter.has_room(1, 11)
    assert not meter.overflows(1, 11)
    assert meter.overflows(1, 12)


def test_states_count_where_garbage_lay():
    model, statistics = make_model("llama"), LoadingStatistics()
    meter = StateMeter([model], 1, statistics)
    gc.collect()
    place = bytearray(40_000)
    gc.disable()  # garbage must outlive the beginning, unless the meter sees to it
    try:
        cycle = [torch.frombuffer(place, dtype=torch.float32)]
        cycle.append(cycle)
        del cycle
        meter.begin(tokens=10**9)
        gc.collect()
        state = torch.frombuffer(place, dtype=torch.float32)
        assert meter.measure(1, 1, 0, [])
    finally:
        gc.enable()
    assert statistics.state_bytes == state.nbytes == 40_000

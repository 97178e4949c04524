"""Forwards that stop in front of layers: what they must never do, on a model of a few lines."""

import contextlib
import contextvars
import gc
import weakref

import greenlet
import pytest
import torch
from torch import nn
from torch.nn import functional

from llfast.paging.suspended import HEAD, Forward, stops

WIDTH = 8
VARIABLE = contextvars.ContextVar("VARIABLE", default=0)


class Model(nn.Module):
    """Layers in an order, and a head; `between` is called after each layer."""

    def __init__(self, order=(0, 1, 2), between=lambda hidden: None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)
        self.order, self.between = order, between

    def forward(self, hidden, order=None):
        for number in self.order if order is None else order:
            hidden = self.layers[number](hidden)
            self.between(hidden)
        return self.head(hidden)

    @property
    def named_layers(self):
        return {str(number): layer for number, layer in enumerate(self.layers)}


def state(model):
    """All that hooks and replaced forwards change."""
    return [
        ("forward" in vars(module), list(module._forward_pre_hooks), list(module._forward_hooks))
        for module in model.modules()
    ]


def go(forward, answer=None):
    """All stops of a forward; logits are `answer`."""
    found = []
    forward.resume()
    while forward.stopped_at is not None:
        found.append(forward.stopped_at)
        forward.resume(answer if forward.stopped_at == HEAD else None)
    return found


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def model():
    return Model()


def hidden(seed=0):
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_an_evicted_layer_raises_and_computes_nothing():
    """A weight on the meta device would not: what comes out then is whatever memory held."""
    x = hidden()
    for empty in (torch.empty(0), torch.empty(0, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError):
            functional.linear(x, empty)
        with pytest.raises(RuntimeError):
            functional.linear(x, empty, torch.randn(4))
        with pytest.raises(RuntimeError):
            functional.embedding(torch.tensor([1]), empty)
        with pytest.raises(RuntimeError):
            functional.layer_norm(x, (WIDTH,), empty)
        with pytest.raises(RuntimeError):
            x * empty


def test_a_forward_stops_in_front_of_every_layer(model):
    x = hidden()
    expected = model(x)
    with stops(model.named_layers, model.head):
        forward = Forward(lambda: model(x))
        forward.resume()
        assert forward.stopped_at == "0"
        forward.resume()
        assert forward.stopped_at == "1"
        forward.resume()
        forward.resume()
        assert forward.stopped_at == HEAD
        logits = functional.linear(forward.hidden, model.head.weight, model.head.bias)
        forward.resume(logits)
    assert forward.dead
    assert forward.hidden is None
    assert torch.equal(forward.result, expected)


def test_no_forward_goes_into_a_layer_that_is_not_there(model):
    """Whether or not anything in the layer would notice."""
    with stops(model.named_layers, model.head, {"1": lambda: False, "0": lambda: True}):
        forward = Forward(lambda: model(hidden()))
        forward.resume()
        forward.resume()
        assert forward.stopped_at == "1"
        with pytest.raises(AssertionError, match="1 must have its weights to be called"):
            forward.resume()
    assert forward.dead


def test_what_many_forwards_compute_is_their_own(model):
    inputs = [hidden(seed) for seed in range(5)]
    expected = [model(x) for x in inputs]
    model.layers, weights = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), model.layers
    for layer in model.layers:
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    with stops(model.named_layers, model.head):
        forwards = [Forward(lambda x=x: model(x)) for x in inputs]
        for forward in forwards:
            forward.resume()
        for number, layer in enumerate(model.layers):
            assert {forward.stopped_at for forward in forwards} == {str(number)}
            layer.weight, layer.bias = weights[number].weight, weights[number].bias
            for forward in forwards:
                forward.resume()
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        for forward, wanted in zip(forwards, expected, strict=True):
            logits = functional.linear(forward.hidden, model.head.weight, model.head.bias)
            forward.resume(logits)
            assert torch.equal(forward.result, wanted)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 1, 0, 1, 2, 0), (1, 1, 1), ()])
def test_any_order(order):
    model = Model(order)
    with stops(model.named_layers, model.head):
        answer = torch.zeros(2, 5)
        assert go(Forward(lambda: model(hidden())), answer) == [*map(str, order), HEAD]


def test_a_head_that_answers_itself(model):
    ramp = torch.arange(5.0)
    with stops(model.named_layers, model.head):
        forward = Forward(lambda: model(hidden()), lambda x: ramp.expand(len(x), 5))
        assert go(forward) == ["0", "1", "2"]
    assert torch.equal(forward.result, ramp.expand(2, 5))


def test_a_call_that_is_no_forward_goes_through(model):
    x = hidden()
    expected = model.layers[1](model.layers[0](x))
    with stops(model.named_layers, model.head):
        assert torch.equal(model.layers[1](model.layers[0](x)), expected)
        other = greenlet.greenlet(lambda: model.layers[1](model.layers[0](x)))
        assert torch.equal(other.switch(), expected)
        with pytest.raises(AssertionError, match="by a forward only"):
            model(x)


def test_a_context_of_its_own(model):
    """As transformers has, which collects outputs in a variable of the context."""
    seen = {}

    def call(number):
        token = VARIABLE.set(number)
        model(hidden())
        seen[number] = VARIABLE.get()
        VARIABLE.reset(token)
        return VARIABLE.get()

    VARIABLE.set(-1)
    with stops(model.named_layers, model.head):
        forwards = [Forward(lambda number=number: call(number)) for number in range(3)]
        VARIABLE.set(-2)
        for _ in range(4):
            for forward in forwards:
                forward.resume()
                assert VARIABLE.get() == -2
        for forward in forwards:
            forward.resume(torch.zeros(2, 5))
    assert seen == {0: 0, 1: 1, 2: 2}
    assert [forward.result for forward in forwards] == [-1, -1, -1]
    VARIABLE.set(0)


LEFT = []  # modes that end where they are forgotten


def leave_gradients_on():
    torch.set_grad_enabled(not torch.is_grad_enabled())


def leave_autocast_on():
    torch.set_autocast_enabled("cpu", True)


def leave_inference_mode():
    LEFT.append(torch.inference_mode(mode=False))
    LEFT[-1].__enter__()


@pytest.mark.parametrize("leave", [leave_gradients_on, leave_autocast_on, leave_inference_mode])
def test_a_model_that_leaves_torch_in_another_mode_is_found_out(leave):
    model = Model(between=lambda _: leave())
    before = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        with stops(model.named_layers, model.head):
            forward = Forward(lambda: model(hidden()))
            forward.resume()
            with pytest.raises(AssertionError, match="must leave torch's modes as they are"):
                forward.resume()
            forward.end()
    finally:
        torch.set_grad_enabled(before[0])
        torch.set_default_dtype(before[1])
        torch.set_autocast_enabled("cpu", False)
        torch.clear_autocast_cache()
        while LEFT:
            LEFT.pop().__exit__(None, None, None)


def test_modes_that_last_as_long_as_a_layer_are_no_matter(model):
    def between(x):
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            x.sum()

    model.between = between
    with stops(model.named_layers, model.head):
        assert len(go(Forward(lambda: model(hidden())), torch.zeros(2, 5))) == 4


class Park:
    """Forwards that are stopped in front of the second layer, and what their frames hold."""

    def __init__(self, model, number=3):
        self.model, self.held = model, []
        self.forwards = [Forward(self.call) for _ in range(number)]
        for forward in self.forwards:
            forward.resume()
            forward.resume()

    def call(self):
        held = torch.randn(7)
        self.held.append(weakref.ref(held))
        frame = [held]
        frame.append(frame)  # so that it is never collected while it is suspended
        self.model(hidden())
        return frame

    def check_gone(self):
        assert all(forward.dead for forward in self.forwards)
        assert len(self.held) == len(self.forwards)
        gc.collect()
        assert [reference() for reference in self.held] == [None] * len(self.held)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, greenlet.GreenletExit])
def test_nothing_is_left_of_forwards_that_are_ended(model, error):
    with pytest.raises(error), stops(model.named_layers, model.head):
        park = Park(model)
        try:
            raise error
        finally:
            for forward in park.forwards:
                forward.end()
    park.check_gone()


def test_a_forward_that_is_not_ended_would_be_there_for_ever(model):
    with stops(model.named_layers, model.head):
        park = Park(model)
        references = park.held
        gc.collect()
        assert all(reference() is not None for reference in references)
        for forward in park.forwards:
            forward.end()
    park.check_gone()


def test_one_that_has_not_begun_and_one_that_is_through_end_as_well(model):
    with stops(model.named_layers, model.head):
        fresh, through = Forward(lambda: model(hidden())), Forward(lambda: model(hidden()))
        go(through, torch.zeros(2, 5))
        for forward in (fresh, through, fresh):
            forward.end()
            assert forward.dead
            assert forward.result is None


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_what_a_forward_raises_comes_out_of_it(model, error):
    def between(_):
        raise error

    with stops(model.named_layers, model.head):
        park = Park(Model())  # which has no hooks, and so is through at once
        model.between = between
        forward = Forward(lambda: model(hidden()))
        forward.resume()
        with pytest.raises(type(error)):
            forward.resume()
        assert forward.dead
    assert all(each.dead for each in park.forwards)


def test_a_forward_that_does_not_end_is_found_out(model):
    class Stubborn(Model):
        def forward(self, hidden):
            for layer in self.layers:
                try:
                    hidden = layer(hidden)
                except greenlet.GreenletExit:
                    continue
            return hidden

    model = Stubborn()
    with stops(model.named_layers, model.head):
        forward = Forward(lambda: model(hidden()))
        forward.resume()
        with pytest.raises(AssertionError, match="must end when it is told to"):
            forward.end()
        with pytest.raises(KeyError):
            forward.throw(KeyError)
        forward.end()


def test_blocks_around_a_layer_are_left_when_a_forward_ends(model):
    """So the thread is in the modes that it was in."""
    left = []

    class Careful(Model):
        def forward(self, hidden):
            try:
                return super().forward(hidden)
            finally:
                left.append(True)

    model = Careful()
    with stops(model.named_layers, model.head):
        Forward(lambda: None).end()
        forward = Forward(lambda: model(hidden()))
        forward.resume()
        forward.end()
    assert left == [True]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, greenlet.GreenletExit])
def test_hooks_are_gone_on_every_way_out(model, error):
    before = state(model)
    own = model.layers[0].register_forward_pre_hook(lambda *_: None)
    model.head.forward = mine = lambda x: x
    with_own = state(model)
    with contextlib.suppress(error or ()), stops(model.named_layers, model.head):
        assert state(model) != with_own
        if error is not None:
            raise error
    assert state(model) == with_own
    assert model.head.forward is mine
    own.remove()
    del model.head.forward
    assert state(model) == before


def test_a_forward_stops_before_other_hooks_of_a_layer(model):
    """One may want the weights that are to come."""
    seen = []
    model.layers[0].register_forward_pre_hook(lambda *_: seen.append("hook"))
    with stops(model.named_layers, model.head):
        forward = Forward(lambda: model(hidden()))
        forward.resume()
        assert seen == []
        forward.resume()
        assert seen == ["hook"]
        forward.end()

"""Where a model's hidden states are, and how to read them as its head reads the last one.

Both are found by watching a forward pass. A layer is a call of an item of the model's list of
layers; one that is called twice counts twice. State 0 is what enters the first layer, state i what
comes out of the i-th. The read-out is what lies between the last state and the head: a norm, most
often, and in some models a projection, too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .dtypes import dtype_name
from .errors import ScoringError, UnsupportedModelError
from .head import Head, hidden_states, run_model
from .traits import listed_modules


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lens:
    """A way into a model.

    Attributes:
        layers: the modules that are its layers.
        calls: how often they are called in a forward pass, L.
        read_out: what is done between the last of them and the head, one after the other.
    """

    layers: tuple[nn.Module, ...]
    calls: int
    read_out: tuple[Callable[[Tensor], Tensor], ...]

    def read(self, state: Float[Tensor, "B S *state"]) -> Float[Tensor, "B S D"]:
        """What would enter the head if this were the last state."""
        for step in self.read_out:
            state = step(state)
        return state

    @contextlib.contextmanager
    def watch(self, see: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Let a forward pass show its states, each as soon as it is there, with its number.

        Later layers may write over a state, so it is to be used at once.

        Raises:
            UnsupportedModelError: if layers are not called as often as on the probe.
        """
        seen = 0

        def show(state: Tensor | None) -> None:
            nonlocal seen
            assert state is not None, "there was one on the probe"
            see(seen, state)
            seen += 1

        with _shown(self.layers, show):
            yield
        if seen != self.calls + 1:
            raise UnsupportedModelError(
                f"layers must be called {self.calls} times in every forward pass, got one with "
                f"{seen - 1} calls; leave out the longest texts"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A module, what it was given by place and by name, and what it made of it."""

    module: nn.Module
    given: tuple[Any, ...]
    out: Any


def find_lens(model: Any, head: Head, probe: Int64[Tensor, " S"]) -> Lens:
    """Find a model's layers and its read-out, and try them.

    Args:
        model: a transformers causal language model.
        head: of it.
        probe: a few valid token ids.

    Raises:
        UnsupportedModelError: if there is no list of layers, or no chain of modules that makes what
            enters the head of the last layer's output, and of nothing else.
    """
    calls: list[_Call] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        calls.append(_Call(module, (*given, *named.values()), out))

    with contextlib.ExitStack() as stack:
        entered = stack.enter_context(hidden_states(head))
        for module in model.modules():
            stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
        run_model(model, probe[None])
    layers = _layers(model, {call.module for call in calls})
    passed = [call for call in calls if call.module in layers]
    states = [_state(found) for found in (passed[0].given, *(call.out for call in passed))]
    last = states[-1]
    shapes = {None if state is None else tuple(state.shape) for state in states}
    if last is None or len(shapes) > 1:
        listed = " and ".join(sorted(map(str, shapes)))
        _refuse(model, f"whose hidden states have the shapes {listed}")
    chain = _read_out(model, head, calls, last, entered[0])
    lens = Lens(layers=layers, calls=len(passed), read_out=chain)
    _try(model, head, lens, probe)
    return lens


def refuse_not_finite(model: Any, probe: Int64[Tensor, " S"]) -> None:
    """Refuse a model whose own numbers are not finite, by the first place where they are not.

    Args:
        model: a transformers causal language model.
        probe: a few valid token ids.

    Raises:
        ScoringError: if they are not, for a token of the probe.
        UnsupportedModelError: if they are not, and there is no list of layers.
    """
    called: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_hook(lambda each, *_: called.add(each)))
        # Of the whole softmax: a model may rule words out by -inf.
        of_head = _odd_number(run_model(model, probe[None]).logsumexp(-1))
    if of_head is None:
        return
    odd: dict[str, float | None] = {}  # by place, in the order of a forward pass

    def see(state: Tensor | None) -> None:
        odd[f"layer {len(odd)}" if odd else "the embedding (layer 0)"] = _odd_number(state)

    def see_entering(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        odd[f"behind layer {len(odd) - 1}"] = _odd_number(_state((given, named)))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_shown(_layers(model, called), see))
        head = model.get_output_embeddings()
        if head is not None:
            stack.enter_context(head.register_forward_pre_hook(see_entering, with_kwargs=True))
        run_model(model, probe[None])
    odd[_head_name(model)] = of_head
    place, number = next((place, number) for place, number in odd.items() if number is not None)
    dtype = dtype_name(model.dtype)
    advice = "look for NaN and inf in its weights"
    if dtype == "float16":
        advice = "score it with dtype bfloat16 or float32"
    raise ScoringError(
        f"model must give finite numbers, got {number} from {place} on, in {dtype}; {advice}"
    )


def _odd_number(state: Tensor | None) -> float | None:
    """The first that is not finite."""
    odd = None if state is None else state[~state.isfinite()]
    return None if odd is None or not len(odd) else odd[0].item()


def _head_name(model: Any) -> str:
    """What to call the head: in many models it is the embedding's weight once more."""
    weights = [
        getattr(module, "weight", None)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    if weights[0] is not None and weights[0] is weights[1] and _odd_number(weights[0]) is not None:
        return "the embedding, which is the head, too,"
    return "the head"


@contextlib.contextmanager
def _shown(layers: Sequence[nn.Module], show: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Let a forward pass show what enters the first of its layers, and what comes out of each."""
    is_first = True

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            show(_state((given, named)))

    def after(_module: nn.Module, _given: tuple[Any, ...], out: Any) -> None:
        show(_state(out))

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
            stack.enter_context(layer.register_forward_hook(after))
        yield


def _layers(model: Any, called: set[nn.Module]) -> tuple[nn.Module, ...]:
    """The items of the heaviest list that a forward pass goes through, and others of their kind."""
    lists: dict[str, list[nn.Module]] = {}
    for name, module in listed_modules(model):
        if module in called:
            lists.setdefault(name.rpartition(".")[0], []).append(module)
    if not lists:
        raise UnsupportedModelError(
            f"model must have a list of layers to be read out at, got a {type(model).__name__}"
        )

    def weight_bytes(items: Sequence[nn.Module]) -> int:
        return sum(parameter.nbytes for item in items for parameter in item.parameters())

    kinds = {type(item) for item in max(lists.values(), key=weight_bytes)}
    found = (item for items in lists.values() for item in items if type(item) in kinds)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class _Division:
    """By a whole number, and rounding."""

    number: int
    dtype: torch.dtype

    def __call__(self, state: Tensor) -> Tensor:
        return (state / self.number).to(self.dtype)


def _read_out(
    model: Any, head: Head, calls: Sequence[_Call], last: Tensor, entered: Tensor
) -> tuple[Callable[[Tensor], Tensor], ...]:
    """The steps that make what entered the head of the last state.

    Tensors are told apart by where they are in memory: all of them are still there.
    """
    taker: nn.Module = head.module
    wanted, end = entered, len(calls)
    steps: list[nn.Module | _Division] = []
    while not _is_same(wanted, last):
        # Modules within others are the first to end.
        made = ((number, call.out) for number, call in enumerate(calls[:end]) if _is_plain(call))
        maker = next((number for number, out in made if _is_same(out, wanted)), None)
        if maker is not None:
            taker, wanted, end = calls[maker].module, calls[maker].given[0], maker
            steps.append(taker)
            continue
        division = _divided(wanted, last, calls[:end])
        if division is None:
            name = next(name for name, module in model.named_modules() if module is taker)
            _refuse(model, f"in which no module alone makes what enters {name}")
        wanted, step = division
        steps.append(step)
    if not any(isinstance(step, nn.Module) for step in steps):
        _refuse(model, "whose last layer's output enters the head as it is")
    return tuple(reversed(steps))


def _divided(
    wanted: Tensor, last: Tensor, calls: Sequence[_Call]
) -> tuple[Tensor, _Division] | None:
    """Where a model divides without a module for it (RWKV, MiniCPM3): what, and by what."""
    largest = wanted.abs().argmax()
    made = (call.out for call in reversed(calls) if _is_plain(call))
    for each in (last, *made):
        if each.shape == wanted.shape and not _is_same(each, wanted):
            ratio = (each.flatten()[largest] / wanted.flatten()[largest]).item()
            if 0.5 < ratio < math.inf:
                step = _Division(round(ratio), wanted.dtype)
                if torch.equal(step(each), wanted):
                    return each, step
    return None


def _is_plain(call: _Call) -> bool:
    """Whether a module has made a tensor of another one, and of nothing else."""
    return (
        len(call.given) == 1 and isinstance(call.given[0], Tensor) and isinstance(call.out, Tensor)
    )


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and (a.shape, a.dtype) == (b.shape, b.dtype)


def _try(model: Any, head: Head, lens: Lens, probe: Int64[Tensor, " S"]) -> None:
    """Refuse a model whose last state is not read as its head reads it, to the bit."""
    read: list[Tensor] = []

    def see(number: int, state: Tensor) -> None:
        if number == lens.calls:
            read.append(lens.read(state))

    with lens.watch(see), hidden_states(head) as entered:
        run_model(model, probe[None])
    if not torch.equal(read[0], entered[0]):
        _refuse(model, "in which they alone do not make what enters the head")


def _state(found: Any) -> Tensor | None:
    """The first floating-point tensor among a layer's arguments or results."""
    if isinstance(found, Tensor):
        return found if found.is_floating_point() else None
    if isinstance(found, Mapping):
        found = tuple(found.values())
    if isinstance(found, tuple | list):
        return next((state for each in found if (state := _state(each)) is not None), None)
    return None


def _refuse(model: Any, what: str) -> NoReturn:
    raise UnsupportedModelError(
        "model must have a final norm between its last layer and its head, got a "
        f"{type(model).__name__} {what}"
    )

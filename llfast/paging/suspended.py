"""Forwards that stop in front of every layer, so that many can go through it before the next.

Each forward is an ordinary call of the model in a greenlet of its own; hooks in front of the layers
switch back to whoever started it. Nothing here knows how a model is written.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from llfast.head import replaced_forward

HEAD = "head"  # where a forward stops that wants logits of the head


class Forward(greenlet.greenlet):
    """One call of a model, to be resumed until it has a result.

    Attributes:
        stopped_at: the name of the layer that it waits for; None before and after.
        result: what the call returned.
        hidden: what went into the head, if it stopped there.
        member: the number of the model that is called.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        at_head: Callable[[Tensor], Tensor] | None = None,
        *,
        member: int = 0,
        during: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Prepare.

        Args:
            call: runs the model.
            at_head: what the head returns; None stops to ask.
            member: the number of the model.
            during: is entered for as long as the call runs, and left while it is suspended.
        """
        super().__init__(call)
        # A greenlet begins with an empty context; transformers keeps things in it.
        self.gr_context = contextvars.copy_context()
        self.at_head = at_head
        self._during = nullcontext() if during is None else during
        self.member = member
        self.stopped_at: str | None = None
        self.result: Any = None
        self.hidden: Tensor | None = None

    def resume(self, answer: Tensor | None = None) -> None:
        """Go on to the next stop, or to the end."""
        modes = _modes()
        with self._during:
            value = self.switch() if answer is None else self.switch(answer)
        assert _modes() == modes, "a model must leave torch's modes as they are between layers"
        if self.dead:
            assert not isinstance(value, greenlet.GreenletExit), "a forward was ended by others"
            self.stopped_at, self.result = None, value
        else:
            self.stopped_at = value

    def end(self) -> None:
        """Unwind the call, wherever it is; a suspended frame would never be collected."""
        self.hidden = self.result = None
        if not self.dead:
            self.throw(greenlet.GreenletExit)
        assert self.dead, "a suspended forward must end when it is told to"


def _modes() -> tuple[object, ...]:
    """What torch keeps by thread, and greenlets would share."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        stream,
    )


@contextmanager
def stops(
    layers: Mapping[str, nn.Module],
    head: nn.Module,
    is_there: Mapping[str, Callable[[], bool]] | None = None,
) -> Iterator[None]:
    """Let forwards stop in front of layers, and ask what a head returns.

    No forward goes into a layer of which `is_there` says no: what an operator makes of a weight
    that is elsewhere need not be an error. Calls outside of a `Forward` go through as ever, except
    that they must not reach the head.
    """

    def stop_at(name: str) -> Callable[[nn.Module, Any], None]:
        check = (is_there or {}).get(name)

        def stop(_module: nn.Module, _args: Any) -> None:
            current = greenlet.getcurrent()
            if isinstance(current, Forward):
                assert current.parent is not None
                current.parent.switch(name)
                assert check is None or check(), f"{name} must have its weights to be called"

        return stop

    def at_head(hidden: Tensor) -> Tensor:
        current = greenlet.getcurrent()
        assert isinstance(current, Forward), "the head is asked for by a forward only"
        if current.at_head is not None:
            return current.at_head(hidden)
        assert current.parent is not None
        current.hidden = hidden
        logits: Tensor = current.parent.switch(HEAD)
        current.hidden = None
        return logits

    handles = [
        module.register_forward_pre_hook(stop_at(name), prepend=True)
        for name, module in layers.items()
    ]
    try:
        with replaced_forward(head, at_head):
            yield
    finally:
        for handle in handles:
            handle.remove()

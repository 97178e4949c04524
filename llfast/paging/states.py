"""How much memory suspended forwards hold."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .statistics import LoadingStatistics

# No model tried holds more between layers, in hidden states of a token (Llama holds 2.04).
_MOST_HIDDEN_STATES = 32
# Beside its tensors: its stack, its frames, what tensors are made of. Measured by RSS for 3,000 of
# 12 tokens, before layers of GPT-2, Llama and Mixtral: 31 to 38 KB (greenlet 3.5, Python 3.11).
FORWARD_BYTES = 48 << 10
_MEASURE_EVERY = 1.5  # times as many layers as at the last time: it looks at all live objects


class StateMeter:
    """Says how many tokens fit into memory, by looking at what tensors there are.

    Attributes:
        bytes_per_token: the most that was seen, of tensors.
    """

    def __init__(
        self, models: Sequence[Any], room_bytes: int, statistics: LoadingStatistics
    ) -> None:
        """Args: models: whose weights do not count. room_bytes: for all states of a wave."""
        self.bytes_per_token = 0.0
        self._models, self._room, self._statistics = models, room_bytes, statistics
        self._before: set[int] = set()
        self._next = 0.0

    def begin(self, tokens: int) -> None:
        """Prepare, before the first forward of a wave, when so many tokens are still to come.

        Few tokens in much memory are not measured: it takes a quarter of a second each time.
        """
        model = self._models[0]
        width = getattr(model.config.get_text_config(), "hidden_size", None)
        self._next = 0.0
        if width and tokens * width * model.dtype.itemsize * _MOST_HIDDEN_STATES < self._room:
            self._next = float("inf")
        else:
            gc.collect()  # a state may come to lie where something lay that nobody needs
            self._before = set(_live(model.device))

    def measure(self, layers: int, tokens: int, forwards: int, read: Iterable[Tensor]) -> bool:
        """After some layers, of the first wave: learn what a token holds.

        Args:
            layers: how many.
            tokens: of all that went through them.
            forwards: that are suspended.
            read: weights that are there, but in no model.

        Returns: whether it was measured; it is now and then.
        """
        if layers < self._next:
            return False
        self._next = layers * _MEASURE_EVERY
        known = {tensor.untyped_storage().data_ptr() for tensor in read}
        for model in self._models:
            known |= {each.untyped_storage().data_ptr() for each in model.parameters()}
            known |= {each.untyped_storage().data_ptr() for each in model.buffers()}
        live = _live(self._models[0].device)
        held = sum(size for place, size in live.items() if place not in self._before | known)
        in_all = held + forwards * FORWARD_BYTES
        self._statistics.state_bytes = max(self._statistics.state_bytes, in_all)
        self.bytes_per_token = max(self.bytes_per_token, held / tokens)
        return True

    def has_room(self, tokens: int, forwards: int) -> bool:
        """Whether a wave may have so many tokens, in so many forwards."""
        return self._held(tokens, forwards) <= self._room

    def overflows(self, tokens: int, forwards: int) -> bool:
        """Whether a wave holds clearly more than was expected of it."""
        return self._held(tokens, forwards) > 1.1 * self._room

    def _held(self, tokens: int, forwards: int) -> float:
        return self.bytes_per_token * tokens + FORWARD_BYTES * forwards


def _live(device: torch.device) -> dict[int, int]:
    """Bytes of every storage on a device that a tensor refers to, by its address."""
    found: dict[int, int] = {}
    for each in gc.get_objects():
        # Exactly these: tensors of other kinds may have no storage, and are not a model's states.
        plain = type(each) in (Tensor, nn.Parameter)
        if plain and each.layout == torch.strided and each.device.type == device.type:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found

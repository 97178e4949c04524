"""A model whose weights are paged, from its checkpoint to log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Int64
from torch import Tensor

from llfast.batches import TokenizedTexts
from llfast.checkpoint import Checkpoint
from llfast.errors import CannotPageError
from llfast.head import linear_head
from llfast.linear import linear_path

from .pages import Pages
from .skeleton import Skeleton, why_not
from .statistics import LoadingStatistics
from .suspended import stops
from .units import find_units
from .waves import Waves
from .weights import Weights

_ROOM_FOR_WORK = 1.1  # times the weights, where all of them are to stay


class PagedModel:
    """A model without weights, and all that is known of them before one is read.

    Attributes:
        model: the transformers model, in evaluation mode; only `waves` can run it.
        head: its output layer.
        linear: the path of its linear layers, the same as if it were all there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        *,
        dtype: torch.dtype,
        device: torch.device,
        name: str,
    ) -> None:
        """Build the model.

        Raises:
            CheckpointError: if the checkpoint does not fill it.
            CannotPageError: if it cannot be paged; `score` can load it whole.
        """
        self._checkpoint = checkpoint
        self._name = name
        self._skeleton = Skeleton(checkpoint.plain, config, dtype=dtype, device=device, name=name)
        if self._skeleton.converts and (problem := why_not()) is not None:
            raise CannotPageError(
                f"{name} must be loaded whole by transformers {transformers.__version__}, whose "
                f"loading is not as llfast knows it: {problem}"
            )
        self.model = self._skeleton.model
        head = linear_head(self.model)
        self.linear = linear_path(device, dtype, model=self.model, leave_out=head)
        self._units = find_units(self._skeleton, self.linear)
        self.head = self._units.head.module
        self._skeleton.evict(self._skeleton.places)

    @contextmanager
    def waves(
        self,
        tokens: TokenizedTexts,
        *,
        memory_bytes: int,
        may_keep: bool,
        rows: int,
        probe: Int64[Tensor, " S"],
        statistics: LoadingStatistics,
    ) -> Iterator[Waves]:
        """Read what stays in memory, and be ready to score.

        Args:
            tokens: of all texts.
            memory_bytes: for weights, and for what suspended forwards hold.
            may_keep: let layers stay once they are read, if they all fit.
            rows: how many rows linear layers will mostly be given.
            probe: a few tokens to try the model's head with.
            statistics: what is filled in.

        Raises:
            ValueError: if `memory_bytes` does not hold two pages.
        """
        with ExitStack() as stack:
            pages = stack.enter_context(Pages(self._checkpoint, self._skeleton.device, statistics))
            weights = Weights(
                self._skeleton,
                self._units,
                pages,
                statistics,
                linear=self.linear,
                rows=rows,
            )
            weights.keep = may_keep and weights.kept_bytes * _ROOM_FOR_WORK <= memory_bytes
            room = memory_bytes - (weights.kept_bytes if weights.keep else weights.paged_bytes)
            if room <= 0:
                largest = weights.largest
                raise ValueError(
                    f"memory_budget must hold two pages of {self._name}, whose largest is "
                    f"{largest.name} with {largest.page.nbytes:,} bytes, and what stays in memory, "
                    f"got {memory_bytes:,}; it takes more than {weights.paged_bytes:,}"
                )
            stack.enter_context(weights)
            layers = {name: unit.module for name, unit in weights.layers.items()}
            stack.enter_context(stops(layers, self.head))
            yield Waves(
                self._skeleton,
                weights,
                self._units.head,
                tokens,
                statistics,
                room_bytes=room,
                probe=probe,
            )

"""A model whose weights are paged, from its checkpoint to log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import transformers

from llfast.batches import TokenizedTexts
from llfast.checkpoint import Checkpoint
from llfast.errors import CannotPageError
from llfast.head import linear_head
from llfast.linear import linear_path
from llfast.safetensors_file import StoredTensor
from llfast.traits import probe_tokens

from .members import Member, Plan
from .pages import Pages
from .questions import Subject
from .room import Room, refuse_if_alone_is_less, share_out
from .sharing import Equals
from .skeleton import Skeleton, why_not
from .statistics import LoadingStatistics
from .suspended import stops
from .units import find_units
from .waves import Waves
from .weights import Weights

# Of the room for suspended forwards, a table of words may take so much; from the host, the rows of
# each batch would be gathered and copied while a GPU has nothing to do.
_SHARE_FOR_TABLE = 1 / 3


class PagedModel:
    """A model without weights, and all that is known of them before one is read.

    Attributes:
        model: the transformers model, in evaluation mode; only `open_waves` can run it.
        checkpoint: where its weights are.
        device: where it runs.
        linear: the path of its linear layers, the same as if it were all there.
        name: what it is called.
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
        self.checkpoint, self.device, self.name = checkpoint, device, name
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
        self._skeleton.evict(self._skeleton.places)

    def member(self, equals: Mapping[str, StoredTensor]) -> Member:
        """The model as one of several; `equals` are read in the stead of its own tensors."""
        return Member(
            name=self.name,
            skeleton=self._skeleton,
            units=self._units,
            linear=self.linear,
            equals=equals,
        )

    def room(self, memory_bytes: int, *, may_keep: bool) -> Room:
        """How `open_waves` would share memory out; reads no weights.

        Raises:
            ValueError: if `memory_bytes` does not hold two pages.
        """
        with Pages(self.checkpoint.weights, self.device, LoadingStatistics()) as pages:
            plan = Plan([self.member({})], pages.slot_bytes)
            return share_out(plan, memory_bytes, may_keep=may_keep, name=self.name)


@contextmanager
def open_waves(
    models: Sequence[PagedModel],
    tokens: Sequence[TokenizedTexts],
    equals: Sequence[Equals],
    *,
    memory_bytes: int,
    may_keep: bool,
    statistics: LoadingStatistics,
) -> Iterator[Waves]:
    """Read what stays in memory, and be ready to score.

    Args:
        models: of one kind, in one dtype on one device.
        tokens: of all texts, for each model.
        equals: for each, what is read in the stead of its own tensors, see `relatives`.
        memory_bytes: for weights, and for what suspended forwards hold.
        may_keep: let the layers of a single model stay once they are read, if they all fit.
        statistics: what is filled in.

    Raises:
        CannotPageError: if the models are not of one kind; from the first wave, if it does not pay
            to go through them together.
        ValueError: if `memory_bytes` does not hold two pages.
    """
    members = [model.member(each) for model, each in zip(models, equals, strict=True)]
    layers = [{unit.name: unit.module for unit in member.units.layers} for member in members]
    if any(each.keys() != layers[0].keys() for each in layers):
        names = ", ".join(member.name for member in members)
        raise CannotPageError(f"models must have the same layers to go together, got {names}")
    read = (member.read(each) for member in members for each in member.tensors)
    files = sorted({tensor.path for tensor in read})  # as `room` has them: slots are as large
    with ExitStack() as stack:
        pages = stack.enter_context(Pages(files, models[0].device, statistics))
        counts = [int(each.token_counts.sum()) for each in tokens]
        weights = Weights(
            members,
            pages,
            statistics,
            most_table_rows=_most_table_rows(models, counts),
        )
        name = models[0].name if len(models) == 1 else f"{len(models)} models"
        is_alone = len(models) == 1
        room = share_out(weights.plan, memory_bytes, may_keep=may_keep and is_alone, name=name)
        weights.keep = room.keeps_weights
        weights.keep_table = weights.table_bytes <= _SHARE_FOR_TABLE * room.states_bytes
        states_bytes = room.states_bytes - (weights.table_bytes if weights.keep_table else 0)
        check = None
        if not is_alone:
            plan = Plan(members[:1], pages.slot_bytes)
            alone = share_out(plan, memory_bytes, may_keep=may_keep, name=models[0].name)
            check = partial(refuse_if_alone_is_less, weights.plan, room, alone, counts)
        stack.enter_context(weights)
        for member, modules in zip(members, layers, strict=True):
            is_there = {
                unit.name: member.skeleton.watch(unit.places) for unit in member.units.layers
            }
            stack.enter_context(stops(modules, member.units.head.module, is_there))
        subjects = [
            Subject(
                model=member.skeleton.model,
                stored_head=member.units.head,
                tokens=own,
                probe=probe_tokens(member.skeleton.model),
            )
            for member, own in zip(members, tokens, strict=True)
        ]
        yield Waves(subjects, weights, statistics, room_bytes=states_bytes, check=check)


def _most_table_rows(models: Sequence[PagedModel], tokens: Sequence[int]) -> int:
    """Where memory_budget is for a device's memory alone, the host's may hold a table at least.

    Not of every one of several models. With fewer tokens than rows, these are fewer to read.
    """
    if models[0].device.type == "cpu" or len(models) > 1:
        return 0
    return tokens[0]

"""Scoring by waves: many batches go through one layer before any goes through the next.

A wave is as many batches as fit into memory while they are suspended, which the first one is
measured for. What a wave needs of the model is read once, so the weights are read as often as there
are waves, whatever the number of batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from jaxtyping import Float, Float32, Int64
from torch import Tensor

from llfast.batches import Batch
from llfast.errors import CannotPageError
from llfast.forward import BatchInputs
from llfast.head import Head, run_model
from llfast.kernels import PartialLogprobs
from llfast.pointwise import TextByText

from .questions import Questions, Subject
from .states import StateMeter
from .statistics import LoadingStatistics
from .suspended import HEAD, Forward
from .weights import Weights

_MOST_FORWARDS = 4096  # in a wave; each has a stack
# Where weights stay, the first wave computes while they are read; more waves cost no reading, and
# a batch alone leaves its states in the processor's cache.
_FORWARDS_WHILE_READING = 16


@dataclass(frozen=True, slots=True)
class Task:
    """A batch for one of the models."""

    member: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class Scored:
    """A batch with the log-probabilities of its scored tokens, text after text, on the host."""

    member: int
    batch: Batch
    logprobs: Float32[Tensor, " T"]


@dataclass(slots=True, eq=False)
class _Body:
    """What a batch has become once it is through the model's body."""

    hidden: Float[Tensor, "T D"]
    targets: Int64[Tensor, " T"]


@dataclass(slots=True, eq=False)
class _Wave:
    """The calls that are under way."""

    tasks: list[Task] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)  # of these
    questions: dict[int, Questions] = field(default_factory=dict)  # by member

    @property
    def all(self) -> list[Forward]:
        asked = (forward for each in self.questions.values() for forward in each.forwards)
        return [*self.forwards, *asked]

    @property
    def members(self) -> list[int]:
        return sorted({forward.member for forward in self.all})

    @property
    def count(self) -> int:
        """Of all forwards."""
        return len(self.forwards) + sum(len(each.forwards) for each in self.questions.values())

    @property
    def tokens(self) -> int:
        return _tokens(self.tasks)


class Waves:
    """Gives the log-probabilities of batches, a wave at a time.

    Attributes:
        subjects: the models; their heads are found in the first wave that each is a part of.
        keeps_weights: whether they stay once they are there.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        weights: Weights,
        statistics: LoadingStatistics,
        *,
        room_bytes: int,
        check: Callable[[float], None] | None,
    ) -> None:
        """Prepare.

        Args:
            subjects: the models.
            weights: theirs.
            statistics: filled in.
            room_bytes: for what suspended forwards hold.
            check: is told how many bytes a token holds, as soon as that is known, and may refuse.
        """
        self.subjects = subjects
        self._check = check
        self.keeps_weights = weights.keep
        self._weights, self._statistics = weights, statistics
        self._meter = StateMeter([each.model for each in subjects], room_bytes, statistics)
        self._measures = True
        self._by_text = [TextByText() for _ in subjects]

    def run(self, tasks: Sequence[Task]) -> Iterator[list[Scored]]:
        """What each wave scored.

        Args:
            tasks: of one model after the other: so most waves are of few models, and a wave of one
                reads no more than that one.

        Raises:
            CannotPageError: if a model's forwards do not go through its layers alike.
            UnsupportedModelError: if it is not causal, or its head is not a linear one.
        """
        pending = deque(tasks)
        while pending:
            wave = _Wave()
            try:
                yield self._run_wave(pending, wave)
            finally:
                with ExitStack() as stack:  # all of them, whatever one does
                    for forward in wave.all:
                        stack.callback(forward.end)

    def _run_wave(self, pending: deque[Task], wave: _Wave) -> list[Scored]:
        """Take batches off `pending`, as many as have room, and score them."""
        self._weights.begin_wave(pending[0].member)
        if self._measures:
            self._meter.begin(_tokens(pending))
        self._take(pending, wave, ask=False)
        leader = wave.forwards[0]
        passed = self._lead(leader)
        if self._measures:
            self._meter.measure(1, wave.tokens, wave.count, self._weights.held)
            if self._check is not None:
                self._check(self._meter.bytes_per_token)
        self._ask(wave, leader.member)
        self._admit(pending, wave)
        self._weights.expect(wave.members)
        followers = [forward for forward in wave.all if forward is not leader]
        for forward in self._batch_by_batch(wave, followers):
            forward.resume()
        for name in passed:
            if followers and self._common_stop(followers) != name:
                raise self._other_order({name, followers[0].stopped_at})
            self._go_through(name, followers)
        while stop := self._common_stop(wave.all):
            self._go_through(stop, wave.all)
            passed.append(stop)
            if self._measures and self._meter.measure(
                len(passed), wave.tokens, wave.count, self._weights.held
            ):
                self._shed(pending, wave)
        self._measures = False
        self._statistics.wave_tokens = max(self._statistics.wave_tokens, wave.tokens)
        self._weights.next_member = pending[0].member if pending else None
        return self._score(wave)

    def _take(self, pending: deque[Task], wave: _Wave, *, ask: bool = True) -> None:
        """One batch off `pending`, with what has to be asked of its model."""
        task = pending.popleft()
        if ask:
            self._ask(wave, task.member)
        wave.tasks.append(task)
        wave.forwards.append(self._forward(task))

    def _ask(self, wave: _Wave, member: int) -> None:
        subject = self.subjects[member]
        if subject.head is None and member not in wave.questions:
            wave.questions[member] = Questions(subject, member)

    def _forward(self, task: Task) -> Forward:
        """A suspended call of a model on a batch; its result is what is scored of it."""
        subject = self.subjects[task.member]
        inputs = BatchInputs.of(subject.tokens, task.batch, subject.model.device)
        seen: list[Tensor] = []
        by_text = self._by_text[task.member]
        mode = by_text.during(inputs.input_ids)

        def at_head(hidden: Tensor) -> Tensor:
            seen.append(inputs.scored(hidden))
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        def call() -> _Body:
            run_model(subject.model, inputs.input_ids)
            by_text.learn(inputs.input_ids, mode)
            return _Body(seen[0], inputs.targets)

        return Forward(call, at_head, member=task.member, during=mode)

    def _lead(self, forward: Forward) -> list[str]:
        """Take one forward through the first layer; the names of what it went through."""
        passed: list[str] = []
        forward.resume()
        if forward.stopped_at not in (None, HEAD):
            passed.append(str(forward.stopped_at))
            self._weights.need(passed[0], forward.member)
            forward.resume()
        return passed

    def _batch_by_batch(self, wave: _Wave, followers: Iterable[Forward]) -> list[Forward]:
        """Those of one batch after another: its words are looked up once for all models."""
        order = {
            forward: task.batch.texts
            for forward, task in zip(wave.forwards, wave.tasks, strict=True)
        }
        return sorted(followers, key=lambda forward: order.get(forward, ()))

    def _go_through(self, name: str, forwards: Sequence[Forward]) -> None:
        """Resume forwards that stop in front of a layer, one model after the other."""
        by_member: dict[int, list[Forward]] = {}
        for forward in forwards:
            by_member.setdefault(forward.member, []).append(forward)
        for member in sorted(by_member):
            self._weights.need(name, member)
            for forward in by_member[member]:
                forward.resume()

    def _admit(self, pending: deque[Task], wave: _Wave) -> None:
        """Take batches off `pending` while there is room for them."""
        most = _MOST_FORWARDS
        if self.keeps_weights:
            most = _FORWARDS_WHILE_READING if wave.questions else 1
        tokens = wave.tokens
        while pending and len(wave.forwards) < most:
            tokens += _tokens([pending[0]])
            if not self._meter.has_room(tokens, wave.count + 1):
                return
            self._take(pending, wave)

    def _shed(self, pending: deque[Task], wave: _Wave) -> None:
        """Put the last batches back if the wave grew beyond its room; a later wave takes them."""
        while len(wave.tasks) > 1 and self._meter.overflows(wave.tokens, wave.count):
            wave.forwards.pop().end()
            pending.appendleft(wave.tasks.pop())

    def _common_stop(self, forwards: Sequence[Forward]) -> str | None:
        """The layer that all forwards wait for; None once all are at the head, or through."""
        stops = {forward.stopped_at for forward in forwards}
        layers = stops - {None, HEAD}
        if len(layers) > 1 or (layers and len(stops) > 1):
            raise self._other_order(stops)
        return layers.pop() if layers else None

    def _other_order(self, stops: set[str | None]) -> CannotPageError:
        return CannotPageError(
            f"a {type(self.subjects[0].model).__name__} must go through its layers alike for all "
            f"texts to be paged, got {sorted(map(str, stops))[:3]} at a time; use "
            "weights='resident'"
        )

    def _score(self, wave: _Wave) -> list[Scored]:
        """Go through the tiles of heads, with what is scored and what is asked of the head."""
        asked: dict[int, list[_Body]] = {member: [] for member in wave.members}
        heads: dict[int, Head] = {}
        for task, forward in zip(wave.tasks, wave.forwards, strict=True):
            assert isinstance(forward.result, _Body), "every forward must end with hidden states"
            asked[task.member].append(forward.result)
        for member, subject in enumerate(self.subjects):
            if questions := wave.questions.get(member):
                heads[member] = questions.describe()
                targets = heads[member].probe_targets(subject.probe)
                asked[member].append(_Body(questions.hidden, targets))
            elif subject.head is not None:
                heads[member] = subject.head
        partials: dict[_Body, PartialLogprobs] = {}
        for members, first, weight in self._weights.head_tiles():
            for member in members:
                bias = self._weights.head_bias(member)
                bias = None if bias is None else bias[first : first + len(weight)]
                _add(partials, asked[member], heads[member], first, weight, bias)
                if questions := wave.questions.get(member):
                    questions.add_logits(weight, bias)
        for member, questions in wave.questions.items():
            body = asked[member].pop()
            questions.judge(heads[member], partials[body].statistics())
            self.subjects[member].head = heads[member]
        return [
            Scored(task.member, task.batch, partials[forward.result].statistics().logprobs.cpu())
            for task, forward in zip(wave.tasks, wave.forwards, strict=True)
        ]


def _add(
    partials: dict[_Body, PartialLogprobs],
    asked: Sequence[_Body],
    head: Head,
    first: int,
    weight: Float[Tensor, "W D"],
    bias: Float[Tensor, " W"] | None,
) -> None:
    """Take the words of a tile into what is known of hidden states."""
    words = max(min(head.vocabulary - first, len(weight)), 0)
    for body in asked if words else ():
        part = PartialLogprobs.of_slice(
            body.hidden,
            weight[:words],
            body.targets,
            first_word=first,
            bias=None if bias is None else bias[:words],
            scale=head.scale,
            softcap=head.softcap,
        )
        before = partials.get(body)
        partials[body] = part if before is None else before.merge(part)


def _tokens(tasks: Iterable[Task]) -> int:
    return sum(task.batch.shape[0] * task.batch.shape[1] for task in tasks)

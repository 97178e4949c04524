"""What all workers of a run are told alike."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from llfast.model_list import ModelRequest
from llfast.store import Store

from .ledger import name_of
from .loop import begin


class Options(TypedDict, total=False):
    """Options of a run, by the names that `score_share` and `score_on_ray` take.

    Those up to `allow_pickle` are as for `score_models`; a model of the list may have its own
    dtype, way of having weights, memory budget and trust.

    Attributes:
        convention: which tokens are scored.
        dtype: "auto" or a dtype.
        device: "auto" or a device; on a Ray cluster, "cpu" leaves GPUs alone.
        token_budget: the most tokens in a batch.
        weights: "auto", "resident" or "paged".
        memory_budget: for weights and texts on their way; on a Ray cluster by default what a worker
            reserves.
        verify: compare sha256 digests of weights.
        trust_remote_code: let checkpoints bring code of their own.
        allow_pickle: let weights be pickles.
        attempts: how often a model is tried that fails for a reason which may pass, or whose worker
            dies; what llfast itself refuses is tried once. 3 by default.
        lease_seconds: how long a worker may give no sign before its model is taken over; on the
            same machine the end of a process is seen at once. 120 by default.
    """

    convention: str
    dtype: str
    device: str
    token_budget: int | None
    weights: str
    memory_budget: int | str | None
    verify: bool | str | os.PathLike[str]
    trust_remote_code: bool
    allow_pickle: bool
    attempts: int
    lease_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """`Options` with their defaults filled in."""

    convention: str = "paper"
    dtype: str = "auto"
    device: str = "auto"
    token_budget: int | None = None
    weights: str = "auto"
    memory_budget: int | str | None = None
    verify: bool | str | os.PathLike[str] = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attempts: int = 3
    lease_seconds: float = 120.0

    def of_session(self) -> dict[str, Any]:
        """Those that a `Session` takes."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del own["attempts"], own["lease_seconds"]
        return own


def agree(requests: Sequence[ModelRequest], store: Store, options: Options) -> Terms:
    """Make a store ready for a run, unless all of it would fail.

    Returns: the terms, with the memory budget in bytes.

    Raises:
        OSError: if a manifest cannot be read, or the store not be written.
        ValueError: for options that make no sense, and two models of one name.
    """
    terms = Terms(**options)
    if terms.attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {terms.attempts}")
    _refuse_two_of_a_name(requests)
    budget_bytes = begin(
        requests,
        store,
        convention=terms.convention,
        dtype=terms.dtype,
        token_budget=terms.token_budget,
        weights=terms.weights,
        memory_budget=terms.memory_budget,
        verify=terms.verify,
    )
    store.prepare()  # workers keep their leases in it
    return replace(terms, memory_budget=budget_bytes)


def told_apart(requests: Sequence[ModelRequest]) -> list[ModelRequest]:
    """The same models; none whose name has other revisions, too, goes by its name alone.

    It would be done with the first of them that is.
    """
    revisions: defaultdict[str, set[str | None]] = defaultdict(set)
    for each in requests:
        revisions[name_of(each)].add(each.revision)
    return [
        replace(each, revision="main")  # which the Hub gives whoever names none
        if each.revision is None
        and len(revisions[name_of(each)]) > 1
        and not Path(each.model).is_dir()
        else each
        for each in requests
    ]


def _refuse_two_of_a_name(requests: Sequence[ModelRequest]) -> None:
    """Refuse different models of one name: their results could not be told apart."""
    models: dict[str, ModelRequest] = {}
    for each in requests:
        other = models.setdefault(name_of(each), each)
        if (each.model, each.tokenizer, each.adapter_base) != (
            other.model,
            other.tokenizer,
            other.adapter_base,
        ):
            raise ValueError(
                f"names must be of one model each, got two called {name_of(each)}; rename one"
            )

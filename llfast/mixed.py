"""Models that were not scored alike: what that does to their distances, and warnings of it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from .errors import LlfastWarning
from .intervals import half_variances
from .results import LogLikelihoods

_CALLER = 3  # the warning is for whoever called the function of ours that asks for it


def warn_of_dtypes(dtypes: Collection[str], noise_floor: float | None) -> None:
    """Warn if there are several; unknown ones ("", and "unknown" of imports) are passed over.

    `noise_floor` is the KL that they are known to make between two runs of one model, nats a text.
    """
    kinds = sorted({dtype for dtype in dtypes if dtype not in ("", "unknown")})
    if len(kinds) < 2:
        return
    measured = (
        "how much of a KL that makes is not known here; score one model in both to see"
        if noise_floor is None
        else f"that makes a KL of up to {noise_floor:.3g} nats a text between dtypes of one model "
        "here, and smaller ones say nothing"
    )
    message = f"models ran in {' and '.join(kinds)}: {measured}"
    warnings.warn(message, LlfastWarning, stacklevel=_CALLER)


def warn_of_bos(convention: str, adds_bos: Sequence[object]) -> None:
    """Warn if some tokenizers add BOS and others do not, where that decides what is scored."""
    with_bos, without = adds_bos.count(True), adds_bos.count(False)
    if convention == "paper" and with_bos and without:
        warnings.warn(
            f"{with_bos} of the tokenizers add BOS and {without} do not: under convention 'paper' "
            "the first token of each text is scored only by those that do, so KL between the two "
            "kinds holds its log-likelihood too; convention 'always-bos' scores it everywhere",
            LlfastWarning,
            stacklevel=_CALLER,
        )


def warn_of_kind(
    result: LogLikelihoods,
    convention: str,
    dtypes: Collection[str],
    adds_bos: Mapping[bool, int],
    noise_floor: float | None,
) -> None:
    """Warn if a result's dtype, or its tokenizer, is of another kind than all known ones.

    Args:
        result: what joins them.
        convention: which tokens were scored.
        dtypes: what the others ran in.
        adds_bos: how many of their tokenizers add BOS, and how many do not.
        noise_floor: see `warn_of_dtypes`.
    """
    if result.dtype not in dtypes:
        warn_of_dtypes({*dtypes, result.dtype}, noise_floor)
    own = adds_bos_of(result)
    if own is not None and not adds_bos.get(own):
        known = [each for each, count in adds_bos.items() for _ in range(count)]
        warn_of_bos(convention, [*known, own])


def adds_bos_of(result: LogLikelihoods) -> bool | None:
    """Whether the tokenizer adds BOS; None if that is not known."""
    found = result.provenance.get("adds_bos", result.metadata.get("adds_bos"))
    return found if isinstance(found, bool) else None


def layer_of(name: str) -> str:
    """The layer in the name of a row, as `Store.matrix` makes it; "" for a whole model."""
    return name.partition("@layer=")[2]


def noise_floor(
    points: Shaped[np.ndarray, "K N"],
    names: Sequence[str],
    revisions: Sequence[str],
    dtypes: Sequence[str],
) -> float:
    """The largest KL between two dtypes of one model, nats a text; 0 if no model is in two."""
    pairs = _dtype_pairs(names, revisions, dtypes)
    differences = (points[[a]].astype(np.float64) - points[b] for a, b in pairs)
    return max((float(half_variances(each)[0]) for each in differences), default=0.0)


def _dtype_pairs(
    names: Sequence[str], revisions: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """Rows that are one model in two dtypes: they have the same revision and the same layer."""
    if len({dtype for dtype in dtypes if dtype}) < 2:
        return
    kinds: dict[tuple[str, str], list[int]] = {}
    for row, (name, revision) in enumerate(zip(names, revisions, strict=True)):
        if revision and dtypes[row]:
            kinds.setdefault((revision, layer_of(name)), []).append(row)
    for rows in kinds.values():
        for a, b in itertools.combinations(rows, 2):
            if dtypes[a] != dtypes[b]:
                yield a, b

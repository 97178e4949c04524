"""Warnings of models that were not scored alike, and of what that does to their distances."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .errors import LlfastWarning

_CALLER = 3  # the warning is for whoever called the function of ours that asks for it


def warn_of_dtypes(dtypes: Sequence[str], noise_floor: float | None) -> None:
    """Warn if there are several; unknown ones ("") are passed over.

    `noise_floor` is the KL that they are known to make between two runs of one model, nats a text.
    """
    kinds = sorted({dtype for dtype in dtypes if dtype})
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

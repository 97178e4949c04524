"""Why a model failed: in one line, and whether another try may help."""

from __future__ import annotations

from llfast.errors import LlfastError
from llfast.files import as_utf8
from llfast.redaction import without_secrets


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, with its kind unless it is one of llfast's own."""
    lines = str(error).strip().splitlines()
    text = without_secrets(as_utf8(lines[0])) if lines else ""
    if isinstance(error, LlfastError | ValueError):
        return text
    return f"{type(error).__name__}: {text}"


def is_lasting(error: BaseException) -> bool:
    """Whether the same is to be expected of another try: llfast itself has refused the model."""
    return isinstance(error, LlfastError | ValueError) and error.__cause__ is None

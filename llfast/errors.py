"""The exceptions that llfast defines.

    LlfastError
    ├── TextSetError            a text file or text set cannot be used
    ├── CheckpointError         a checkpoint is missing, damaged or incomplete
    │   └── UnsupportedModelError   it is whole, but of a kind that llfast does not score
    │       └── CannotPageError         or does not page: it has to be loaded whole
    ├── ScoringError            a model ran, but gave no usable numbers
    ├── StoreError              a store folder or one of its files cannot be used
    ├── SpaceError              vectors that cannot be compared were asked to be
    ├── SearchError             an index or a query cannot be used
    └── MissingDependencyError  an optional package is needed; the message has the pip command

Arguments of the wrong type or value raise `TypeError` or `ValueError`, and files that cannot be
opened raise `OSError`; where they are at s3:// that is a `RemoteError`. The command line prints any
of these as one line and exits with 1.

`LlfastWarning` is what llfast warns of: numbers that are right, but not all that they seem.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class LlfastError(Exception):
    """Base of everything that llfast raises for a reason of its own."""


class TextSetError(LlfastError):
    """A text file or text set cannot be used."""


class CheckpointError(LlfastError):
    """A checkpoint is missing, damaged or incomplete."""


class UnsupportedModelError(CheckpointError):
    """A checkpoint is whole, but of a kind that llfast does not score."""


class CannotPageError(UnsupportedModelError):
    """A model has to be loaded whole to be scored."""


class ScoringError(LlfastError):
    """A model ran, but gave no usable numbers."""


class StoreError(LlfastError):
    """A store folder or one of its files cannot be used."""


class SpaceError(LlfastError):
    """Vectors that cannot be compared were asked to be."""


class SearchError(LlfastError):
    """An index or a query cannot be used."""


class MissingDependencyError(LlfastError):
    """An optional package is needed; the message has the pip command."""


class RemoteError(OSError):
    """A place on other machines cannot be reached, or does not allow what was asked for."""


class LlfastWarning(UserWarning):
    """Numbers are right, but not all that they seem."""


@contextlib.contextmanager
def needed(package: str, message: str) -> Iterator[None]:
    """Import an optional package in here.

    Raises:
        MissingDependencyError: with this message, if it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is there, and lacks something itself
        raise MissingDependencyError(message) from None

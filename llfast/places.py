"""Where the models of a map are, in a file: a later map keeps their places."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SpaceError
from .files import atomic_write
from .placing import METHODS

_KIND = "llfast places 1"
_LARGEST = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The places of a map's models, and how they came about.

    Attributes:
        method: "tsne", "pca" or "mds".
        perplexity: of t-SNE.
        textset_digest: the texts that the models were scored on.
        convention: which tokens were scored.
        places: (x, y) by model and its revision.
    """

    method: str
    perplexity: float
    textset_digest: str
    convention: str
    places: Mapping[tuple[str, str], tuple[float, float]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON, atomically; raises OSError if that fails."""
        rows = [
            {"model": model, "revision": revision, "place": list(place)}
            for (model, revision), place in self.places.items()
        ]
        fields = {
            "kind": _KIND,
            "method": self.method,
            "perplexity": self.perplexity,
            "textset": self.textset_digest,
            "convention": self.convention,
            "models": rows,
        }
        with atomic_write(path) as file:
            file.write(json.dumps(fields, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Places:
        """Read what `save` wrote.

        Raises:
            OSError: if the file cannot be read.
            SpaceError: if it is something else, or damaged.
        """
        try:
            return cls._from(json.loads(Path(path).read_bytes()))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise SpaceError(
                f"{os.fspath(path)} must be a file of places, as a map writes it, got {error!r}"
            ) from None

    @classmethod
    def _from(cls, fields: Any) -> Places:
        if fields["kind"] != _KIND:
            raise ValueError(f"kind {fields['kind']!r}")
        if fields["method"] not in METHODS:
            raise ValueError(f"method {fields['method']!r}")
        places = {}
        for row in fields["models"]:
            x, y = (_number(each) for each in list(row["place"]))
            key = str(row["model"]), str(row["revision"])
            if key in places:
                raise ValueError(f"{key[0]!r} twice")
            places[key] = x, y
        perplexity = _number(fields["perplexity"])
        if perplexity < 1:
            raise ValueError(f"perplexity {perplexity}")
        return cls(
            method=fields["method"],
            perplexity=perplexity,
            textset_digest=str(fields["textset"]),
            convention=str(fields["convention"]),
            places=places,
        )


def _number(value: Any) -> float:
    """A number that arithmetic on places stays finite with."""
    if isinstance(value, bool | str) or not abs(float(value)) <= _LARGEST:
        raise ValueError(f"{value!r} for a number")
    return float(value)

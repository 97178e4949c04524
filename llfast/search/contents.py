"""What an index searches in: the models of a space, or those of a segment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from llfast.space import ModelSpace

from .flat import norms_of, refuse_overflow
from .gpu import copied, has_room
from .listing import fit_lists
from .lists import ListedRows, Lists
from .models import IndexedModel, Models
from .projection import Projection, Reduced, draw_sample
from .searched import Rows
from .segment import Segment

_EXACT_BYTES = 8 << 20  # of fp32 points: reading them all takes as long as looking at bounds
_ROWS = 256  # worked on at once: 20 MB of fp64 at 10,000 texts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contents:
    """Models and their points.

    Attributes:
        models: one a row.
        rows: their points.
        projection: what their lower-bound coordinates were made with, if there are any.
        largest: norm of the points, at most.
        offset: mean of a point's coordinates, at most.
        noise_floor: the largest KL between two dtypes of one model, nats a text.
    """

    models: Models
    rows: Rows
    projection: Projection | None
    largest: float
    offset: float
    noise_floor: float

    def listed(self, lists: Lists | None) -> Contents:
        """The same, of which searches look at some lists only; as it is if there are none."""
        if lists is None or self.rows.reduced is None:
            return self
        listed = ListedRows(lists, self.rows.reduced.first)
        return replace(self, rows=replace(self.rows, listed=listed))

    def on_gpu(self) -> Contents:
        """The same, with points on the GPU too, if there is one with room.

        Raises:
            SearchError: if points are damaged.
        """
        rows = self.rows
        if rows.flat is None or not has_room(rows.flat.nbytes):
            return self
        if rows.check is not None:
            rows.check(range(len(rows)))
        return replace(self, rows=replace(rows, on_gpu=copied(rows.flat)))

    @classmethod
    def of_segment(cls, segment: Segment, mode: str) -> Contents:
        """All rows of a segment, for one of the modes but "auto"."""
        facts, rows, projection = segment.facts, segment.rows, segment.projection
        if mode == "exact":
            rows, projection = replace(rows, reduced=None), None
        found = cls(
            models=segment.models(),
            rows=rows,
            projection=projection,
            largest=facts["largest"],
            offset=facts["offset"],
            noise_floor=facts["noise_floor"],
        )
        return found.listed(segment.lists) if mode == "approximate" else found

    @classmethod
    def of_space(
        cls, space: ModelSpace, mode: str, created: Mapping[str, datetime] | None = None
    ) -> Contents:
        """All models of a space, for one of the modes but "auto"; points are referred to.

        Args:
            space: the models.
            mode: how they are searched.
            created: when the store got each, if they are from one.

        Raises:
            SearchError: if coordinates are too large for fp32.
        """
        points = space.coordinates
        norms = np.concatenate([norms_of(points[block]) for block in blocks(len(space))])
        refuse_overflow(float(norms.max()))
        known = zip(space.models, space.revisions, space.dtypes, space.metadata, strict=True)
        when = created or {}
        projection, flat, reduced = None, None, None
        if mode == "exact":
            flat = points.astype(np.float32)
        else:
            projection = Projection.fit(points[draw_sample(*points.shape)])
            parts = [projection.reduce(points[block]) for block in blocks(len(space))]
            reduced = Reduced(
                np.concatenate([each.first for each in parts]),
                np.concatenate([each.rest for each in parts]),
            )
        found = cls(
            models=Models.of([IndexedModel(*each, created=when.get(each[0])) for each in known]),
            rows=Rows(points=points, flat=flat, reduced=reduced),
            projection=projection,
            largest=float(norms.max()),
            offset=float(np.abs(points.mean(axis=1)).max()),
            noise_floor=space.noise_floor("nats_per_text") or 0.0,
        )
        if mode != "approximate":
            return found
        lists = fit_lists(found.rows, largest=found.largest, offset=found.offset)
        return found.listed(lists)


def choose_mode(mode: str, nbytes: int) -> str:
    """A mode other than "auto", for so many bytes of fp32 points.

    Never a GPU's: bounds need no seconds to copy points there, and answer in milliseconds too.
    """
    if mode != "auto":
        return mode
    return "exact" if nbytes <= _EXACT_BYTES else "certified"


def blocks(count: int) -> Iterator[slice]:
    """Slices of so many rows, to be worked on at once."""
    return (slice(at, at + _ROWS) for at in range(0, count, _ROWS))

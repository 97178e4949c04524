"""Models far larger than memory: weights are read a layer at a time, under all texts at once.

`skeleton` builds a model without weights, `units` cuts it into what comes and goes, `pages` reads,
`weights` puts in place, `suspended` stops forwards in front of a layer, `waves` ties them together.
Several models are gone through as one: `sharing` finds what they have in common.
"""

from __future__ import annotations

from .model import PagedModel, open_waves
from .sharing import Equals, Relatives, relatives
from .statistics import LoadingStatistics
from .waves import Task

__all__ = [
    "Equals",
    "LoadingStatistics",
    "PagedModel",
    "Relatives",
    "Task",
    "open_waves",
    "relatives",
]

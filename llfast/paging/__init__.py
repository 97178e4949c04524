"""Models far larger than memory: weights are read a layer at a time, under all texts at once.

`skeleton` builds a model without weights, `units` cuts it into what comes and goes, `pages` reads,
`weights` puts in place, `suspended` stops forwards in front of a layer, `waves` ties them together.
"""

from __future__ import annotations

from llfast.errors import CannotPageError

from .model import PagedModel
from .statistics import LoadingStatistics, PageRead

__all__ = ["CannotPageError", "LoadingStatistics", "PageRead", "PagedModel"]

"""Nearest models in collections of any size, exactly.

index.py ─▶ snapshot.py ─▶ certified.py ─▶ flat.py (faiss)
                            ├▶ projection.py: lower bounds
                            └▶ lists.py: for approximate searches; listing.py makes them
stored.py ─▶ building.py ─▶ writer.py: the index of a store, on disk; segment.py reads it
"""

from .building import Selection
from .flat import import_faiss
from .hits import Hit, Hits
from .index import KLIndex, check_mode
from .searched import Certificate
from .segment import Segment
from .stored import StoredIndex
from .writer import SegmentWriter

__all__ = [
    "Certificate",
    "Hit",
    "Hits",
    "KLIndex",
    "Segment",
    "SegmentWriter",
    "Selection",
    "StoredIndex",
    "check_mode",
    "import_faiss",
]

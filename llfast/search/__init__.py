"""Nearest models in collections of any size, exactly.

index.py ─▶ snapshot.py ─▶ certified.py ─▶ flat.py (faiss)
                            └▶ projection.py
stored.py ─▶ segment.py: the index of a store, on disk
"""

from .building import Selection
from .certified import Certificate
from .hits import Hit, Hits
from .index import KLIndex
from .stored import StoredIndex

__all__ = ["Certificate", "Hit", "Hits", "KLIndex", "Selection", "StoredIndex"]

"""Nearest models in collections of any size, exactly.

index.py ─▶ certified.py ─▶ flat.py (faiss)
             └▶ projection.py
"""

from .certified import Certificate
from .hits import Hit, Hits
from .index import KLIndex

__all__ = ["Certificate", "Hit", "Hits", "KLIndex"]

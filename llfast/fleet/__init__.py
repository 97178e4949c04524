"""Many models into a store: one after the other here, or shared out among many workers."""

from .loop import estimate_models, score_models
from .session import open_request
from .share import Shared, score_share
from .status import fleet_status

__all__ = [
    "Shared",
    "estimate_models",
    "fleet_status",
    "open_request",
    "score_models",
    "score_share",
]

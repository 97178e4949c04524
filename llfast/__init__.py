"""Score texts with causal language models, and compare the models by what they say.

Importing llfast is cheap: torch and transformers are loaded by the first thing that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comparison import compare_relations
    from .errors import (
        CheckpointError,
        LlfastError,
        LlfastWarning,
        MissingDependencyError,
        RemoteError,
        ScoringError,
        SearchError,
        SpaceError,
        StoreError,
        TextSetError,
        UnsupportedModelError,
    )
    from .kernels import PartialLogprobs, token_logprobs, token_statistics
    from .layers import score_layers
    from .mapping import make_map
    from .page import map_page
    from .paging import LoadingStatistics
    from .prediction import predict_scores
    from .results import KLEstimate, LogLikelihoodMatrix, LogLikelihoods
    from .scores import read_scores
    from .scoring import score, score_many
    from .search import KLIndex
    from .space import ModelSpace
    from .store import Store
    from .texts import TextSet, build_texts
    from .trajectory import follow

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "KLEstimate",
    "KLIndex",
    "LlfastError",
    "LlfastWarning",
    "LoadingStatistics",
    "LogLikelihoodMatrix",
    "LogLikelihoods",
    "MissingDependencyError",
    "ModelSpace",
    "PartialLogprobs",
    "RemoteError",
    "ScoringError",
    "SearchError",
    "SpaceError",
    "Store",
    "StoreError",
    "TextSet",
    "TextSetError",
    "UnsupportedModelError",
    "build_texts",
    "compare_relations",
    "follow",
    "make_map",
    "map_page",
    "predict_scores",
    "read_scores",
    "score",
    "score_layers",
    "score_many",
    "token_logprobs",
    "token_statistics",
]

_HOME = {
    "KLEstimate": "results",
    "KLIndex": "search",
    "LoadingStatistics": "paging",
    "LogLikelihoodMatrix": "results",
    "LogLikelihoods": "results",
    "ModelSpace": "space",
    "PartialLogprobs": "kernels",
    "Store": "store",
    "TextSet": "texts",
    "build_texts": "texts",
    "compare_relations": "comparison",
    "follow": "trajectory",
    "make_map": "mapping",
    "map_page": "page",
    "predict_scores": "prediction",
    "read_scores": "scores",
    "score": "scoring",
    "score_layers": "layers",
    "score_many": "scoring",
    "token_logprobs": "kernels",
    "token_statistics": "kernels",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

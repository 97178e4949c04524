"""Checkpoints whose weights are quantised: what they hold once those are turned back."""

from .plain import plain_weights, quantisation
from .weight import QuantisedWeight

__all__ = ["QuantisedWeight", "plain_weights", "quantisation"]

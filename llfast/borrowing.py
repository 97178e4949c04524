"""A model that may be the caller's: used by one thread at a time, and given back as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .loading import quiet

# Scoring steps in front of a model's head, so two threads must not score one model at once.
_LOCKS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()
# Where torch may round fp32 numbers before it multiplies them, to TF32 or bf16.
_PRODUCTS: tuple[Any, ...] = attrgetter(
    "cuda.matmul", "cudnn.conv", "mkldnn.matmul", "mkldnn.conv"
)(torch.backends)


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """The model alone, in evaluation and inference mode, in its own dtype and no other.

    Afterwards every module is back in the mode that it was in.
    """
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.Lock())
    with lock:
        modes = {module: module.training for module in model.modules()}
        gradients = [each for each in model.parameters() if each.requires_grad]
        model.eval()
        # Under inference mode, too, torch multiplies by a weight that wants gradients in another
        # way, which in half precision may give other bits.
        for parameter in gradients:
            parameter.requires_grad_(requires_grad=False)
        try:
            with (
                torch.inference_mode(),
                torch.autocast(model.device.type, enabled=False),
                _attention_without_cudnn(),
                _products_of_whole_fp32(),
                quiet(),  # some models miss the mask that they do not need
            ):
                yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.inference_mode():  # in which the model may have been made
                for parameter in gradients:
                    parameter.requires_grad_()


@contextmanager
def _attention_without_cudnn() -> Iterator[None]:
    """Torch's own attention kernels, which take every shape as it comes.

    On sm_90 and sm_100 torch would prefer cuDNN's, which makes a plan for every new shape of a
    batch, for 20 to 450 ms each, as users report; scoring has tens of shapes.
    """
    # torch gives this one function no types; its setter has them.
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    try:
        torch.backends.cuda.enable_cudnn_sdp(enabled=False)
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def _products_of_whole_fp32() -> Iterator[None]:
    """Products of fp32 numbers as they are, for a store says that its numbers are in fp32.

    A program that trains as well may have allowed less (`torch.set_float32_matmul_precision`), and
    for convolutions on a GPU torch does.
    """
    before = [each.fp32_precision for each in _PRODUCTS]
    try:
        for each in _PRODUCTS:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(_PRODUCTS, before, strict=True):
            each.fp32_precision = precision

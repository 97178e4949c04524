"""What scoring would take, before any weight is read."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from os import PathLike
from statistics import median

import torch

from .dtypes import dtype_name
from .engines import Job, as_pages, memory_bytes, plan_unread
from .errors import CannotPageError
from .linear import PACKED, linear_layers, linear_path
from .loading import count_parameters
from .models import ModelSource
from .paging import PagedModel
from .runs import prepare
from .texts import TextSet
from .traits import check_fit

_MEASURE_SECONDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The cost of scoring one model on one text set.

    Attributes:
        model: its name.
        dtype: what its body would run in.
        device: where.
        parameters: stored numbers; of pickles, which are not opened for that, as many as have
            room in the files.
        weights: "resident", "kept" (read as pages, which then stay) or "paged", as the result will
            say; a model that turns out to be one that cannot be paged is loaded whole after all.
        read_bytes: size of the weight files; weights that are paged are read once a wave.
        weights_bytes: of memory, for weights alone: if they are paged, two pages and what stays,
            and a memory budget must be larger; otherwise all of them. Texts on their way come on
            top: what they hold is known once the first has run.
        memory_bytes: if all of it is in memory: weights in `dtype` and packed (see `linear.py`),
            plus a batch's activations (hidden states and one feed-forward layer); a mixture of
            experts and long attention take more.
        tokens: scored tokens.
        padded_tokens: tokens that run, padding and dummy rows included.
        truncated_texts: texts that are longer than the model takes.
        matmul_flops: FLOP/s of a matrix product in this dtype on this device, measured just now.
        seconds: 2 FLOP a parameter and token at that rate; reading is not in it, and a mixture of
            experts, which uses a part of its parameters, is faster.
    """

    model: str
    dtype: str
    device: str
    parameters: int
    weights: str
    read_bytes: int
    weights_bytes: int
    memory_bytes: int
    tokens: int
    padded_tokens: int
    truncated_texts: int
    matmul_flops: float
    seconds: float


def estimate(
    source: ModelSource,
    texts: TextSet,
    *,
    convention: str = "paper",
    dtype: str = "auto",
    device: str = "auto",
    token_budget: int | None = None,
    weights: str = "auto",
    memory_budget: int | str | None = None,
    verify: bool | str | PathLike[str] = False,
) -> Estimate:
    """Estimate what `score` would take; tokenises the texts, reads no weights.

    Raises:
        CheckpointError: if the checkpoint does not fill its model, the tokens do not fit it, or
            there is no digest to verify with.
        UnsupportedModelError: if it cannot be paged where that is asked for.
        ValueError: for a memory budget that is too small, and for a model in memory, whose weights
            are there already.
    """
    if source.checkpoint is None:
        raise ValueError("model must be a folder or Hub id for an estimate, got a loaded model")
    job = prepare(
        source,
        texts,
        convention=convention,
        dtype=dtype,
        device=device,
        token_budget=token_budget,
        weights=weights,
        memory_budget=memory_budget,
        verify=verify,
    ).job
    paged = as_pages(job, weights)
    way, paged_bytes = _way(job, paged, weights)
    sizes = [math.prod(batch.shape) for batch in plan_unread(job, paged)]
    padded = sum(sizes)
    config = source.config.get_text_config()
    hidden = getattr(config, "hidden_size", 0) or 0
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    if isinstance(feed_forward, list):  # one a layer
        feed_forward = max(feed_forward)
    parameters = count_parameters(source.checkpoint, source.config)
    tied = getattr(config, "tie_word_embeddings", False)
    embedding = hidden * (getattr(config, "vocab_size", 0) or 0)
    looked_up = 0 if tied else embedding
    flops = _matmul_flops(job.dtype, job.device)
    itemsize = job.dtype.itemsize
    body = max(parameters - embedding - looked_up, 0)
    stored = parameters + (body if linear_path(job.device, job.dtype) == PACKED else 0)
    largest = max(sizes, default=0)
    return Estimate(
        model=source.name,
        dtype=dtype_name(job.dtype),
        device=str(job.device),
        parameters=parameters,
        weights=way,
        read_bytes=source.checkpoint.weight_bytes,
        weights_bytes=parameters * itemsize if way == "resident" else paged_bytes,
        memory_bytes=(stored + largest * (6 * hidden + 3 * feed_forward)) * itemsize,
        tokens=int(job.tokens.token_counts.sum()),
        padded_tokens=padded,
        truncated_texts=int(job.tokens.truncated.sum()),
        matmul_flops=flops,
        seconds=2.0 * max(parameters - looked_up, 0) * padded / flops,
    )


def _way(job: Job, paged: PagedModel | None, weights: str) -> tuple[str, int]:
    """How a run would hold the weights, and how much memory pages would then take."""
    if paged is None:
        return "resident", 0
    check_fit(paged.model, job.tokens, job.ids)
    try:
        room = paged.room(memory_bytes(job), may_keep=weights == "auto")
    except (ValueError, CannotPageError) as error:
        asked_for = isinstance(error, ValueError) and job.memory_bytes is not None
        if weights == "paged" or asked_for:
            raise
        return "resident", 0  # the run warns that it may not fit
    return "kept" if room.keeps_weights else "paged", room.weights_bytes


@torch.inference_mode()
def _matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Of a linear layer, on the path that a model's would take."""
    rows, inner, columns = 512, 1024, 2048
    # Nothing is drawn from torch's own generator.
    layer = torch.nn.Linear(inner, columns, bias=False, device="meta", dtype=dtype)
    layer.to_empty(device=device)
    given = torch.empty(rows, inner, device=device, dtype=dtype)
    for tensor in (layer.weight, given):
        tensor.normal_(generator=torch.Generator(device))
    times: list[float] = []
    with linear_layers(layer, linear_path(device, dtype), leave_out=None):
        stop = time.perf_counter() + _MEASURE_SECONDS
        while len(times) < 3 or time.perf_counter() < stop:
            start = time.perf_counter()
            layer(given)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - start)
    return 2.0 * rows * inner * columns / median(times)

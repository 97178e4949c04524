"""One batch of texts, as a model takes it, and which of its hidden states are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .batches import Batch, TokenizedTexts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchInputs:
    """A batch on a device.

    Attributes:
        input_ids: right-padded with token 0, as are rows without a text.
        rows: of each scored position, text after text.
        columns: the same; position s predicts token s + 1.
        targets: the tokens predicted.
    """

    input_ids: Int64[Tensor, "B S"]
    rows: Int64[Tensor, " T"]
    columns: Int64[Tensor, " T"]
    targets: Int64[Tensor, " T"]

    @staticmethod
    def of(tokens: TokenizedTexts, batch: Batch, device: torch.device) -> BatchInputs:
        """Lay out a batch."""
        input_ids = np.zeros(batch.shape, dtype=np.int64)
        targets = []
        for row, text in enumerate(batch.texts):
            ids = tokens[text]
            inputs = ids[: tokens.max_length]
            input_ids[row, : len(inputs)] = inputs
            targets.append(ids[1:])
        counts = [len(target) for target in targets]
        rows = np.repeat(np.arange(len(counts)), counts)
        columns = np.concatenate([np.arange(count) for count in counts])
        return BatchInputs(
            input_ids=_to_device(input_ids, device),
            rows=_to_device(rows, device),
            columns=_to_device(columns, device),
            targets=_to_device(np.concatenate(targets).astype(np.int64), device),
        )

    def scored(self, states: Float[Tensor, "B S D"]) -> Float[Tensor, "T D"]:
        """The states of scored positions, packed."""
        return states[self.rows, self.columns]


class ToHost:
    """A tensor that may still be made on a device, and is copied to the host as soon as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=tensor.is_cuda)  # into pinned memory then
        self._copied: Any = None
        if tensor.is_cuda:
            self._copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> Tensor:
        """On the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


def _to_device(array: Int64[np.ndarray, "*shape"], device: torch.device) -> Int64[Tensor, "*shape"]:
    """Without waiting: a copy of pageable memory would begin when the device has nothing to do."""
    host = torch.from_numpy(array)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)

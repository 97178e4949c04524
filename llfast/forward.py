"""One batch of texts, as a model takes it, and which of its hidden states are scored."""

from __future__ import annotations

from dataclasses import dataclass

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
            input_ids=torch.from_numpy(input_ids).to(device),
            rows=torch.from_numpy(rows).to(device),
            columns=torch.from_numpy(columns).to(device),
            targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device),
        )

    def scored(self, states: Float[Tensor, "B S D"]) -> Float[Tensor, "T D"]:
        """The states of scored positions, packed."""
        return states[self.rows, self.columns]

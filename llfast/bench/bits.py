"""Whether a row keeps its bits whatever is computed beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .heads import run_llfast
from .problems import Problem

FIRST_ROWS = (1, 3, 64, 65, 128, 300)


def same_bits(problem: Problem) -> dict[str, Any]:
    """Compare llfast on all rows with fewer of them, with other places, and with itself.

    Returns: by "first N rows" and the like, if the bits were the same.
    """
    all_rows = _bits(problem)
    found = {
        f"first {rows} rows": torch.equal(_bits(problem.first(rows)), all_rows[:rows])
        for rows in FIRST_ROWS
        if rows <= len(all_rows)
    }
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(all_rows), generator=random).to(problem.device)
    permuted = replace(problem, hidden=problem.hidden[order], targets=problem.targets[order])
    found["rows permuted"] = torch.equal(_bits(permuted), all_rows[order])
    found["once more"] = torch.equal(_bits(problem), all_rows)
    return {"same": found, "all_same": all(found.values())}


def _bits(problem: Problem) -> Tensor:
    return run_llfast(problem).view(torch.int32)  # so that a NaN equals itself

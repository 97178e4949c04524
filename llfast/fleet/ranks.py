"""Which of how many workers this one is: as it is told, or as job schedulers say."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

# Of each, the variables that hold the rank and the number of workers; the first that is there
# counts. Array jobs come before the tasks of a step: an array's job often is one task.
_SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),  # Kubernetes; the second one has to be set
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
_Each = TypeVar("_Each")


def find_rank(
    rank: int | None = None,
    world_size: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, int]:
    """(rank, world size), from 0 on; (0, 1) where nothing says anything.

    Args:
        rank: as given; None to ask the environment.
        world_size: the same.
        environment: that is asked; None for this process's.

    Raises:
        ValueError: if one of both is missing, or they do not fit together.
    """
    where = os.environ if environment is None else environment
    if rank is None:
        for rank_name, size_name in _SCHEDULERS:
            if rank_name in where:
                rank = _number(where, rank_name)
                if world_size is None and size_name in where:
                    world_size = _number(where, size_name)
                if world_size and "ARRAY" in rank_name:  # arrays may begin anywhere, with gaps
                    rank %= world_size
                break
    if rank is None and world_size is None:
        return 0, 1
    if rank is None or world_size is None:
        raise ValueError(
            f"rank and world_size must both be known, got rank {rank} of {world_size}; give the "
            "other one"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    return rank, world_size


def in_order(items: Sequence[_Each], rank: int, world_size: int) -> list[_Each]:
    """A worker's own share first, then those of the others, each from its end.

    Shares are every `world_size`-th item. Who is through with a share helps the next worker, and
    begins where that one is last.
    """
    found = list(items[rank::world_size])
    for step in range(1, world_size):
        found += reversed(items[(rank + step) % world_size :: world_size])
    return found


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name} must be a number, got {environment[name]!r}") from None

from collections.abc import Sequence
from os import PathLike
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

# The addresses of five arrays: max, sum, weighted sum, target logit, arg max.
_Addresses: TypeAlias = tuple[int, int, int, int, int]

GROUP: int

def head_partials(
    *,
    hidden: int,
    hidden_stride: int,
    lm_head: int,
    lm_head_stride: int,
    bias: int,
    targets: int,
    parts: _Addresses,
    first_word: int,
    tokens: int,
    vocabulary: int,
    width: int,
    dtype: str,
    scale: float,
    softcap: float | None,
    threads: int,
    instruction_set: str,
) -> None: ...
def fold_partials(
    *, parts: _Addresses, count: int, tokens: int, total: _Addresses, instruction_set: str
) -> None: ...
def statistics(
    *,
    total: _Addresses,
    tokens: int,
    logprobs: int,
    lse: int,
    target_logits: int,
    entropy: int,
    argmax: int,
) -> None: ...
def choose_instruction_set(name: str) -> str: ...
def available_instruction_sets() -> list[str]: ...

class Memory:
    def __init__(self, size: int) -> None: ...
    @property
    def address(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class ReadStatistics:
    @property
    def bytes(self) -> int: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def cached_bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...

class FileReader:
    def __init__(
        self,
        paths: Sequence[str | PathLike[str]],
        *,
        threads: int = 8,
        chunk_bytes: int = 8388608,
        direct: bool = True,
    ) -> None: ...
    # Rows of file, offset, size and destination.
    def read(self, memory: Memory, extents: npt.NDArray[np.int64]) -> ReadStatistics: ...
    def cancel(self) -> None: ...
    def changed(self) -> str: ...

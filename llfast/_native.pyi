from typing import TypeAlias

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

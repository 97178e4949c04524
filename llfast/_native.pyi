def token_logprobs(
    *,
    hidden: int,
    hidden_stride: int,
    lm_head: int,
    lm_head_stride: int,
    bias: int,
    targets: int,
    logprobs: int,
    tokens: int,
    vocabulary: int,
    width: int,
    dtype: str,
    scale: float,
    softcap: float | None,
    threads: int,
    instruction_set: str,
) -> None: ...
def choose_instruction_set(name: str) -> str: ...
def available_instruction_sets() -> list[str]: ...

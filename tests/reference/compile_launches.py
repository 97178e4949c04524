"""Let the launcher's own calls compile, for a chip that is not there.

Run by test_triton_compiles.py, in a process where Triton does not interpret.
"""

import sys

import torch

from llfast.kernels import token_statistics
from tests.ptx.device import pretend

CAPABILITY = tuple(int(number) for number in sys.argv[1].split("."))
SHAPES = ((1, 1, 1), (70, 3000, 64), (70, 3000, 37))
compiled = []

pretend(CAPABILITY, 132, lambda kernel, arguments, programs: compiled.append(kernel))
for dtype in (torch.bfloat16, torch.float32):
    for tokens, vocabulary, width in SHAPES:
        hidden = torch.zeros(tokens, width, dtype=dtype)
        lm_head = torch.zeros(vocabulary, width, dtype=dtype)
        targets = torch.zeros(tokens, dtype=torch.int64)
        token_statistics(hidden, lm_head, targets)
        bias = torch.zeros(vocabulary)
        token_statistics(hidden, lm_head, targets.int(), bias=bias, scale=0.5, softcap=3.0)
assert {kernel.metadata.target.arch for kernel in compiled} == {10 * CAPABILITY[0] + CAPABILITY[1]}
print(len(compiled))

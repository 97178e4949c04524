"""The processor, and the dtype that checkpoints run in on it."""

from pathlib import Path

import pytest
import torch

from llfast import dtypes, processor
from llfast.dtypes import fast_dtype
from llfast.processor import Processor, processor_name, this_processor

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC 9575F
flags\t\t: fpu avx2 avx512f {}avx512vl

processor\t: 1
vendor_id\t: Another
cpu family\t: 1
"""


@pytest.fixture
def cpuinfo(monkeypatch):
    """Lets Linux say something else of its processor, and counts how often it is asked."""
    reads = []

    def say(text):
        processor._cpuinfo.cache_clear()
        this_processor.cache_clear()

        def read(path, **_):
            assert path == Path("/proc/cpuinfo")
            reads.append(path)
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(Path, "read_text", read)
        return reads

    yield say
    monkeypatch.undo()
    processor._cpuinfo.cache_clear()
    this_processor.cache_clear()


@pytest.mark.parametrize(
    ("flags", "instructions"),
    [("", "avx512"), ("avx512_bf16 ", "avx512_bf16"), ("amx_bf16 avx512_bf16 ", "amx_bf16")],
)
def test_the_first_processor_is_read_once(cpuinfo, flags, instructions):
    reads = cpuinfo(CPUINFO.format(flags))
    for _ in range(3):
        assert this_processor() == Processor("AuthenticAMD 26", instructions)
        assert processor_name() == "AMD EPYC 9575F"
    assert len(reads) == 1


@pytest.mark.parametrize("text", [None, "", "CPU implementer\t: 0x41\nFeatures\t: fp asimd bf16\n"])
def test_other_systems_have_no_key_but_a_name(cpuinfo, text):
    cpuinfo(text)
    assert this_processor() == Processor("", "")
    assert processor_name()
    assert fast_dtype(BF16, CPU) == F32


@pytest.mark.parametrize(
    ("chip", "instructions", "expected"),
    [
        ("AuthenticAMD 25", "avx512_bf16", BF16),
        ("AuthenticAMD 25", "avx2", F32),  # Zen 3, or Zen 4 that is kept from using AVX-512
        ("AuthenticAMD 26", "avx512_bf16", BF16),
        ("AuthenticAMD 26", "avx512", F32),
        ("GenuineIntel 6", "amx_bf16", BF16),
        ("GenuineIntel 6", "avx512_bf16", F32),
        ("", "", F32),
    ],
)
def test_bf16_runs_where_it_is_fast(chip, instructions, expected, monkeypatch):
    monkeypatch.setattr(dtypes, "this_processor", lambda: Processor(chip, instructions))
    assert fast_dtype(BF16, CPU) == expected
    assert fast_dtype(F16, CPU) == F32
    assert fast_dtype(F32, CPU) == F32
    for dtype in (F32, BF16, F16):
        assert fast_dtype(dtype, torch.device("cuda")) == dtype

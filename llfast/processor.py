"""What this machine's processor is: its name, and what tables of numeric paths are keyed by."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

# The widest instructions for matrix products, and the flag of Linux that shows each.
_INSTRUCTIONS = {
    "amx_bf16": "amx_bf16",
    "avx512_bf16": "avx512_bf16",
    "avx512": "avx512f",
    "avx2": "avx2",
}


@dataclass(frozen=True, slots=True)
class Processor:
    """A key of tables; two machines of one key are taken to be fast in the same things.

    Attributes:
        chip: vendor and family ("AuthenticAMD 26" is Zen 5), empty where Linux names none.
        instructions: "amx_bf16", "avx512_bf16", "avx512" or "avx2", empty for none of them.
    """

    chip: str
    instructions: str


@functools.cache
def this_processor() -> Processor:
    """The processor that this process runs on."""
    fields = _cpuinfo()
    flags = fields.get("flags", "").split()
    chip = f"{fields.get('vendor_id', '')} {fields.get('cpu family', '')}".strip()
    widest = next((name for name, flag in _INSTRUCTIONS.items() if flag in flags), "")
    return Processor(chip, widest)


def processor_name() -> str:
    """The processor's own name."""
    # `platform.processor()` says little or nothing on Linux.
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; empty on other systems."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}

"""Sizes in words, and what Linux says of memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llfast import memory
from llfast.memory import available_bytes, parse_bytes

CPU = torch.device("cpu")
MEMINFO = "MemTotal:       7000 kB\nMemFree:  5 kB\nMemAvailable:    100 kB\n"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        (8 << 30, 8 << 30),
        (2**63 - 1, 2**63 - 1),
        ("1", 1),
        ("17b", 17),
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        (np.int64(8 << 30), 8 << 30),
        (" 8GIB ", 8 << 30),
        ("500 MB", 500_000_000),
        ("500m", 500_000_000),
        ("2e9", 2_000_000_000),
        ("1.5k", 1500),
        ("1.5KiB", 1536),
        (".5 TiB", 1 << 39),
        ("0.001 kb", 1),
        ("2T", 2 * 10**12),
        ("1e3 KiB", 1_024_000),
    ],
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize(
    "size",
    [
        *(0, -1, 2**63, 1.0, 8e9, True, False),
        *("", " ", "GiB", "0", "0.5", "-1", "1 2", "1.2.3", ".", "1 GiBB", "1PB", "8 Gb/s"),
        *("nan", "inf", "1e400", "1e30 TiB", "e9", "0x10", "1,000"),
    ],
)
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="^memory_budget must be a size like '8GiB', got ") as got:
        parse_bytes(size)
    assert str(got.value).endswith(repr(size))


LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
USES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


@pytest.fixture
def files(monkeypatch):
    """What is in the files that Linux has; all others are missing."""
    contents = {}

    def read(path):
        if str(path) not in contents:
            raise FileNotFoundError(path)
        return contents[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    return contents


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 7000 << 10),
        ({0: "max\n"}, 7000 << 10),
        ({0: "5000\n"}, 5000),
        ({1: f"{2**63 - 4096}\n"}, 7000 << 10),
        ({1: "6000\n"}, 6000),
    ],
)
def test_the_memory_of_a_machine_or_of_a_container(limits, expected, files):
    files["/proc/meminfo"] = MEMINFO
    files |= {LIMITS[version]: text for version, text in limits.items()}
    assert memory.total_bytes.__wrapped__() == expected


def test_nothing_says_how_much_memory_there_is(files):
    assert memory.total_bytes.__wrapped__() == 0
    assert available_bytes(CPU) == 0


@pytest.mark.parametrize(
    ("limit", "use", "expected"),
    [
        (None, None, 100 << 10),
        ("max\n", "4000\n", 100 << 10),
        ("50000\n", None, 100 << 10),
        ("50000\n", "8000\n", 42_000),
        ("50000\n", "60000\n", 1),
        ("50000000\n", "8000\n", 100 << 10),
    ],
)
@pytest.mark.parametrize("version", [0, 1])
def test_the_memory_that_is_free(limit, use, expected, version, files):
    files["/proc/meminfo"] = MEMINFO
    for names, text in ((LIMITS, limit), (USES, use)):
        if text is not None:
            files[names[version]] = text
    assert available_bytes(CPU) == expected


def test_cached_files_are_free_memory(files):
    files["/proc/meminfo"] = MEMINFO
    files |= {LIMITS[0]: "50000\n", USES[0]: "49000\n"}
    files["/sys/fs/cgroup/memory.stat"] = "anon 5\ninactive_file 30000\nactive_file 7\n"
    assert available_bytes(CPU) == 31_000


JOBS = (
    ("0::/slurm/job_7/step_0\n", LIMITS[0], USES[0], "inactive_file"),
    ("9:name=systemd:/\n4:hugetlb,memory:/slurm/job_7/step_0\n0::/\n", *(LIMITS[1], USES[1]),
     "total_inactive_file"),
)  # fmt: skip


@pytest.mark.parametrize(("own", "limit", "use", "cached"), JOBS)
@pytest.mark.parametrize("level", ["slurm", "slurm/job_7", "slurm/job_7/step_0"])
def test_the_memory_of_a_job(own, limit, use, cached, level, files):
    """It is that of a control group, which may be any that the process lies in."""

    def at(path):
        return "/".join((str(Path(path).parent), level, Path(path).name))

    files["/proc/meminfo"], files["/proc/self/cgroup"] = MEMINFO, own
    files |= {at(limit): "60000\n", at(use): "50000\n"}
    files[at("/".join((str(Path(limit).parent), "memory.stat")))] = f"{cached} 3000\n"
    assert memory.total_bytes.__wrapped__() == 60_000
    assert available_bytes(CPU) == 13_000


def test_another_jobs_memory_is_none_of_ours(files):
    files |= {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": "0::/slurm/job_7\n"}
    files["/sys/fs/cgroup/slurm/job_8/memory.max"] = "50000\n"
    files["/sys/fs/cgroup/slurm/job_7/memory.max"] = "max\n"
    assert memory.total_bytes.__wrapped__() == 7000 << 10


def test_this_machine():
    assert 0 < available_bytes(CPU) <= memory.total_bytes()

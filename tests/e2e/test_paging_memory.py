"""A model that is larger than the memory a process may have."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import llfast
from llfast.checkpoint import Checkpoint
from tests.paging import least_budget, lengthen_header
from tests.stores import run_python
from tests.tiny import make_model, save

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "dtype": "bfloat16",
}
BEYOND = 128 << 20  # bytes that the process may take, on top of what it has after its imports
WORK = 56 << 20  # of a batch, for which nothing is put aside, also where bf16 runs in fp32
# What counts is private memory that may be written to; files that are mapped do not.
CODE = """
import json, re, resource, sys
from pathlib import Path
import torch
import llfast
from llfast.paging import LoadingStatistics

small, large, tokens, beyond = json.loads(sys.argv[1])
def status(name):
    found = re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10
llfast.score(small, token_ids=tokens, weights="paged")  # imports, and threads
limit = status("VmData") + beyond
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytearray(beyond + (32 << 20))
    raise SystemExit("the limit must hold")
except MemoryError:
    pass
Path("/proc/self/clear_refs").write_text("5")  # the highest size of all is that from now on
before, loading = status("VmRSS"), LoadingStatistics()
result = llfast.score(
    large, token_ids=tokens, token_budget=128, weights="paged", memory_budget=72 << 20,
    loading=loading,
)
print(json.dumps({
    "values": result.values.tolist(), "waves": loading.waves, "bytes": loading.nbytes,
    "slots": loading.slot_bytes, "said": loading.peak_bytes, "grown": status("VmHWM") - before,
}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small checkpoint, and one of some 300 MB; neither has a tokenizer."""
    root = tmp_path_factory.mktemp("memory")
    model = make_model("llama", **SIZES).bfloat16()
    return save(make_model("llama"), None, root / "small"), save(model, None, root / "large")


def test_a_model_is_scored_in_less_memory_than_it_takes(folders):
    small, large = folders
    weight_bytes = Checkpoint.open(large).weight_bytes
    assert weight_bytes > 2 * BEYOND
    random = np.random.default_rng(0)
    tokens = [random.integers(3, 300, size).tolist() for size in (40, 100, 7, 250)]
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps([str(small), str(large), tokens, BEYOND])],
        capture_output=True,
        text=True,
        check=False,
        # As many threads as tests have here: bits are promised for one number of them.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = llfast.score(large, token_ids=tokens, token_budget=128, weights="resident").values
    assert found["values"] == expected.tolist()
    assert found["slots"] < BEYOND
    assert found["slots"] < found["said"] < BEYOND
    assert found["grown"] < found["said"] + WORK
    assert found["bytes"] >= found["waves"] * 0.9 * weight_bytes


EXPERTS = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 40,
}
MERGED = """
import json, re, sys
from pathlib import Path
import torch
import llfast

torch.set_num_threads(2)  # each has memory of its own
small, large, budget, options = json.loads(sys.argv[1])
def status(name):
    found = re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10
few = options | {"token_ids": options["token_ids"][:2]}
llfast.score(small, weights="paged", **few)  # imports, and threads
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
llfast.score(large, weights="paged", memory_budget=budget, **options)
print(status("VmHWM") - before)
"""


def test_experts_that_are_put_together_take_what_was_promised(tmp_path):
    """Each is stored by itself; they are copied to another dtype, and then into one tensor."""
    small = save(make_model("mixtral"), None, tmp_path / "small")
    large = save(make_model("mixtral", **EXPERTS).bfloat16(), None, tmp_path / "large")
    options = {"token_ids": [list(range(3, 60))], "token_budget": 128, "dtype": "float32"}
    budget = least_budget(large, **options) + (1 << 20)
    given = json.dumps([str(small), str(large), budget, options])
    grown = int(run_python(MERGED, given).stdout)
    assert grown < budget + WORK


WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}


def test_tensors_between_whole_addresses_take_what_was_promised(tmp_path):
    """A page of them is there a second time, and what is copied of it goes with it."""
    small = save(make_model("llama"), None, tmp_path / "small")
    large = save(make_model("llama", **WIDE).bfloat16(), None, tmp_path / "large")
    lengthen_header(large, 1)
    options = {"token_ids": [list(range(3, 60))], "token_budget": 128, "dtype": "bfloat16"}
    budget = least_budget(large, **options) + (1 << 20)
    given = json.dumps([str(small), str(large), budget, options])
    grown = int(run_python(MERGED, given).stdout)
    assert grown < budget + WORK // 2, "a copy of a page is 24 MiB"


def test_many_short_batches_take_what_was_promised(tmp_path):
    """What a suspended call takes beside its tensors counts: its stack, above all."""
    small = save(make_model("llama"), None, tmp_path / "small")
    options = {"token_ids": [[3 + n % 200] * 12 for n in range(1500)], "token_budget": 16}
    budget = least_budget(small, **options) + (16 << 20)
    given = json.dumps([str(small), str(small), budget, options])
    grown = int(run_python(MERGED, given).stdout)
    assert grown < budget + (8 << 20), "all of them take some 60 MiB"


def test_a_large_vocabulary_takes_its_logits_once(tmp_path):
    """Those of the probe are looked at by rows: together they would be there in fp64, too."""
    small = save(make_model("llama"), None, tmp_path / "small")
    sizes = {"vocabulary": 1 << 18, "hidden_size": 64, "num_attention_heads": 4}
    large = save(make_model("llama", **sizes).bfloat16(), None, tmp_path / "large")
    options = {"token_ids": [list(range(3, 60))], "token_budget": 64, "dtype": "bfloat16"}
    budget = least_budget(large, **options) + (1 << 20)
    given = json.dumps([str(small), str(large), budget, options])
    grown = int(run_python(MERGED, given).stdout)
    assert grown < budget + WORK, "24 MiB in bf16, and 48 of some rows in fp64"


COPIES = """
import re
from pathlib import Path
import torch
from llfast.paging.slots import move_to

def taken():
    found = re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10
def layer():
    for each in read:
        there.append(move_to(each, cpu, torch.float32))
        between.append(torch.empty(1000))  # it stays, and parts what is freed around it
cpu, between = torch.device("cpu"), []
read = [torch.zeros(words, 512, dtype=torch.bfloat16) for words in (1024, 2048, 2048)]
for number in range(31):
    there = []
    layer()
    if not number:
        before = taken()
assert all(each.data_ptr() % 4096 == 0 for each in there)  # as memory is that malloc has not
print(taken() - before)
"""


def test_copies_in_another_dtype_leave_nothing_behind():
    assert int(run_python(COPIES).stdout) < 20 << 20, "each layer's copies take 10 MiB"

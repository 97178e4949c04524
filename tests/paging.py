"""Scoring by pages in as little memory as it takes, and files to read pages from."""

import json
import re

import numpy as np
import pytest
import torch

import llfast
from llfast.dtypes import STORED_DTYPES
from llfast.paging import LoadingStatistics

# Kept small, or a unit of its own: the limits that `units` has for both.
LIMITS = ("LARGEST_KEPT_EMBEDDING_BYTES", "LARGEST_KEPT_LAYER_BYTES")


def least_budget(folder, *texts, **options):
    """The least `memory_budget` that is not refused: room for a batch, and for no other."""
    with pytest.raises(ValueError, match="memory_budget must hold two pages") as caught:
        llfast.score(folder, *texts, weights="paged", memory_budget=1, **options)
    number = re.search(r"it takes more than ([\d,]+)$", str(caught.value))[1]
    return int(number.replace(",", "")) + 1


def score_paged(folder, *texts, memory_budget="1GiB", **options):
    """The result, and what loading took."""
    statistics = LoadingStatistics()
    result = llfast.score(
        folder,
        *texts,
        weights="paged",
        memory_budget=memory_budget,
        loading=statistics,
        per_token=True,
        **options,
    )
    assert result.provenance["weights"] == "paged"
    return result, statistics


def check_same(one, other):
    """The same bits of every text and every token."""
    assert one.values.tobytes() == other.values.tobytes()
    assert one.logprobs.values.tobytes() == other.logprobs.values.tobytes()
    assert one.token_counts.tolist() == other.token_counts.tolist()
    assert one.token_budgets.tolist() == other.token_budgets.tolist()
    provenance = [{**each.provenance, "weights": ""} for each in (one, other)]
    assert provenance[0] == provenance[1]


def make_tensor(dtype, shape, seed=0):
    """Any bits, NaNs among them."""
    count = int(np.prod(shape, dtype=int))
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    most = 2 if dtype == torch.bool else 256
    raw = np.random.default_rng(seed).integers(0, most, size, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def same_bits(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    raw = [each.contiguous().view(-1).view(torch.uint8) for each in (one, other) if each.numel()]
    assert not raw or torch.equal(*raw)


def plain_file(path, tensors):
    """A file whose tensors lie right after a header of any length, in the order given."""
    header, begin, data = {}, 0, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        dtype = next(key for key, kind in STORED_DTYPES.items() if kind == tensor.dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + len(raw)],
        }
        begin += len(raw)
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def lengthen_header(folder, count):
    """Put as many spaces at the end of a file's header: tensors begin later."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes((end - 8 + count).to_bytes(8, "little") + data[8:end] + b" " * count)
    with path.open("ab") as file:
        file.write(data[end:])

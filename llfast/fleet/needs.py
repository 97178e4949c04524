"""How much of a machine a model needs, from the headers of its weights alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llfast.checkpoint import Checkpoint
from llfast.dtypes import parse_dtype
from llfast.memory import parse_bytes
from llfast.model_list import ModelRequest
from llfast.quantised import QuantisedWeight
from llfast.safetensors_file import DTYPE_BITS, StoredTensor

_GIB = 1 << 30
_PROCESS_BYTES = _GIB  # of host memory: Python, torch, transformers, texts
_CONTEXT_BYTES = _GIB  # of a GPU: CUDA's own, and kernels
_BATCH_BYTES = _GIB // 2  # a batch's activations
_COPIES = 2.2  # on a CPU: weights, and those of linear layers once more, packed
_ROOM = 1.2  # on a GPU, over weights
_UNKNOWN_BYTES = 1.0 * _GIB  # of weights, where nothing says
_LEAST_PAGES = 3  # of memory: two on their way, and what stays
_MOST_AT_ONCE = 16  # on a GPU
_LAYER = re.compile(r"(.*?\.\d+)\.")
# Stored tensors of which each number is several, mostly of 4 bits.
_PACKED = re.compile(r"(?:.*\.)?(?:weight_packed|qweight)")
_PACKED_DTYPE = "F4"


@dataclass(frozen=True, slots=True)
class Size:
    """What is stored of a model.

    Attributes:
        parameters: stored numbers; of those that are packed, as many as they are in 4 bits.
        page: stored numbers of the largest layer, or tensor that is in none.
        itemsize: bytes of most of them.
    """

    parameters: int
    page: int
    itemsize: float


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """What a worker reserves.

    Attributes:
        gpus: a share of one; 0 without.
        memory: bytes of host memory.
        cpus: processor cores.
    """

    gpus: float
    memory: int
    cpus: float

    def resources(self) -> dict[str, float]:
        """What is reserved, by the names that Ray has for it."""
        own = {"GPU": self.gpus, "memory": self.memory, "CPU": self.cpus}
        return {name: size for name, size in own.items() if size}

    def times_in(self, machine: Mapping[str, float]) -> int:
        """How many of them a machine's resources hold."""
        return min(int(machine.get(name, 0) / size) for name, size in self.resources().items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What the machines of a cluster have at most.

    Attributes:
        memory: bytes of host memory.
        gpu_bytes: memory of the smallest GPU; 0 without, or if they are not to be used.
        cpus: cores for a worker.
    """

    memory: int
    gpu_bytes: int
    cpus: float


def size_of(request: ModelRequest) -> Size | None:
    """The size of a model, from the headers of its safetensors files; reads no weights.

    Returns: None if that does not say: its worker will find out what it is.
    """
    try:
        where, revision = request.model, request.revision
        if request.adapter_base is not None:
            where, revision = request.adapter_base, None
        if Path(where).is_dir():
            tensors = Checkpoint.open(Path(where)).plain
            found = [(name, _dtype_of(each), each.parameters) for name, each in tensors.items()]
        else:
            from huggingface_hub import get_safetensors_metadata

            files = get_safetensors_metadata(where, revision=revision).files_metadata
            found = [
                (name, each.dtype, each.parameter_count)
                for file in files.values()
                for name, each in file.tensors.items()
            ]
    except Exception:  # whatever it is, it is told where the model is tried
        return None
    counts: Counter[str] = Counter()
    pages: Counter[str] = Counter()
    for name, stored, numbers in found:
        dtype, parameters = stored, numbers
        if _PACKED.fullmatch(name) and stored in DTYPE_BITS:
            dtype = _PACKED_DTYPE
            parameters = numbers * DTYPE_BITS[stored] // DTYPE_BITS[dtype]
        counts[dtype] += parameters
        layer = _LAYER.match(name)
        pages[layer[1] if layer else name] += parameters
    if not counts.total():
        return None
    (most, _), *_ = counts.most_common(1)
    return Size(counts.total(), max(pages.values()), DTYPE_BITS.get(most, 32) / 8)


def _dtype_of(weight: StoredTensor | QuantisedWeight) -> str:
    is_packed = isinstance(weight, QuantisedWeight) and DTYPE_BITS[weight.dtype] > 8
    return _PACKED_DTYPE if is_packed else weight.dtype


def place(
    request: ModelRequest, size: Size | None, dtype: str, machines: Machines, ran_out: int = 0
) -> tuple[Slot, ModelRequest]:
    """What a worker reserves for a model, and the model with the memory budget that this leaves it.

    What no machine holds reserves the largest one, and is paged there.

    Args:
        request: the model.
        size: of it, if it is known.
        dtype: unless it has its own.
        machines: what there is.
        ran_out: how often memory has run out: each time, twice as much is reserved, and half as
            much used.
    """
    weights, page = _UNKNOWN_BYTES, 0.0
    if size is not None:
        itemsize = _itemsize(size, request.dtype or dtype, machines)
        weights, page = size.parameters * itemsize, size.page * itemsize
    own = None if request.memory_budget is None else parse_bytes(request.memory_budget)
    if machines.gpu_bytes:
        needed = (_ROOM * weights if own is None else own) + _BATCH_BYTES + _CONTEXT_BYTES
        share = (
            1.0 if size is None else 1 / min(max(machines.gpu_bytes // needed, 1), _MOST_AT_ONCE)
        )
        gpus = min(share * 2**ran_out, 1.0)
        memory = _reserved(_PROCESS_BYTES + weights, machines)
        room = share * machines.gpu_bytes - _CONTEXT_BYTES
        is_free = share == 1.0  # nobody else is there
    else:
        gpus = 0.0
        usual = _COPIES * weights + _BATCH_BYTES
        memory = _reserved(_PROCESS_BYTES + (usual if own is None else own), machines)
        room = memory - _PROCESS_BYTES
        is_free = room <= 0  # a machine that does not say, or hardly has any: its worker sees
    slot = Slot(gpus, min(memory * 2**ran_out, machines.memory), machines.cpus)
    as_it_is = own is not None or size is None or is_free or request.weights == "resident"
    if as_it_is and not ran_out:
        return slot, request
    least = _LEAST_PAGES * page if own is None else min(_LEAST_PAGES * page, own)
    budget = max((own or room) / 2**ran_out, least, 1)
    way = "auto" if request.weights == "resident" else request.weights
    return slot, replace(request, weights=way, memory_budget=str(int(budget)))


def _itemsize(size: Size, dtype: str, machines: Machines) -> float:
    """Bytes of a number as it runs."""
    if dtype != "auto":
        return parse_dtype(dtype).itemsize
    if not machines.gpu_bytes:
        return 4.0  # what is stored in fewer bits runs in 32 where processors are slow in these
    return max(size.itemsize, 2.0)


def _reserved(size: float, machines: Machines) -> int:
    """The next of 1, 1.5, 2, 3, 4, 6, 8, ... GiB: so a few kinds of workers serve all models."""
    step = _GIB
    while step < size:
        step = step * 3 // 2 if step & (step - 1) == 0 else step * 4 // 3
    return min(step, machines.memory)

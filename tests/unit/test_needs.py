"""What a model reserves on a machine, against arithmetic by hand."""

import dataclasses

import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file

from llfast.fleet import needs
from llfast.fleet.needs import Machines, Size, Slot, place, size_of
from llfast.model_list import ModelRequest
from tests.compressed import save_compressed
from tests.tiny import make_model, save

GIB = 1 << 30
CPUS = Machines(memory=64 * GIB, gpu_bytes=0, cpus=8)
GPUS = Machines(memory=200 * GIB, gpu_bytes=80 * GIB, cpus=1)
MODEL = ModelRequest(model="org/m")


def sized(gib, itemsize=2):
    """A model of so many GiB as it is stored, in 32 layers."""
    parameters = int(gib * GIB / itemsize)
    return Size(parameters, parameters // 32, itemsize)


def budget(request):
    return None if request.memory_budget is None else int(request.memory_budget)


def test_size_of_a_folder(checkpoints):
    from transformers import AutoModelForCausalLM

    for kind in ("gpt2", "llama"):
        model = AutoModelForCausalLM.from_pretrained(checkpoints / kind)
        layers = model.transformer.h if kind == "gpt2" else model.model.layers
        pages = [sum(each.numel() for each in layer.parameters()) for layer in layers]
        pages += [each.numel() for each in (*model.get_input_embeddings().parameters(),)]
        found = size_of(ModelRequest(model=str(checkpoints / kind)))
        assert found == Size(model.num_parameters(), max(pages), 4)


def test_size_of_a_repository_takes_headers_alone(monkeypatch):
    asked = []

    def get_safetensors_metadata(repo, *, revision):
        asked.append((repo, revision))
        tensors = {
            "model.embed.weight": TensorInfo("BF16", [100, 8], (0, 1600)),
            "model.layers.0.a.weight": TensorInfo("BF16", [8, 8], (1600, 1728)),
            "model.layers.0.b.weight": TensorInfo("F32", [8], (1728, 1760)),
            "model.layers.1.a.weight": TensorInfo("BF16", [8, 200], (1760, 4960)),
        }
        weights = dict.fromkeys(tensors, "model.safetensors")
        file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        return SafetensorsRepoMetadata(
            metadata=None, sharded=False, weight_map=weights, files_metadata={"m": file}
        )

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", get_safetensors_metadata)
    request = ModelRequest(model="org/m", revision="v1")
    assert size_of(request) == Size(800 + 64 + 8 + 1600, 1600, 2)
    adapter = dataclasses.replace(request, adapter_base="org/base")
    assert size_of(adapter) == size_of(request)
    assert asked == [("org/m", "v1"), ("org/base", None), ("org/m", "v1")]


def test_packed_numbers_are_counted_one_by_one(tmp_path):
    """They run in 16 or 32 bits each."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    layer = {f"model.layers.0.{name}.weight_packed": (32, 8) for name in ("q_proj", "k_proj")}
    tensors = {name: torch.zeros(size, dtype=torch.int32) for name, size in layer.items()}
    tensors["model.layers.0.q_proj.qweight"] = torch.zeros(8, 32, dtype=torch.int32)  # as others do
    tensors["model.layers.0.q_proj.weight_scale"] = torch.zeros(32, 2, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"] = torch.zeros(100, 8, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    packed = 3 * 256 * 8
    size = size_of(ModelRequest(model=str(tmp_path)))
    assert size == Size(packed + 64 + 800, packed + 64, 0.5)
    for machines, itemsize in ((CPUS, 4), (GPUS, 2)):
        assert needs._itemsize(size, "auto", machines) == itemsize


def test_a_folder_of_packed_numbers(tmp_path):
    """As llfast itself reads it, by what it stands for."""
    model = make_model("llama", hidden_size=128, intermediate_size=256).bfloat16()
    whole = save(model, None, tmp_path / "plain")
    plain = size_of(ModelRequest(model=str(whole)))
    folder = save_compressed(whole, tmp_path / "m", "pack-quantized")
    size = size_of(ModelRequest(model=str(folder)))
    scales = sum(
        tensor.numel()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.endswith(("weight_scale", "weight_shape"))
    )
    assert plain.parameters <= size.parameters <= plain.parameters + scales
    assert (plain.itemsize, size.itemsize) == (2, 0.5)


def test_a_model_that_is_not_there_has_no_size(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert size_of(ModelRequest(model=str(tmp_path / "gone"))) is None
    assert size_of(ModelRequest(model=str(tmp_path))) is None


def test_small_models_share_a_gpu_and_large_ones_have_it():
    shares = [place(MODEL, sized(gib), "auto", GPUS)[0].gpus for gib in (0.3, 4, 14, 40, 300)]
    # 1.2 of the weights and 1.5 GiB beside them: 80 / 1.86, 6.3, 18.3, 49.5, 361.5.
    assert shares == [1 / 16, 1 / 12, 1 / 4, 1, 1]
    _, request = place(MODEL, sized(14), "auto", GPUS)
    assert budget(request) == 19 * GIB, "a quarter of 80 GiB, but for what CUDA takes"
    assert place(MODEL, sized(300), "auto", GPUS)[1] == MODEL, "pages what does not fit"


def test_the_dtype_that_it_runs_in_counts():
    def gpus(size, dtype):
        return place(MODEL, size, dtype, GPUS)[0].gpus

    assert gpus(sized(14), "float32") == gpus(sized(28), "auto") == 1 / 2
    assert gpus(sized(7, itemsize=1), "auto") == gpus(sized(14), "auto"), "fp8 runs in 16 bits"
    own = dataclasses.replace(MODEL, dtype="float32")
    assert place(own, sized(14), "bfloat16", GPUS)[0].gpus == 1 / 2


def test_host_memory_on_processors():
    # Half precision may run in 32 bits, twice (packed), with a GiB for the process and half a one
    # for a batch: 1.5 + 2.2 x 2 x 0.3 = 2.8 and 1.5 + 2.2 x 2 x 5 = 23.5.
    for gib, reserved in ((0.3, 3), (5, 24), (100, 64)):
        slot, request = place(MODEL, sized(gib), "auto", CPUS)
        assert slot == Slot(0.0, reserved * GIB, 8)
        assert budget(request) == max((reserved - 1) * GIB, int(3 * sized(gib).page * 4))


def test_what_the_list_says_stays():
    own = dataclasses.replace(MODEL, memory_budget="10GiB", weights="paged")
    assert place(own, sized(100), "auto", CPUS) == (Slot(0.0, 12 * GIB, 8), own)
    whole = dataclasses.replace(MODEL, weights="resident")
    assert place(whole, sized(5), "auto", CPUS) == (Slot(0.0, 24 * GIB, 8), whole)
    assert place(MODEL, None, "auto", CPUS)[1] == MODEL


@pytest.mark.parametrize("way", [None, "resident", "paged"])
def test_a_model_that_ran_out_of_memory_is_given_more_and_uses_less(way):
    request = dataclasses.replace(MODEL, weights=way)
    expected = {None: None, "resident": "auto", "paged": "paged"}[way]
    for times, reserved, used in ((1, 6, 1), (2, 12, 0.5), (7, 64, 0.5 / 32)):
        slot, again = place(request, sized(0.3), "auto", CPUS, times)
        assert (slot.memory, again.weights) == (reserved * GIB, expected)
        assert budget(again) == max(int(used * GIB), int(3 * sized(0.3).page * 4))
    for times, gpus, used in ((1, 1 / 2, 9.5), (2, 1, 4.75), (3, 1, 2.375)):
        slot, again = place(request, sized(14), "auto", GPUS, times)
        assert slot.gpus == gpus
        assert budget(again) == max(int(used * GIB), int(3 * sized(14).page * 2))


def test_a_budget_that_was_too_much_is_never_raised():
    """Where the list's own is less than the pages that a model is usually left."""
    own = dataclasses.replace(MODEL, memory_budget=str(GIB), weights="paged")
    for machines in (CPUS, GPUS):
        assert budget(place(own, sized(40), "auto", machines, 1)[1]) == GIB


def test_host_memory_that_ran_out_beside_a_gpu_is_doubled_too():
    reserved = [place(MODEL, sized(14), "auto", GPUS, times)[0].memory for times in range(5)]
    assert reserved == [16 * GIB, 32 * GIB, 64 * GIB, 128 * GIB, 200 * GIB]


@pytest.mark.parametrize("memory", [0, GIB // 2])
def test_a_machine_that_says_of_no_memory_sets_no_budget(memory):
    machines = dataclasses.replace(CPUS, memory=memory)
    assert place(MODEL, sized(5), "auto", machines) == (Slot(0.0, memory, 8), MODEL)


def test_how_many_a_machine_holds():
    slot = Slot(0.25, 8 * GIB, 1)
    assert slot.times_in({"CPU": 16, "GPU": 2, "memory": 100 * GIB}) == 8
    assert slot.times_in({"CPU": 3, "GPU": 2, "memory": 100 * GIB}) == 3
    assert slot.times_in({"CPU": 16, "memory": 100 * GIB}) == 0
    assert Slot(0.0, 8 * GIB, 4).times_in({"CPU": 16, "memory": 17 * GIB}) == 2


def test_sizes_are_of_few_kinds():
    steps = [
        needs._reserved(gib * GIB, CPUS) / GIB for gib in (0.1, 1, 1.2, 1.6, 2.5, 5, 9, 30, 63)
    ]
    assert steps == [1, 1, 1.5, 2, 3, 6, 12, 32, 64]

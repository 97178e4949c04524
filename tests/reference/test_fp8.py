"""fp8 checkpoints give the bits of the plain ones that they stand for, loaded whole or paged."""

import re
import threading

import pytest
import safetensors
import torch
import transformers

import llfast
from llfast import CheckpointError, loading
from llfast.checkpoint import Checkpoint
from llfast.dtypes import fast_dtype
from llfast.errors import CannotPageError
from llfast.models import open_model
from llfast.paging import units
from llfast.paging.skeleton import Skeleton
from llfast.quantised.dequantise import in_fp32, multiplied
from llfast.quantised.weight import Fp8Weight
from tests.paging import LIMITS, check_same, least_budget, score_paged
from tests.quantised import (
    KINDS,
    edit,
    is_quantised,
    quantise,
    same_numbers,
    save_fp8,
    save_plain,
    spread,
)
from tests.tiny import TEXTS, make_model, make_tokenizer, quiet

pytestmark = pytest.mark.usefixtures("on_one_thread")  # models are tiny

OPTIONS = {"token_budget": 64}
FEW = TEXTS[1::3]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Plain checkpoints in bf16, by kind and the sizes that are changed."""
    made, folder = {}, tmp_path_factory.mktemp("plain")

    def get(kind, **sizes):
        key = f"{kind} {sizes}"
        if key not in made:
            model = make_model(kind, **KINDS[kind] | sizes)
            made[key] = save_plain(model, make_tokenizer(adds_bos=False), folder / str(len(made)))
        return made[key]

    return get


def resident(folder, **options):
    result = llfast.score(folder, FEW, weights="resident", per_token=True, **OPTIONS, **options)
    assert result.provenance["weights"] == "resident"
    return result


def paged(folder, **options):
    return score_paged(folder, FEW, **OPTIONS, **options)[0]


# ------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_resident_is_the_truth_and_paged_is_resident(kind, dtype, plain, tmp_path):
    """Experts are merged, and no size is a multiple of 128."""
    folder = save_fp8(
        plain(kind), tmp_path / "m", truth=tmp_path / "truth", truth_dtype=DTYPES[dtype]
    )
    truth = resident(tmp_path / "truth", dtype=dtype)
    assert truth.values.tobytes() != resident(plain(kind), dtype=dtype).values.tobytes()
    expected = resident(folder, dtype=dtype)
    same_numbers(expected, truth)
    least = least_budget(folder, FEW, dtype=dtype, **OPTIONS)
    for budget in ("1GiB", least):
        check_same(paged(folder, dtype=dtype, memory_budget=budget), expected)
    kept = llfast.score(folder, FEW, dtype=dtype, per_token=True, **OPTIONS)
    assert kept.provenance["weights"] == "kept"
    same_numbers(kept, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_transformers_loads_the_same_where_blocks_are_whole(kind, plain, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    sizes |= {"moe_intermediate_size": 128} if kind == "qwen3_moe" else {}
    folder = save_fp8(plain(kind, **sizes), tmp_path / "m")
    own = open_model(folder).load(torch.bfloat16, torch.device("cpu"))
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
        )
    theirs = dict(model.named_parameters())
    assert theirs.keys() == dict(own.named_parameters()).keys()
    for name, parameter in own.named_parameters():
        assert parameter.dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(parameter, theirs[name]), name


def activation_scales(tensors):
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.5)


def short_names(tensors):
    for name in [name for name in tensors if name.endswith(".weight_scale_inv")]:
        tensors[name.replace("weight_scale_inv", "scale")] = tensors.pop(name)


FORMS = {
    "one a weight": {"block": None},
    "one a weight, and of inputs": {"block": None, "change": activation_scales},
    "bf16": {"scale_dtype": torch.bfloat16},
    "exponents": {"scale_dtype": torch.float8_e8m0fnu, "scale_fmt": "ue8m0"},
    "exponents in bytes": {"scale_dtype": torch.uint8, "scale_fmt": "ue8m0"},
    "other names": {"change": short_names},
    "low and wide": {"block": (1, 500)},
    "high and narrow": {"block": (500, 7)},
    "embedding": {"chosen": lambda name, weight: is_quantised(name, weight) or "embed" in name},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_scales(form, plain, tmp_path):
    folder = save_fp8(plain("qwen3"), tmp_path / "m", truth=tmp_path / "truth", **FORMS[form])
    expected = resident(folder, dtype="float32")
    same_numbers(expected, resident(tmp_path / "truth", dtype="float32"))
    check_same(paged(folder, dtype="float32"), expected)


def test_every_layer_pages_alone(plain, tmp_path, monkeypatch):
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)
    folder = save_fp8(plain("qwen3_moe"), tmp_path / "m", chosen=FORMS["embedding"]["chosen"])
    check_same(paged(folder, dtype="float32"), resident(folder, dtype="float32"))


@pytest.mark.parametrize("shape", [(3, 300, 200), (576, 192), (1, 1), (0, 5), (128, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_multiplied(shape, dtype):
    torch.manual_seed(0)
    numbers = torch.randn(shape).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scales = torch.rand(grid)
    expected = (numbers.float() * spread(scales, shape, (128, 128))).to(dtype)
    weight = Fp8Weight("w", shape, (), (128, 128))
    found = multiplied(weight, numbers, scales, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_files_are_asked_by_one_thread(plain, tmp_path, monkeypatch):
    """safetensors 0.8 says "Already borrowed" now and then where two ask."""
    asked = []

    class Watched:
        def __init__(self, *arguments):
            self._file = safetensors.safe_open(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __getattr__(self, name):
            asked.append(threading.current_thread())
            return getattr(self._file, name)

    monkeypatch.setattr(loading, "safe_open", Watched)
    folder = save_fp8(plain("llama"), tmp_path / "m")
    open_model(folder).load(torch.bfloat16, torch.device("cpu"))
    assert set(asked) == {threading.current_thread()}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_in_fp32(dtype):
    """Every number that there is, with and without those that are none."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every[every.float().isfinite()]
    assert len(finite) == (254 if dtype == torch.float8_e4m3fn else 248)
    for numbers in (every, finite, finite[:0], finite.reshape(2, -1).T):
        found = in_fp32(numbers)
        assert found.dtype == torch.float32
        assert torch.equal(found.isnan(), numbers.float().isnan())
        where = ~found.isnan()
        assert torch.equal(found[where], numbers.float()[where])
        assert torch.equal(found[where].signbit(), numbers.float()[where].signbit())


# ------------------------------------------------------------------------------ what is told


def test_it_runs_in_the_dtype_that_it_was_made_from(plain, tmp_path):
    folder = save_fp8(plain("llama"), tmp_path / "m")
    source = open_model(folder)
    assert source.checkpoint.stored_dtype == "F8_E4M3"
    assert source.dtype("auto", torch.device("cuda")) == torch.bfloat16
    cpu = torch.device("cpu")
    assert source.dtype("auto", cpu) == fast_dtype(torch.bfloat16, cpu)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_scales_are_no_parameters(kind, plain, tmp_path):
    folder = save_fp8(plain(kind), tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.parameters == Checkpoint.open(plain(kind)).parameters
    assert checkpoint.quantised == "fp8"
    assert len(checkpoint.tensors) > len(checkpoint.plain)
    assert checkpoint.plain.keys() == Checkpoint.open(plain(kind)).tensors.keys()


def test_memory_is_counted_in_the_dtype_that_it_runs_in(plain, tmp_path):
    """Not in bytes of the file: the layer is there dequantised, beside its page."""
    folder = save_fp8(plain("llama"), tmp_path / "m", truth=tmp_path / "truth")
    least = least_budget(folder, FEW, dtype="float32", **OPTIONS)
    of_truth = least_budget(tmp_path / "truth", FEW, dtype="float32", **OPTIONS)
    layer = sum(
        4 * weight.parameters
        for name, weight in Checkpoint.open(folder).plain.items()
        if ".layers.0." in name
    )
    assert layer < least < of_truth
    _, statistics = score_paged(folder, FEW, dtype="float32", memory_budget=least, **OPTIONS)
    assert statistics.slot_bytes + statistics.kept_bytes + layer < least


def test_merged_experts_take_two_copies(plain, tmp_path):
    for kind, copies in (("llama", 1), ("qwen3_moe", 2)):
        folder = save_fp8(plain(kind), tmp_path / kind)
        source = open_model(folder)
        skeleton = Skeleton(
            source.checkpoint.plain,
            source.config,
            dtype=torch.float32,
            device=torch.device("cpu"),
            name=kind,
        )
        names = [name for name in skeleton.places if ".layers.1." in name]
        assert skeleton.copies(names) == copies
        assert skeleton.converts == (kind == "qwen3_moe")
        assert skeleton.copies([name for name in names if "norm" in name]) == 1  # from bf16


def test_a_model_that_transformers_has_pages_whatever_code_comes_with_it(plain, tmp_path):
    """As DeepSeek-V3 does: only where it may run does its own code count."""
    folder = save_fp8(plain("deepseek_v3"), tmp_path / "m")
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_deepseek.Model"})
    check_same(paged(folder), resident(folder))


def test_a_quantised_head_is_loaded_whole(plain, tmp_path):
    def with_head(name, weight):
        return is_quantised(name, weight) or name == "lm_head.weight"

    folder = save_fp8(plain("llama"), tmp_path / "m", truth=tmp_path / "truth", chosen=with_head)
    with pytest.raises(CannotPageError, match="must have a linear head, stored as it is, to be pa"):
        paged(folder)
    result = llfast.score(folder, FEW, dtype="float32", per_token=True, **OPTIONS)
    assert result.provenance["weights"] == "resident"
    same_numbers(result, resident(tmp_path / "truth", dtype="float32"))


# ------------------------------------------------------------------------------ what is damaged

NAME = "model.layers.1.mlp.down_proj.weight"
SCALE = f"{NAME}_scale_inv"


def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


DAMAGE = {
    "no scale": (without(SCALE), f"'{NAME}' must come with scales ('{SCALE}'), got none"),
    "wrong grid": (
        put(SCALE, lambda scale: scale.T.contiguous()),
        "one for 128 x 128 numbers of a weight of shape [192, 320], got [3, 2]",
    ),
    "a row short": (put(SCALE, lambda scale: scale[:1].clone()), "must have shape [2, 3], one for"),
    "one scale": (put(SCALE, lambda scale: scale[0, 0].clone()), "got []"),
    "integers": (
        put(SCALE, lambda scale: scale.int()),
        f"'{SCALE}' must be of scales, got it in I",
    ),
    "no numbers of 8 bits": (
        put(NAME, lambda weight: weight.bfloat16()),
        f"'{NAME}' must be of 8-bit floats, for it has scales, got it in BF16",
    ),
    "packed": (
        put(NAME, lambda weight: weight.view(torch.int8)),
        "for it has scales, got it in I8",
    ),
    "a vector": (
        put(NAME, lambda weight: weight.flatten()),
        "must have rows and columns, for it has scales, got shape [61440]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_scales_that_do_not_fit_are_refused_unread(damage, plain, tmp_path):
    change, message = DAMAGE[damage]
    folder = save_fp8(plain("llama"), tmp_path / "m", change=change)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weights", ["resident", "paged", "auto"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_scales_that_are_not_finite(kind, weights, value, plain, tmp_path):
    """Also those of an expert that no text may need."""
    name = SCALE if kind == "llama" else "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    change = put(name, lambda scale: scale.index_put((torch.tensor(1), torch.tensor(0)), value))
    value = torch.tensor(value)
    folder = save_fp8(plain(kind), tmp_path / "m", change=change)
    message = f"'{name}' must be finite, for it scales weights, got {value.item()}; download or"
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        llfast.score(folder, FEW, weights=weights, **OPTIONS)
    assert str(caught.value).count("must be") == 1, "it is not wrapped"


def test_scales_without_a_word_of_them_in_the_config(plain, tmp_path):
    """transformers would leave them out, and go on."""
    folder = save_fp8(plain("llama"), tmp_path / "m")
    edit(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match="must have a quantization_config, for 'model.layers"):
        Checkpoint.open(folder)


def test_a_weight_short(plain, tmp_path):
    def both(tensors):
        del tensors[NAME], tensors[SCALE]

    folder = save_fp8(plain("llama"), tmp_path / "m", change=both)
    for weights in ("resident", "paged"):
        with pytest.raises(CheckpointError, match=f"1 missing keys: {NAME}"):
            llfast.score(folder, FEW, weights=weights, **OPTIONS)


def test_truths_of_these_tests():
    """What is quantised comes back within an eighth of an octave, and not as it was."""
    torch.manual_seed(0)
    weight = torch.randn(200, 300)
    numbers, scales, product = quantise(weight, (128, 128), torch.float32)
    assert (numbers.dtype, scales.shape) == (torch.float8_e4m3fn, (2, 3))
    assert 0 < (product / weight - 1).abs().median() < 1 / 16

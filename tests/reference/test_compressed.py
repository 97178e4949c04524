"""compressed-tensors gives the bits of the plain checkpoints that it stands for."""

import re
import warnings

import pytest
import torch
import transformers

import llfast
from llfast import CheckpointError, MissingDependencyError, UnsupportedModelError
from llfast.checkpoint import Checkpoint
from llfast.models import open_model
from llfast.quantised import compressed
from tests.compressed import ARGUMENTS, save_compressed
from tests.paging import check_same, least_budget, score_paged
from tests.quantised import KINDS, edit, same_numbers, save_plain
from tests.tiny import TEXTS, make_model, make_tokenizer, quiet

pytestmark = pytest.mark.usefixtures("on_one_thread")  # models are tiny


pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
OPTIONS = {"token_budget": 64}
FEW = TEXTS[1::4]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Plain checkpoints in bf16."""
    folder, tokenizer = tmp_path_factory.mktemp("plain"), make_tokenizer(adds_bos=False)
    return {
        kind: save_plain(make_model(kind, **KINDS[kind]), tokenizer, folder / kind)
        for kind in ("llama", "qwen3_moe")
    }


def resident(folder, **options):
    return llfast.score(folder, FEW, weights="resident", per_token=True, **OPTIONS, **options)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", "float32"),
        ("qwen3_moe", "bfloat16"),
        pytest.param("llama", "bfloat16", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("form", ARGUMENTS)
def test_resident_is_the_truth_and_paged_is_resident(kind, form, dtype, plain, tmp_path):
    truth = {"truth": tmp_path / "truth", "truth_dtype": DTYPES[dtype]}
    folder = save_compressed(plain[kind], tmp_path / "m", form, **truth)
    expected = resident(folder, dtype=dtype)
    same_numbers(expected, resident(tmp_path / "truth", dtype=dtype))
    least = least_budget(folder, FEW, dtype=dtype, **OPTIONS)
    for budget in ("1GiB", least):
        found, _ = score_paged(folder, FEW, dtype=dtype, memory_budget=budget, **OPTIONS)
        check_same(found, expected)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.parameters == Checkpoint.open(plain[kind]).parameters
    assert open_model(folder).dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_scales_of_other_dtypes(scale_dtype, plain, tmp_path):
    for form in ("float-quantized", "pack-quantized"):
        options = {"truth": tmp_path / f"{form} truth", "scale_dtype": scale_dtype}
        folder = save_compressed(plain["llama"], tmp_path / form, form, **options)
        expected = resident(folder, dtype="float32")
        same_numbers(expected, resident(options["truth"], dtype="float32"))
        check_same(score_paged(folder, FEW, dtype="float32", **OPTIONS)[0], expected)


@pytest.mark.parametrize("form", ["float-quantized", "int-quantized", "pack-quantized asymmetric"])
def test_transformers_loads_the_same(form, plain, tmp_path):
    folder = save_compressed(plain["llama"], tmp_path / "m", form)
    own = open_model(folder).load(torch.bfloat16, torch.device("cpu"))
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is asked for beside the config
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        )
    theirs = dict(model.named_parameters())
    for name, parameter in own.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_groups_are_told_by_names(plain, tmp_path):
    """The last one is of every linear layer that none before it names."""
    folder = save_compressed(plain["llama"], tmp_path / "m", "int-quantized", truth=tmp_path / "t")
    eight = {"num_bits": 8, "type": "int", "strategy": "channel"}
    wrong = eight | {"strategy": "group", "group_size": 8}
    groups = {
        "others": {"targets": ["Linear"], "weights": wrong},
        "mlp": {"targets": [r"re:.*mlp\..*_proj$"], "weights": eight},
        "attention": {"targets": [r"re:.*self_attn.*"], "weights": eight},
    }
    settings = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    settings |= {"format": "int-quantized", "config_groups": groups}
    edit(folder, quantization_config=settings)
    same_numbers(resident(folder, dtype="float32"), resident(tmp_path / "t", dtype="float32"))
    del groups["attention"]
    edit(folder, quantization_config=settings)
    with pytest.raises(CheckpointError, match="must be of BF16 and shape .* by its config group"):
        Checkpoint.open(folder)
    del groups["others"]
    groups["mlp 2"] = groups["mlp"]
    edit(folder, quantization_config=settings)
    with pytest.raises(CheckpointError, match="must be a target of a config group, got one of non"):
        Checkpoint.open(folder)


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "got the format 'nvfp4-pack-quantized'; use the chec"),
        ({"format": "marlin-24"}, "got the format 'marlin-24'"),
        ({"format": "dense"}, "got the format 'dense'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights ('sparse-24-bitmas"),
        ({"transform_config": {"config_groups": {}}}, "got rotated ones (transform_config)"),
        ({"quantization_status": "frozen"}, "got ones of the status 'frozen'"),
        ({"quantization_status": None}, "got ones of the status None"),
    ],
)
def test_other_forms_are_refused_by_name(settings, message, plain, tmp_path):
    folder = save_compressed(plain["llama"], tmp_path / "m", "int-quantized", **settings)
    (folder / "model.safetensors").write_bytes(b"not looked at")
    with pytest.raises(UnsupportedModelError, match=re.escape(message)) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("groups", [None, {}, {"group_0": 3}, {"group_0": {"weights": {}}}, []])
def test_configs_that_are_none(groups, plain, tmp_path):
    folder = save_compressed(plain["llama"], tmp_path / "m", "int-quantized", config_groups=groups)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [None, "0.15.0.1", "0.19"])
def test_the_package_is_named_where_it_is_missing_or_old(version, plain, tmp_path, monkeypatch):
    def installed(name):
        if version is None:
            raise compressed.importlib.metadata.PackageNotFoundError(name)
        return version

    folder = save_compressed(plain["llama"], tmp_path / "m", "int-quantized")
    monkeypatch.setattr(compressed.importlib.metadata, "version", installed)
    with pytest.raises(MissingDependencyError, match=r"run `pip install 'llfast\[compressed\]'`"):
        Checkpoint.open(folder)


MODULE = "model.layers.1.mlp.down_proj"


def without(last):
    return lambda tensors: tensors.pop(f"{MODULE}.{last}")


def put(last, change):
    name = f"{MODULE}.{last}"
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def reorder(tensors):
    tensors[f"{MODULE}.weight_g_idx"] = torch.arange(320, dtype=torch.int32)


GROUPS, CHANNELS, ZEROS = "pack-quantized", "int-quantized", "pack-quantized asymmetric"
DAMAGE = {
    "no scale": (GROUPS, without("weight_scale"), "must come with scales"),
    "no scale of a plain name": (CHANNELS, without("weight_scale"), "must come with scales"),
    "no shape": (GROUPS, without("weight_shape"), "must come with"),
    "no zeros": (ZEROS, without("weight_zero_point"), "weight_zero_point', got none"),
    "fewer scales": (GROUPS, put("weight_scale", lambda t: t[:, :8]), "shape [192, 40] by its con"),
    "turned scales": (CHANNELS, put("weight_scale", lambda t: t.T), "shape [192, 1] by its config"),
    "integers": (CHANNELS, put("weight_scale", lambda t: t.int()), "must be of scales, got it in"),
    "fewer zeros": (ZEROS, put("weight_zero_point", lambda t: t[:9]), "shape [24, 40] by its conf"),
    "another shape": (GROUPS, put("weight_shape", lambda t: t + 8), "of I32 and shape [200, 41]"),
    "no shape at all": (GROUPS, put("weight_shape", lambda t: -t), "must be two sizes, got -192 a"),
    "three sizes": (GROUPS, put("weight_shape", lambda t: t.repeat(2)), "must be two integers, go"),
    "floats": (CHANNELS, put("weight", lambda t: t.to(torch.float8_e4m3fn)), "must be of I8 and s"),
    "unpacked": (GROUPS, put("weight_packed", lambda t: t.to(torch.int8)), "must be of I32 and sh"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_parts_that_do_not_fit_are_refused_unread(damage, plain, tmp_path):
    form, change, message = DAMAGE[damage]
    folder = save_compressed(plain["llama"], tmp_path / "m", form, change=change)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_columns_in_another_order_are_refused(plain, tmp_path):
    """The package has forgotten how to turn them back, and says nothing."""
    folder = save_compressed(plain["llama"], tmp_path / "m", GROUPS, change=reorder)
    with pytest.raises(UnsupportedModelError, match="got columns in another order"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("weights", ["resident", "paged", "auto"])
def test_scales_that_are_not_finite(weights, plain, tmp_path):
    nan = put(
        "weight_scale", lambda t: t.index_put((torch.tensor(7),), torch.tensor(torch.nan).to(t))
    )
    folder = save_compressed(plain["llama"], tmp_path / "m", GROUPS, change=nan)
    with pytest.raises(CheckpointError, match=f"'{MODULE}.weight_scale' must be finite, for it sc"):
        llfast.score(folder, FEW, weights=weights, **OPTIONS)


def test_scales_without_a_word_of_them_in_the_config(plain, tmp_path):
    folder = save_compressed(plain["llama"], tmp_path / "m", "float-quantized")
    edit(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match="must have a quantization_config, for 'model.layers"):
        Checkpoint.open(folder)

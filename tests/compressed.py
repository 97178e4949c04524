"""Tiny checkpoints of compressed-tensors, made by the package itself from plain ones."""

import torch
from safetensors.torch import load_file

from tests.quantised import edit, is_quantised, save_both

ARGUMENTS = {
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "float-quantized tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "float-quantized block": {
        "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]
    },
    "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "naive-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8},
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8},
    "pack-quantized channel": {"num_bits": 4, "type": "int", "strategy": "channel"},
    "pack-quantized 8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "pack-quantized 3": {"num_bits": 3, "type": "int", "strategy": "channel"},
    "pack-quantized asymmetric": {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": False
    },
}  # fmt: skip


def quantise(weight, arguments, form, scale_dtype):
    """What is stored of a weight by its local names, and what it stands for.

    The truth is worked out from the numbers before they are stored: (number - zero) x scale, in
    the dtype of scales.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, arguments.get("group_size")),
        "block": tuple(arguments.get("block_structure", ())),
    }[arguments["strategy"]]
    row, column = torch.arange(rows) // height, torch.arange(columns) // width
    is_float, symmetric = arguments["type"] == "float", arguments.get("symmetric", True)
    most = 448 if is_float else 2 ** (arguments["num_bits"] - 1) - 1
    grid = (-(-rows // height), -(-columns // width))
    largest = torch.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
            largest[i, j] = part.abs().max()
    scales = (largest / most).to(scale_dtype)
    zeros = torch.zeros(grid, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(-2, 3, grid, dtype=torch.int8)
    every, zero = scales[row][:, column].float(), zeros[row][:, column].float()
    numbers = weight / every + zero
    if is_float:
        numbers = numbers.to(torch.float8_e4m3fn).float()
    else:
        numbers = numbers.round().clamp(-most - 1, most)
    exact = ((numbers - zero) * every).to(scale_dtype)  # the product of two that fp32 holds
    state = {
        "weight": exact.float(),
        "weight_scale": scales.reshape(-1) if grid == (1, 1) else scales,
    }
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": arguments})
    if not symmetric:
        state["weight_zero_point"] = zeros
    stored = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
    return {name: tensor.contiguous() for name, tensor in stored.items()}, exact


def save_compressed(
    plain,
    folder,
    kind,
    *,
    truth=None,
    truth_dtype=torch.float32,
    scale_dtype=torch.bfloat16,
    change=lambda tensors: None,
    arguments=None,
    **settings,
):
    """A checkpoint of compressed-tensors, and the plain one that it stands for, as `save_fp8`."""
    form, arguments = kind.split()[0], ARGUMENTS[kind] | (arguments or {})
    stored, exact = {}, {}
    torch.manual_seed(0)
    for name, weight in load_file(plain / "model.safetensors").items():
        exact[name] = weight.to(truth_dtype)
        if is_quantised(name, weight):
            parts, product = quantise(weight.float(), arguments, form, scale_dtype)
            prefix = name.removesuffix("weight")
            stored |= {prefix + part: tensor for part, tensor in parts.items()}
            exact[name] = product.to(truth_dtype)
        else:
            stored[name] = weight
    change(stored)
    group = {"targets": ["Linear"], "weights": arguments}
    if form in ("float-quantized", "int-quantized"):
        inputs = {"num_bits": 8, "type": arguments["type"], "strategy": "token", "dynamic": True}
        group["input_activations"] = inputs
    method = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    } | settings
    save_both(plain, (folder, stored), (truth, exact))
    edit(folder, quantization_config=method)
    return folder

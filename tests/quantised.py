"""Tiny checkpoints with quantised weights, and the plain ones that they stand for."""

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import quiet

SMALL = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "max_position_embeddings": 256,
}
EXPERTS = {"moe_intermediate_size": 136, "num_experts_per_tok": 2}
# No size is a multiple of 128, but for a few of deepseek_v3's.
KINDS = {
    "llama": SMALL,
    "qwen3": SMALL,
    "qwen3_moe": SMALL | EXPERTS | {"num_experts": 4, "decoder_sparse_step": 1},
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": SMALL
    | EXPERTS
    | {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
}


def is_quantised(name, weight):
    """Linear layers, as DeepSeek and Qwen choose them: neither router nor tables."""
    kept = ("embed", "lm_head", "gate.weight", "norm")
    return weight.ndim > 1 and not any(each in name for each in kept)


def grid(shape, block):
    return [-(-size // each) for size, each in zip(shape[-2:], block, strict=True)]


def spread(scales, shape, block):
    """One scale for every number, by nothing but its place."""
    rows = torch.arange(shape[-2]) // block[0]
    columns = torch.arange(shape[-1]) // block[1]
    return scales[..., rows[:, None], columns[None, :]]


def quantise(weight, block, scale_dtype):
    """(numbers, scales, their product): the largest number of a block is about 448."""
    rows, columns = grid(weight.shape, block)
    largest = torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            part = weight[
                row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]
            ]
            largest[row, column] = part.abs().max()
    scales = largest / 448
    if scale_dtype in (torch.float8_e8m0fnu, torch.uint8):
        scales = scales.log2().ceil().exp2()
    stored = scales.to(torch.float8_e8m0fnu if scale_dtype == torch.uint8 else scale_dtype)
    exact = spread(stored.float(), weight.shape, block)
    numbers = (weight / exact).to(torch.float8_e4m3fn)
    if scale_dtype == torch.uint8:
        stored = stored.view(torch.uint8)
    return numbers, stored, numbers.float() * exact


def save_plain(model, tokenizer, folder, dtype=torch.bfloat16):
    with quiet():
        model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_both(plain, *twins):
    """Tensors in folders, each with all else that is in the plain one. None is for no folder."""
    for to, tensors in twins:
        if to is not None:
            to.mkdir(parents=True)
            for file in plain.iterdir():
                if file.name != "model.safetensors":
                    (to / file.name).write_bytes(file.read_bytes())
            save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})


def save_fp8(
    plain,
    folder,
    *,
    truth=None,
    truth_dtype=torch.float32,
    block=(128, 128),
    scale_dtype=torch.float32,
    chosen=is_quantised,
    change=lambda tensors: None,
    **settings,
):
    """An fp8 checkpoint out of a plain one.

    Args:
        plain: the folder of a bf16 checkpoint.
        folder: where the fp8 one goes.
        truth: where a plain one goes that holds what the fp8 one stands for, in `truth_dtype`.
        block: None for one scale a weight.
        scale_dtype: of scales.
        chosen: which weights are quantised.
        change: done to what is stored.
        settings: of the config's quantization_config.
    """
    stored, exact = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        exact[name] = weight.to(truth_dtype)
        stored[name] = weight
        if chosen(name, weight):
            numbers, scales, product = quantise(
                weight.float(), block or tuple(weight.shape), scale_dtype
            )
            stored[name] = numbers
            stored[f"{name}_scale_inv"] = scales.reshape(()) if block is None else scales
            exact[name] = product.to(truth_dtype)
    change(stored)
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    method |= {"weight_block_size": None if block is None else list(block)} | settings
    save_both(plain, (folder, stored), (truth, exact))
    edit(folder, quantization_config=method)
    return folder


def same_numbers(one, other):
    """Of results, whose provenance differs: they are of two checkpoints."""
    assert np.std(other.values) > 10, "the truth must tell texts apart"
    assert one.values.tobytes() == other.values.tobytes()
    assert one.logprobs.values.tobytes() == other.logprobs.values.tobytes()

"""How the configurations are shrunk: sizes common to all types, then what single types need."""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 300
WIDTH = 64
HEADS = 4
EXPERTS = 4
MAX_LENGTH = 128
# Rows of the vocabulary that are padding and that Inkling cuts from its logits.
PADDING_ROWS = 10
# Shorter than the longest test text, so that windows, chunks and selections cut something off.
WINDOW = 16

# Applied to every configuration that has a field of the name.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Widths.
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "n_embd": WIDTH,
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "shared_intermediate_size": 32,
    "dff": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    # Depths. A pattern of layer kinds makes a model deeper, until every kind is there.
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    # Attention.
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "num_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    # Few rectified heads score many pairs exactly zero, and ties are selected by chance.
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": WINDOW,
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "max_position_embeddings": MAX_LENGTH,
    "n_positions": MAX_LENGTH,
    "n_ctx": MAX_LENGTH,
    "max_seq_len": MAX_LENGTH,
    # Experts.
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    # Recurrences.
    "chunk_size": WINDOW,
    "mamba_chunk_size": WINDOW,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
    "linear_head_dim": 16,
    "linear_num_heads": HEADS,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": HEADS,
}

_SLIDING = ["sliding_attention", "full_attention"]
_INKLING = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": WINDOW,
    "d_rel": 4,
    "rel_extent": 32,
    "unpadded_vocab_size": VOCAB_SIZE - PADDING_ROWS,
}
_DOTS3 = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_GEMMA_SHARED_KV = {"layer_types": _SLIDING * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
_LLAMA4 = {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "floor_scale": WINDOW}
_QWEN4 = {
    "hc_lowrank": 8,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": WINDOW,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
}
# Zamba ties its attention blocks to one another, which takes two of them.
_ZAMBA_LAYERS = ["linear_attention", "hybrid"] * 2

# What one model type needs besides. Factors behind the head are set away from one on purpose.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "patching_threshold": 5.0,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    # The sections (height, width, time) share out half of a head.
    "cohere_compass_text": {
        "logit_scale": 0.5,
        "layer_types": _SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
            for kind in _SLIDING
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "doge": {"keep_window_size": WINDOW},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH, "lm_head_multiplier": 0.5},
    "gemma3n_text": _GEMMA_SHARED_KV | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4": {
        "text_config": {
            "global_head_dim": 32,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "final_logit_softcapping": 10.0,
        }
    },
    "gemma4_text": _GEMMA_SHARED_KV | {"global_head_dim": 32},
    "gemma4_unified": {"text_config": {"global_head_dim": 32}},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "flint": {"mlp_only_layers": [0]},
    "granite": {"logits_scaling": 2.0},
    "granite_swa": {"logits_scaling": 2.0},
    "granitemoe": {"logits_scaling": 2.0},
    "granitemoe_swa": {"logits_scaling": 2.0},
    "granitemoehybrid": {
        "logits_scaling": 2.0,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoeshared": {"logits_scaling": 2.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "inkling2_text": _INKLING,
    "inkling_text": _INKLING | {"logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _SLIDING},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "longcat_flash": {
        "head_dim": 8,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 16},
    "mellum": {"layer_types": _SLIDING},
    "minicpm3": {"dim_model_base": 32},
    "minimax": {"block_size": WINDOW},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_n_heads": 2,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
    },
    "opt": {"word_embed_proj_dim": 32},
    "phi4_multimodal": {
        "vision_config": {"image_size": 28, "crop_size": 28},
        "audio_config": {
            "num_blocks": 1,
            "ext_pw_out_channel": WIDTH,
            "depthwise_separable_out_channel": WIDTH,
            "nemo_conv_channels": 8,
        },
    },
    "qwen2": {"use_sliding_window": True, "layer_types": _SLIDING},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW},
    # RWKV rescales its weights in its first forward; in every layer here.
    "rwkv": {"rescale_every": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": _ZAMBA_LAYERS},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": _ZAMBA_LAYERS},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}

"""The causal-LM model types of transformers: which are built and tested, and which are not and why.

A type in neither list is new to this catalogue; the tests print it.
"""

from __future__ import annotations


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COVERED = _names(
    """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom blt
    codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm dbrx deepseek_v2 deepseek_v3
    deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note dots3_note_text emu3 ernie4_5
    ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint fuyu gemma
    gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text
    git glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo
    gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe
    kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4 llama4_text longcat_flash mamba
    mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral
    ministral3 mistral mixtral mllama modernbert-decoder moshi moss_transcribe_diarize mpt
    nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi
    phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv seed_oss
    smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlstm youtu zamba zamba2 zaya
    """
)

_ENCODER = "an encoder: it attends in both directions"
_DECODER_HALF = "the decoder of an encoder-decoder: trained to attend to an encoder's output"
_DRAFT = "a draft model: it needs the hidden states and the key-value cache of its target model"
_AUDIO = "predicts several audio codebooks at a time, not text tokens"

EXCLUDED: dict[str, str] = {
    **dict.fromkeys(
        _names("""
        bert big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod
        """),
        _ENCODER,
    ),
    **dict.fromkeys(
        _names("""
        bart bert-generation bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus
        plbart prophetnet trocr whisper
        """),
        _DECODER_HALF,
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFT),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _AUDIO),
    "cpmant": "its attention is not causal: a token sees what comes after it",
    "gemma3n": "its image tower needs the optional package timm; gemma3n_text is covered",
    "reformer": "hashes with random rotations: two forwards of one text differ",
    "xlnet": "a permutation language model: without a mask it attends in both directions",
}

"""Small checkpoints and tokenizers, made on the spot."""

import contextlib
import math
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards brew green tea and hum "
    "quietly in the morning rain because nobody told them that the river had risen again"
).split()
TEXTS = [
    " ".join(WORDS[(7 * row + 3 * place) % len(WORDS)] for place in range(3 + 3 * row))
    for row in range(12)
]


def make_tokenizer(*, adds_bos: bool, vocabulary: int = 300, **kwargs) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with BOS `<s>` added to every text, or without any."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    bos = {"bos_token": "<s>"} if adds_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **bos, **kwargs)


SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "llama": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 16},
    "granite": {"logits_scaling": 4.0},
    "phi": {"num_key_value_heads": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def make_model(kind: str, *, seed: int = 0, vocabulary: int = 304, **changes):
    """A random model whose logits differ by a few nats; fp32, in evaluation mode."""
    sizes = ({} if kind == "gpt2" else COMMON) | SIZES.get(kind, {}) | changes
    config = AutoConfig.for_model(
        kind, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=None, **sizes
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 2.0 / math.sqrt(parameter.shape[-1]))
            elif "bias" in name:
                parameter.normal_(0.0, 0.5)
    return model.eval()


def save(model, tokenizer, folder: Path) -> Path:
    """An ordinary checkpoint folder."""
    with quiet():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, *, seed: int = 1) -> Path:
    """A LoRA adapter of llama, as peft saves it."""
    import peft

    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # It asks transformers for something that has got another name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = peft.get_peft_model(make_model("llama"), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    return folder


def make_checkpoints(folder: Path) -> Path:
    """`gpt2` and `llama` with and without BOS, a finetune of gpt2, and a mixture of experts."""
    plain, with_bos = make_tokenizer(adds_bos=False), make_tokenizer(adds_bos=True)
    base = make_model("gpt2")
    save(base, plain, folder / "gpt2")
    save(make_model("llama"), with_bos, folder / "llama")
    save(make_model("mixtral"), plain, folder / "mixtral")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    save(base, plain, folder / "gpt2-finetune")
    return folder


def copy_checkpoint(folder, copy, change=lambda name, weight: weight):
    """A checkpoint with other weights."""
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    path = copy / "model.safetensors"
    weights = {name: change(name, weight).clone() for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return copy


@contextlib.contextmanager
def quiet():
    """No progress bars of transformers in the test output."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def one_thread():
    """Models this small are slower on several, and far slower where others use the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plain_logprobs(model, ids) -> torch.Tensor:
    """fp64 log-softmax of a plain forward pass over one text: (n - 1,) nats of tokens 2..n."""
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def plain_loglikelihood(model, ids) -> float:
    """The sum of `plain_logprobs`; 0.0 for fewer than two tokens."""
    return plain_logprobs(model, ids).sum().item() if len(ids) > 1 else 0.0

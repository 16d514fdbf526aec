"""Tiny random models of every family of the paper, with a real (trained in a moment) byte-level tokenizer. No download."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lens_affect.stimuli import load_stimuli

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' if loop.first else '' }}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
VOCABULARY = 480
_COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    # transformers' default of 0.02 makes a random model nearly the identity; larger weights make mistakes visible
    "initializer_range": 0.2,
}
_GATED = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

FAMILIES = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            **_COMMON,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=512,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
    ),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**_GATED, head_dim=16, sliding_window=8)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**_GATED, head_dim=16, sliding_window=8)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_GATED)),
    "llama": (LlamaForCausalLM, LlamaConfig(**_GATED)),
    "mistral": (MistralForCausalLM, MistralConfig(**_GATED, sliding_window=8)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**_GATED, num_local_experts=4, sliding_window=None)),
}
PHI3 = (Phi3ForCausalLM, Phi3Config(**_GATED))
"""A family whose files hold q, k and v in one tensor, and gate and up in another."""
DENSE = tuple(name for name in FAMILIES if name != "mixtral")


@functools.cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(load_stimuli("passages").texts, trainer)
    return tokenizer.to_str()


def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_hf_model(family: str, *, seed: int = 0) -> torch.nn.Module:
    cls, config = PHI3 if family == "phi3" else FAMILIES[family]
    torch.manual_seed(seed)
    model = cls(type(config).from_dict(config.to_dict())).eval()
    model.config.architectures = [cls.__name__]
    return model


def make_multilingual(words, *, seed: int = 0):
    """A random Llama and a SentencePiece-like tokenizer that has each word as one token, with and without a space before, and all bytes."""
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += list(
        dict.fromkeys(form for word in words for form in (word.replace(" ", "▁"), "▁" + word.replace(" ", "▁")))
    )
    inner = Tokenizer(
        models.Unigram([(piece, -float(len(piece) < 2)) for piece in pieces], unk_id=0, byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    settings = _GATED | {"vocab_size": len(pieces) + 3, "hidden_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**settings | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    model.config.architectures = ["LlamaForCausalLM"]
    return model, tokenizer

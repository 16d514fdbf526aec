"""Tiny HookedTransformer models with weights from random Hugging Face models; left out where TransformerLens has no such class any more."""

import importlib.metadata
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from lens_affect.stimuli import load_stimuli
from tests.tiny import make_hf_model, make_tokenizer

torch.set_num_threads(1)  # tiny models are faster on one thread, and many times faster when the other core is busy

if int(importlib.metadata.version("transformer-lens").split(".")[0]) >= 4:
    collect_ignore_glob = ["test_*.py"]  # the main suite runs with TransformerLens 4


def make_random_hf(family):
    """A random model whose norm weights and biases matter too: as transformers draws them they are all 1 and 0."""
    model = make_hf_model(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_hooked(settings, *, chat=True, padding_side="right"):
    """A HookedTransformer with random weights and the tiny tokenizer, which it reads from a folder."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(chat=chat).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = HookedTransformerConfig(**settings, device="cpu", seed=0)
        return HookedTransformer(config, tokenizer=tokenizer, default_padding_side=padding_side).eval()


def settings_of(hf_config):
    """HookedTransformerConfig arguments as loading_from_pretrained sets them for these two architectures."""
    if hf_config.model_type == "gpt2":
        return {
            "n_layers": hf_config.n_layer,
            "d_model": hf_config.n_embd,
            "n_heads": hf_config.n_head,
            "d_head": hf_config.n_embd // hf_config.n_head,
            "d_mlp": 4 * hf_config.n_embd,
            "n_ctx": hf_config.n_positions,
            "d_vocab": hf_config.vocab_size,
            "act_fn": hf_config.activation_function,
            "eps": hf_config.layer_norm_epsilon,
            "normalization_type": "LN",
            "original_architecture": "GPT2LMHeadModel",
        }
    d_head = hf_config.hidden_size // hf_config.num_attention_heads
    return {
        "n_layers": hf_config.num_hidden_layers,
        "d_model": hf_config.hidden_size,
        "n_heads": hf_config.num_attention_heads,
        "n_key_value_heads": hf_config.num_key_value_heads,
        "d_head": d_head,
        "d_mlp": hf_config.intermediate_size,
        "n_ctx": hf_config.max_position_embeddings,
        "d_vocab": hf_config.vocab_size,
        "act_fn": hf_config.hidden_act,
        "eps": hf_config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "rotary_base": hf_config.rope_parameters["rope_theta"],
        "rotary_adjacent_pairs": False,
        "original_architecture": "LlamaForCausalLM",
    }


def take_over(hf_model, **options):
    """A HookedTransformer with the weights of a Hugging Face model, unprocessed."""
    from transformer_lens.pretrained import weight_conversions

    model = make_hooked(settings_of(hf_model.config), **options)
    family = hf_model.config.model_type
    state = getattr(weight_conversions, f"convert_{family}_weights")(hf_model, model.cfg)
    absent = model.load_state_dict(state, strict=False)
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters & set(absent.missing_keys) <= {"unembed.b_U"}, (
        "only GPT-2's b_U, which is zero, has no counterpart"
    )
    assert not absent.unexpected_keys
    return model


@pytest.fixture(scope="session")
def hf_model():
    """hf_model("llama") -> a random Hugging Face model; shared, so tests must not change it."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = make_random_hf(family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def hooked(hf_model):
    """hooked("llama") -> a HookedTransformer with that model's weights; shared, so tests must not change it."""
    made = {}

    def make(family, **options):
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = take_over(hf_model(family), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def few_passages():
    """Four emotions and neutral on four topics."""
    return load_stimuli("passages").select(
        emotions=["happy", "sad", "angry", "calm", "neutral"], groups=["kitchen", "train", "school", "garden"]
    )

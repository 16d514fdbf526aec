"""A tiny Llama as a GGUF file, written as llama.cpp does."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MERGES = ["a b", "ab c"]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    vocabulary = len(_tokens())
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **settings, initializer_range=0.2)
    return LlamaForCausalLM(config).eval()


def _tokens() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return ["<|endoftext|>", *bytes_to_unicode().values(), *(m.replace(" ", "") for m in MERGES)]


def write_gguf(
    path: Path, model: LlamaForCausalLM, quantization: gguf.GGMLQuantizationType, **names: str
) -> dict[str, np.ndarray]:
    """The model as llama.cpp stores it, with `general.*` names; returns the weights as they are after the loss of precision."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    for key, name in names.items():
        writer.add_string(f"general.{key}", name)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantization.name == "Q8_0" else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(_tokens())
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    stored = {}
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        kind = quantization if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(_interleaved(array, name), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
        stored[name] = gguf.dequantize(gguf.quantize(array, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _interleaved(array: np.ndarray, name: str) -> np.ndarray:
    """llama.cpp keeps the rotary halves of query and key rows interleaved."""
    heads = {"q": 4, "k": 2}.get(name.split("_proj", maxsplit=1)[0][-1]) if "self_attn" in name else None
    if heads is None:
        return array
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)

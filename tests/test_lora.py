"""LoRA adapters: what is read without merging is what merging adds; kinds that change more are refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lens_affect.checkpoint_pairs import open_pair
from lens_affect.checkpoints import find_parts, open_checkpoint
from lens_affect.lora import LowRank, multiplied, open_adapter_folder, open_adapter_model
from lens_affect.models import load_model
from tests.tiny import make_hf_model, make_tokenizer

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_peft(family="llama", **settings):
    """A LoRA model whose B is not zero, so that it changes something."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ALL} | settings
    model = get_peft_model(make_hf_model(family), LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


KINDS = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {"rank_pattern": {"gate_proj": 2, "layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"up_proj": 11}},
    ),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["gate_proj", "embed_tokens", "lm_head"]}),
    "saved": ("llama", {"target_modules": ["gate_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["folder", "memory"])
def test_an_adapter_adds_what_merging_adds(kind, where, tmp_path):
    family, settings = KINDS[kind]
    model = make_peft(family, **settings)
    model.save_pretrained(tmp_path / "adapter")
    tuned = open_adapter_folder(tmp_path / "adapter", "mine") if where == "folder" else open_adapter_model(model)
    base = make_hf_model(family)
    pair = open_pair(base, tuned)
    merged = open_checkpoint(PeftModel.from_pretrained(make_hf_model(family), tmp_path / "adapter").merge_and_unload())
    assert pair.keys
    plain = open_checkpoint(base)
    for key in merged.parts:
        difference = merged.read(key) - plain.read(key)
        if key in pair.keys:
            assert difference.abs().max() > 1e-3
            assert (multiplied(pair.change(key)) - difference).abs().max() < 1e-6
            assert (pair.tuned_weight(key) - merged.read(key)).abs().max() < 1e-6
        else:
            assert difference.abs().max() == 0
            assert torch.equal(pair.tuned_weight(key), merged.read(key))


def test_live_layers_inside_a_bridge_are_read_with_their_own_scaling():
    model = make_peft(rank_pattern={"gate_proj": 2}, use_rslora=False)
    bridge = load_model(model, tokenizer=make_tokenizer())
    live, known = open_pair(make_hf_model("llama"), bridge), open_pair(make_hf_model("llama"), model)
    assert live.keys == known.keys
    assert "was not checked by name" in live.notes[0]
    for key in known.keys:
        torch.testing.assert_close(multiplied(live.change(key)), multiplied(known.change(key)))


def test_the_rank_of_a_product_is_that_of_the_adapter():
    change = open_adapter_model(make_peft()).change(open_checkpoint(make_hf_model("llama")).parts["layers.0.gate"])
    assert isinstance(change, LowRank)
    assert change.left.shape == (48, 4)
    assert torch.linalg.matrix_rank(change.dense()) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "of kind 'IA3'; allowed is LORA"),
        ({"use_dora": True}, "DoRA, which rescales the whole weight"),
        ({"init_lora_weights": "pissa"}, "started by 'pissa', which changed the base as well"),
        ({"r": 8}, "matrices of rank 4 .* where its config says 8"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
    ],
)
def test_what_is_no_plain_lora_is_refused(changes, message, tmp_path):
    make_peft().save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        open_adapter_folder(tmp_path / "a", "a")
    file.write_text("[1]")
    with pytest.raises(ValueError, match="damaged .*adapter_config.json"):
        open_adapter_folder(tmp_path / "a", "a")


def test_matrices_without_a_partner_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make_peft().save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match="one matrix only for"):
        open_adapter_folder(tmp_path / "a", "a")
    save_file(
        {k: v[:3] if k == name and ".lora_A" in k else v[:, :3] if k == name else v for k, v in tensors.items()}, file
    )
    with pytest.raises(ValueError, match="allowed are matrices of one rank"):
        open_adapter_folder(tmp_path / "a", "a")
    save_file({"x": torch.ones(1)} | {k: v for k, v in tensors.items() if k == name}, file)
    with pytest.raises(ValueError, match="one matrix only"):
        open_adapter_folder(tmp_path / "a", "a")


def test_two_adapters_at_once_are_refused():
    model = make_peft()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["gate_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="allowed is exactly one"):
        open_adapter_model(model)
    model.set_adapter("second")
    assert set(open_adapter_model(model).targets) == {f"layers.{i}.mlp.gate_proj" for i in range(3)}


def adapter_of(folder, paths):
    """An adapter of rank 1 on 8 x 8 maps, each with a B of its own."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    tensors = {f"base_model.model.{path}.lora_A.weight": torch.ones(1, 8) for path in paths}
    tensors |= {f"base_model.model.{p}.lora_B.weight": torch.full((8, 1), i + 1.0) for i, p in enumerate(paths)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return open_adapter_folder(folder, "mine")


def test_a_vision_tower_keeps_its_own_changes(tmp_path):
    text, vision = "language_model.model.layers.0.self_attn.q_proj", "vision_tower.encoder.layers.0.self_attn.q_proj"
    found = adapter_of(tmp_path / "a", [text, vision])
    assert set(found.targets) == {"layers.0.self_attn.q_proj", vision}
    parts = find_parts({f"{name}.weight": (8, 8) for name in (text, vision)}, {"model_type": None})
    changes = {key: found.change(part).dense() for key, part in parts.items()}
    assert float(changes["layers.0.q"].mean()) == 1
    assert float(changes[f"{vision}.weight"].mean()) == 2


def test_two_changes_of_one_map_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"both stand for layers\.0\.self_attn\.q_proj"):
        adapter_of(tmp_path / "a", ["model.layers.0.self_attn.q_proj", "language_model.layers.0.self_attn.q_proj"])

"""Sizes: published parameter counts come out of a config without weights; names that match nothing are refused."""

import json

import pytest

from lens_affect.sizes import choose_blocks, choose_modules, count_layers, count_parameters, module_shapes, read_config
from tests.tiny import DENSE, FAMILIES, make_hf_model

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def test_affectgpt_trains_what_its_paper_says():
    """Qwen2.5-7B, LoRA rank 16 on all linear modules: the number of its rank table; one quarter of it is the gate."""
    assert count_parameters(QWEN_7B, rank=16) == 40_370_176
    assert count_parameters(QWEN_7B, "gate", rank=16) == 10_092_544
    assert count_parameters(QWEN_7B, "gate", rank=16) / count_parameters(QWEN_7B, rank=16) == 0.25
    assert count_parameters(QWEN_7B, "attention", rank=16) == count_parameters(QWEN_7B, "up", rank=16)


def test_smollm2_has_arms_of_equal_size():
    per_layer = {m: count_parameters(SMOLLM2, m, layers=[3]) for m in ("gate", "up", "down", "attention")}
    assert set(per_layer.values()) == {884_736}
    assert count_parameters(SMOLLM2, "gate", rank=20, layers=[0]) == 42_240
    assert count_parameters(SMOLLM2, "attention", rank=11, layers=[0]) == 42_240
    assert count_parameters(SMOLLM2, "gate", rank=4) / count_parameters(SMOLLM2, rank=4) == pytest.approx(
        0.2075, abs=1e-4
    )
    ranks = {"q": 1, "k": 2, "v": 2, "o": 1}
    assert count_parameters(SMOLLM2, "attention", rank=ranks, layers=[0]) == 2 * 1152 + 4 * 768


@pytest.mark.parametrize("family", DENSE)
def test_shapes_are_those_of_the_model(family):
    model = make_hf_model(family)
    shapes = module_shapes(model.config)
    assert count_layers(model.config) == 3
    sizes = sorted(a * b for a, b in shapes.values())
    block = (model.transformer.h if family == "gpt2" else model.model.layers)[0]
    linear = [p for n, p in block.named_parameters() if p.ndim == 2]
    if family == "gpt2":  # q, k and v are one tensor there
        assert "gate" not in shapes
        assert sum(sizes) == sum(p.numel() for p in linear)
    else:
        assert sizes == sorted(p.numel() for p in linear)
        assert shapes["gate"] == tuple(block.mlp.gate_proj.weight.shape)
        assert shapes["o"] == tuple(block.self_attn.o_proj.weight.shape)


def test_groups_and_lists_name_modules_once_and_in_order():
    assert choose_modules("all") == choose_modules(["mlp", "attention", "gate"])
    assert choose_modules("down+gate, q") == ("q", "gate", "down")
    assert choose_modules("none") == choose_modules([]) == ()
    assert choose_modules("mlp", present=("q", "up", "down")) == ("up", "down")
    assert choose_modules(["embed", "gate"], extra=("embed", "norm")) == ("gate", "embed")
    assert choose_blocks(None, 3) == (0, 1, 2)
    assert choose_blocks([2, 0], 3) == (0, 2)
    assert choose_blocks(1, 3) == (1,)


def test_what_names_nothing_is_refused():
    with pytest.raises(ValueError, match=r"received module 'gate_proj'; allowed are \['q'.*groups \['attention'"):
        choose_modules("gate_proj")
    with pytest.raises(ValueError, match=r"'gate', which this model does not have; it has \['up'\]"):
        choose_modules("gate", present=("up",))
    with pytest.raises(ValueError, match="name nothing"):
        choose_modules("")
    for layers in ([], [3], [0, 0]):
        with pytest.raises(ValueError, match="allowed are different ones of 0 to 2"):
            choose_blocks(layers, 3)
    with pytest.raises(ValueError, match="received rank 0 for 'gate'"):
        count_parameters(SMOLLM2, "gate", rank=0)
    with pytest.raises(ValueError, match="received rank None for 'up'"):
        count_parameters(SMOLLM2, "gate,up", rank={"gate": 1})


def test_configs_come_from_files_and_nested_parts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": QWEN_7B}))
    assert module_shapes(tmp_path) == module_shapes(QWEN_7B)
    assert read_config(tmp_path / "config.json")["model_type"] == "qwen2"
    with pytest.raises(ValueError, match="holds no readable config"):
        read_config(tmp_path / "other.json")
    with pytest.raises(ValueError, match="mixture of experts"):
        module_shapes(FAMILIES["mixtral"][1])
    with pytest.raises(ValueError, match="without hidden_size"):
        module_shapes({"a": 1})
    with pytest.raises(ValueError, match="without the number of layers"):
        count_layers({"hidden_size": 3})
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="is a list"):
        read_config(tmp_path / "list.json")

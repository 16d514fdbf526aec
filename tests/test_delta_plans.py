"""Plans: sizes from headers or configs, before any weight is read; the memory bound itself is tested in test_deltas.py."""

import json

import pytest

from lens_affect.delta_plans import peak_bytes, plan_delta
from lens_affect.lora import open_adapter_model
from tests.test_checkpoint_pairs import changed, save
from tests.test_lora import make_peft
from tests.test_sizes import QWEN_7B
from tests.tiny import make_hf_model


def test_a_plan_counts_what_will_be_read(tmp_path):
    base, tuned = save(make_hf_model("llama"), tmp_path / "a"), save(changed(gate=0.1), tmp_path / "b")
    plan = plan_delta(base, tuned)
    parameters = sum(p.numel() for p in make_hf_model("llama").parameters())
    assert (plan.n_linear, plan.parameters, plan.read_bytes) == (21, parameters, 8 * parameters)
    assert plan.largest == (32, 48)
    assert plan.seconds > 0
    assert "21 linear modules" in str(plan)
    assert plan_delta(base, tuned, control=tuned).read_bytes == 12 * parameters
    assert plan_delta(base, tuned, spectrum=False).seconds < plan.seconds
    assert plan_delta(make_hf_model("llama"), tuned).read_bytes == 4 * parameters
    assert plan_delta(make_hf_model("llama"), changed(gate=0.1)).assumed == "shapes from memory"
    adapter = plan_delta(base, open_adapter_model(make_peft()))
    assert adapter.n_linear == 21
    assert 0 < adapter.read_bytes < plan.read_bytes
    assert plan.to_frame().loc[0, "largest"] == "32x48"


def test_a_7b_pair_is_planned_from_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B | {"vocab_size": 152064, "torch_dtype": "bfloat16"}))
    plan = plan_delta(tmp_path, "nobody/has-this")
    assert plan.n_linear == 196
    assert plan.parameters == 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 2 * 152064 * 3584
    assert plan.read_bytes == 4 * plan.parameters
    assert sorted(plan.largest) == [3584, 18944]
    assert plan.peak_bytes == peak_bytes((18944, 3584)) < 2e9
    assert "from config.json" in str(plan)


def test_pairs_that_do_not_fit_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="different shapes"):
        plan_delta(save(make_hf_model("llama"), tmp_path / "a"), save(make_hf_model("gemma3"), tmp_path / "b"))


def test_of_a_hub_model_that_is_not_here_only_the_config_is_fetched(monkeypatch):
    asked = []

    def config(name):
        asked.append(name)
        return {
            "hidden_size": 8,
            "intermediate_size": 20,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": 50,
        }

    monkeypatch.setattr("lens_affect.delta_plans.locate_config", config)
    found = plan_delta("someone/a-model", "someone/a-fine-tune")
    assert asked == ["someone/a-model"]
    assert found.n_linear == 14
    assert "config.json, both sides as large" in str(found)


def test_an_adapter_of_one_module_is_planned_with_the_modules_that_it_leaves_alone(tmp_path):
    from tests.test_lora import make_peft

    model = make_peft("llama", target_modules=["q_proj"])
    plan = plan_delta(make_hf_model("llama"), model)
    assert plan.n_linear == 21

"""What must be true: published sizes come out, costs grow as they must, nothing is read but a config."""

import pytest

from lens_affect.tuning_plans import machine_speed, plan_tuning
from tests.test_arms import QWEN7B, SMOLLM2

QWEN = {**QWEN7B, "vocab_size": 152064}


def test_a_7b_pair_is_planned_from_its_config():
    whole, gate = (plan_tuning(QWEN, m, rank=16, speed=1e12) for m in ("all", "gate"))
    assert whole.arm.n_parameters == 40370176
    assert gate.arm.n_parameters == 10092544
    assert whole.parameters == pytest.approx(7.61e9, rel=0.01)
    assert 30e9 < gate.memory_bytes < whole.memory_bytes < 40e9
    assert "10,092,544 weights" in str(gate)
    assert len(str(gate).splitlines()) <= 5
    assert gate.to_frame()["n_parameters"].item() == 10092544


def test_full_tuning_costs_more_memory_and_time_than_lora():
    config = {**SMOLLM2, "vocab_size": 49152, "tie_word_embeddings": True}
    lora, full = (plan_tuning(config, "all", method=m, speed=1e11) for m in ("lora", "full"))
    assert lora.parameters == pytest.approx(134.5e6, rel=0.01)
    assert full.memory_bytes > 2 * lora.memory_bytes
    assert full.training_seconds > lora.training_seconds
    assert full.scoring_seconds == lora.scoring_seconds


def test_time_is_proportional_to_steps_and_rows():
    one, two = (plan_tuning({**SMOLLM2, "vocab_size": 9}, "gate", steps=s, n_test=s, speed=1e11) for s in (10, 20))
    assert two.training_seconds == pytest.approx(2 * one.training_seconds)
    assert two.scoring_seconds == pytest.approx(2 * one.scoring_seconds)
    assert plan_tuning({**SMOLLM2, "vocab_size": 9}, "none", speed=1e11).training_seconds == 0


def test_the_machine_is_measured_once():
    assert machine_speed() > 1e8
    assert machine_speed() is machine_speed()

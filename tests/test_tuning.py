"""What must be true: a planted rule is learned, the same seed gives the same weights, failures are recorded, wrong input ends early."""

import pytest
import torch

from lens_affect import tuning
from lens_affect.arms import plan_arm
from lens_affect.trainable import linear_maps
from lens_affect.tuned import write_adapter
from lens_affect.tuning import NoRateError, arm_size, choose_rate, run_arms, tune_module
from tests.planted_task import QUICK, TASK


def test_a_planted_rule_is_learned(tunable, unchanged):
    done = tune_module(tunable, TASK, modules="all", rank=4, rate=2e-2, steps=40, check_every=40, n_validation=8)
    assert done.before.value < 0.8
    assert done.after.value > 0.9
    assert done.gain == pytest.approx(done.after.value - done.before.value)


def test_the_same_seed_gives_the_same_weights(tunable, unchanged):
    first, again, other = (
        tune_module(tunable, TASK, modules="random", rank=2, rate=3e-3, seed=s, **QUICK) for s in (0, 0, 1)
    )
    assert first.trained.keys() == again.trained.keys()
    assert all(torch.equal(first.trained[name], again.trained[name]) for name in first.trained)
    assert set(first.arm.ranks) != set(other.arm.ranks)


def test_none_trains_nothing(tunable, unchanged):
    done = tune_module(tunable, TASK, modules="none")
    assert done.after is done.before
    assert done.trained == {}
    with pytest.raises(ValueError, match="trained nothing"):
        write_adapter(done, "anywhere")


def test_an_exploding_loss_is_recorded_and_the_model_restored(tunable, unchanged, monkeypatch):
    real = tuning.answer_loss
    calls = []

    def loss(tunable, batch):
        calls.append(1)
        return real(tunable, batch) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(tuning, "answer_loss", loss)
    done = tune_module(tunable, TASK, modules="gate", rank=2, rate=3e-3, **QUICK)
    assert done.exploded
    assert "exploded at step 4" in done.note
    assert done.after.n == 0
    assert done.after.values.isnan().all()


def test_a_loss_that_is_finite_but_huge_counts_as_exploded(tunable, unchanged, monkeypatch):
    real, calls = tuning.answer_loss, []

    def loss(tunable, batch):
        calls.append(1)
        return real(tunable, batch) * (100 if len(calls) > 2 else 1)

    monkeypatch.setattr(tuning, "answer_loss", loss)
    assert tune_module(tunable, TASK, modules="gate", rank=2, rate=3e-3, **QUICK).exploded


def test_training_stops_early_and_keeps_the_best_weights(tunable, unchanged, monkeypatch):
    losses = iter([5.0, 4.0, 4.5, 4.6, 3.0])
    seen = []

    def look(tunable, data, step, train_loss):
        seen.append(step)
        return {"step": step, "train_loss": train_loss, "validation_loss": next(losses), "validation_exact": 0.0}

    monkeypatch.setattr(tuning, "_look", look)
    done = tune_module(
        tunable, TASK, modules="gate", rank=1, rate=3e-3, steps=12, check_every=2, patience=2, batch_size=4
    )
    assert seen == [0, 2, 4, 6]
    assert done.best_step == 2
    assert "no better validation loss since step 2" in done.note


def test_the_rate_is_climbed_to_the_best(tunable, unchanged, monkeypatch):
    tried = []

    def train(tunable, parameters, data, rate, *rest):
        tried.append(rate)
        return tuning._Run(None, 0, abs(rate - 0.5), False, "")

    monkeypatch.setattr(tuning, "_train", train)
    kind = {"modules": "gate", "rank": 1, "batch_size": 4, "n_validation": 4}
    assert choose_rate(tunable, TASK, first=0.125, **kind) == 0.5
    assert tried == [0.125, 0.5, 2.0]
    tried.clear()
    assert choose_rate(tunable, TASK, first=2.0, **kind) == 0.5
    assert tried == [2.0, 8.0, 0.5, 0.125]

    def explode(tunable, parameters, data, rate, *rest):
        tried.append(rate)
        return tuning._Run(None, 0, 1.0 if rate < 0.5 else float("inf"), False, "")

    monkeypatch.setattr(tuning, "_train", explode)
    assert choose_rate(tunable, TASK, first=2.0, **kind) == 0.125
    monkeypatch.setattr(tuning, "_train", lambda *a, **k: tuning._Run(None, 0, float("inf"), True, ""))
    with pytest.raises(RuntimeError, match="exploded at every rate"):
        choose_rate(tunable, TASK, first=2.0, **kind)


def test_wrong_input_is_refused_before_anything_is_trained(tunable, unchanged, tiny_model):
    with pytest.raises(ValueError, match="received module 'gates'"):
        tune_module(tunable, TASK, modules="gates")
    with pytest.raises(ValueError, match="received steps=0"):
        tune_module(tunable, TASK, modules="gate", steps=0)
    with pytest.raises(ValueError, match="no training example of planted is that short"):
        tune_module(tunable, TASK, modules="gate", max_tokens=3)
    with pytest.raises(ValueError, match="has no linear maps named q_proj"):
        tune_module(tiny_model("gpt2"), TASK, modules="up")
    with pytest.raises(TypeError, match="allowed is a TransformerBridge"):
        linear_maps(torch.nn.Linear(1, 1))


def test_batches_hold_alike_lengths_and_every_row():
    rows = [((0,) * n, (1,)) for n in torch.randint(3, 30, (64,), generator=torch.Generator().manual_seed(0)).tolist()]
    found = tuning._bucketed(rows, 8, 0)
    assert sorted(len(h) for batch in found for h, _ in batch) == sorted(len(h) for h, _ in rows)
    assert sum(max(len(h) for h, _ in b) - min(len(h) for h, _ in b) for b in found) < 40
    assert found == tuning._bucketed(rows, 8, 0)


def test_arms_run_seed_by_seed_and_finished_ones_are_read(tunable, unchanged, tmp_path, monkeypatch):
    asked = {"modules": ("gate", "all"), "seeds": (0, 1), "rank": 1, "steps": 2, "folder": tmp_path}
    monkeypatch.setattr(tuning, "_best_rate", lambda *a, **k: 1e-3)
    found = run_arms(tunable, TASK, **asked)
    assert {name: [r.seed for r in runs] for name, runs in found.items()} == {"gate": [0, 1], "all": [0, 1]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all-seed0", "all-seed1", "gate-seed0", "gate-seed1"]

    def refuse(*a, **k):
        raise AssertionError("nothing is trained twice")

    monkeypatch.setattr(tuning, "tune_module", refuse)
    again = run_arms(tunable, TASK, **asked)
    assert str(again["gate"][1]) == str(found["gate"][1])
    with pytest.raises(ValueError, match="choose another folder"):
        run_arms(tunable, TASK, **asked | {"rank": 2})
    with pytest.raises(ValueError, match="allowed is at least one of each"):
        run_arms(tunable, TASK, **asked | {"seeds": ()})


def test_at_equal_size_all_stays_the_reference():
    from tests.test_arms import SMOLLM2

    assert tuning.arm_size(SMOLLM2, "attention", "lora", 4, True) == {"n_parameters": 253_440}
    assert tuning.arm_size(SMOLLM2, "all", "lora", 4, True) == {"rank": 4}
    assert tuning.arm_size(SMOLLM2, "gate", "full", 4, False) == {}


def test_an_arm_that_explodes_at_every_rate_is_recorded_and_the_others_go_on(tunable, unchanged, monkeypatch):
    def rate(model, arm, *rest):
        if arm.name == "up":
            raise NoRateError("the loss of up exploded at every rate")
        return 0.01

    monkeypatch.setattr("lens_affect.tuning._best_rate", rate)
    found = run_arms(tunable, TASK, modules=["up", "gate"], seeds=(0,), rank=1, steps=2)
    up, gate = found["up"][0], found["gate"][0]
    assert up.exploded
    assert "every rate" in up.note
    assert up.after.values.isnan().all()
    assert not up.before.values.isnan().any()
    assert not gate.exploded
    assert gate.trained


def test_full_tuning_at_equal_size_has_the_size_of_the_smallest_arm():
    qwen = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    qwen |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    sizes = {
        m: plan_arm(qwen, m, method="full", **arm_size(qwen, m, "full", 4, True)).n_parameters
        for m in ("gate", "up", "attention")
    }
    assert sizes["attention"] == plan_arm(qwen, "attention", method="full").n_parameters
    assert all(abs(size / sizes["attention"] - 1) <= 0.01 for size in sizes.values())
    assert arm_size(qwen, "all", "full", 4, True) == {}

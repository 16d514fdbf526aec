"""What must be true: only the arm's maps change, the model comes back bit for bit, the same seed gives the same weights, failures are recorded."""

import json

import pytest
import torch

from lens_affect import tuning
from lens_affect.adapter import model_info, update_provenance
from lens_affect.models import load_model
from lens_affect.task_data import Example
from lens_affect.tasks import ChoiceTask
from lens_affect.tuning import (
    Tuned,
    choose_rate,
    linear_maps,
    tune_module,
    tuned_weights,
    weight_changes,
    write_adapter,
)
from tests.tiny import make_hf_model, make_tokenizer

WORDS = {"joy": ("sun", "cake", "song", "gift"), "anger": ("theft", "insult", "lie", "shove")}


def examples(n, start):
    return tuple(
        Example(f"{word} {i}", (label,), f"{label}{i}")
        for i in range(start, start + n)
        for label, words in WORDS.items()
        for word in words
    )


TASK = ChoiceTask(
    name="planted",
    title="words that give the label away",
    affective=True,
    splits={"train": examples(8, 0), "validation": examples(2, 20), "test": examples(2, 30)},
    labels=("anger", "joy"),
    question="Emotion",
)
QUICK = {"steps": 8, "check_every": 4, "n_validation": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def model():
    """A bridge of this file's own: it is tuned and restored."""
    return load_model(make_hf_model("llama"), tokenizer=make_tokenizer())


@pytest.fixture(scope="module")
def state(model):
    return {name: p.detach().clone() for name, p in model.original_model.named_parameters()}


@pytest.fixture
def unchanged(model, state):
    """After the test the model is as before: names, values, flags, and nothing of peft left."""
    flags = {name: p.requires_grad for name, p in model.original_model.named_parameters()}
    yield
    now = dict(model.original_model.named_parameters())
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], value) for name, value in state.items())
    assert {name: p.requires_grad for name, p in now.items()} == flags
    assert not any("lora" in name for name, _ in model.original_model.named_modules())
    assert not hasattr(model.original_model, "peft_config")


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"modules": "gate", "rank": 2}, {"gate"}),
        ({"modules": "attention", "n_parameters": 1000}, {"q", "k", "v", "o"}),
        ({"modules": ["up", "down"], "rank": 1, "layers": [1]}, {"up", "down"}),
        ({"modules": "gate", "method": "full"}, {"gate"}),
    ],
    ids=["lora", "equal size", "one layer", "full"],
)
def test_only_the_named_maps_learn_and_the_model_is_restored(model, state, unchanged, options, places):
    done = tune_module(model, TASK, rate=3e-3, seed=1, **QUICK, **options)
    assert {place.split(".")[-1] for place in done.arm.ranks} == places
    assert sum(t.numel() for t in done.trained.values()) == done.arm.n_parameters
    assert set(weight_changes(done)) == set(done.arm.ranks)
    assert done.curve["validation_loss"].iloc[-1] < done.curve["validation_loss"].iloc[0]
    with tuned_weights(model, done):
        now = dict(model.original_model.named_parameters())
        changed = {name for name, value in state.items() if not torch.equal(now[name], value)}
        again = TASK.score(model, TASK.examples("test"), seed=1)
    names = {f"{linear_maps(model)[place][0]}.weight" for place in done.arm.ranks}
    assert {name.replace("._original_component", "") for name in changed} == names
    assert torch.allclose(again.log_probabilities, done.after.log_probabilities, atol=1e-4)
    assert done.cpu_seconds > 0


def test_a_planted_rule_is_learned(model, unchanged):
    done = tune_module(model, TASK, modules="all", rank=4, rate=2e-2, steps=40, check_every=40, n_validation=8)
    assert done.before.value < 0.8
    assert done.after.value > 0.9
    assert done.gain == pytest.approx(done.after.value - done.before.value)


def test_the_same_seed_gives_the_same_weights(model, unchanged):
    first, again, other = (
        tune_module(model, TASK, modules="random", rank=2, rate=3e-3, seed=s, **QUICK) for s in (0, 0, 1)
    )
    assert first.trained.keys() == again.trained.keys()
    assert all(torch.equal(first.trained[name], again.trained[name]) for name in first.trained)
    assert set(first.arm.ranks) != set(other.arm.ranks)


def test_none_trains_nothing(model, unchanged):
    done = tune_module(model, TASK, modules="none")
    assert done.after is done.before
    assert done.trained == {}
    with pytest.raises(ValueError, match="trained nothing"):
        write_adapter(done, "anywhere")


def test_an_exploding_loss_is_recorded_and_the_model_restored(model, unchanged, monkeypatch):
    real = tuning.answer_loss
    calls = []

    def loss(model, batch):
        calls.append(1)
        return real(model, batch) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(tuning, "answer_loss", loss)
    done = tune_module(model, TASK, modules="gate", rank=2, rate=3e-3, **QUICK)
    assert done.exploded
    assert "exploded at step 4" in done.note
    assert done.after.n == 0
    assert done.after.values.isnan().all()


def test_a_loss_that_is_finite_but_huge_counts_as_exploded(model, unchanged, monkeypatch):
    real, calls = tuning.answer_loss, []

    def loss(model, batch):
        calls.append(1)
        return real(model, batch) * (100 if len(calls) > 2 else 1)

    monkeypatch.setattr(tuning, "answer_loss", loss)
    assert tune_module(model, TASK, modules="gate", rank=2, rate=3e-3, **QUICK).exploded


def test_the_model_is_restored_after_an_exception(model, unchanged, monkeypatch):
    def fail(model, batch):
        raise RuntimeError("power cut")

    monkeypatch.setattr(tuning, "answer_loss", fail)
    for method in ("lora", "full"):
        with pytest.raises(RuntimeError, match="power cut"):
            tune_module(model, TASK, modules="gate", method=method, rate=1e-3, **QUICK)


def test_tuned_weights_are_taken_out_after_an_exception(model, unchanged):
    done = tune_module(model, TASK, modules="gate", rank=2, rate=3e-3, **QUICK)
    with pytest.raises(KeyError), tuned_weights(model, done):
        raise KeyError


def test_training_stops_early_and_keeps_the_best_weights(model, unchanged, monkeypatch):
    losses = iter([5.0, 4.0, 4.5, 4.6, 3.0])
    seen = []

    def look(model, data, step, train_loss):
        seen.append(step)
        return {"step": step, "train_loss": train_loss, "validation_loss": next(losses), "validation_exact": 0.0}

    monkeypatch.setattr(tuning, "_look", look)
    done = tune_module(
        model, TASK, modules="gate", rank=1, rate=3e-3, steps=12, check_every=2, patience=2, batch_size=4
    )
    assert seen == [0, 2, 4, 6]
    assert done.best_step == 2
    assert "no better validation loss since step 2" in done.note


def test_the_rate_is_climbed_to_the_best(model, unchanged, monkeypatch):
    tried = []

    def train(model, parameters, data, rate, *rest):
        tried.append(rate)
        return tuning._Run(None, 0, abs(rate - 0.5), False, "")

    monkeypatch.setattr(tuning, "_train", train)
    kind = {"modules": "gate", "rank": 1, "batch_size": 4, "n_validation": 4}
    assert choose_rate(model, TASK, first=0.125, **kind) == 0.5
    assert tried == [0.125, 0.5, 2.0]
    tried.clear()
    assert choose_rate(model, TASK, first=2.0, **kind) == 0.5
    assert tried == [2.0, 8.0, 0.5, 0.125]

    def explode(model, parameters, data, rate, *rest):
        tried.append(rate)
        return tuning._Run(None, 0, 1.0 if rate < 0.5 else float("inf"), False, "")

    monkeypatch.setattr(tuning, "_train", explode)
    assert choose_rate(model, TASK, first=2.0, **kind) == 0.125
    monkeypatch.setattr(tuning, "_train", lambda *a, **k: tuning._Run(None, 0, float("inf"), True, ""))
    with pytest.raises(RuntimeError, match="exploded at every rate"):
        choose_rate(model, TASK, first=2.0, **kind)


def test_saving_keeps_everything_and_peft_reads_the_adapter(model, unchanged, tmp_path):
    from peft import PeftModel

    done = tune_module(model, TASK, modules="attention", n_parameters=1000, rate=1e-2, **QUICK)
    done.save(tmp_path / "arm")
    again = Tuned.load(tmp_path / "arm")
    assert again.arm == done.arm
    assert str(again) == str(done)
    assert again.to_frame().equals(done.to_frame())
    assert all(torch.equal(again.trained[name], value) for name, value in done.trained.items())

    folder = write_adapter(done, tmp_path / "adapter", base="tiny")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    plain = make_hf_model("llama")
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    after = dict(merged.named_parameters())
    for place, change in weight_changes(done).items():
        name = f"{linear_maps(model)[place][0]}.weight"
        assert torch.allclose(after[name] - before[name], change, atol=1e-6)
    assert sum(not torch.equal(after[name], value) for name, value in before.items()) == len(done.arm.ranks)


def test_whole_weights_are_written_under_their_names(model, unchanged, tmp_path):
    from safetensors.torch import load_file

    done = tune_module(model, TASK, modules="gate", method="full", rate=1e-3, **QUICK)
    found = load_file(write_adapter(done, tmp_path / "full") / "model.safetensors")
    assert set(found) == {f"model.layers.{i}.mlp.gate_proj.weight" for i in range(3)}
    with pytest.raises(FileExistsError):
        write_adapter(done, tmp_path / "full")


def test_wrong_input_is_refused_before_anything_is_trained(model, unchanged, tiny_model):
    with pytest.raises(ValueError, match="received module 'gates'"):
        tune_module(model, TASK, modules="gates")
    with pytest.raises(ValueError, match="received steps=0"):
        tune_module(model, TASK, modules="gate", steps=0)
    with pytest.raises(ValueError, match="no training example of planted is that short"):
        tune_module(model, TASK, modules="gate", max_tokens=3)
    with pytest.raises(ValueError, match="has no linear maps named q_proj"):
        tune_module(tiny_model("gpt2"), TASK, modules="up")
    with pytest.raises(TypeError, match="allowed is a TransformerBridge"):
        linear_maps(torch.nn.Linear(1, 1))


def test_an_arm_of_another_model_is_refused(model, unchanged):
    done = tune_module(model, TASK, modules="gate", rank=1, rate=1e-3, **QUICK)
    own = model_info(model).provenance.weights_sha256
    update_provenance(model, weights_sha256="another")
    try:
        with pytest.raises(ValueError, match="load the model it was tuned from"), tuned_weights(model, done):
            pass
    finally:
        update_provenance(model, weights_sha256=own)


def test_batches_hold_alike_lengths_and_every_row():
    rows = [((0,) * n, (1,)) for n in torch.randint(3, 30, (64,), generator=torch.Generator().manual_seed(0)).tolist()]
    found = tuning._bucketed(rows, 8, 0)
    assert sorted(len(h) for batch in found for h, _ in batch) == sorted(len(h) for h, _ in rows)
    assert sum(max(len(h) for h, _ in b) - min(len(h) for h, _ in b) for b in found) < 40
    assert found == tuning._bucketed(rows, 8, 0)

"""Damage: the loss is the one an independent computation gives, and every arm is brought to the same rise of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lens_affect.ablations import ablate_modules, mean_outputs
from lens_affect.adapter import encode
from lens_affect.damage import EqualDamage, equal_damage, neutral_loss
from lens_affect.live_weights import LiveWeights
from lens_affect.stimuli import load_stimuli
from tests.test_checkpoint_pairs import changed
from tests.test_transfers import bridged, same, state
from tests.tiny import make_hf_model

TEXTS = load_stimuli("passages").select(emotions=["neutral"]).texts[:4]


@pytest.fixture(scope="module")
def model():
    return bridged(make_hf_model("llama"))


def test_the_loss_leaves_out_what_is_predicted_from_position_zero(model):
    found = neutral_loss(model, TEXTS)
    for text, loss in zip(TEXTS, found, strict=True):
        ids = torch.tensor([encode(model, text).ids])
        with torch.no_grad():
            logits = model(ids)[0]
        assert loss == pytest.approx(float(F.cross_entropy(logits[1:-1], ids[0, 2:])), rel=1e-4)
    with pytest.raises(ValueError, match="fewer than three tokens"):
        neutral_loss(model, ["a"])


def length_of(key, start):
    """A loss that is known: the relative length of the change of one weight, and a little more for some texts."""
    return lambda model: float((LiveWeights(model).read(key) - start).norm() / start.norm()) * np.array([0.9, 1.0, 1.1])


@pytest.mark.parametrize("power", [1, 2, 3])
def test_few_losses_find_a_scale_whatever_power_of_it_the_loss_is(power):
    model = make_hf_model("llama")
    key = "layers.1.up"
    length = length_of(key, LiveWeights(model).read(key))
    options = {"arms": ["up"], "loss": lambda m: length(m) ** power}
    for target in (0.01, 0.3, 2.0):
        found = equal_damage(model, target=target, **options)
        assert found.reached.all()
        assert found.trials[0] <= 8
        assert float(found.scales[0]) ** power == pytest.approx(target, rel=0.08)
    nothing = equal_damage(model, target=0.1, arms=["gate"], loss=length)  # the loss does not depend on it
    assert not nothing.reached.any()
    assert nothing.trials[0] < 24


def test_a_loss_that_jumps_is_brought_within_its_bracket():
    model = make_hf_model("llama")
    key = "layers.1.up"
    length = length_of(key, LiveWeights(model).read(key))
    jumps = {"steep": lambda x: x**12, "late": lambda x: 0.01 * x + 50 * np.maximum(x - 0.7, 0), "wild": lambda x: np.where(x > 1, np.inf, x)}  # fmt: skip
    for name, of in jumps.items():
        found = equal_damage(model, arms=["up"], target=0.3, loss=lambda m, of=of: of(length(m)))
        assert found.reached.all(), name
        assert found.trials[0] <= 20, name


def test_interpolation_finds_a_known_scale():
    model = make_hf_model("llama")
    key = "layers.1.up"
    loss = length_of(key, LiveWeights(model).read(key))
    found = equal_damage(model, arms=["up", "mlp"], target=0.3, loss=loss, tolerance=0.01)
    assert found.scales.tolist() == pytest.approx([0.3, 0.3], rel=0.02)
    assert found.reached.all()
    assert found.rise.tolist() == pytest.approx([0.3, 0.3], rel=0.01)
    assert (found.low < found.rise).all()
    assert found.scale_of["up"] == found.scales[0]
    assert "scales: up 0.3" in str(found)


def test_an_arm_that_cannot_do_that_much_is_said_and_the_others_are_found():
    base, model = make_hf_model("llama"), changed(up=0.05, gate=0.5)
    key = "layers.1.up"
    start = LiveWeights(model).read(key)
    both = [length_of(key, start), length_of("layers.1.gate", LiveWeights(model).read("layers.1.gate"))]
    found = equal_damage(
        model, arms=["up", "gate"], target=0.5, how="base", base=base, loss=lambda m: both[0](m) + both[1](m)
    )
    assert found.reached.tolist() == [False, True]
    assert torch.isnan(found.scales[0])
    assert list(found.scale_of) == ["gate"]
    assert "up not reached" in str(found)


@pytest.mark.parametrize("how", ["random_equal_norm", "shuffle", "mean"])
def test_arms_do_equal_damage_to_language(how, model, tmp_path):
    before = state(model)
    means = mean_outputs(model, modules="mlp") if how == "mean" else None
    seen = []
    found = equal_damage(
        model, arms=["gate", "up"], target=0.02, how=how, loss=lambda m: neutral_loss(m, TEXTS), means=means, tolerance=0.1,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 2), (2, 2)]
    own = neutral_loss(model, TEXTS)
    for arm, scale in found.scale_of.items():
        with ablate_modules(model, modules=arm, how=how, scale=scale, means=means):
            assert (neutral_loss(model, TEXTS) - own).mean() == pytest.approx(0.02, rel=0.11)
    assert found.scale_of or how == "mean"  # a random model says nothing, so holding a module still may even help it
    assert same(model, before)
    found.save(tmp_path / "d")
    assert EqualDamage.load(tmp_path / "d").to_frame().equals(found.to_frame())


def test_wrong_targets_and_arms_are_refused(model):
    for arms, target in ((["gate", "gate"], 0.1), ([], 0.1), (["gate"], 0.0), (["gate"], float("nan"))):
        with pytest.raises(ValueError, match="allowed are different arms and a rise above 0"):
            equal_damage(model, arms=arms, target=target)

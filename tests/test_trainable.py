"""What must be true: only the arm's maps change, and the model comes back bit for bit, also after an exception."""

import pytest
import torch

from lens_affect import tuning
from lens_affect.adapter import model_info, update_provenance
from lens_affect.trainable import linear_maps, tuned_weights
from lens_affect.tuned import weight_changes
from lens_affect.tuning import tune_module
from tests.planted_task import QUICK, TASK


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
def test_only_the_named_maps_learn_and_the_model_is_restored(tunable, tunable_state, unchanged, options, places):
    done = tune_module(tunable, TASK, rate=3e-3, seed=1, **QUICK, **options)
    assert {place.split(".")[-1] for place in done.arm.ranks} == places
    assert sum(t.numel() for t in done.trained.values()) == done.arm.n_parameters
    assert set(weight_changes(done)) == set(done.arm.ranks)
    assert done.curve["validation_loss"].iloc[-1] < done.curve["validation_loss"].iloc[0]
    with tuned_weights(tunable, done):
        now = dict(tunable.original_model.named_parameters())
        changed = {name for name, value in tunable_state.items() if not torch.equal(now[name], value)}
        again = TASK.score(tunable, TASK.examples("test"), seed=1)
    names = {f"{linear_maps(tunable)[place][0]}.weight" for place in done.arm.ranks}
    assert {name.replace("._original_component", "") for name in changed} == names
    assert torch.allclose(again.log_probabilities, done.after.log_probabilities, atol=1e-4)
    assert done.cpu_seconds > 0


def test_the_model_is_restored_after_an_exception(tunable, unchanged, monkeypatch):
    def fail(tunable, batch):
        raise RuntimeError("power cut")

    monkeypatch.setattr(tuning, "answer_loss", fail)
    for method in ("lora", "full"):
        with pytest.raises(RuntimeError, match="power cut"):
            tune_module(tunable, TASK, modules="gate", method=method, rate=1e-3, **QUICK)


def test_tuned_weights_are_taken_out_after_an_exception(tunable, unchanged):
    done = tune_module(tunable, TASK, modules="gate", rank=2, rate=3e-3, **QUICK)
    with pytest.raises(KeyError), tuned_weights(tunable, done):
        raise KeyError


def test_an_arm_of_another_model_is_refused(tunable, unchanged):
    done = tune_module(tunable, TASK, modules="gate", rank=1, rate=1e-3, **QUICK)
    own = model_info(tunable).provenance.weights_sha256
    update_provenance(tunable, weights_sha256="another")
    try:
        with pytest.raises(ValueError, match="load the model it was tuned from"), tuned_weights(tunable, done):
            pass
    finally:
        update_provenance(tunable, weights_sha256=own)

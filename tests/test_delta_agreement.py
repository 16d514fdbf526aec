"""Agreement of two fine-tunes: one change along another, a planted common direction, and unrelated noise."""

import numpy as np
import pytest
import torch

from lens_affect.checkpoints import open_checkpoint
from lens_affect.delta_agreement import DeltaAgreement
from lens_affect.deltas import compare_modules
from tests.test_checkpoint_pairs import changed
from tests.test_lora import make_peft
from tests.tiny import make_hf_model


def moved(change, seed=None, family="llama"):
    """A model whose linear weights were changed by change(part, generator)."""
    model = make_hf_model(family)
    found = open_checkpoint(model)
    generator = torch.Generator().manual_seed(seed or 0)
    for part in found.parts.values():
        if part.is_linear:
            found.read(part.key).add_(change(part, generator))
    return model


def noise(size):
    return lambda part, generator: size * torch.randn(part.shape, generator=generator)


def delta(model):
    return compare_modules(make_hf_model("llama"), model, spectrum=False)


def test_a_change_along_another_has_cosine_one_whatever_its_size():
    found = delta(moved(noise(0.1), 1)).compare(delta(moved(noise(0.3), 1)))
    table = found.to_frame()
    assert table["cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert table[["output_overlap", "input_overlap"]].to_numpy() == pytest.approx(1, abs=1e-4)
    assert (table["rank"] == 8).all()
    opposite = delta(moved(noise(0.1), 1)).compare(delta(moved(noise(-0.1), 1))).to_frame()
    assert opposite["cosine"].to_numpy() == pytest.approx(-1, abs=1e-5)


def test_unrelated_changes_have_the_cosine_and_overlap_of_chance():
    table = delta(moved(noise(0.1), 1)).compare(delta(moved(noise(0.1), 2))).to_frame()
    assert (table["cosine"].abs() < 4 * table["chance_sd"]).all()
    ratio = table["output_overlap"].mean() / table["output_chance"].mean()
    assert 0.8 < ratio < 1.2
    angle = table["input_angle"]
    assert angle.min() > 5


def test_a_common_output_direction_is_found_where_it_was_planted():
    axis = torch.randn(64, generator=torch.Generator().manual_seed(9))

    def planted(part, generator):
        change = 0.01 * torch.randn(part.shape, generator=generator)
        if part.module == "gate":
            change += torch.outer(axis[: part.shape[0]], torch.randn(part.shape[1], generator=generator))
        return change

    table = delta(moved(planted, 1)).compare(delta(moved(planted, 2)), rank=1).to_frame().set_index("module")
    assert table.loc["gate", "output_overlap"].min() > 0.99
    assert table.loc["gate", "output_angle"].max() < 5
    assert table.loc["gate", "input_overlap"].max() < 0.5
    assert table.drop("gate")["output_overlap"].max() < 0.9


def test_strategies_are_compared_and_modules_that_only_one_changed_are_left_out(tmp_path):
    lora = compare_modules(make_hf_model("llama"), make_peft(target_modules=["gate_proj", "up_proj"]))
    full = delta(make_peft(target_modules=["gate_proj", "up_proj"]).merge_and_unload())
    found = lora.compare(full)
    assert set(found.modules) == {"gate", "up"}
    assert found.to_frame()["cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert (found.to_frame()["rank"] <= 4).all()
    by_module = found.by_module()
    assert list(by_module["module"]) == ["gate", "up"]
    angles = found.to_frame().groupby("module", sort=False)[["output_angle", "input_angle"]].mean()
    assert by_module[["output_angle", "input_angle"]].to_numpy() == pytest.approx(angles.to_numpy())
    assert "over 6 linear modules" in str(found)
    found.save(tmp_path / "agreement")
    assert DeltaAgreement.load(tmp_path / "agreement").to_frame().equals(found.to_frame())


def test_nothing_in_common_is_said():
    still = delta(moved(noise(0.0), 1)).compare(delta(changed(gate=0.1)))
    assert still.to_frame()["cosine"].isna().all()
    assert "no module that both changed" in str(still)
    assert np.isnan(still.by_module()["cosine"]).all()
    with pytest.raises(ValueError, match="share no linear module of one shape"):
        delta(changed(gate=0.1)).compare(compare_modules(make_hf_model("gemma3"), changed("gemma3", gate=0.1)))

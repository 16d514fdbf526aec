"""What must be true: an arm survives saving, and peft reads the adapter that is written as the same change of weights."""

import json
import warnings

import pytest
import torch

from lens_affect.trainable import linear_maps
from lens_affect.tuned import Tuned, weight_changes, write_adapter
from lens_affect.tuning import tune_module
from tests.planted_task import QUICK, TASK
from tests.tiny import make_hf_model


def test_saving_keeps_everything_and_peft_reads_the_adapter(tunable, unchanged, tmp_path):
    from peft import PeftModel

    done = tune_module(tunable, TASK, modules="attention", n_parameters=1000, rate=1e-2, **QUICK)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    after = dict(merged.named_parameters())
    for place, change in weight_changes(done).items():
        name = f"{linear_maps(tunable)[place][0]}.weight"
        assert torch.allclose(after[name] - before[name], change, atol=1e-6)
    assert sum(not torch.equal(after[name], value) for name, value in before.items()) == len(done.arm.ranks)


def test_whole_weights_are_written_under_their_names(tunable, unchanged, tmp_path):
    from safetensors.torch import load_file

    done = tune_module(tunable, TASK, modules="gate", method="full", rate=1e-3, **QUICK)
    found = load_file(write_adapter(done, tmp_path / "full") / "model.safetensors")
    assert set(found) == {f"model.layers.{i}.mlp.gate_proj.weight" for i in range(3)}
    with pytest.raises(FileExistsError):
        write_adapter(done, tmp_path / "full")


def test_lora_without_peft_says_what_to_install(tunable, unchanged, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a))
    with pytest.raises(RuntimeError, match=r"pip install 'lens-affect\[tuning\]'"):
        tune_module(tunable, TASK, modules="gate", rank=1, **QUICK)
    assert tune_module(tunable, TASK, modules="gate", method="full", rate=1e-4, **QUICK).trained

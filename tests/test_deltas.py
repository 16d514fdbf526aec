"""Deltas: nothing changed gives 0, a planted change is found by every measure, and a sharded pair is streamed within the stated memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lens_affect.catalogue import CATALOGUE, FetchError, fetch
from lens_affect.checkpoints import open_checkpoint
from lens_affect.deltas import ModuleDelta, compare_modules
from lens_affect.models import load_model
from lens_affect.sizes import MODULES
from tests.test_checkpoint_pairs import changed, save
from tests.test_lora import make_peft
from tests.tiny import DENSE, make_hf_model, make_tokenizer

MEASURES = ["relative_frobenius", "rms", "spectral", "effective_rank", "share_of_change", "concentration"]


@pytest.mark.parametrize("family", [*DENSE, "phi3"])
def test_a_model_did_not_change_from_itself(family):
    found = compare_modules(make_hf_model(family), make_hf_model(family))
    table = found.to_frame()
    assert (table[["relative_frobenius", "rms", "spectral", "effective_rank", "change_norm"]] == 0).all(axis=None)
    assert table["share_of_change"].isna().all()
    assert "none changed" in str(found)
    assert (found.others()["relative_frobenius"] == 0).all()


@pytest.mark.parametrize("module", ["gate", "o", "down"])
def test_a_planted_change_is_ranked_first_by_every_measure(module):
    found = compare_modules(make_hf_model("llama"), changed(**dict.fromkeys(MODULES, 0.01) | {module: 0.05}))
    modules = found.by_module().set_index("module")
    for measure in set(MEASURES) - {"effective_rank"}:
        assert modules[measure].idxmax() == module, measure
    row = modules.loc[module]
    assert row["low"] > 1
    assert row["rms"] == pytest.approx(0.05, rel=0.05)
    alone = compare_modules(make_hf_model("llama"), changed(**{module: 0.05})).by_module().set_index("module")
    for measure in MEASURES:
        assert alone[measure].idxmax() == module, measure
    assert alone.loc[module, "share_of_change"] == pytest.approx(1)


def test_columns_are_what_an_independent_computation_gives():
    base, tuned = make_hf_model("gemma3"), changed("gemma3", gate=0.02, k=0.03)
    table = compare_modules(base, tuned).to_frame().set_index(["module", "layer"])
    a, b = ({n: p.detach() for n, p in model.named_parameters()} for model in (base, tuned))
    total = sum(float(((b[n] - a[n]) ** 2).sum()) for n in a if "_proj" in n)
    for module, path in (("gate", "mlp.gate_proj"), ("k", "self_attn.k_proj")):
        name = f"model.layers.1.{path}.weight"
        w, d = a[name].double(), (b[name] - a[name]).double()
        values = torch.linalg.svdvals(d)
        p = values / values.sum()
        row = table.loc[module, 1]
        assert row["relative_frobenius"] == pytest.approx(float(d.norm() / w.norm()), rel=1e-5)
        assert row["rms"] == pytest.approx(float(d.norm()) / d.numel() ** 0.5, rel=1e-5)
        assert row["spectral"] == pytest.approx(float(values[0] / torch.linalg.svdvals(w)[0]), rel=1e-4)
        assert row["effective_rank"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-4)
        assert row["share_of_change"] == pytest.approx(float(d.square().sum()) / total, rel=1e-4)
        assert row["parameters"] == w.numel()
        assert row["depth"] == pytest.approx(2 / 3)


def test_shares_add_up_and_equal_noise_gives_every_module_its_share():
    table = compare_modules(make_hf_model("llama"), changed(**dict.fromkeys(MODULES, 0.01))).by_module()
    assert table["share_of_change"].sum() == pytest.approx(1)
    assert table["share_of_parameters"].sum() == pytest.approx(1)
    assert table["concentration"].between(0.9, 1.1).all()
    assert ((table["low"] < 1.05) & (table["high"] > 0.95)).all()


@pytest.mark.parametrize("where", ["folders", "bridges", "sharded"])
def test_all_ways_to_name_a_pair_give_the_same_numbers(where, tmp_path):
    base, tuned = make_hf_model("llama"), changed(gate=0.02, norm=0.1)
    expected = compare_modules(base, tuned)
    if where == "bridges":
        pair = [load_model(m, tokenizer=make_tokenizer()) for m in (base, tuned)]
    else:
        for name, model in (("a", base), ("b", tuned)):
            model.save_pretrained(tmp_path / name, **({"max_shard_size": "30KB"} if where == "sharded" else {}))
        pair = [tmp_path / "a", tmp_path / "b"]
    found = compare_modules(*pair)
    assert found.to_frame().equals(expected.to_frame())
    assert found.others().set_index("module").loc["norm", "relative_frobenius"] > 0


def test_an_adapter_gives_what_its_merged_model_gives(tmp_path):
    make_peft(target_modules=["gate_proj", "q_proj"]).save_pretrained(tmp_path / "adapter")
    merged = make_peft(target_modules=["gate_proj", "q_proj"]).merge_and_unload()
    base = make_hf_model("llama")
    read, dense = compare_modules(base, tmp_path / "adapter"), compare_modules(base, merged)
    a, b = (x.to_frame().sort_values(by=["module", "layer"]).reset_index(drop=True) for x in (read, dense))
    assert (a["module"].tolist(), a["layer"].tolist()) == (b["module"].tolist(), b["layer"].tolist())
    for column in ("relative_frobenius", "rms", "spectral", "share_of_change", "concentration"):
        np.testing.assert_allclose(a[column], b[column], atol=2e-6)
    assert a["effective_rank"].max() <= 4


def test_a_control_says_what_is_generic():
    generic = dict.fromkeys(MODULES, 0.01) | {"gate": 0.03}
    base = make_hf_model("llama")
    alike = compare_modules(base, changed(**generic), control=changed(**{m: 2 * x for m, x in generic.items()}))
    table = alike.by_module().set_index("module")
    assert table["ratio_to_control"].to_numpy() == pytest.approx(0.5, rel=1e-4)
    assert table["concentration_to_control"].to_numpy() == pytest.approx(1, rel=1e-4)
    assert table.loc["gate", "concentration"] > 1.5
    special = compare_modules(base, changed(**generic | {"o": 0.03}), control=compare_modules(base, changed(**generic)))
    table = special.by_module().set_index("module")
    assert table["concentration_to_control"].idxmax() == "o"
    assert table.loc["o", "control_low"] > 1 > table.loc["gate", "control_high"]
    assert "against the control LlamaForCausalLM, o has" in str(special)
    assert "no control" in str(compare_modules(base, changed(**generic)))
    with pytest.raises(ValueError, match="allowed is a fine-tune of the same base"):
        compare_modules(
            base, changed(gate=0.1), control=compare_modules(make_hf_model("gpt2"), changed("gpt2", up=0.1))
        )


def test_without_spectrum_it_says_not_measured():
    table = compare_modules(make_hf_model("llama"), changed(gate=0.1), spectrum=False).to_frame()
    assert table[["spectral", "effective_rank"]].isna().all(axis=None)
    assert table["relative_frobenius"].max() > 0


def test_results_are_saved_and_compared_again_where_they_came_from(tmp_path):
    for name, model in (("a", make_hf_model("llama")), ("b", changed(gate=0.1)), ("c", changed(gate=0.2))):
        save(model, tmp_path / name)
    first, second = (compare_modules(tmp_path / "a", tmp_path / name) for name in "bc")
    first.save(tmp_path / "first")
    loaded = ModuleDelta.load(tmp_path / "first")
    assert loaded.to_frame().equals(first.to_frame())
    assert str(loaded) == str(first)
    assert "concentration" in loaded._repr_html_()
    assert loaded.compare(second).to_frame().equals(first.compare(second).to_frame())
    memory = compare_modules(make_hf_model("llama"), changed(gate=0.1))
    memory.save(tmp_path / "memory")
    with pytest.raises(ValueError, match="whose models were in memory"):
        ModuleDelta.load(tmp_path / "memory").compare(memory)


def test_broken_weights_are_refused():
    broken = changed(gate=0.1)
    open_checkpoint(broken).read("layers.1.up")[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"at layers\.1\.up that are not finite"):
        compare_modules(make_hf_model("llama"), broken)


def test_a_broken_adapter_is_refused():
    for value in (float("nan"), float("inf")):
        broken = make_peft()
        with torch.no_grad():
            next(t for n, t in broken.named_parameters() if "layers.1.mlp.up_proj.lora_A" in n)[0, 0] = value
        for spectrum in (True, False):
            with pytest.raises(ValueError, match=r"at layers\.1\.up that are not finite"):
                compare_modules(make_hf_model("llama"), broken, spectrum=spectrum)


def test_progress_ends_with_everything_done():
    seen = []
    compare_modules(make_hf_model("llama"), changed(gate=0.1), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (30, 30)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_a_sharded_pair_is_streamed_within_the_stated_memory(tmp_path):
    """134 MB of weights on each side in shards: the peak grows by less than the bound of delta_plans, less than half of one side."""
    script = Path(__file__).with_name("measure_delta_memory.py")
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=script.parent.parent)
    for line in done.stdout.splitlines():
        grown, bound, weights = (float(x) for x in line.split())
        assert grown < bound < 0.5 * weights, (grown, bound, weights)


@pytest.mark.weights
def test_a_change_planted_in_a_real_model_is_found_and_read_without_merging(tmp_path):
    try:
        fetch(CATALOGUE["smollm2-135m-instruct"])
    except FetchError as error:
        pytest.skip(f"no weights: {error}")
    base = open_checkpoint("smollm2-135m-instruct")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part in base.parts.values():
        if part.module in ("gate", "v"):
            size = 0.02 if part.module == "gate" else 0.002
            path = f"base_model.model.model.{part.owner}"
            outputs, inputs = part.shape
            tensors[f"{path}.lora_A.weight"] = size * torch.randn(4, inputs, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = compare_modules("smollm2-135m-instruct", tmp_path, spectrum=False)
    table = found.by_module().set_index("module")
    assert table["concentration"].idxmax() == table["relative_frobenius"].idxmax() == "gate"
    assert table.loc["gate", "share_of_change"] > 0.99
    assert table.loc["gate", "parameters"] == 30 * 884_736
    assert (found.provenance.source_precision, found.n_layers, found.notes) == ("Q4_1", 30, ())

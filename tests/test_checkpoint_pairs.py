"""Pairs: what both sides have is matched; other shapes, bases and tokenizers are refused or said."""

import json

import pytest
import torch

from lens_affect.checkpoint_pairs import open_pair
from lens_affect.checkpoints import open_checkpoint
from lens_affect.sizes import MODULES
from tests.test_lora import make_peft
from tests.tiny import make_hf_model, make_tokenizer


def changed(family="llama", **planted):
    """A copy with some modules changed: gate=0.1 adds noise of that size."""
    model = make_hf_model(family)
    found = open_checkpoint(model)
    generator = torch.Generator().manual_seed(7)
    for part in found.parts.values():
        noise = torch.randn(part.shape, generator=generator)
        found.read(part.key).add_(planted.get(part.module, 0.0) * noise)
    return model


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def test_a_pair_gives_base_change_and_tuned():
    pair = open_pair(make_hf_model("llama"), changed(gate=0.1, norm=0.1))
    assert len(pair.linear_keys) == 3 * len(MODULES)
    assert {pair.base.parts[k].module for k in pair.keys} == {*MODULES, "embed", "unembed", "norm"}
    for key in pair.keys:
        change = pair.change(key)
        assert bool(change.abs().max() > 0) == (pair.base.parts[key].module in ("gate", "norm"))
        assert torch.equal(pair.change(key, slice(1, 3)), change[1:3])
        torch.testing.assert_close(pair.base_weight(key) + change, pair.tuned_weight(key))


def test_other_shapes_are_refused_with_an_example():
    with pytest.raises(ValueError, match=r"different shapes: layers\.0\.q is \(32, 32\) and \(64, 32\)"):
        open_pair(make_hf_model("llama"), make_hf_model("gemma3"))
    with pytest.raises(ValueError, match="without a linear module in common"):
        open_pair(make_hf_model("llama"), _only_embedding())


def _only_embedding():
    found = open_checkpoint(make_hf_model("llama"))
    kept = {key: part for key, part in found.parts.items() if key == "embed"}
    return type(found)(**{**found.__dict__, "parts": kept})


def test_a_resized_vocabulary_is_compared_on_the_shared_rows(tmp_path):
    tuned = changed(gate=0.1)
    tuned.resize_token_embeddings(490, mean_resizing=False)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    pair = open_pair(
        save(make_hf_model("llama"), tmp_path / "a", make_tokenizer()), save(tuned, tmp_path / "b", tokenizer)
    )
    assert pair.change("embed").shape == (480, 32)
    assert pair.change("unembed").abs().max() == 0
    assert any("embed has 480 rows in the base and 490" in note for note in pair.notes)
    assert any("tuned tokenizer has 1 tokens more and 0 fewer" in note for note in pair.notes)
    back = open_pair(tmp_path / "b", tmp_path / "a")
    assert back.base_weight("embed").shape == back.tuned_weight("embed").shape == (480, 32)


def test_embeddings_of_other_tokenizers_are_not_compared(tmp_path):
    save(make_hf_model("llama"), tmp_path / "a", make_tokenizer())
    save(changed(gate=0.1), tmp_path / "b", make_tokenizer())
    file = tmp_path / "b" / "tokenizer.json"
    found = json.loads(file.read_text())
    names = list(found["model"]["vocab"])
    found["model"]["vocab"][names[50]], found["model"]["vocab"][names[60]] = 60, 50
    file.write_text(json.dumps(found))
    pair = open_pair(tmp_path / "a", tmp_path / "b")
    assert not {"embed", "unembed"} & set(pair.keys)
    assert any("2 tokens have other ids" in note for note in pair.notes)
    assert len(pair.linear_keys) == 21


def test_tied_and_untied_outputs_are_compared_and_said():
    tied = make_hf_model("llama")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    pair = open_pair(make_hf_model("llama"), tied)
    assert any("output is tied to its embedding" in note for note in pair.notes)
    assert pair.change("unembed").abs().max() > 0
    back = open_pair(tied, make_hf_model("llama"))
    assert "unembed" not in back.keys
    assert any("only the tuned model has an output of its own" in note for note in back.notes)


def test_missing_tensors_are_left_out_and_said():
    base = open_checkpoint(make_hf_model("llama"))
    fewer = type(base)(**{**base.__dict__, "parts": {k: p for k, p in base.parts.items() if p.layer != 2}})
    pair = open_pair(base, fewer)
    assert len(pair.linear_keys) == 14
    assert any("9 tensors are only in the base (7 of linear modules)" in note for note in pair.notes)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_adapter_of_another_base_is_refused(tmp_path):
    model = make_peft()
    model.peft_config["default"].base_model_name_or_path = "meta-llama/Llama-3.2-1B"
    model.save_pretrained(tmp_path / "adapter")
    base = save(make_hf_model("llama"), tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"for the base 'meta-llama/Llama-3.2-1B'; here the base is .*any_base=True"):
        open_pair(base, tmp_path / "adapter")
    pair = open_pair(base, tmp_path / "adapter", any_base=True)
    assert any("names 'meta-llama/Llama-3.2-1B' as its base" in note for note in pair.notes)
    base.rename(tmp_path / "Llama-3.2-1B")
    assert open_pair(tmp_path / "Llama-3.2-1B", tmp_path / "adapter").notes == ()
    other = save(make_hf_model("gemma3"), tmp_path / "gemma")
    with pytest.raises(ValueError, match="was made for another base"):
        open_pair(other, tmp_path / "adapter", any_base=True)


def test_sides_that_are_swapped_are_refused(tmp_path):
    make_peft().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="as a full set of weights; allowed there is its base"):
        open_pair(tmp_path / "adapter", make_hf_model("llama"))
    with pytest.raises(ValueError, match="with LoRA layers as a full set"):
        open_pair(make_peft(), make_hf_model("llama"))

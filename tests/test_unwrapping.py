"""Without its wrappers a bridge reads the same, and afterwards, also after an exception, it is as before."""

import pytest
import torch

from lens_affect.activations import extract_activations
from lens_affect.adapter import add_hooks, model_info
from lens_affect.models import load_model
from lens_affect.steering import steer
from lens_affect.unwrapping import CHECK, can_be_plain, plain_hooks, plain_trunk, reads_plain
from lens_affect.vectors import fit_vectors
from tests.tiny import make_hf_model, make_tokenizer

FAMILIES = ["llama", "gemma3", "qwen2", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_gives_the_same_with_and_without_wrappers(tiny_model, few_passages, monkeypatch, family):
    model = tiny_model(family)
    assert reads_plain(model), model_info(model).provenance.checks[CHECK]
    without = []
    monkeypatch.setattr("lens_affect.activations.plain_trunk", lambda m: without.append(m) or plain_trunk(m))
    plain = extract_activations(model, few_passages)
    assert without
    without.clear()
    monkeypatch.setattr("lens_affect.activations.reads_plain", lambda model: False)
    wrapped = extract_activations(model, few_passages)
    assert not without
    torch.testing.assert_close(plain.values, wrapped.values, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(plain.embedding, wrapped.embedding, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_back_afterwards_and_after_an_exception(tiny_model, family):
    model = tiny_model(family)
    before = {name: id(part) for name, part in model.named_modules()}
    hooks = [list(part._forward_hooks) for part in model.modules()]  # the host may have left some of its own
    attention = model.original_model.config._attn_implementation
    with pytest.raises(RuntimeError, match="on the way"), plain_trunk(model) as blocks:
        assert not any("_original_component" in part._modules for part in model.original_model.base_model.modules())
        kept = [list(part._forward_hooks) for part in blocks]
        with plain_hooks(blocks, {}, {0: lambda value: None}):
            assert [list(part._forward_hooks) for part in blocks] != kept
            raise RuntimeError("on the way")
    assert {name: id(part) for name, part in model.named_modules()} == before
    assert model.original_model.config._attn_implementation == attention
    assert [list(part._forward_hooks) for part in model.modules()] == hooks


def test_only_some_layers_are_read_and_later_blocks_do_not_run(tiny_model, few_passages):
    model = tiny_model("llama")
    whole = extract_activations(model, few_passages)
    ran = []
    last = model.original_model.base_model.layers[2]
    handle = last._modules["_original_component"].register_forward_hook(lambda *_: ran.append(1))
    try:
        first = extract_activations(model, few_passages, layers=[1])
    finally:
        handle.remove()
    torch.testing.assert_close(first.values[:, 0], whole.values[:, 1])
    assert not ran


def test_a_steered_model_is_read_as_it_is_steered(few_passages):
    model = load_model(make_hf_model("llama"), tokenizer=make_tokenizer())
    plain = extract_activations(model, few_passages)
    vectors = fit_vectors(plain)
    with steer(model, vectors, "happy", layers=1, strength=1.0, scope="all"):
        assert not can_be_plain(model)
        pushed = extract_activations(model, few_passages)
    assert can_be_plain(model)
    assert torch.equal(extract_activations(model, few_passages).values, plain.values)
    torch.testing.assert_close(pushed.values[:, 0], plain.values[:, 0], atol=2e-5, rtol=1e-4)
    assert (pushed.values[:, 1] - plain.values[:, 1]).norm(dim=-1).min() > 0.1


def test_hooks_of_any_kind_keep_the_wrappers_on(tiny_model):
    model = tiny_model("llama")
    with add_hooks(model, [("blocks.0.hook_resid_post", lambda value, hook=None: None)]):
        assert not can_be_plain(model)
    point = model.hook_dict["blocks.0.hook_resid_post"].register_forward_hook(lambda *_: None)
    try:
        assert not can_be_plain(model)
    finally:
        point.remove()
    handle = model.original_model.base_model.layers[0].register_forward_hook(lambda *_: None)
    try:
        assert not can_be_plain(model)
    finally:
        handle.remove()
    assert can_be_plain(model)


def test_other_families_and_numerics_keep_their_wrappers(tiny_model):
    assert not can_be_plain(tiny_model("gpt2"))
    folded = load_model(make_hf_model("llama"), tokenizer=make_tokenizer(), compatibility=True)
    assert not can_be_plain(folded)
    assert not reads_plain(folded)


@pytest.mark.weights
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_models_have_passed_the_check(real_model, name):
    assert model_info(real_model(name)).provenance.checks[CHECK].startswith("passed")

"""Transfers: everything is the tuned model, nothing is the base, and afterwards every bit is as before."""

import json

import pytest
import torch

from lens_affect.adapter import CHANGED, model_info
from lens_affect.models import load_model
from lens_affect.steering import residual_norms
from lens_affect.transfers import revert_modules, transfer_modules
from tests.test_checkpoint_pairs import changed, save
from tests.test_lora import make_peft
from tests.tiny import make_hf_model, make_tokenizer

ALL = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down", "embed", "unembed", "norm", "bias"), 0.1)
TOKENS = torch.tensor([[0, 17, 33, 90, 250, 7, 8]])


def logits(model):
    with torch.no_grad():
        found = model(TOKENS)
        inner = model.original_model(TOKENS) if hasattr(model, "original_model") else found
    found = getattr(found, "logits", found)
    assert torch.equal(found, inner.logits)
    return found


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


def same(model, before):
    return all(torch.equal(p, before[n]) for n, p in model.named_parameters(remove_duplicate=False))


def bridged(model):
    return load_model(model, tokenizer=make_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt2", "phi3"])
@pytest.mark.parametrize("wrap", [bridged, lambda model: model], ids=["bridge", "plain"])
def test_everything_is_the_tuned_model_and_nothing_is_the_base(family, wrap):
    base, tuned = wrap(make_hf_model(family)), wrap(changed(family, **ALL))
    before, expected, own = state(base), logits(tuned), logits(base)
    assert not torch.equal(expected, own)
    with transfer_modules(base, tuned, modules="everything") as found:
        assert torch.equal(logits(base), expected)
        assert found.n_changed == len(found.keys)
    assert same(base, before)
    with transfer_modules(base, tuned, modules="none") as found:
        assert torch.equal(logits(base), own)
        assert found.keys == ()
    with revert_modules(tuned, base, modules="everything"):
        assert torch.equal(logits(tuned), own)
    assert torch.equal(logits(tuned), expected)
    assert torch.equal(logits(base), own)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("module", ["k", "up"])
def test_one_module_changes_the_logits_as_tuning_it_alone_would(family, module):
    base, tuned = bridged(make_hf_model(family)), changed(family, **ALL)
    only = make_hf_model(family)
    with (
        transfer_modules(only, tuned, modules=module, layers=[1]) as found,
        transfer_modules(base, tuned, modules=module, layers=[1]),
    ):
        expected = logits(only)
        torch.testing.assert_close(logits(base), expected)
        assert not torch.equal(expected, logits(make_hf_model(family)))
        assert {key.split(".")[1] for key in found.keys} == {"1"}
    assert torch.equal(logits(only), logits(make_hf_model(family)))


def test_a_transferred_gate_is_the_model_whose_gate_was_tuned():
    base, tuned = make_hf_model("llama"), changed(**ALL)
    by_hand = make_hf_model("llama")
    with torch.no_grad():
        for mine, other in zip(by_hand.model.layers, tuned.model.layers, strict=True):
            mine.mlp.gate_proj.weight.copy_(other.mlp.gate_proj.weight)
            mine.mlp.up_proj.weight.copy_(other.mlp.up_proj.weight)
    with transfer_modules(base, tuned, modules=["gate", "up"]) as found:
        assert torch.equal(logits(base), logits(by_hand))
        assert found.n_parameters == 2 * 3 * 48 * 32
        assert "gate+up of LlamaForCausalLM: 6 tensors, 9,216 entries" in str(found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_an_exception_leaves_no_trace(family):
    base = bridged(make_hf_model(family))
    before, own, info = state(base), logits(base), model_info(base)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        transfer_modules(base, changed(family, **ALL), modules="all"),
    ):
        raise RuntimeError("in the middle")
    assert same(base, before)
    broken = changed(family, **ALL)
    with pytest.raises(ValueError, match="not in memory"):
        broken.lm_head.weight = torch.nn.Parameter(torch.empty(480, 32, device="meta"))
        with transfer_modules(base, broken, modules="everything"):
            pass
    assert same(base, before)
    assert torch.equal(logits(base), own)
    assert model_info(base) is info


def test_a_cast_bridge_is_written_wherever_it_computes():
    """In bfloat16 the pieces of GPT-2's fused q, k, v no longer share its memory."""
    base, tuned = (
        load_model(m, tokenizer=make_tokenizer(), dtype=torch.bfloat16)
        for m in (make_hf_model("gpt2"), changed("gpt2", **ALL))
    )
    before = logits(base)
    with transfer_modules(base, tuned, modules="everything"):
        assert torch.equal(logits(base), logits(tuned))
    with transfer_modules(base, tuned, modules="q"):
        assert not torch.equal(logits(base), before)
    assert torch.equal(logits(base), before)


def test_folders_and_adapters_are_read_directly(tmp_path):
    tuned = changed(**ALL)
    base = bridged(make_hf_model("llama"))
    with transfer_modules(base, save(tuned, tmp_path / "tuned"), modules="everything"):
        torch.testing.assert_close(logits(base), logits(tuned))
    peft = make_peft(target_modules=["gate_proj"])
    peft.save_pretrained(tmp_path / "adapter")
    with transfer_modules(base, tmp_path / "adapter", modules="everything") as found:
        torch.testing.assert_close(logits(base), logits(peft.merge_and_unload()))
        assert found.n_changed == 3
    with transfer_modules(base, tmp_path / "adapter", modules="up") as found:
        assert found.n_changed == 0


def test_results_made_inside_the_block_say_so():
    base = bridged(make_hf_model("llama"))
    norms = residual_norms(base)
    with transfer_modules(base, changed(**ALL), modules="gate", layers=[0, 2]):
        assert model_info(base).provenance.checks[CHANGED] == "gate of LlamaForCausalLM in layers 0, 2"
        assert not torch.equal(residual_norms(base), norms)  # and nothing remembered from before is used
        with transfer_modules(base, changed(**ALL), modules="up"):
            assert model_info(base).provenance.checks[CHANGED].endswith("; up of LlamaForCausalLM")
    assert CHANGED not in model_info(base).provenance.checks
    assert torch.equal(residual_norms(base), norms)


def test_what_cannot_be_transferred_is_refused(tmp_path):
    base = make_hf_model("llama")

    def attempt(model, other, modules="gate", layers=None):
        with transfer_modules(model, other, modules=modules, layers=layers):
            raise AssertionError

    with pytest.raises(ValueError, match="received module 'gaet'"):
        attempt(base, changed(gate=0.1), "gaet")
    with pytest.raises(ValueError, match="'gate', which this model does not have"):
        attempt(make_hf_model("gpt2"), changed("gpt2", up=0.1))
    with pytest.raises(ValueError, match="received layers"):
        attempt(base, changed(gate=0.1), layers=[7])
    with pytest.raises(ValueError, match="different shapes"):
        attempt(base, make_hf_model("gemma3"))
    with pytest.raises(TypeError, match="allowed is a model in memory"):
        attempt("smollm2-135m-instruct", base)
    with pytest.raises(ValueError, match="LoRA layers, whose weights are not what it computes with"):
        attempt(make_peft(), base)
    compatible = load_model(make_hf_model("llama"), tokenizer=make_tokenizer(), compatibility=True)
    for pair in ((compatible, base), (base, compatible)):
        with pytest.raises(ValueError, match="compatibility mode"):
            attempt(*pair)
    larger = changed(gate=0.1)
    larger.resize_token_embeddings(490, mean_resizing=False)
    with transfer_modules(base, larger, modules="all") as found:
        assert found.n_changed == 3
    with pytest.raises(ValueError, match="embed, which has other rows"):
        attempt(base, larger, "everything")
    save(changed(embed=0.1), tmp_path / "moved", make_tokenizer())
    tokenizer = tmp_path / "moved" / "tokenizer.json"
    said = json.loads(tokenizer.read_text())
    ids = said["model"]["vocab"]
    first, second = list(ids)[-2:]
    ids[first], ids[second] = ids[second], ids[first]
    tokenizer.write_text(json.dumps(said))
    bridge = load_model(make_hf_model("llama"), tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match="embed, which has rows of other tokens"):
        attempt(bridge, tmp_path / "moved", "everything")
    tied = make_hf_model("llama")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    with pytest.raises(ValueError, match="tensors that the model lacks, such as unembed"):
        attempt(tied, base, "everything")
    make_peft().save_pretrained(tmp_path / "adapter")
    with (
        pytest.raises(ValueError, match="allowed there is its base model"),
        revert_modules(base, tmp_path / "adapter", modules="gate"),
    ):
        pass

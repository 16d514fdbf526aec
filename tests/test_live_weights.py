"""Live weights: keys that a choice names, and writes that reach the memory a model computes with."""

import pytest
import torch

from lens_affect.checkpoints import open_checkpoint
from lens_affect.live_weights import LiveWeights, choose_keys, replaced
from lens_affect.models import load_model
from tests.tiny import make_hf_model, make_tokenizer


def test_a_choice_names_modules_with_their_biases_in_the_blocks_asked_for():
    found = open_checkpoint(make_hf_model("qwen2"))
    assert choose_keys(found, "q", [1]) == ("layers.1.q", "layers.1.q.bias")
    assert choose_keys(found, "gate", [2, 0]) == ("layers.0.gate", "layers.2.gate")
    assert choose_keys(found, "embed") == ("embed",)
    assert choose_keys(found, "embed", [0]) == ()
    assert choose_keys(found, "none") == ()
    assert set(choose_keys(found, "everything")) == set(found.parts)
    assert len(choose_keys(found, "bias")) == 9
    with pytest.raises(ValueError, match="received module 'bias'"):
        choose_keys(open_checkpoint(make_hf_model("llama")), "bias")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen2"])
@pytest.mark.parametrize("bridged", [True, False])
def test_every_key_reaches_the_forward_pass(family, bridged):
    model = make_hf_model(family)
    model = load_model(model, tokenizer=make_tokenizer()) if bridged else model
    live = LiveWeights(model)
    tokens = torch.tensor([[0, 5, 6, 7]])

    def run():
        with torch.no_grad():
            found = model(tokens)
        return getattr(found, "logits", found)

    before = run()
    for key in live.checkpoint.parts:
        old = live.read(key)
        with replaced(live, [(key, old + torch.randn(old.shape, generator=torch.Generator().manual_seed(1)))], "noise"):
            if not key.endswith("k.bias"):  # the same number added to every key's score
                assert (run() - before).abs().max() > 1e-5, key
            assert torch.equal(live.checkpoint.read(key), live.read(key))
        assert torch.equal(run(), before)

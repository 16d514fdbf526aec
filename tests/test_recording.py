"""Recordings against plain forward passes, and the models that cannot be recorded."""

import pytest
import torch

from lens_affect.adapter import add_hooks, run_logits
from lens_affect.recording import record
from lens_affect.sites import resolve_site
from tests.pairs import LENGTHS, make_pairs
from tests.tiny import DENSE


@pytest.mark.parametrize("family", DENSE)
def test_streams_and_logits_are_those_of_the_model_right_aligned(tiny_model, family):
    model = tiny_model(family)
    tokens, mask = make_pairs()
    recording = record(model, tokens, mask)
    assert recording.trunk is not None
    seen = {}
    hooks = [
        (
            resolve_site(model, "resid_post").at(layer),
            lambda activation, hook, layer=layer: seen.update({layer: activation}),
        )
        for layer in range(model.cfg.n_layers)
    ]
    with add_hooks(model, hooks):
        logits = run_logits(model, tokens, mask)
    for text, length in enumerate(LENGTHS * 2):
        torch.testing.assert_close(recording.logits[text], logits[text, length - 1], rtol=1e-5, atol=1e-4)
        for layer, stream in seen.items():
            torch.testing.assert_close(recording.trunk.stream[layer + 1, text, -length:], stream[text, :length])


def test_recording_in_parts_is_recording_at_once(tiny_model):
    model = tiny_model("gemma3")
    whole, parts = (record(model, *make_pairs(), batch_tokens=size) for size in (10_000, 60))
    torch.testing.assert_close(parts.logits, whole.logits)
    assert whole.trunk is not None
    assert parts.trunk is not None
    torch.testing.assert_close(parts.trunk.stream[:, :, -19:], whole.trunk.stream[:, :, -19:])
    assert len({id(arguments) for arguments in parts.trunk.arguments}) == len({id(a) for a in whole.trunk.arguments})


def test_blocks_that_take_what_is_not_known_are_recorded_without_a_trunk(tiny_model, monkeypatch):
    model = tiny_model("llama")
    tokens, mask = make_pairs()
    block = model.blocks[1]
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"cache_position": torch.arange(3)}), with_kwargs=True
    )
    try:
        recording = record(model, tokens, mask)
    finally:
        handle.remove()
    assert recording.trunk is None
    assert "cache_position" in recording.obstacle
    torch.testing.assert_close(recording.logits, record(model, tokens, mask).logits, rtol=1e-5, atol=1e-4)


def test_padding_on_the_left_is_refused_with_the_next_step(tiny_model):
    tokens, mask = make_pairs()
    with pytest.raises(ValueError, match="pad_right"):
        record(tiny_model("llama"), tokens, mask.flip(1))

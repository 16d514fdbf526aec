"""Ablations: scale 0 changes nothing, scale 1 is the target, zeroing any MLP matrix is one function, and everything is put back."""

import pytest
import torch

from lens_affect.ablations import ablate_modules, mean_outputs
from lens_affect.adapter import CHANGED, encode, model_info
from lens_affect.live_weights import LiveWeights
from lens_affect.stimuli import load_stimuli
from tests.test_checkpoint_pairs import changed
from tests.test_transfers import ALL, bridged, logits, same, state
from tests.tiny import make_hf_model

HOWS = ["base", "random_equal_norm", "mean", "shuffle", "zero"]


@pytest.fixture(scope="module")
def tuned():
    """A bridge whose base is make_hf_model("llama"); every test puts it back."""
    return bridged(changed(**ALL))


def options(how):
    return {"how": how, "base": make_hf_model("llama") if how == "base" else None}


@pytest.mark.parametrize("how", HOWS)
def test_scale_zero_changes_nothing_and_an_exception_leaves_no_trace(how, tuned):
    before, own, info = state(tuned), logits(tuned), model_info(tuned)
    with ablate_modules(tuned, modules="all", scale=0.0, **options(how)):
        torch.testing.assert_close(logits(tuned), own, atol=2e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="stop"), ablate_modules(tuned, modules="gate", **options(how)) as found:
        assert not torch.allclose(logits(tuned), own)
        assert model_info(tuned).provenance.checks[CHANGED].startswith(f"gate ablated by {how} at scale 1")
        assert f"gate ablated in 3 blocks by {how} at scale 1: 4,608 entries" in str(found)
        raise RuntimeError("stop")
    assert same(tuned, before)
    assert torch.equal(logits(tuned), own)
    assert model_info(tuned) is info


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "phi3"])
def test_zeroing_gate_up_or_down_is_one_function(family):
    model = make_hf_model(family)
    found = {}
    for module in ("gate", "up", "down"):
        with ablate_modules(model, modules=module, how="zero"):
            found[module] = logits(model)
    assert torch.equal(found["gate"], found["up"])
    assert torch.equal(found["gate"], found["down"])
    assert not torch.allclose(found["gate"], logits(model))


def test_base_takes_the_change_back_all_or_part_of_the_way(tuned):
    base = make_hf_model("llama")
    with ablate_modules(tuned, modules="all", how="base", base=base):
        assert all(torch.equal(LiveWeights(tuned).read(k), LiveWeights(base).read(k)) for k in _linear(base))
    whole, original = LiveWeights(tuned), LiveWeights(base)
    expected = 0.75 * whole.read("layers.1.gate") + 0.25 * original.read("layers.1.gate")
    with ablate_modules(tuned, modules="gate", layers=[1], how="base", base=base, scale=0.25) as found:
        torch.testing.assert_close(LiveWeights(tuned).read("layers.1.gate"), expected)
        assert torch.equal(LiveWeights(tuned).read("layers.0.gate"), whole.read("layers.0.gate"))
        assert (found.modules, found.layers, found.n_parameters) == (("gate",), (1,), 48 * 32)


def _linear(model):
    return [key for key, part in LiveWeights(model).checkpoint.parts.items() if part.is_linear]


def test_random_weights_have_the_norm_of_what_they_replace(tuned):
    base, key = make_hf_model("llama"), "layers.2.up"
    now, old = LiveWeights(tuned).read(key), LiveWeights(base).read(key)
    with ablate_modules(tuned, modules="up", how="random_equal_norm", base=base):
        noise = LiveWeights(tuned).read(key) - old
    assert noise.norm() == pytest.approx(float((now - old).norm()), rel=1e-5)
    assert abs(torch.cosine_similarity(noise.flatten(), (now - old).flatten(), 0)) < 0.1
    with ablate_modules(tuned, modules="up", how="random_equal_norm", scale=0.3, seed=4) as found:
        first = LiveWeights(tuned).read(key) - now
        assert found.change == pytest.approx(0.3, rel=1e-4)
    assert first.norm() == pytest.approx(0.3 * float(now.norm()), rel=1e-5)
    with ablate_modules(tuned, modules="all", how="random_equal_norm", scale=0.6, seed=4):
        again = LiveWeights(tuned).read(key) - now
    torch.testing.assert_close(
        again, 2 * first, rtol=1e-4, atol=1e-5
    )  # one noise per module and seed, whatever else is ablated
    with ablate_modules(tuned, modules="up", how="random_equal_norm", scale=0.3, seed=5):
        assert not torch.allclose(LiveWeights(tuned).read(key) - now, first)


def test_shuffled_outputs_are_the_same_numbers_in_other_places():
    model = make_hf_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.bias.normal_()
    layer = model.model.layers[1].self_attn.q_proj
    x = torch.randn(4, 32)
    before = layer(x)
    with ablate_modules(model, modules="q", layers=[1], how="shuffle"):
        after = layer(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after.sort(-1).values, before.sort(-1).values)
    order = [int((before[0] - value).abs().argmin()) for value in after[0]]
    torch.testing.assert_close(after, before[:, order])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi3"])
def test_mean_outputs_are_those_of_content_tokens(family, tiny_model):
    model = tiny_model(family)
    module = "up"
    found = mean_outputs(model, modules=[module, "q"], layers=[1])
    assert set(found) == {"layers.1.up", "layers.1.q"}
    texts = load_stimuli("passages").select(emotions=["neutral"]).texts
    total, n = 0.0, 0
    kept = []
    hook = "blocks.1.mlp.hook_pre" if family == "gpt2" else "blocks.1.mlp.hook_pre_linear"
    for text in texts:
        encoded = encode(model, text)
        with model.hooks(fwd_hooks=[(hook, lambda value, hook=None: kept.append(value))]), torch.no_grad():
            model(torch.tensor([encoded.ids]))
        total = total + kept.pop()[0, list(encoded.content)].double().sum(0)
        n += len(encoded.content)
    torch.testing.assert_close(found["layers.1.up"], (total / n).float(), rtol=1e-3, atol=1e-4)
    assert 0 not in encode(model, texts[0]).content


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_module_held_at_its_mean_says_the_same_about_every_text(family):
    model = bridged(make_hf_model(family))
    means = mean_outputs(model, modules="v")
    own = logits(model)
    with ablate_modules(model, modules="v", how="mean", means=means):
        a, b = (model(torch.tensor([tokens]))[0, -1] for tokens in ([0, 5, 6, 9], [0, 300, 7, 9]))
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-4
        )  # without values, attention carries nothing from earlier tokens
        assert not torch.allclose(logits(model), own)
    with ablate_modules(model, modules="v", how="mean", means=means, scale=0.5):
        half = logits(model)
    assert not torch.allclose(half, own)
    assert torch.equal(logits(model), own)


def test_what_cannot_be_ablated_is_refused():
    model = make_hf_model("llama")

    def attempt(**settings):
        with ablate_modules(model, **{"modules": "gate", "how": "shuffle"} | settings):
            raise AssertionError

    for settings, message in (
        ({"how": "erase"}, r"received how='erase'; allowed are \['base'"),
        ({"how": "base"}, "without a base"),
        ({"scale": 1.5}, "received scale 1.5 for 'shuffle'; allowed are numbers from 0"),
        ({"modules": "none"}, "received no module to ablate"),
        ({"modules": "embed"}, "received module 'embed'; allowed are"),
        ({"layers": [9]}, "received layers"),
        ({"how": "base", "base": make_hf_model("gemma3")}, "different shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt(**settings)
    with pytest.raises(TypeError, match="lacks"):
        attempt(how="mean")

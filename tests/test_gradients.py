"""Attribution patching: exact for what is linear, gradients as autograd and finite differences give them, agreement by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from lens_affect.gradients import agreement, approximate_patches
from lens_affect.patching import patch_sites
from tests.test_donors import make_pairs
from tests.test_patching import planted_neuron, synthetic
from tests.tiny import DENSE

SITES = ("resid_post", "mlp_out", "attn_out", "v", "act")


@pytest.mark.parametrize("family", DENSE)
def test_for_a_small_change_it_is_the_exact_effect(tiny_model, family, monkeypatch):
    """The exact effect of a patch towards the source by a hundredth, a hundred times, is the first-order effect."""
    model, pairs = tiny_model(family), make_pairs().select([0, 1, 5, 9])
    found = approximate_patches(model, pairs, sites=SITES, positions="all", rows_at_once=3)
    share = 0.01

    def a_step(own, source, site, layer, texts, from_end):
        return own + share * (source - own)

    import lens_affect.donors

    monkeypatch.setattr(lens_affect.donors, "_random_direction", lambda matched, seed: a_step)
    exact = patch_sites(model, pairs, sites=SITES, positions="all", controls=["random"])
    torch.testing.assert_close(found.gap, exact.gap, rtol=1e-4, atol=1e-4)
    small = exact.controls["random"] / share
    scale = float(small.abs().max())
    assert float((small - found.effect_raw).abs().max()) < 0.1 * scale
    assert stats.pearsonr(small.flatten(), found.effect_raw.flatten())[0] > 0.99


def test_positions_add_up_and_noise_has_its_own_start(tiny_model):
    model, pairs = tiny_model("llama"), make_pairs(tails=True)
    everywhere, each, last = (
        approximate_patches(model, pairs, sites=["gate", "q"], positions=p).effect_raw for p in ("all", "each", "last")
    )
    torch.testing.assert_close(each.nansum(-1), everywhere[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each[..., -1], last[..., 0])
    noise = approximate_patches(model, pairs, sites=["gate"], direction="noise")
    torch.testing.assert_close(noise.gap, approximate_patches(model, pairs, sites=["gate"]).gap)
    assert not torch.allclose(noise.effect_raw[:, 0], everywhere[:, 0])


def test_no_graph_hook_or_gradient_is_left_behind(tiny_model):
    model = tiny_model("qwen2")
    wanted = [p.requires_grad for p in model.parameters()]
    approximate_patches(model, make_pairs(), sites=["gate"])
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_planted_causal_neuron_is_found_from_the_side_where_it_is_not_saturated():
    model, sites = planted_neuron(), ["gate", "v", "attn_out"]
    noise, denoise = (
        approximate_patches(model, make_pairs(), sites=sites, positions="last", direction=d).to_frame()
        for d in ("noise", "denoise")
    )
    effect = noise.set_index(["site", "layer"])["effect"]
    assert effect["gate", 1] > 0.5
    assert effect.drop(("gate", 1)).abs().max() < 1e-4
    # From the other side SiLU is nearly flat, so the first order sees a small part of an effect near 1: what `agreement` is for.
    assert denoise.set_index(["site", "layer"])["effect"]["gate", 1] < 0.3


def test_agreement_is_the_rank_correlation_of_effects():
    exact = synthetic([[0.3, 0.1, 0.0, 0.2], [0.0, 0.1, 0.2, 0.4]])
    twice = replace(exact, effect_raw=2 * exact.effect_raw)
    table = agreement(exact, twice).set_index("site")
    assert table["rho_cells"].tolist() == pytest.approx([1, 1])
    assert table["rho_pairs"].tolist() == pytest.approx([1, 1])
    assert table["slope"].tolist() == pytest.approx([0.5, 0.5])
    other = synthetic([[0.0, 0.1, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]], seed=1)
    table = agreement(exact, replace(other, groups=exact.groups)).set_index("site")
    cells = [m.normalized()[0][1].ravel() for m in (exact, other)]
    assert table.loc["up", "rho_cells"] == pytest.approx(stats.spearmanr(cells[0], cells[1])[0])
    raw = [m.effect_raw[:, 1].numpy().ravel() for m in (exact, other)]
    assert table.loc["up", "rho_pairs"] == pytest.approx(stats.spearmanr(raw[0], raw[1])[0])
    assert np.isfinite(table["slope"]).all()
    with pytest.raises(ValueError, match="received maps with different layers"):
        agreement(exact, replace(exact, layers=(1, 2, 3, 4)))

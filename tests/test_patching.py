"""Patching: known effects (all, nothing, a planted neuron), nested sites, statistics by hand, and refusals before any work."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from lens_affect.adapter import add_hooks, model_info, run_logits
from lens_affect.contrasts import ContrastPairs
from lens_affect.matching import match_pairs
from lens_affect.models import load_model
from lens_affect.patching import SAME, PatchingMap, patch_sites
from lens_affect.results import Provenance
from lens_affect.sites import resolve_site
from lens_affect.statistics import jackknife_interval, mean_interval
from lens_affect.vectors import EmotionVectors
from tests.test_donors import make_pairs
from tests.tiny import DENSE, make_hf_model, make_tokenizer

NESTED = ("attn_out", "z", "o", "mlp_out", "act", "down")


@pytest.mark.parametrize("family", DENSE)
def test_patching_everything_restores_the_target_and_patching_itself_nothing(tiny_model, family):
    pairs = make_pairs(tails=True)
    found = patch_sites(tiny_model(family), pairs, sites=["resid_post"], controls=["self"])
    last = found.to_frame().query("layer == 2")
    assert last["effect"].item() == pytest.approx(1, abs=1e-4)
    assert float((found.effect_raw[:, 0, -1, 0] - found.gap).abs().max()) < 1e-4
    assert float(found.controls["self"].abs().max()) < 1e-5
    assert float(found.control_changes["self"].abs().max()) < 1e-5
    assert float(found.change.min()) > 0


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_nested_sites_carry_the_same_patch_also_with_post_norms(tiny_model, family, positions):
    model = tiny_model(family)
    alone = {
        site: patch_sites(model, make_pairs(tails=True), sites=[site], positions=positions, controls=["topic"])
        for site in NESTED
    }
    for site, same in SAME.items():
        torch.testing.assert_close(alone[site].effect_raw, alone[same].effect_raw, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[site].change, alone[same].change, rtol=1e-4, atol=1e-5)
    together = patch_sites(model, make_pairs(tails=True), sites=NESTED, positions=positions, controls=["topic"])
    for i, site in enumerate(NESTED):
        torch.testing.assert_close(together.effect_raw[:, i], alone[site].effect_raw[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            together.controls["topic"][:, i], alone[site].controls["topic"][:, 0], rtol=1e-4, atol=1e-5
        )


def test_each_position_by_itself_is_labelled_from_the_end_and_the_last_is_last(tiny_model):
    model, pairs = tiny_model("llama"), make_pairs(tails=True)
    each = patch_sites(model, pairs, sites=["gate", "v"], positions="each", controls=[])
    last = patch_sites(model, pairs, sites=["gate", "v"], positions="last", controls=[])
    matched = match_pairs(model, pairs)
    spans = matched.last - matched.first + 1
    assert int(spans.max()) == 4
    assert each.positions == tuple(str(-k) for k in range(int(spans.max()), 0, -1))
    torch.testing.assert_close(each.effect_raw[..., -1], last.effect_raw[..., 0])
    assert each.effect_raw.isfinite().sum((1, 2, 3)).tolist() == (spans * 2 * 3).tolist()


def test_noise_is_denoise_of_the_exchanged_pairs(tiny_model):
    model, pairs = tiny_model("qwen2"), make_pairs(tails=True)
    exchanged = replace(
        pairs,
        clean=pairs.corrupted,
        corrupted=pairs.clean,
        clean_words=pairs.corrupted_words,
        corrupted_words=pairs.clean_words,
        clean_emotions=pairs.corrupted_emotions,
        corrupted_emotions=pairs.clean_emotions,
    )
    noise = patch_sites(model, pairs, sites=["up"], direction="noise", controls=[])
    denoise = patch_sites(model, exchanged, sites=["up"], controls=[])
    torch.testing.assert_close(noise.effect_raw, denoise.effect_raw)
    torch.testing.assert_close(noise.gap, denoise.gap)


def test_kl_is_the_divergence_from_the_target_run(tiny_model):
    model, pairs = tiny_model("llama"), make_pairs()
    found = patch_sites(model, pairs, sites=["resid_post", "gate"], metric="kl", controls=[])
    matched = match_pairs(model, pairs)
    rows = torch.arange(len(matched))
    clean, corrupted = (
        run_logits(model, t, matched.mask)[rows, matched.last] for t in (matched.clean, matched.corrupted)
    )
    by_hand = torch.nn.functional.kl_div(
        corrupted.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(found.gap, by_hand.sum(-1), rtol=1e-4, atol=1e-6)
    table = found.to_frame().set_index(["site", "layer"])
    assert table.loc[("resid_post", 2), "effect"] == pytest.approx(1, abs=1e-4)
    assert table.loc[("gate", 1), "effect"] < 1  # 1 - KL(patched) / KL(start)


def vectors_of(model, emotions=("calm", "afraid", "sad", "happy"), layers=None):
    """Random unit vectors with the model's name on them."""
    layers = tuple(range(model.cfg.n_layers)) if layers is None else layers
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(emotions), len(layers), model.cfg.d_model, generator=generator)
    return EmotionVectors(
        directions=torch.nn.functional.normalize(directions, dim=-1),
        raw_norms=torch.ones(len(emotions), len(layers)),
        reference=torch.zeros(len(layers), model.cfg.d_model),
        reliability=torch.ones(len(emotions), len(layers)),
        emotions=tuple(emotions),
        layers=layers,
        site="resid_post",
        n_layers=model.cfg.n_layers,
        n_texts=8,
        baseline="grand_mean",
        pooling="mean",
        source="planted",
        provenance=model_info(model).provenance,
    )


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_the_projection_is_read_at_a_later_layer(tiny_model, family, direction):
    model = tiny_model(family)
    pairs = make_pairs(tails=True)
    vectors = vectors_of(model, sorted({*pairs.clean_emotions, *pairs.corrupted_emotions}))
    found = patch_sites(
        model,
        pairs,
        sites=["resid_post", "up"],
        metric="projection",
        vectors=vectors,
        read_layer=1,
        direction=direction,
        controls=["self"],
    )
    assert found.layers == (0, 1)
    matched = match_pairs(model, pairs)
    ends = []
    with add_hooks(model, [(resolve_site(model, "resid_post").at(1), lambda x, hook: ends.append(x))]):
        for tokens in (matched.clean, matched.corrupted):
            run_logits(model, tokens, matched.mask)
    clean, corrupted = (x[torch.arange(len(matched)), matched.last] for x in ends)
    axis = torch.stack(
        [
            vectors.vector(a, 1) - vectors.vector(b, 1)
            for a, b in zip(pairs.clean_emotions, pairs.corrupted_emotions, strict=True)
        ]
    )
    gap = ((clean - corrupted) * axis).sum(-1)
    torch.testing.assert_close(found.gap, gap, rtol=1e-4, atol=1e-5)
    # resid_post of the layer that is read: everything that there is to move
    torch.testing.assert_close(found.effect_raw[:, 0, 1, 0], gap, rtol=1e-4, atol=1e-4)
    assert float((found.effect_raw[:, 1, 0, 0]).abs().max()) > 0.001
    assert float(found.controls["self"].abs().max()) < 1e-5
    assert "by projection at layer 1" in str(found)
    assert "units of the residual stream" in str(found)


def test_a_projection_without_vectors_that_fit_is_refused(tiny_model):
    model, pairs = tiny_model("llama"), make_pairs()
    emotions = sorted({*pairs.clean_emotions, *pairs.corrupted_emotions})
    vectors = vectors_of(model, emotions)
    asked = {"sites": ["gate"], "metric": "projection"}
    with pytest.raises(ValueError, match="received metric='projection' without vectors"):
        patch_sites(model, pairs, **asked)
    with pytest.raises(ValueError, match="they belong to metric='projection'"):
        patch_sites(model, pairs, sites=["gate"], vectors=vectors)
    with pytest.raises(ValueError, match=r"received read_layer=7; there are vectors for layers \[0, 1, 2\]"):
        patch_sites(model, pairs, vectors=vectors, read_layer=7, **asked)
    with pytest.raises(ValueError, match="for which there is no vector"):
        patch_sites(model, pairs, vectors=vectors_of(model, ["proud", "bored"]), **asked)
    with pytest.raises(ValueError, match=r"received layers \[2\]; allowed are different ones of 0 to 1"):
        patch_sites(model, pairs, vectors=vectors, read_layer=1, layers=[2], **asked)
    with pytest.raises(ValueError, match="vectors were made with"):
        patch_sites(tiny_model("qwen2"), pairs, vectors=vectors, **asked)
    with pytest.raises(ValueError, match="read at mlp_out"):
        patch_sites(model, pairs, vectors=replace(vectors, site="mlp_out"), **asked)


def planted_neuron(neuron: int = 7, layer: int = 1):
    """A Llama in which the text's letter reaches the next word through one gate only: no attention, and one MLP with one live neuron."""
    hf = make_hf_model("llama")
    tokenizer = make_tokenizer()
    a, b = (tokenizer(f" {x}", add_special_tokens=False)["input_ids"][-1] for x in "ab")
    x, y = (tokenizer(f" {w}", add_special_tokens=False)["input_ids"][-1] for w in "xy")
    with torch.no_grad():
        for block in hf.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding, mlp = hf.model.embed_tokens.weight, hf.model.layers[layer].mlp
        hf.lm_head.weight.zero_()
        mlp.gate_proj.weight[neuron] = 0.2 * (embedding[a] - embedding[b]) / embedding[a].norm()
        mlp.up_proj.weight[neuron] = (embedding[a] + embedding[b]) / embedding[a].norm()
        direction = torch.zeros(32)
        direction[0] = 1
        for block in hf.model.layers[layer:]:
            block.mlp.down_proj.weight[:, neuron] = 0
        mlp.down_proj.weight[:, neuron] = 0.3 * direction
        hf.lm_head.weight[x], hf.lm_head.weight[y] = direction, -direction
    return load_model(hf, tokenizer=tokenizer)


def test_a_planted_causal_neuron_is_found_in_the_gate_of_its_layer_and_nowhere_else():
    model = planted_neuron()
    found = patch_sites(model, make_pairs(), sites=["gate", "up", "act", "v", "attn_out"], positions="last")
    table = found.to_frame().set_index(["site", "layer"])["effect"]
    assert table["gate", 1] > 0.5
    assert table["act", 1] == pytest.approx(1, abs=0.2)
    assert table["gate", 1] > 5 * abs(table["up", 1])
    others = table.drop([("gate", 1), ("act", 1), ("up", 1)])
    assert others.abs().max() < 1e-4
    difference = found.compare("gate", "up").set_index("layer")
    assert difference.loc[1, "low"] > 0
    assert (found.compare("gate", "attn_out").set_index("layer").loc[[0, 2], "difference"].abs() < 1e-4).all()


def synthetic(effects, *, n_topics=12, per_topic=4, noise=0.3, seed=0, random=0.0) -> PatchingMap:
    """A map with these normalized effects per site and layer, topics that differ, and a gap of about 2 nats."""
    generator = np.random.default_rng(seed)
    effects = np.asarray(effects, float)
    n, (n_sites, n_layers) = n_topics * per_topic, effects.shape
    groups = tuple(f"topic {i % n_topics}" for i in range(n))
    gap = generator.normal(2, 0.3, n)
    by_topic = generator.normal(0, noise, (n_topics, 1, n_layers))[[i % n_topics for i in range(n)]]
    raw = gap[:, None, None] * effects + by_topic + generator.normal(0, noise, (n, n_sites, n_layers))
    other = gap[:, None, None] * random + generator.normal(0, noise, (n, n_sites, n_layers))
    change = np.broadcast_to(np.arange(1, n_sites + 1)[None, :, None] * 0.1, raw.shape)

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x)).float()[..., None]

    return PatchingMap(
        effect_raw=tensor(raw),
        change=tensor(change),
        controls={"random": tensor(other)},
        control_changes={"random": tensor(change)},
        gap=torch.from_numpy(gap).float(),
        sites=("gate", "up", "attn_out")[:n_sites],
        layers=tuple(range(n_layers)),
        positions=("all",),
        groups=groups,
        metric="logit_difference",
        read_layer=None,
        direction="denoise",
        n_layers=n_layers,
        dropped={},
        words_left_out=0,
        way="resumed",
        seed=0,
        name="planted",
        provenance=Provenance(model="planted"),
    )


def test_the_normalized_effect_is_a_ratio_of_sums_with_a_jackknife_over_topics():
    found = synthetic([[0.3, 0.0], [0.1, 0.0]])
    table = found.to_frame().set_index(["site", "layer"])
    raw, gap = found.effect_raw[:, 0, 0, 0].double().numpy(), found.gap.double().numpy()
    groups = np.array(found.groups)
    whole = raw.sum() / gap.sum()
    without = np.array([raw[groups != g].sum() / gap[groups != g].sum() for g in dict.fromkeys(groups)])
    interval = jackknife_interval(np.array(whole), without)
    row = table.loc[("gate", 0)]
    assert row["effect"] == pytest.approx(whole)
    assert (row["low"], row["high"]) == pytest.approx((float(interval.low), float(interval.high)))
    assert row["raw"] == pytest.approx(raw.mean(), rel=1e-5)
    assert row["effect_per_change"] == pytest.approx(whole / 0.1, rel=1e-5)
    assert table.loc[("up", 0), "effect_per_change"] == pytest.approx(table.loc[("up", 0), "effect"] / 0.2, rel=1e-5)
    assert row["n"] == 48
    gap_by_topic = np.array([gap[groups == g].mean() for g in dict.fromkeys(groups)])
    of_gap = mean_interval(gap_by_topic)
    assert found.gap_interval == pytest.approx([float(of_gap.estimate), float(of_gap.low), float(of_gap.high)])


def test_an_effect_is_significant_against_a_random_donor_and_only_then():
    table = synthetic([[0.3] * 5, [0.0] * 5]).to_frame().set_index("site")
    assert (table.loc["gate", "p_family"] < 0.01).all()
    assert (table.loc["up", "p_family"] > 0.05).all()
    same_as_random = synthetic([[0.3] * 5, [0.3] * 5], random=0.3).to_frame()
    assert (same_as_random["p_family"] > 0.05).all()
    p = [synthetic([[0.1]], random=0.1, seed=s, n_topics=10).to_frame()["p"].item() for s in range(60)]
    assert stats.kstest(p, "uniform").pvalue > 0.001


def test_the_difference_of_two_sites_has_intervals_for_all_layers_at_once():
    found = synthetic([[0.0, 0.4, 0.0], [0.0, 0.1, 0.0], [0.0, 0.1, 0.0]])
    table = found.compare("gate", "up").set_index("layer")
    effects = found.to_frame().set_index(["site", "layer"])["effect"]
    for layer in range(3):
        assert table.loc[layer, "difference"] == pytest.approx(effects["gate", layer] - effects["up", layer])
        assert (table.loc[layer, "low"] > 0) == (layer == 1)
    assert table.loc["mean", "difference"] == pytest.approx(table.loc[[0, 1, 2], "difference"].mean())
    per_change = found.compare("gate", "up", per_change=True).set_index("layer")
    expected = effects["gate", 1] / 0.1 - effects["up", 1] / 0.2
    assert per_change.loc[1, "difference"] == pytest.approx(expected, rel=1e-4)
    turned = found.compare("up", "gate").set_index("layer")
    assert turned.loc[1, "high"] == pytest.approx(-table.loc[1, "low"])
    with pytest.raises(ValueError, match=r"received site 'q'; this map has \['gate', 'up', 'attn_out'\]"):
        found.compare("gate", "q")


def test_simultaneous_intervals_of_a_difference_hold_their_level():
    inside = 0
    for seed in range(100):
        table = synthetic(np.full((2, 20), 0.2), seed=seed).compare("gate", "up").iloc[:-1]
        inside += bool(((table["low"] <= 0) & (table["high"] >= 0)).all())
    assert inside >= 88


def test_pairs_without_the_behaviour_can_be_left_out_and_are_counted():
    found = synthetic([[0.3], [0.1]])
    found.gap[:5] = -0.5
    assert int(found.shown.sum()) == 43
    raw, gap = found.effect_raw[:, 0, 0, 0].double(), found.gap.double()
    assert found.to_frame(shown_only=True)["effect"][0] == pytest.approx(float(raw[5:].sum() / gap[5:].sum()))
    assert "48 pairs in 12 groups, 43 show the behaviour" in str(found)
    assert "; above a random donor: family-wise p" in str(found)
    assert "; above 0: family-wise p" in str(replace(found, controls={}, control_changes={}))
    assert "not shown to be above a random donor" in str(replace(found, controls={"random": found.effect_raw}))
    nothing = replace(found, gap=torch.linspace(-1, 1, 48))
    assert "NOT ABOVE 0" in str(nothing)
    with pytest.raises(ValueError, match="no pair shows the behaviour"):
        replace(found, gap=-found.gap.abs()).to_frame(shown_only=True)


def test_a_map_comes_back_from_disk_and_shows_itself(tiny_model, tmp_path):
    found = patch_sites(tiny_model("gemma2"), make_pairs(), sites=["gate", "up"], layers=[0, 2], controls=["random"])
    again = PatchingMap.load(found.save(tmp_path / "map"))
    assert again.to_frame().equals(found.to_frame())
    assert str(again) == str(found)
    assert {"site", "layer", "position", "effect", "low", "high", "random", "p_family", "n"} <= set(found.to_frame())
    assert found.layers == (0, 2)
    assert found.provenance.stimuli_hash == make_pairs().hash
    assert found.way.startswith("resumed: largest difference of an output")
    assert "<table" in found._repr_html_()
    assert len(str(found).splitlines()) <= 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": ["blocks.0.mlp.hook_pre"]}, "received site 'blocks.0.mlp.hook_pre'; allowed are"),
        ({"sites": []}, r"received sites \[\]"),
        ({"positions": "first"}, "received positions='first'; allowed are"),
        ({"metric": "accuracy"}, "received metric='accuracy'; allowed are"),
        ({"direction": "both"}, "received direction='both'; allowed are"),
        ({"controls": ["counterpart"]}, r"received controls \['counterpart'\]; allowed are"),
        ({"layers": [3]}, r"received layers \[3\]; allowed are different ones of 0 to 2"),
    ],
)
def test_what_cannot_be_patched_is_refused_before_any_work(tiny_model, change, message):
    with pytest.raises(ValueError, match=message):
        patch_sites(tiny_model("llama"), make_pairs(), **change)


def test_a_model_without_a_gate_and_pairs_of_unequal_length_are_refused(tiny_model):
    with pytest.raises(ValueError, match="no gated MLP"):
        patch_sites(tiny_model("gpt2"), make_pairs(), sites=["gate"])
    with pytest.raises(ValueError, match="mixture of experts"):
        patch_sites(tiny_model("mixtral"), make_pairs(), sites=["gate"])
    unequal = ContrastPairs.from_texts([("She went home", "She went home again and again")], ("x", "y"))
    with pytest.raises(ValueError, match="unequal token length"):
        patch_sites(tiny_model("llama"), unequal, sites=["gate"])


def test_logits_that_are_not_finite_are_refused_with_the_text(tiny_model):
    hf = make_hf_model("llama")
    model = load_model(hf, tokenizer=make_tokenizer())
    with torch.no_grad():
        hf.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"not finite"):
        patch_sites(model, make_pairs(), sites=["gate"])

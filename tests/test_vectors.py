"""Vectors: planted directions come back, baselines do what their algebra says, controls and lenses match by-hand values."""

from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch

from lens_affect.activations import Activations, extract_activations
from lens_affect.adapter import model_info
from lens_affect.models import load_model
from lens_affect.results import Provenance
from lens_affect.stimuli import NEUTRAL, Stimuli
from lens_affect.vectors import EmotionVectors, fit_vectors
from tests.tiny import make_hf_model, make_tokenizer

BASELINES = ("grand_mean", "neutral", "within_topic", "neutral_pcs")
FOUR = ("happy", "sad", "calm", "angry")


def planted(values, emotions, groups, *, embedding=None) -> Activations:
    """Activations without a model: values[text, layer, d]."""
    values = torch.as_tensor(values, dtype=torch.float32)
    n, n_layers = len(values), values.shape[1]
    texts = tuple(f"text {i}" for i in range(n))
    return Activations(
        arrays={"resid_post": values},
        squares={},
        counts=torch.ones(n, dtype=torch.long),
        layers=tuple(range(n_layers)),
        embedding={} if embedding is None else {"embedding": torch.as_tensor(embedding, dtype=torch.float32)},
        stimuli=Stimuli(texts, tuple(emotions), tuple(groups), ("planted",) * n, ("",) * n, "planted"),
        n_layers=n_layers,
        pooling="mean",
        texts_with_sinks={"resid_post": torch.zeros(n_layers, dtype=torch.long)},
        provenance=Provenance(model="planted", numerics="hf"),
    )


def crossed(emotions, n_topics, *, per_cell=1, n_neutral=0):
    """Labels and topics of a crossed design, neutral texts last."""
    cells = [(e, f"topic {t}") for t in range(n_topics) for e in emotions for _ in range(per_cell)]
    cells += [(NEUTRAL, f"topic {i % n_topics}") for i in range(n_neutral)]
    return [e for e, _ in cells], [g for _, g in cells]


def class_values(rng, emotions, means, *, noise=0.0, d=None):
    """values[text, 1, d]: the mean of each text's class and noise."""
    d = d or len(next(iter(means.values())))
    at = np.stack([means.get(e, np.zeros(d)) for e in emotions])
    return (at + noise * rng.standard_normal(at.shape))[:, None]


def off_diagonal(vectors, layer=0):
    table = vectors.similarity(layer).to_numpy()
    return table[~np.eye(len(table), dtype=bool)]


@pytest.fixture
def without_type_checks():
    """Annotations say which names are allowed; the messages for users who run without a type checker are tested without it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("baseline", BASELINES)
def test_planted_directions_are_recovered(baseline):
    rng = np.random.default_rng(0)
    d, shift, nuisance = 64, 3 * np.eye(64)[60], np.eye(64)[50]
    means = {e: shift + rng.standard_normal(d) for e in FOUR}
    emotions, groups = crossed(FOUR, 12, per_cell=4, n_neutral=48)
    values = class_values(rng, emotions, means, noise=0.3)
    offsets = rng.standard_normal((12, 1, d))
    values += np.stack([offsets[int(g.split()[1])] for g in groups])  # balanced: every class meets every topic
    neutral = np.array(emotions) == NEUTRAL
    values[neutral] += 20 * rng.standard_normal((48, 1, 1)) * nuisance
    values[neutral] -= values[neutral].mean(0) * nuisance
    found = fit_vectors(planted(values, emotions, groups), baseline=baseline)
    centre = np.mean(list(means.values()), axis=0)
    for e in FOUR:
        truth = means[e] - (0 if baseline == "neutral" else centre)
        if baseline == "neutral_pcs":
            truth = truth - truth @ nuisance * nuisance
        assert torch.cosine_similarity(found.vector(e, 0), torch.tensor(truth).float(), dim=0) > 0.99
        assert found.raw_norms[found.emotions.index(e), 0] == pytest.approx(np.linalg.norm(truth), rel=0.05)
    assert found.n_texts == 4 * 12 * 4


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_the_neutral_baseline_shares_the_shift_and_the_grand_mean_does_not(shift):
    # c = b^2 / (b^2 + w) up to the diagonal: b what all emotions share against neutral, w their spread (PAPERS.md 4.3)
    rng, n, d = np.random.default_rng(1), 8, 16
    emotions = [f"e{i}" for i in range(n)]
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    means = {e: 1.5 * rotation[i] + shift * rotation[n] for i, e in enumerate(emotions)}
    labels, groups = crossed(emotions, 3, n_neutral=3)
    activations = planted(class_values(rng, labels, means), labels, groups)
    stack = np.stack(list(means.values()))
    b2 = (stack.mean(0) ** 2).sum()
    w = ((stack - stack.mean(0)) ** 2).sum(1).mean()
    share = b2 / (b2 + w)
    expected = (n * share - 1) / (n - 1)
    assert expected == pytest.approx(shift**2 / (shift**2 + 1.5**2))
    assert off_diagonal(fit_vectors(activations, baseline="neutral")).mean() == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(off_diagonal(fit_vectors(activations)), -1 / (n - 1), atol=1e-5)


def test_the_grand_mean_pins_the_mean_cosine_of_equal_norms_whatever_the_pairs_are():
    # seven emotions on a circle: pairs from -0.97 to 0.62, their mean -1/6 all the same
    angle = 2 * np.pi * np.arange(7) / 7
    means = {f"e{i}": np.array([np.cos(a), np.sin(a), 5.0]) for i, a in enumerate(angle)}
    labels, groups = crossed(list(means), 2)
    found = off_diagonal(fit_vectors(planted(class_values(np.random.default_rng(0), labels, means), labels, groups)))
    assert found.mean() == pytest.approx(-1 / 6, abs=1e-5)
    assert found.max() > 0.6
    assert found.min() < -0.9


def test_within_topic_removes_a_topic_offset_that_the_grand_mean_keeps_in_an_unbalanced_design():
    rng = np.random.default_rng(2)
    offset = 10 * np.eye(8)[7]
    means = {"happy": np.eye(8)[0], "sad": np.eye(8)[1], "angry": np.eye(8)[2]}
    cells = {("happy", "kitchen"): 3, ("happy", "train"): 1, ("sad", "kitchen"): 1, ("sad", "train"): 3,
             ("angry", "kitchen"): 2, ("angry", "train"): 2}  # fmt: skip
    labels, groups = zip(*[cell for cell, n in cells.items() for _ in range(n)], strict=True)
    values = class_values(rng, labels, means)
    values[np.array(groups) == "kitchen"] += offset
    activations = planted(values, labels, groups)
    kept, removed = (fit_vectors(activations, baseline=b) for b in ("grand_mean", "within_topic"))
    assert abs(kept.vector("happy", 0)[7]) > 0.9
    assert removed.directions[..., 7].abs().max() < 1e-6
    by_hand = means["happy"] - (3 * (3 * means["happy"] + means["sad"] + 2 * means["angry"])
                                + (means["happy"] + 3 * means["sad"] + 2 * means["angry"])) / 24  # fmt: skip
    raw = removed.directions * removed.raw_norms[..., None]
    difference = (raw[removed.emotions.index("happy"), 0] - raw[removed.emotions.index("sad"), 0]).numpy()
    other = means["sad"] - (3 * means["happy"] + means["sad"] + 2 * means["angry"]
                            + 3 * (means["happy"] + 3 * means["sad"] + 2 * means["angry"])) / 24  # fmt: skip
    np.testing.assert_allclose(difference, by_hand - other, atol=1e-6)


@pytest.mark.parametrize(("spread", "removed"), [((6.0, 1.0, 1.0), 1), ((4.0, 3.5, 2.5), 2)])
def test_neutral_pcs_removes_the_components_that_carry_half_of_the_neutral_variance(spread, removed):
    rng, d = np.random.default_rng(3), 10
    means = {e: rng.standard_normal(d) for e in FOUR}
    labels, groups = crossed(FOUR, 3, n_neutral=6)
    values = class_values(rng, labels, means)
    for i, variance in enumerate(spread):  # exact: each axis has two neutral texts at plus and minus
        values[-6 + 2 * i, 0, i], values[-5 + 2 * i, 0, i] = np.sqrt(variance), -np.sqrt(variance)
    plain, cleaned = (fit_vectors(planted(values, labels, groups), baseline=b) for b in ("grand_mean", "neutral_pcs"))
    size = cleaned.directions[:, 0, :3].abs().amax(0)
    assert (size[:removed] < 1e-6).all()
    assert (size[removed:] > 0.05).all()
    rest = plain.directions * plain.raw_norms[..., None]
    torch.testing.assert_close((cleaned.directions * cleaned.raw_norms[..., None])[..., 3:], rest[..., 3:])


def noise_activations(seed, *, signal=0.0, n_topics=12, d=200, n_neutral=0):
    rng = np.random.default_rng(seed)
    means = {e: signal * rng.standard_normal(d) for e in FOUR}
    labels, groups = crossed(FOUR, n_topics, n_neutral=n_neutral)
    return planted(class_values(rng, labels, means, noise=1.0, d=d), labels, groups)


@pytest.mark.parametrize("baseline", BASELINES)
def test_reliability_is_near_one_where_signal_dominates(baseline):
    found = fit_vectors(noise_activations(0, signal=5.0, n_neutral=12), baseline=baseline)
    assert found.reliability.min() > 0.98


@pytest.mark.parametrize("baseline", BASELINES)
def test_reliability_is_near_zero_for_pure_noise(baseline):
    means = [
        fit_vectors(noise_activations(s, n_neutral=12, d=100), baseline=baseline).reliability.mean() for s in range(4)
    ]
    assert abs(np.mean(means)) < 0.1


def test_reliability_is_the_stepped_up_cosine_of_two_halves():
    # two topics: only one way to halve, so the value can be computed by hand
    found = fit_vectors(noise_activations(3, signal=0.7, n_topics=2, d=30))
    values = noise_activations(3, signal=0.7, n_topics=2, d=30).values[:, 0].double()
    halves = [values[4 * t : 4 * t + 4] - values[4 * t : 4 * t + 4].mean(0) for t in range(2)]
    r = torch.cosine_similarity(*halves, dim=-1)
    order = [FOUR.index(e) for e in found.emotions]
    torch.testing.assert_close(found.reliability[:, 0].double(), (2 * r / (1 + r))[order], atol=1e-5, rtol=1e-5)


def test_reliability_is_missing_with_one_group_and_where_groups_cannot_be_halved():
    one_group = fit_vectors(noise_activations(0, n_topics=1))
    assert one_group.reliability.isnan().all()
    labels = list(FOUR)
    nested = planted(np.random.default_rng(0).standard_normal((4, 1, 5)), labels, labels)
    assert fit_vectors(nested).reliability.isnan().all()


@pytest.mark.parametrize("baseline", BASELINES)
def test_scaling_all_activations_changes_the_norms_only(baseline):
    activations = noise_activations(4, signal=1.0, n_neutral=12)
    larger = replace(activations, arrays={"resid_post": 7 * activations.values})
    a, b = fit_vectors(activations, baseline=baseline), fit_vectors(larger, baseline=baseline)
    torch.testing.assert_close(a.directions, b.directions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(7 * a.raw_norms, b.raw_norms)
    torch.testing.assert_close(a.directions.norm(dim=-1), torch.ones(4, 1))


def test_classes_without_a_difference_get_zero_vectors_not_nan():
    labels, groups = crossed(FOUR, 2)
    found = fit_vectors(planted(np.ones((8, 1, 3)), labels, groups))
    assert (found.directions == 0).all()
    assert (found.raw_norms == 0).all()


def test_project_gives_the_component_from_the_reference():
    activations = noise_activations(5, signal=2.0)
    vectors = fit_vectors(activations)
    probe = vectors.reference[None] + 3 * vectors.vector("sad", 0)
    found = vectors.project(planted(probe, ["sad"], ["topic 0"]))
    similarity = vectors.similarity(0)
    for i, emotion in enumerate(vectors.emotions):
        assert found[0, i, 0].item() == pytest.approx(3 * similarity.loc["sad", emotion], abs=1e-4)


@pytest.mark.parametrize(
    ("field", "other"),
    [("model", "other"), ("revision", "abc"), ("weights_sha256", "00"), ("numerics", "compatibility")],
)
def test_vectors_of_another_model_revision_or_numerics_are_refused(field, other):
    activations = noise_activations(6)
    vectors = fit_vectors(activations)
    foreign = replace(activations, provenance=activations.provenance.updated(**{field: other}))
    with pytest.raises(
        ValueError, match=rf"received {field} '{other}'; these vectors were made with {field}.*Fit vectors"
    ):
        vectors.project(foreign)
    vectors.require_match(activations.provenance.updated(dtype="bfloat16", seed=9))


def test_project_refuses_other_layers():
    activations = noise_activations(6)
    with pytest.raises(ValueError, match=r"layers \(5,\); these vectors were read at resid_post, layers \(0,\)"):
        fit_vectors(activations).project(replace(activations, layers=(5,)))


def test_random_vectors_have_the_raw_norms_are_seeded_and_nearly_orthogonal():
    vectors = fit_vectors(noise_activations(7, signal=1.0, d=3000))
    drawn = vectors.random_vectors(seed=0, n=5)
    torch.testing.assert_close(drawn.norm(dim=-1), vectors.raw_norms.expand(5, -1, -1))
    assert torch.equal(drawn, vectors.random_vectors(seed=0, n=5))
    assert not torch.equal(drawn, vectors.random_vectors(seed=1, n=5))
    unit = torch.nn.functional.normalize(drawn.flatten(0, 2), dim=-1)
    cosines = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    assert cosines.abs().max() < 5 / 3000**0.5
    assert (drawn[0] * vectors.directions).sum(-1).abs().max() < 5 * vectors.raw_norms.max() / 3000**0.5


@pytest.fixture(scope="module")
def lens_models():
    """Raw and compatibility numerics of one model with a final norm that is not trivial."""

    def make(family):
        def hf():
            model = make_hf_model(family)
            torch.manual_seed(9)
            with torch.no_grad():
                model.model.norm.weight.add_(0.5 * torch.rand_like(model.model.norm.weight))
            return model

        return hf(), [load_model(hf(), tokenizer=make_tokenizer(), compatibility=c) for c in (False, True)]

    return make


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_the_logit_lens_finds_a_planted_token_in_raw_and_compatibility_numerics(lens_models, family):
    hf_model, models = lens_models(family)
    weight = hf_model.model.norm.weight.detach() + (1.0 if family == "gemma3" else 0.0)
    rows = hf_model.lm_head.weight.detach()
    tokens, tables = (50, 300, 411), []
    random = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(torch.cat([rows[list(tokens)] / weight, random]), dim=-1)
    for model in models:
        vectors = replace(
            fit_vectors(noise_activations(8, d=32)),
            directions=directions[:, None],
            provenance=model_info(model).provenance,
        )
        tables.append(vectors.top_tokens(model, 0, k=5))
    raw, compatible = tables
    for emotion, token in zip(raw.index, tokens, strict=False):
        assert raw.loc[emotion, "top"][0] == make_tokenizer().decode([token])
    by_hand = (directions[-1] * weight) @ rows.T
    assert raw["top"].iloc[-1] == tuple(make_tokenizer().decode([t]) for t in by_hand.topk(5).indices.tolist())
    assert raw["bottom"].iloc[-1] == tuple(make_tokenizer().decode([t]) for t in (-by_hand).topk(5).indices.tolist())
    assert raw.equals(compatible)


def test_top_tokens_refuses_another_model(tiny_model):
    with pytest.raises(ValueError, match="these vectors were made with model 'planted'"):
        fit_vectors(noise_activations(8)).top_tokens(tiny_model("llama"), 0)


@pytest.mark.parametrize(
    "baseline",
    ["grand_mean", "neutral", "within_topic"],
)  # fmt: skip
def test_moments_give_the_vectors_of_pooled_activations(tiny_model, few_passages, baseline):
    pooled, moments = (extract_activations(tiny_model("llama"), few_passages, keep=k) for k in ("pooled", "moments"))
    assert int(moments.counts.max()) > 1
    a, b = fit_vectors(pooled, baseline=baseline), fit_vectors(moments, baseline=baseline)
    torch.testing.assert_close(a.directions, b.directions, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(a.raw_norms, b.raw_norms, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(a.reliability, b.reliability, atol=1e-3, rtol=1e-3)
    assert a.n_texts == b.n_texts == 16


def test_saved_vectors_come_back(tmp_path):
    vectors = fit_vectors(noise_activations(9, n_neutral=12), baseline="neutral")
    back = EmotionVectors.load(vectors.save(tmp_path / "vectors"))
    assert torch.equal(back.directions, vectors.directions)
    assert torch.equal(back.reliability, vectors.reliability)
    assert (back.emotions, back.layers, back.baseline) == (vectors.emotions, vectors.layers, "neutral")
    back.require_match(vectors.provenance)
    assert str(back) == str(vectors)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_axis_grows_with_valence_and_the_second_with_arousal(sign):
    d = 6
    plane = {"happy": (2, 1), "calm": (2, -1), "angry": (-2, 1), "sad": (-2, -1)}
    means = {e: sign * (v * np.eye(d)[0] + a * np.eye(d)[1]) for e, (v, a) in plane.items()}
    labels, groups = crossed(list(plane), 2)
    axes = fit_vectors(planted(class_values(np.random.default_rng(0), labels, means), labels, groups)).principal_axes(0)
    for emotion, (valence, arousal) in plane.items():
        assert np.sign(axes.loc[emotion, "pc1"]) == np.sign(valence)
        assert np.sign(axes.loc[emotion, "pc2"]) == np.sign(arousal)
    assert axes.attrs["explained"] == pytest.approx((0.8, 0.2))  # squares 4 and 1 of equal raw norms


def test_the_axes_name_the_quadrant_of_every_emotion():
    axes = fit_vectors(noise_activations(0)).principal_axes(0)
    assert axes.loc["angry", "quadrant"] == "negative, high"


def test_to_frame_and_str_hold_what_was_fitted():
    vectors = fit_vectors(noise_activations(10, signal=1.0))
    frame = vectors.to_frame()
    assert frame.raw_norm.tolist() == vectors.raw_norms[:, 0].tolist()
    assert set(frame.depth) == {1.0}
    assert "from 48 texts" in str(vectors)
    assert f"{vectors.reliability.mean():.2f}" in str(vectors)


def test_unknown_emotions_and_layers_are_refused():
    vectors = fit_vectors(noise_activations(10))
    with pytest.raises(ValueError, match=r"received emotion 'bored'; there are vectors for \['happy'"):
        vectors.vector("bored", 0)
    with pytest.raises(ValueError, match=r"received layer 3; there are vectors for 0"):
        vectors.similarity(3)


def test_fits_that_cannot_be_are_refused(without_type_checks):
    activations = noise_activations(10)
    with pytest.raises(ValueError, match=r"received baseline='median'; allowed are \['grand_mean', 'neutral'"):
        fit_vectors(activations, baseline="median")
    for baseline in ("neutral", "neutral_pcs"):
        with pytest.raises(ValueError, match=r"needs texts labelled 'neutral'; add some, or use 'grand_mean'"):
            fit_vectors(activations, baseline=baseline)
    with pytest.raises(ValueError, match=r"received the emotions \['sad'\]; a direction needs at least two"):
        fit_vectors(activations.select(emotions=["sad"]))
    nested = planted(np.zeros((4, 1, 3)), ["sad", "sad", "calm", "calm"], ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=r"these are nested: use 'grand_mean'"):
        fit_vectors(nested, baseline="within_topic")
    two = replace(activations, arrays={"resid_post": activations.values, "gate": activations.values})
    with pytest.raises(ValueError, match=r"\.values needs one site: use \.at\('resid_post'\)"):
        fit_vectors(two)


def test_neutral_components_need_single_texts(tiny_model, few_passages):
    moments = extract_activations(tiny_model("llama"), few_passages, keep="moments")
    with pytest.raises(ValueError, match="keep='pooled'"):
        fit_vectors(moments, baseline="neutral_pcs")

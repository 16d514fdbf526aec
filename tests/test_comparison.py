"""Comparing methods: the planted factor is found and no other, contexts are what they say, numbers agree with a by-hand loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lens_affect.comparison import (
    CONTEXTS,
    FACTORS,
    METRICS,
    Cell,
    MethodComparison,
    _complete,
    compare_cells,
    compare_methods,
    place_in_context,
)
from lens_affect.localization import localize
from lens_affect.stimuli import NEUTRAL
from lens_affect.vectors import fit_vectors
from tests.test_vectors import crossed, planted

EMOTIONS = ("happy", "sad", "angry", "calm", "proud", "afraid")
TOPICS, D = 10, 24


def read(seed, *, signal=0.0, shift=0.0, noise=1.0):
    """One layer: emotion directions scaled by `signal`, and a shift that all emotions share against neutral texts."""
    rng = np.random.default_rng(seed)
    labels, groups = crossed(EMOTIONS, TOPICS, n_neutral=TOPICS)
    plan = np.random.default_rng(99)  # the same directions and the same topics in every cell
    directions = {e: plan.standard_normal(D) for e in EMOTIONS}
    shared = plan.standard_normal(D)
    topics = {g: plan.standard_normal(D) for g in dict.fromkeys(groups)}
    values = np.stack(
        [
            topics[g]
            + (signal * directions[e] + shift * shared if e != NEUTRAL else 0)
            + noise * rng.standard_normal(D)
            for e, g in zip(labels, groups, strict=True)
        ]
    )
    return planted(values[:, None], labels, groups)


def cells(**carriers):
    """Cells over two levels of text, context and pooling; `carriers` says which factor adds how much signal."""
    found, seed = [], 0
    for text in ("stories", "passages"):
        for context in ("request", "bare"):
            for pooling in ("mean", "last"):
                signal = 0.3 + carriers.get("text", 0) * (text == "passages")
                signal += carriers.get("context", 0) * (context == "bare") + carriers.get("pooling", 0) * (
                    pooling == "last"
                )
                found.append(Cell(text, context, pooling, "grand_mean", read(seed, signal=signal)))
                seed += 1
    return found


@pytest.mark.parametrize("factor", ["text", "context", "pooling"])
def test_the_planted_factor_carries_the_difference_and_no_other_does(factor):
    found = compare_cells(cells(**{factor: 0.9}))
    assert found.carrier("accuracy") == factor
    effects = found.effects[found.effects["metric"] == "accuracy"].set_index("factor")
    assert effects.loc[factor, "low"] > 0.2
    main = found.main_effects[found.main_effects["metric"] == "accuracy"].set_index("factor")
    assert main["difference"].abs().idxmax() == factor
    assert main.loc[factor, "p_holm"] < 0.01
    for other in {"text", "context", "pooling"} - {factor}:
        assert effects.loc[other, "p_holm"] > 0.05
        assert abs(main.loc[other, "difference"]) < 0.15


def test_with_nothing_planted_no_factor_carries_anything():
    assert compare_cells(cells()).carrier("accuracy") is None


def test_a_smaller_shared_shift_lowers_the_papers_cosine_without_separating_anything_better():
    far = Cell("stories", "request", "mean", "neutral", read(1, signal=0.5, shift=3.0))
    near = Cell("stories", "bare", "mean", "neutral", read(2, signal=0.5, shift=0.0))
    found = compare_cells([far, near])
    effects = found.effects.set_index("metric")
    assert effects.loc["mean_cosine", "difference"] < -0.3
    assert effects.loc["shift", "difference"] < -2
    assert abs(effects.loc["accuracy", "difference"]) < 0.15
    assert abs(effects.loc["spread", "difference"]) < 0.1


def test_shift_and_spread_are_free_of_sampling_variance():
    """Pure noise around one point: both are 0 on average, although every mean is off."""
    found = [
        compare_cells([Cell("a", "bare", "mean", "neutral", read(s))]).table.set_index("metric") for s in range(40)
    ]
    for metric in ("shift", "spread"):
        values = np.array([t.loc[metric, "value"] for t in found])
        assert abs(values.mean()) < 3 * values.std(ddof=1) / np.sqrt(40)
    strong = compare_cells([Cell("a", "bare", "mean", "neutral", read(0, signal=2.0, shift=2.0))]).table.set_index(
        "metric"
    )
    assert strong.loc["spread", "value"] > 1
    assert strong.loc["shift", "value"] > 1


def test_the_mean_cosine_is_that_of_the_fitted_vectors():
    activations = read(3, signal=0.7, shift=0.5)
    for baseline in ("grand_mean", "neutral", "within_topic"):
        table = compare_cells([Cell("a", "bare", "mean", baseline, activations)]).table.set_index("metric")
        similarity = fit_vectors(activations, baseline=baseline).similarity(0).to_numpy()
        expected = similarity[~np.eye(len(EMOTIONS), dtype=bool)].mean()
        assert table.loc["mean_cosine_own", "value"] == pytest.approx(expected, abs=1e-4)
        neutral = fit_vectors(activations, baseline="neutral").similarity(0).to_numpy()
        expected = neutral[~np.eye(len(EMOTIONS), dtype=bool)].mean()
        assert table.loc["mean_cosine", "value"] == pytest.approx(expected, abs=1e-4)
        assert (table["low"] <= table["value"]).all()
        assert (table["value"] <= table["high"]).all()


def test_accuracy_with_the_grand_mean_is_that_of_localize():
    activations = read(4, signal=0.6)
    table = compare_cells([Cell("a", "bare", "mean", "grand_mean", activations)]).table.set_index("metric")
    curve = localize(activations, n_permutations=0)
    assert table.loc["accuracy", "value"] == pytest.approx(float(curve.values[0]))
    assert table.loc["accuracy", "low"] == pytest.approx(float(curve.low[0]))


def test_an_effect_is_the_difference_paired_by_topic():
    a, b = (
        Cell("a", "bare", "mean", "grand_mean", read(5, signal=0.4)),
        Cell("a", "bare", "last", "grand_mean", read(6, signal=0.9)),
    )
    effect = compare_cells([a, b]).effects.set_index("metric").loc["accuracy"]
    first, second = (localize(c.activations, n_permutations=0).per_cluster[:, 0].numpy() for c in (a, b))
    assert effect["difference"] == pytest.approx((second - first).mean())
    spread = (second - first).std(ddof=1) / np.sqrt(TOPICS)
    assert effect["low"] == pytest.approx((second - first).mean() - 2.262157 * spread, abs=1e-5)


def test_vectors_that_follow_the_request_are_told_from_those_that_follow_the_text():
    rng = np.random.default_rng(7)
    labels, groups = crossed(EMOTIONS, TOPICS, n_neutral=0)
    activations = planted(np.zeros((len(labels), 1, D)), labels, groups)
    _, named = place_in_context(activations.stimuli, "wrong", seed=0)
    directions = {e: rng.standard_normal(D) for e in EMOTIONS}
    for followed, leader in ((named, "named_accuracy"), (labels, "accuracy")):
        values = np.stack([2 * directions[e] for e in followed]) + rng.standard_normal((len(labels), D))
        cell = Cell("a", "wrong", "mean", "grand_mean", replace(activations, arrays={"resid_post": torch.tensor(values[:, None])}), tuple(named))  # fmt: skip
        table = compare_cells([cell]).table.set_index("metric")["value"]
        other = "accuracy" if leader == "named_accuracy" else "named_accuracy"
        assert table[leader] > 0.9
        assert table[other] < 0.3


def test_contexts_change_the_request_and_nothing_else(passages):
    chosen = passages.select(emotions=["happy", "sad", "angry", "neutral"])
    for context in CONTEXTS:
        placed, named = place_in_context(chosen, context)
        assert placed.texts == chosen.texts
        assert placed.emotions == chosen.emotions
        assert placed.groups == chosen.groups
        assert (set(placed.prompts) == {""}) == (context == "bare")
        assert bool(named) == (context in ("request", "wrong"))
    placed, named = place_in_context(chosen, "request")
    assert all(
        name in prompt for name, prompt, e in zip(named, placed.prompts, placed.emotions, strict=True) if e != NEUTRAL
    )
    placed, _ = place_in_context(chosen, "none")
    assert not [p for p in placed.prompts for e in ("happy", "sad", "angry") if e in p]


def test_a_wrong_request_names_another_emotion_and_is_crossed_with_the_texts(passages):
    chosen = passages.select(emotions=["happy", "sad", "angry", "calm", "neutral"])
    _, named = place_in_context(chosen, "wrong", seed=1)
    for own, name in zip(chosen.emotions, named, strict=True):
        assert (own == name) == (own == NEUTRAL)
    for topic in set(chosen.groups):
        here = [n for n, g, e in zip(named, chosen.groups, chosen.emotions, strict=True) if g == topic and e != NEUTRAL]
        assert sorted(here) == ["angry", "calm", "happy", "sad"]
    assert len({n for n, e in zip(named, chosen.emotions, strict=True) if e == "happy"}) == 3
    assert place_in_context(chosen, "wrong", seed=1)[1] == named
    assert place_in_context(chosen, "wrong", seed=2)[1] != named


def test_a_text_keeps_the_request_that_it_answered(passages):
    chosen = replace(passages, prompts=("Tell me more.",) * len(passages))
    assert set(place_in_context(chosen, "request")[0].prompts) == {"Tell me more."}
    assert "Tell me more." not in place_in_context(chosen, "none")[0].prompts


def test_stories_and_passages_go_through_a_real_model(tiny_model, passages, tmp_path):
    topics = passages.groups[0:1] + tuple(dict.fromkeys(passages.groups))[1:4]
    chosen = passages.select(emotions=["happy", "sad", "angry", "neutral"], groups=list(topics))
    done = []
    found = compare_methods(
        tiny_model("llama"),
        replace(chosen, name="stories"),
        chosen,
        poolings=("mean", "last"),
        progress=lambda i, n: done.append((i, n)),
    )
    assert found.layer == 1
    assert found.reference == ("stories", "request", "mean", "grand_mean")
    assert done[-1] == (8, 8)
    assert set(found.effects["factor"]) == set(FACTORS)
    assert set(found.table["metric"]) == {*METRICS, "named_accuracy"}
    assert np.isfinite(found.effects[["difference", "low", "high", "p", "p_holm"]].to_numpy(float)).all()
    # The same texts under the same requests are the same cell.
    text = found.effects[(found.effects["factor"] == "text")]
    assert text["difference"].abs().max() < 1e-6
    again = MethodComparison.load(found.save(tmp_path / "c"))
    assert str(again) == str(found)
    assert "4 topics; reference: stories, request, mean, grand_mean" in str(found)


def test_what_cannot_be_compared_is_refused(passages):
    a = Cell("a", "bare", "mean", "grand_mean", read(1))
    with pytest.raises(ValueError, match="received no cells"):
        compare_cells([])
    with pytest.raises(ValueError, match="each combination may occur once"):
        compare_cells([a, a])
    other = replace(a, pooling="last", activations=a.activations.select(groups=["topic 0", "topic 1", "topic 2"]))
    with pytest.raises(ValueError, match="received cells on different topics"):
        compare_cells([a, other])
    with pytest.raises(ValueError, match=r"received context 'odd'; allowed are"):
        place_in_context(passages, "odd")


def test_stories_on_other_topics_are_refused(tiny_model, passages):
    moved = replace(passages, groups=tuple(f"other {g}" for g in passages.groups))
    with pytest.raises(ValueError, match="received stories and passages with 0 complete common topics"):
        compare_methods(tiny_model("llama"), moved, passages)


def test_a_missing_story_costs_the_emotion_or_the_topic_that_lacks_most():
    labels, topics = ["happy", "sad", "calm", "neutral"], ["a", "b", "c", "d", "e"]
    cells = {(e, t) for e in labels for t in topics}
    assert _complete(cells, labels, topics) == (labels, topics)
    assert _complete(cells - {("sad", "b")}, labels, topics) == (
        labels,
        ["a", "c", "d", "e"],
    )  # 1 of 4 weighs more than 1 of 5
    assert _complete(cells - {("sad", "b"), ("sad", "c")}, labels, topics) == (["happy", "calm", "neutral"], topics)
    assert _complete(set(), labels, topics)[1] == []

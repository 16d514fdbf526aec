"""Scorecard: planted runs get the verdict that their rule implies."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lens_affect.advice import recommend
from lens_affect.anisotropy import Anisotropy
from lens_affect.effects import mann_whitney
from lens_affect.localization import localize
from lens_affect.results import Provenance
from lens_affect.scorecard import (
    COLUMNS,
    FAILS,
    HOLDS,
    OPEN,
    ModelFacts,
    Scorecard,
    make_scorecard,
    source_advantage,
)
from lens_affect.statistics import mean_interval
from lens_affect.sweeps import Sweep, SweepSpec
from lens_affect.vectors import fit_vectors
from tests.test_localization import layers

PEAK = [0.0, 0.1, 0.3, 0.5, 1.0, 0.5, 0.3, 0.1, 0.0]
RISE = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
FLAT = [0.5] * 9
STRONG = [1.2] * 9
NOTHING = [0.0] * 9
FEW = ("happy", "calm", "sad", "angry", "proud", "afraid")


@functools.cache
def measured(seed, strengths, n_permutations):
    """Planted activations, their vectors, a curve per score, and one against random directions; shared, so tests must not change them."""
    activations = layers(seed, list(strengths), n_topics=12, emotions=FEW, d=16, n_neutral=12)
    scores = ("nearest_mean", "mean_cosine_neutral")
    curves = {score: localize(activations, score=score, n_permutations=n_permutations) for score in scores}
    random = localize(activations, n_permutations=n_permutations, null="directions") if n_permutations else None
    return activations, fit_vectors(activations), curves, random


def planted_run(folder, passages, stories=None, *, model="planted", n_permutations=39, comparison=None):
    """A finished run whose emotions separate by the given strengths per layer."""
    methods = ("comprehension",) if stories is None else ("comprehension", "generation")
    curves, directions, stimuli, vectors = {}, {}, {}, {}
    facts = Provenance(model=model, numerics="hf")
    for i, (method, strengths) in enumerate(zip(methods, (passages, stories), strict=False)):
        activations, fitted, found, random = measured(10 + i, tuple(strengths), n_permutations)
        replace(activations, provenance=facts).save(folder / "steps" / f"activations-{method}")
        stimuli[method], vectors[method] = activations.stimuli, replace(fitted, provenance=facts)
        curves |= {(method, score): replace(curve, provenance=facts) for score, curve in found.items()}
        if random is not None:
            directions[method] = replace(random, provenance=facts)
    table = pd.DataFrame(
        {"row": [str(i) for i in range(9)], "depth": (np.arange(9) + 1) / 9, "mean_cosine": np.linspace(0.9, 0.7, 9)}
    )
    spec = SweepSpec(
        model=model, methods=methods, scores=("nearest_mean", "mean_cosine_neutral"), n_permutations=n_permutations
    )
    return Sweep(
        spec=spec, folder=folder, stimuli=stimuli, vectors=vectors, curves=curves, bars={}, directions=directions,
        anisotropy=Anisotropy(table, 20, 100, Provenance(model=model)), stories=None, comparison=comparison,
    )  # fmt: skip


def verdicts(card, id):
    return card.table.loc[card.table["id"] == id, "verdict"].tolist()


@pytest.fixture(scope="module")
def peak(tmp_path_factory):
    return planted_run(tmp_path_factory.mktemp("peak"), PEAK, FLAT)


@pytest.fixture(scope="module")
def rise(tmp_path_factory):
    return planted_run(tmp_path_factory.mktemp("rise"), RISE, NOTHING)


def test_a_peak_in_the_middle_holds_and_a_rising_curve_does_not(peak, rise):
    card = make_scorecard(peak)
    assert verdicts(card, "P4")[0] == HOLDS
    assert verdicts(card, "P5")[0] == HOLDS
    card = make_scorecard(rise)
    assert verdicts(card, "P4")[0] == FAILS
    assert verdicts(card, "P5")[0] == FAILS
    assert "the shape is rising" in card.table.loc[card.table["id"] == "P5", "note"].iloc[0]


def test_a_curve_without_signal_is_undecided_in_shape_and_fails_its_baselines(rise):
    card = make_scorecard(rise)
    assert verdicts(card, "P5")[1] == OPEN
    assert verdicts(card, "P7") == [HOLDS, FAILS]


def test_the_better_source_is_decided_by_its_interval(peak, rise, tmp_path):
    assert verdicts(make_scorecard(rise), "P1") == [FAILS]  # passages carry all
    better = planted_run(tmp_path / "better", FLAT, STRONG)
    assert verdicts(make_scorecard(better), "P1") == [HOLDS]
    equal = planted_run(tmp_path / "equal", FLAT, FLAT)
    row = make_scorecard(equal).table.set_index("id").loc["P1"]
    assert row["verdict"] == OPEN
    assert row["low"] < 0 < row["high"]
    advantage = source_advantage(equal)
    assert row["sound_statistic"] == pytest.approx(advantage.mean())
    assert row["low"] == pytest.approx(float(mean_interval(advantage).low))
    assert row["n"] == 12
    assert "impossible" in row["note"] or "not possible" in row["note"]  # the published d beside the published p


def test_the_advantage_is_the_accuracy_gap_on_common_topics_with_as_many_texts(tmp_path):
    run = planted_run(tmp_path, FLAT, FLAT)
    half = run.activations("generation")
    topics = list(dict.fromkeys(half.stimuli.groups))[:6]
    half.select(groups=topics).save(run.folder / "steps" / "activations-generation", overwrite=True)
    advantage = source_advantage(run)
    assert advantage.shape == (6,)
    emotional = [e for e in run.activations("generation").stimuli.labels if e != "neutral"]
    both = [run.activations(m).select(groups=topics, emotions=emotional) for m in ("generation", "comprehension")]
    by_hand = [localize(a, n_permutations=0).selected() for a in both]
    np.testing.assert_allclose(advantage, (by_hand[0] - by_hand[1]).numpy())


def test_too_few_common_topics_are_refused(tmp_path):
    run = planted_run(tmp_path, FLAT, FLAT)
    written = run.activations("generation")
    moved = replace(written, stimuli=replace(written.stimuli, groups=tuple(f"x {g}" for g in written.stimuli.groups)))
    moved.save(run.folder / "steps" / "activations-generation", overwrite=True)
    with pytest.raises(ValueError, match="share 0 topics; 3 are needed"):
        source_advantage(run)
    row = make_scorecard(run).table.set_index("id").loc["P1"]  # the rest is judged all the same
    assert row["verdict"] == OPEN
    assert "share 0 topics" in row["note"]
    assert not recommend(run).table.set_index("question").loc["text", "decided"]


def test_claims_about_pairs_and_families_wait_for_them(peak):
    card = make_scorecard(peak).table.set_index("id")
    for id in ("P2", "P3", "P6"):
        assert card.loc[id, "verdict"] == OPEN
    assert "no base model with its instruct version" in card.loc["P2", "note"]
    assert "of 3 families" in card.loc["P3", "note"]


def test_a_pair_and_three_families_decide_them(tmp_path):
    runs = [
        planted_run(tmp_path / "a", PEAK, NOTHING, model="a-base"),
        planted_run(tmp_path / "b", PEAK, STRONG, model="a-instruct"),
        planted_run(tmp_path / "c", PEAK, STRONG, model="b"),
        planted_run(tmp_path / "d", PEAK, PEAK, model="c"),
    ]
    facts = {
        "a-base": ModelFacts(family="A", tuning="base", pair="a"),
        "a-instruct": ModelFacts(family="A", tuning="instruct", pair="a"),
        "b": ModelFacts(family="B"),
        "c": ModelFacts(family="C"),
    }
    card = make_scorecard(runs, facts)
    assert verdicts(card, "P2") == [HOLDS]
    assert verdicts(card, "P3") == [HOLDS]  # A's mean advantage is far below B's
    assert len(verdicts(card, "P1")) == 5
    over_models = card.table[(card.table["id"] == "P1") & (card.table["model"] == "all 4")].iloc[0]
    written, given = (
        np.array([float(r.curves[m, "mean_cosine_neutral"].values[4]) for r in runs])
        for m in ("generation", "comprehension")
    )
    assert over_models["paper_statistic"] == pytest.approx(mann_whitney(written, given).p)
    means = [source_advantage(r).mean() for r in runs]
    assert (over_models["low"], over_models["high"]) == pytest.approx(
        stats.t.interval(0.95, 3, loc=np.mean(means), scale=stats.sem(means))
    )
    reverse = facts | {"a-base": facts["a-instruct"], "a-instruct": facts["a-base"]}
    assert verdicts(make_scorecard(runs, reverse), "P2") == [FAILS]
    peaks = [replace_methods(r) for r in runs]
    assert verdicts(make_scorecard(peaks, facts), "P6") == [HOLDS]
    other = replace_methods(planted_run(tmp_path / "e", RISE, NOTHING, model="c"))
    assert verdicts(make_scorecard([*peaks[:3], other], facts), "P6") == [FAILS]


def replace_methods(run):
    return replace(run, spec=run.spec.model_copy(update={"methods": ("comprehension",)}))


def test_without_permutations_nothing_is_claimed_about_baselines(tmp_path):
    card = make_scorecard(planted_run(tmp_path, PEAK, n_permutations=0))
    assert verdicts(card, "P7") == []
    few = planted_run(tmp_path / "few", PEAK, n_permutations=10)
    assert verdicts(make_scorecard(few), "P7") == [OPEN]  # 10 permutations cannot reach 5 %


def test_the_scorecard_has_its_columns_prints_itself_and_comes_back(peak, tmp_path):
    card = make_scorecard(peak)
    assert tuple(card.to_frame().columns) == COLUMNS
    assert set(card.table["verdict"]) <= {HOLDS, FAILS, OPEN}
    assert card.table["rule"].str.len().min() > 20
    assert "holds: P4, P5" in str(make_scorecard(replace_methods(peak)))
    assert str(Scorecard.load(card.save(tmp_path / "card"))) == str(card)
    with pytest.raises(ValueError, match="received no run"):
        make_scorecard([])

"""Boundaries and onsets: planted ones are found, on real texts of a tiny model every strength tried is in the table."""

import doctest
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lens_affect import boundaries
from lens_affect.boundaries import Onsets, RegimeBoundaries, compare_onsets, find_boundaries, locate_boundaries
from lens_affect.judges import load_judge
from lens_affect.regimes import Thresholds
from tests.test_patching import vectors_of
from tests.test_regimes import RULE, planted

STRENGTHS = (0.1, 0.2, 0.4, 0.8)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(boundaries).failed == 0


def test_planted_boundaries_are_found_by_bisection():
    calls = []

    def label_at(strength):
        calls.append(strength)
        return "surgical" if strength < 0.37 else "degraded" if strength < 0.9 else "explosive"

    found = find_boundaries(label_at, [0.1, 0.8, 1.6], precision=0.02)
    assert [(b.below, b.above) for b in found] == [("surgical", "degraded"), ("degraded", "explosive")]
    assert found[0].low < 0.37 <= found[0].high
    assert found[1].low < 0.9 <= found[1].high
    assert all(b.high - b.low <= 0.02 for b in found)
    assert len(calls) == len(set(calls)) < 20
    hidden = find_boundaries(label_at, [0.1, 1.6], precision=0.05)
    assert [(b.below, b.above) for b in hidden] == [("surgical", "degraded"), ("degraded", "explosive")]
    assert find_boundaries(lambda s: "inert", [0.1, 0.2, 0.4]) == ()
    with pytest.raises(ValueError, match="allowed are two or more in increasing order"):
        find_boundaries(label_at, [0.8, 0.1])


def test_boundaries_of_a_model_are_those_of_its_own_sweeps(tiny_model, tmp_path):
    """A tiny random model has no regimes to speak of; what is checked is that labels, strengths and brackets belong together."""
    model = tiny_model("llama")
    tried = []
    found = locate_boundaries(
        model, vectors_of(model), ["Hello there", "A cat", "Why"], "sad", layers=1, strengths=[0.1, 8.0],
        precision=0.5, thresholds=Thresholds(1.2, 1.44, 0.9), n_tokens=14, seed=2, progress=lambda n, _: tried.append(n),
    )  # fmt: skip
    label = dict(zip(found.table["strength"], found.table["regime"], strict=True))
    assert tried == list(range(1, len(label) + 1))
    assert {0.1, 8.0} <= set(label)
    for boundary in found.boundaries:
        assert (label[boundary.low], label[boundary.high]) == (boundary.below, boundary.above)
        assert boundary.high - boundary.low <= 0.5 * max((boundary.low + boundary.high) / 2, 0.5)
    assert found.table["p"].between(0, 1).all()
    same = RegimeBoundaries.load(found.save(tmp_path / "boundaries"))
    assert same.boundaries == found.boundaries
    assert str(same) == str(found)
    assert found.judge == ""


def test_a_judge_and_random_directions_stand_behind_surgical_and_inert(tiny_model):
    model = tiny_model("llama")
    found = locate_boundaries(
        model, vectors_of(model), ["Hello there", "A cat", "Why"], "sad", layers=1, strengths=[0.1, 0.2],
        judge=load_judge("lexicon"), thresholds=Thresholds(1e6, 1e12, 2.0), precision=2.0, n_tokens=14,
    )  # fmt: skip
    assert set(found.table["regime"]) <= {"surgical", "inert"}
    assert found.judge


def growing(log_ratios, **options):
    """Texts whose perplexity grows with strength; change equals strength."""
    return planted({("steered", "calm", s): (x, 0.0) for s, x in zip(STRENGTHS, log_ratios, strict=True)}, **options)


def test_a_planted_onset_is_found_between_the_doses_around_it():
    found = compare_onsets(
        {"early": growing([0, 1, 1, 1]), "late": growing([0, 0, 0, 1])}, thresholds={"early": RULE, "late": RULE}
    )
    table = found.to_frame().set_index(["model", "damage"])
    assert table.loc[("early", "any"), "change"] == pytest.approx(math.sqrt(0.1 * 0.2))
    assert table.loc[("late", "any"), "change"] == pytest.approx(math.sqrt(0.4 * 0.8))
    assert table.loc[("early", "explosive"), "change"] == pytest.approx(math.sqrt(0.1 * 0.2))
    assert not table.loc[("early", "repetitive_collapse"), "reached"]
    assert table.loc[("early", "any"), "low"] <= table.loc[("early", "any"), "change"]
    assert "early: half of the texts are damaged at a change of 0.14" in str(found)


def test_an_onset_that_is_never_reached_says_how_far_was_tried():
    row = compare_onsets({"tough": growing([0, 0, 0, 0])}, thresholds={"tough": RULE}).to_frame().iloc[0]
    assert math.isnan(row["change"])
    assert row["low"] == pytest.approx(0.8)
    assert math.isinf(row["high"])
    assert not row["reached"]


def test_the_interval_of_an_onset_covers_the_truth():
    """Each group of prompts has its own onset around a planted one; the grid is fine."""
    inside, grid = 0, np.exp(np.linspace(math.log(0.1), math.log(1.6), 9))
    for seed in range(60):
        generator = np.random.default_rng(seed)
        dose = planted({("steered", "calm", float(s)): (0.0, 0.0) for s in grid}, n_prompts=24, noise=0.0)
        own = generator.normal(math.log(0.4), 0.4, 12)  # log change at which a group breaks
        table = dose.table.copy()
        group = table["group"].str.removeprefix("topic ").astype(int).to_numpy()
        broken = (table["kind"] == "steered") & (np.log(table["strength"].clip(lower=1e-9)) >= own[group])
        table.loc[broken, "nll"] += 2.0
        row = (
            compare_onsets({"m": replace(dose, table=table)}, thresholds={"m": RULE}, n_resamples=300)
            .to_frame()
            .iloc[0]
        )
        # Half of the population is broken at the planted centre, give or take the spacing of the grid.
        inside += bool(row["low"] * 0.9 <= 0.4 <= row["high"] * 1.1)
    assert inside / 60 >= 0.88


def test_onsets_are_saved_and_wrong_input_is_said(tmp_path):
    found = compare_onsets({"m": growing([0, 1, 1, 1])}, thresholds={"m": RULE})
    same = Onsets.load(found.save(tmp_path / "onsets"))
    pd.testing.assert_frame_equal(same.to_frame(), found.to_frame())
    assert "<table" in found._repr_html_()
    assert set(found.shares.columns) >= {"model", "change", "any", "repetitive_collapse", "explosive"}
    with pytest.raises(ValueError, match="received no dose-response"):
        compare_onsets({})
    with pytest.raises(ValueError, match="two or more are needed"):
        compare_onsets({"m": planted({("steered", "calm", 0.4): (0.0, 0.0)})})

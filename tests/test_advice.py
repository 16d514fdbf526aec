"""Advice: what a planted run decides is advised, what it does not decide is named."""

import pytest

from lens_affect.advice import recommend
from lens_affect.comparison import compare_cells
from lens_affect.regimes import classify_regimes
from lens_affect.steering_study import SteeringStudy
from lens_affect.sweeps import STEERING
from tests.test_comparison import cells
from tests.test_regimes import RULE, judged, planted
from tests.test_scorecard import FLAT, NOTHING, PEAK, RISE, planted_run


@pytest.fixture(scope="module")
def peak(tmp_path_factory):
    return planted_run(tmp_path_factory.mktemp("peak"), PEAK, FLAT)


@pytest.fixture(scope="module")
def rise(tmp_path_factory):
    return planted_run(tmp_path_factory.mktemp("rise"), RISE, NOTHING)


def test_advice_names_the_layer_and_what_is_open(peak, rise):
    advice = recommend(peak).table.set_index("question")
    assert advice.loc["layer", "answer"] == "4"
    assert advice.loc["layer", "low"] <= 4 <= advice.loc["layer", "high"]
    assert not advice.loc["pooling", "decided"]
    assert not advice.loc["strength", "decided"]
    assert "not decided: " in str(recommend(peak))
    assert recommend(rise).table.set_index("question").loc["text", "answer"] == "given passages"


def test_advice_on_strength_says_what_a_study_found_or_which_command_makes_one(tmp_path):
    run = planted_run(tmp_path / "run", PEAK)
    row = recommend(run).table.set_index("question").loc["strength"]
    assert not row["decided"]
    assert row["why"] == f"this run holds no steering study; lens-affect regimes MODEL --run {run.folder} makes one"
    gains = {("steered", s): 0.3 for s in (0.2, 0.4, 0.8)}
    cells = {("steered", e, s): (2.0 * (s > 0.4), 0.0) for e in ("calm", "sad") for s in (0.2, 0.4, 0.8)}
    cells |= {("random", "", s): (0.0, 0.0) for s in (0.2, 0.4, 0.8)}
    dose = planted(cells, n_prompts=24)
    for name, seen in (("none", {}), ("some", gains)):
        judgement = judged(dose, seen)
        study = SteeringStudy(dose, judgement, classify_regimes(dose, judgement, thresholds=RULE))
        study.save(run.folder / STEERING / name)
        row = recommend(run).table.set_index("question").loc["strength"]
        assert bool(row["decided"]) == bool(seen)
        assert "+0.8: explosive 2" in row["why"]
    assert (row["answer"], row["low"], row["high"]) == ("0.4", 0.2, 0.4)
    assert "strength: 0.4" in str(recommend(run))


def test_advice_on_pooling_follows_the_comparison(tmp_path):
    for carriers, answer, decided in (({"pooling": 0.9}, "last", True), ({}, "mean", False)):
        run = planted_run(tmp_path / str(decided), PEAK, comparison=compare_cells(cells(**carriers)))
        row = recommend(run).table.set_index("question").loc["pooling"]
        assert (row["answer"], bool(row["decided"])) == (answer, decided)


def test_without_a_layer_above_the_null_no_layer_is_advised(tmp_path):
    row = recommend(planted_run(tmp_path, NOTHING)).table.set_index("question").loc["layer"]
    assert not row["decided"]
    assert "no layer is above shuffled labels" in row["why"]

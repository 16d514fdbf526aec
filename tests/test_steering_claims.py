"""Claims about steering: planted studies get the verdict that the declared rule gives them."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lens_affect.crosslingual import ScriptTable
from lens_affect.meaning import MeaningTable
from lens_affect.regimes import classify_regimes
from lens_affect.scorecard import Scorecard, steering_scorecard
from lens_affect.statistics import mean_interval
from lens_affect.steering_claims import steering_rows
from lens_affect.steering_study import SteeringStudy
from lens_affect.verdicts import COLUMNS, FAILS, HOLDS, OPEN, ModelFacts
from lens_affect.verification import verify_steering
from tests.test_regimes import RULE, judged, planted
from tests.test_verification import beside, judgement_of, swept


def made(cells, gains=None, *, rises=None, **options) -> SteeringStudy:
    dose = planted(cells, n_prompts=24, **options)
    judgement = judged(dose, gains or {})
    study = SteeringStudy(dose, judgement, classify_regimes(dose, judgement, thresholds=RULE))
    if rises is None:
        return study
    tried = swept()
    steered, random, *other = rises
    if other:
        tried = beside(tried, "other_emotion")
    read = judgement_of(tried, steered=steered, random=random, top="target")
    if other:
        raised = read.probabilities.clone()
        raised[np.flatnonzero(tried.table["kind"] == "other_emotion")] += other[0]
        read = replace(read, probabilities=raised)
    return replace(
        study, scenario_dose=tried, scenario_judgement=read, verification=verify_steering(tried, read, thresholds=RULE)
    )


def row(study, id, source=""):
    rows = steering_rows([("m", study)], {"m": ModelFacts(family="A")})
    found = [r for r in rows if r["id"] == id and source in (r["source"], "")]
    assert all(set(r) == set(COLUMNS) for r in rows)
    return found[0]


QUIET = {("steered", "calm", 0.2): (0.0, 0.0), ("random", "", 0.2): (0.0, 0.0)}
THREE = QUIET | {
    ("steered", "calm", 0.8): (0.0, 0.5),
    ("steered", "calm", 1.6): (2.0, 0.0),
    ("random", "", 0.8): (0.0, 0.0),
    ("random", "", 1.6): (0.0, 0.0),
}


@pytest.mark.parametrize(
    ("rises", "verdict"),
    [
        ((0.5, 0.0), OPEN),  # nothing of another emotion to compare with
        ((0.5, 0.0, 0.0), HOLDS),
        ((0.5, 0.0, 0.5), OPEN),  # any emotion raises the target
        ((0.0, 0.0, 0.5), FAILS),
        ((0.5, 0.5, 0.0), OPEN),
        ((0.5, 0.5), OPEN),
        ((0.0, 0.5), FAILS),
    ],
)
def test_steering_is_causal_only_above_random_directions_and_those_of_another_emotion(rises, verdict):
    found = row(made(QUIET, rises=rises), "P8", "rises")
    assert found["verdict"] == verdict
    assert found["n"] == 24
    assert ("no other emotion's directions" in found["note"]) == (len(rises) == 2)
    assert "sound texts: steered 1.00, random 1.00" in found["note"]
    if rises == (0.5, 0.0, 0.5):
        assert (found["sound_statistic"], found["null"]) == (0.0, 1.0)
        assert "sound statistic and null: against another emotion" in found["note"]
    if rises == (0.5, 0.5):
        assert found["paper_statistic"] == 1.0 == found["null"]  # the paper's count alone would call it perfect


def test_without_scenarios_there_is_no_row_about_causality():
    assert not [r for r in steering_rows([("m", made(QUIET))], {}) if r["id"] == "P8"]
    assert steering_rows([], {}) == []


def with_languages(study, *, share, random, p_family, verdicts):
    """A study of a vocabulary with one foreign script, and of two foreign languages."""
    emotions, scripts = tuple("abcdefgh"), ("Latin", "Han")
    foreign = share + 0.01 * torch.linspace(-1, 1, 8).double()
    shares = torch.stack([1 - foreign, foreign], dim=1)
    interval = mean_interval(shares.numpy())
    low, high = (torch.from_numpy(x) for x in (interval.low, interval.high))
    drawn = torch.tensor([[1 - random, random]]).double().expand(20, -1)
    table = ScriptTable(
        *(scripts, shares, drawn, torch.tensor([0.5, 0.5]).double(), low, high),
        *(torch.tensor([1.0, p_family]), torch.tensor([1.0, p_family]), pd.DataFrame({"emotion": ["a"]}), emotions),
        **{"layer": 1, "n_layers": 3, "k": 50, "n_random": 20, "provenance": study.dose.provenance},
    )
    words = pd.DataFrame({"language": ["Chinese", "Spanish", "English"], "verdict": [*verdicts, HOLDS], "effect": 5.0})
    meaning = MeaningTable(words, words, words, 1, 3, 100, study.dose.provenance)
    return replace(study, scripts=table, meaning=meaning)


@pytest.mark.parametrize(
    ("share", "p_family", "verdicts", "verdict"),
    [
        (0.4, 0.01, (HOLDS, FAILS), HOLDS),
        (0.4, 0.01, (OPEN, FAILS), OPEN),  # not shown, and not excluded
        (0.4, 0.01, (FAILS, FAILS), FAILS),
        (0.2, 0.5, (HOLDS, FAILS), FAILS),  # the script's share can be no 0.05 above random directions'
        (0.26, 0.2, (HOLDS, FAILS), OPEN),
        (0.26, 0.2, (FAILS, FAILS), FAILS),
    ],
)
def test_foreign_tokens_fail_only_where_an_effect_worth_a_name_is_excluded(share, p_family, verdicts, verdict):
    found = row(with_languages(made(QUIET), share=share, random=0.2, p_family=p_family, verdicts=verdicts), "P11")
    assert found["verdict"] == verdict
    assert found["null"] == pytest.approx(0.2)  # random directions, as in the rule
    assert "of the vocabulary 0.50" in found["note"]


def test_three_regimes_must_all_be_seen():
    gains = {("steered", 0.2): 0.3}
    three = row(made(THREE, gains), "P9", "regimes")
    assert (three["verdict"], three["sound_statistic"]) == (HOLDS, 3.0)
    two = row(made({k: v for k, v in THREE.items() if k[2] != 1.6}, gains), "P9", "regimes")
    assert (two["verdict"], two["sound_statistic"]) == (FAILS, 2.0)


def test_the_ratio_must_tell_loops_from_other_texts():
    apart = {("steered", "calm", 0.2): (0.0, 0.0), ("steered", "calm", 0.8): (-2.0, 0.5)}
    found = row(made(apart), "P9", "ratio")
    assert found["verdict"] == HOLDS
    assert found["sound_statistic"] == pytest.approx(0.0)
    mixed = {("steered", "calm", 0.2): (0.0, 0.0), ("steered", "calm", 0.8): (0.0, 0.5)}
    found = row(made(mixed, noise=1.0), "P9", "ratio")
    assert found["verdict"] == FAILS
    assert found["low"] < 0.5 < found["high"]
    none = row(made(QUIET), "P9", "ratio")
    assert none["verdict"] == OPEN
    assert math.isnan(none["sound_statistic"])


def test_claims_about_families_and_pairs_stay_open_and_say_what_is_missing():
    study = made(THREE)
    found = row(study, "P10")
    assert found["verdict"] == OPEN
    assert "1 of 3 families" in found["note"]
    assert "half of the texts" in found["note"]
    pair = {
        "a": ModelFacts(family="A", tuning="base", pair="x"),
        "b": ModelFacts(family="A", tuning="instruct", pair="x"),
    }
    rows = steering_rows([("a", study), ("b", study)], pair)
    assert [r["note"] for r in rows if r["id"] == "P12"] == ["pairs among the studies: x"]
    assert all(r["verdict"] == OPEN for r in rows if r["id"] == "P12")
    assert np.isnan(rows[0]["paper_statistic"])


def test_studies_without_a_sweep_have_a_scorecard_of_their_own(tmp_path):
    studies = {"one": made(THREE, rises=(0.5, 0.0)), "two": made(QUIET)}
    card = steering_scorecard(studies)
    assert list(card.table["id"]) == sorted(card.table["id"], key=lambda i: int(i[1:]))
    assert set(card.table["id"]) == {"P8", "P9", "P10", "P12"}
    assert Scorecard.load(card.save(tmp_path / "card")).verdicts() == card.verdicts()
    with pytest.raises(ValueError, match="received no study"):
        steering_scorecard({})

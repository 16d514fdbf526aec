"""Labelled texts: the set is what its card says, and the rule reaches on the half that did not tune it what the card states."""

import doctest
import math
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from lens_affect import labelled_texts
from lens_affect.labelled_texts import LABEL_OF_DAMAGE, load_labelled_texts
from lens_affect.regimes import DAMAGE, REPETITIVE
from lens_affect.repetition import repetition_share

TEXTS = load_labelled_texts()


def test_the_example_holds():
    assert doctest.testmod(labelled_texts).failed == 0


def test_the_set_has_the_counts_of_its_card():
    table = TEXTS.table
    assert Counter(table["origin"]) == {"written": 110, "smollm2-135m-instruct": 60, "gemma-3-270m": 60}
    written = table[table["origin"] == "written"]
    assert Counter(written["first"]) == {"clean": 30, "repetitive": 30, "noise": 25, "degraded": 20, "empty": 5}
    chinese = Counter(written[written["language"] == "zh"]["first"])
    assert (chinese["repetitive"], chinese["clean"]) == (8, 3)
    assert set(table["first"]) | set(table["second"]) <= set(LABEL_OF_DAMAGE.values())
    assert set(LABEL_OF_DAMAGE) == set(DAMAGE)
    assert [not t.strip() for t in written["text"]] == [label == "empty" for label in written["first"]]


def test_at_least_half_are_outputs_of_models_over_the_grid():
    real = TEXTS.table[TEXTS.table["origin"] != "written"]
    assert len(real) >= len(TEXTS.table) / 2
    strengths = {w.split()[-1] for w in real["what"] if w != "unsteered"}
    assert strengths == {"-0.8", "-0.4", "+0.1", "+0.2", "+0.4", "+0.8", "+1.6"}


def test_halves_have_the_same_mixture():
    half = TEXTS.halves()
    for origin in set(TEXTS.table["origin"]):
        for label in set(TEXTS.table["first"]):
            of = ((TEXTS.table["origin"] == origin) & (TEXTS.table["first"] == label)).to_numpy()
            assert abs(int((half & of).sum()) - int((~half & of).sum())) <= 1


def test_a_text_on_which_readers_differ_has_no_label():
    table = TEXTS.table.copy()
    table.loc[0, "second"] = "noise"
    assert table.loc[0, "first"] != "noise"
    assert replace(TEXTS, table=table).labels[0] == ""


def test_the_prediction_is_the_rule():
    rows = TEXTS.table.iloc[:3].copy()
    rows["log_ratio"], rows["repetition"] = [0.0, 0.0, math.log(9.0)], [0.0, 0.5, 0.0]
    rows["limit"], rows["r_ok"] = 0.02, 1.5
    assert replace(TEXTS, table=rows).predict(0.0) == ("clean", "repetitive", "noise")
    assert replace(TEXTS, table=rows).predict(0.6, floor=3.0, power=3.0) == ("clean", "clean", "degraded")
    rows["log_ratio"] = np.nan
    assert set(replace(TEXTS, table=rows).predict()) == {"empty"}


def test_readers_agree_as_the_card_states():
    differ = sum(not label for label in TEXTS.labels)
    assert differ == 7
    assert pytest.approx(0.96, abs=0.005) == TEXTS.kappa
    assert "two readers agree on 223" in str(TEXTS)


def test_on_the_half_that_did_not_tune_the_rule_reaches_what_the_card_states():
    card = files("lens_affect.data").joinpath("regime_texts.md").read_text(encoding="utf-8")
    half, predicted = TEXTS.halves(), TEXTS.predict()
    for label, stated in (
        ("", "0.71 [0.61, 0.79]"),
        ("repetitive", "0.91 [0.83, 0.95]"),
        ("noise", "0.92 [0.86, 0.96]"),
        ("clean", "0.79 [0.71, 0.86]"),
    ):
        right, n = TEXTS.accuracy(~half, predicted, label)
        low, high = proportion_confint(right, n, method="wilson")
        assert stated == f"{right / n:.2f} [{low:.2f}, {high:.2f}]"
        assert stated in card
        assert n == 106


def test_the_floor_of_repetition_is_the_best_on_the_tuning_half():
    half = TEXTS.halves()
    right = {
        least: TEXTS.accuracy(half, TEXTS.predict(least))[0] for least in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
    }
    assert max(right, key=lambda least: right[least]) == REPETITIVE


def test_what_the_rule_measured_is_what_the_text_gives():
    """Repetition of the written texts, by the words that a tokenizer-free count sees: loops are above every clean text."""
    table = TEXTS.table
    share = {
        label: [
            float(repetition_share(t))
            for t in table[(table["origin"] == "written") & (table["first"] == label)]["text"]
        ]
        for label in ("clean", "repetitive")
    }
    assert np.nanmedian(share["repetitive"]) > np.nanmax(share["clean"])

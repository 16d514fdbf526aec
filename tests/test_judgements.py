"""Judgements: labels become our emotions by the stated rule; empty texts count nowhere; judges that agree are found to agree."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lens_affect import judgements
from lens_affect.judgements import Judgement, can_name, judge_agreement, judge_names, judge_texts
from lens_affect.judges import load_judge
from lens_affect.stimuli import EMOTIONS

EKMAN = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")


class Planted:
    """A judge that says what it was told."""

    title = "planted"

    def __init__(self, table, labels=EKMAN, *, multi_label=False, name="planted"):
        self.table, self.labels, self.multi_label, self.name = table, labels, multi_label, name

    def score(self, texts):
        assert all(text.strip() for text in texts)  # empty texts never reach a judge
        return torch.tensor([self.table[text] for text in texts])

    def auc(self, emotion):
        return {"happy": 0.9, "sad": 0.7}.get(emotion, math.nan)


SAID = {
    "a": [0.1, 0.0, 0.1, 0.6, 0.1, 0.1, 0.0],
    "b": [0.1, 0.0, 0.2, 0.1, 0.0, 0.6, 0.0],
    "c": [0.0, 0.1, 0.5, 0.1, 0.2, 0.0, 0.1],
}


def test_labels_become_our_emotions():
    found = judge_texts(Planted(SAID), ["a", "b", "c"])
    assert found.top == ("happy", "sad", "afraid")
    assert found.probability("happy").tolist() == pytest.approx([0.6, 0.1, 0.1])
    assert found.probability("anxious").tolist() == found.probability("afraid").tolist()
    assert dict(zip(found.emotions, found.matches, strict=True))["anxious"] == "near"
    assert found.emotions == tuple(e for e in EMOTIONS if e in found.emotions)
    assert found.reliable == ("happy",)
    assert found.provenance.model == "planted"


def test_several_labels_are_any_of_them_or_their_sum():
    labels = ("joy", "calm", "sad", "gloomy", "happy")
    schemes = {"x": [0.5, 0.2, 0.1, 0.1, 0.1]}
    assert judge_names(Planted(schemes, labels)) == {e: (e,) for e in ("happy", "sad", "calm", "gloomy")}
    goemotions = (
        "admiration amusement anger annoyance approval caring confusion curiosity desire disappointment disapproval disgust "
        "embarrassment excitement fear gratitude grief joy love nervousness optimism pride realization relief remorse sadness "
        "surprise neutral"
    ).split()
    row = [0.0] * 28
    row[goemotions.index("sadness")], row[goemotions.index("grief")] = 0.5, 0.4
    for multi_label, expected in ((True, 0.7), (False, 0.9)):
        found = judge_texts(Planted({"x": row}, tuple(goemotions), multi_label=multi_label), ["x"], ["sad"])
        assert found.probabilities.tolist() == [[pytest.approx(expected)]]
        assert found.labels == (("sadness", "grief"),)


def test_empty_texts_have_no_value_and_are_counted():
    found = judge_texts(Planted(SAID), ["a", "", " ", "b"])
    assert found.n_empty == 2
    assert found.top == ("happy", "", "", "sad")
    assert found.probabilities.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert "2 texts, 2 empty" in str(found)
    assert judge_texts(Planted({}), [""]).n_empty == 1


def test_the_top_of_a_measured_judge_is_relative_to_base_rates(monkeypatch):
    rates = {"happy": 0.5, "sad": 0.01}
    monkeypatch.setattr(judgements, "base_rate", lambda judge, emotion: rates.get(emotion, math.nan))
    said = {"x": [0.4, 0.1], "y": [0.9, 0.01]}
    labels = ("happy", "sad")
    assert judge_texts(Planted(said, labels, multi_label=True), ["x", "y"]).top == ("sad", "happy")
    assert judge_texts(Planted(said, labels, multi_label=False), ["x", "y"]).top == ("happy", "happy")
    rates.pop("sad")  # one rate unknown: probabilities decide
    assert judge_texts(Planted(said, labels, multi_label=True), ["x", "y"]).top == ("happy", "happy")


def test_an_emotion_without_a_label_is_refused_with_those_there_are():
    judge = Planted(SAID)
    assert can_name(judge, "happy")
    assert not can_name(judge, "calm")
    with pytest.raises(
        ValueError, match=r"received \['calm'\], which planted cannot name; it can name \['happy', 'sad'"
    ):
        judge_texts(judge, ["a"], ["happy", "calm"])
    with pytest.raises(ValueError, match="it can name \\[\\]"):
        judge_texts(Planted({"a": [1.0]}, ("LABEL_0",)), ["a"])
    for nothing in ([], "a"):
        with pytest.raises(ValueError, match="as texts; allowed is a list"):
            judge_texts(judge, nothing)
    with pytest.raises(ValueError, match="this judgement has"):
        judge_texts(judge, ["a"]).probability("calm")


def test_a_judgement_is_saved_and_loaded_as_it_was(tmp_path):
    found = judge_texts(Planted(SAID), ["a", "", "c"])
    found.save(tmp_path / "judged")
    again = Judgement.load(tmp_path / "judged")
    assert (again.top, again.labels, again.emotions, again.multi_label) == (
        found.top,
        found.labels,
        found.emotions,
        False,
    )
    torch.testing.assert_close(again.probabilities, found.probabilities, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(again.auc, found.auc, equal_nan=True, rtol=0, atol=0)
    assert str(again) == str(found)
    frame = again.to_frame()
    assert len(frame) == 3 * len(found.emotions)
    assert frame.query("text == 2 and emotion == 'afraid'")["probability"].item() == pytest.approx(0.5)
    assert frame.query("text == 1")["probability"].isna().all()


def test_it_prints_the_most_frequent_emotion_with_its_interval_and_n():
    lines = str(judge_texts(Planted(SAID), ["a"] * 3 + ["b"])).splitlines()
    assert lines[0] == "planted: 4 texts, 0 empty, 11 emotions"
    assert lines[1].startswith("most often on top: happy 0.75 [0.30, 0.95], sad 0.25")
    assert lines[2] == "AUC 0.70 or more where measured; at least 0.80 for 1 emotions"


def test_means_per_emotion_leave_empty_texts_out():
    found = judge_texts(Planted(SAID), ["a", "", "b"])
    table = found.by_emotion().set_index("emotion")
    assert table.loc["happy", "mean"] == pytest.approx(0.35)
    assert table.loc["happy", "low"] < 0.35 < table.loc["happy", "high"]
    assert (table.loc["happy", "top"], table.loc["sad", "n"]) == (0.5, 2)
    assert math.isnan(table.loc["anxious", "top"])  # near emotions do not compete
    assert "<table" in found._repr_html_()
    assert "<table" not in judge_texts(Planted({}), [""])._repr_html_()


def planted_pair(noise):
    rng = np.random.default_rng(0)
    truth = rng.random(120)
    other = (1 + np.tanh((truth + noise * rng.standard_normal(120)) / (1 + noise))) / 2
    tables = [{f"t{i}": [0.0, 0.0, 0.0, float(v), 0.0, 0.5, 0.0] for i, v in enumerate(x)} for x in (truth, other)]
    return [Planted(t, name=name) for t, name in zip(tables, "pq", strict=True)], list(tables[0]), truth, other


def test_agreement_is_the_rank_correlation_with_an_interval_over_groups():
    judges, texts, truth, other = planted_pair(0.3)
    table = judge_agreement(judges, texts, ["happy", "sad"], n_resamples=300).set_index("emotion")
    happy = table.loc["happy"]
    assert happy["rho"] == pytest.approx(stats.spearmanr(truth, other).statistic, abs=1e-6)
    assert happy["low"] < happy["rho"] < happy["high"]
    assert (happy["n"], happy["n_groups"], happy["first"], happy["second"]) == (120, 120, "p", "q")
    assert table.loc["sad", ["rho", "low", "high"]].isna().all()  # no spread, no correlation
    groups = [f"g{i // 2}" for i in range(120)]
    grouped = judge_agreement(judges, texts, ["happy"], groups=groups, n_resamples=300)
    assert grouped.loc[0, "n_groups"] == 60
    assert grouped.loc[0, "rho"] == happy["rho"]
    same = judge_agreement(judges, ["", *texts], ["happy"], n_resamples=300)
    assert same.loc[0, "n"] == 120
    assert same.loc[0, "rho"] == happy["rho"]


def test_equal_judges_agree_fully_and_unrelated_ones_do_not():
    judges, texts, _, _ = planted_pair(0.0)
    assert judge_agreement(judges, texts, ["happy"], n_resamples=50)["low"].item() == pytest.approx(1)
    judges, texts, _, _ = planted_pair(1e3)
    unrelated = judge_agreement(judges, texts, ["happy"], n_resamples=300).loc[0]
    assert unrelated["low"] < 0 < unrelated["high"]


def test_agreement_needs_two_judges_three_texts_and_a_group_for_each():
    judges, texts, _, _ = planted_pair(0.3)
    for some, read in ((judges[:1], texts), (judges, texts[:2])):
        with pytest.raises(ValueError, match="allowed are at least 2 and 3"):
            judge_agreement(some, read)
    with pytest.raises(ValueError, match="received 1 groups for 120 texts"):
        judge_agreement(judges, texts, groups=["g"])


def test_only_what_both_judges_name_is_compared():
    judges, texts, _, _ = planted_pair(0.3)
    table = judge_agreement(
        [judges[0], Planted({t: [0.2, 0.8] for t in texts}, ("happy", "calm"))], texts, n_resamples=10
    )
    assert table["emotion"].tolist() == ["happy"]


def test_the_word_list_names_all_emotions_of_a_plain_sentence():
    found = judge_texts(load_judge("lexicon"), ["She smiled and was glad.", "He wept, heartbroken."])
    assert found.top == ("happy", "sad")
    assert found.emotions == tuple(EMOTIONS)

"""Every emotion has a row for every set of labels; what a judge cannot name is not made up."""

import csv
import math
from importlib.resources import files

import pytest

from lens_affect.judge_labels import label_schemes, measured_auc, measured_scores, namings
from lens_affect.stimuli import EMOTIONS

EKMAN = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")


def test_the_table_has_one_row_per_emotion_and_set_of_labels():
    text = files("lens_affect.data").joinpath("judge_labels.csv").read_text()
    rows = [(row["judge"], row["emotion"], row["labels"], row["match"]) for row in csv.DictReader(text.splitlines())]
    assert sorted((j, e) for j, e, _, _ in rows) == sorted(
        (j, e) for j in ("goemotions", "ekman", "lexicon") for e in EMOTIONS
    )
    assert all((match in ("exact", "near")) == bool(labels) for _, _, labels, match in rows)


@pytest.mark.parametrize("scheme", ["goemotions", "ekman", "lexicon"])
def test_no_label_means_two_emotions_exactly(scheme):
    exact = [label for n in label_schemes()[scheme].values() if n.match == "exact" for label in n.labels]
    assert len(exact) == len(set(exact))


def test_the_labels_decide_which_emotions_can_be_named():
    ekman = namings(EKMAN)
    assert ekman["happy"].labels == ("joy",)
    assert (ekman["afraid"].match, ekman["anxious"].match) == ("exact", "near")
    assert "calm" not in ekman
    goemotions = namings([*measured_scores()["judges"]["embedded"]["labels"]])
    assert goemotions["sad"].labels == ("sadness", "grief")  # not the coarser set, whose labels it has too
    assert len(goemotions) == 16
    assert not {"calm", "desperate", "brooding", "reflective"} & set(goemotions)
    assert list(namings(("gloomy", "calm", "sunny"))) == ["calm", "gloomy"]
    assert namings(("LABEL_0", "LABEL_1")) == {}


def test_what_was_not_measured_has_no_auc():
    assert 0.5 < measured_auc("embedded", "grateful") <= 1
    assert math.isnan(measured_auc("embedded", "calm"))
    assert math.isnan(measured_auc("somebody/else", "happy"))


def test_the_card_states_the_measured_numbers():
    card = files("lens_affect.data").joinpath("judge.md").read_text(encoding="utf-8")
    embedded, words = (measured_scores()["judges"][name] for name in ("embedded", "lexicon"))

    def text(value):
        return f"{value.get('estimate', value.get('auc')):.2f} [{value['low']:.2f}, {value['high']:.2f}]"

    for label, found in embedded["labels"].items():
        assert f"| {label} | {found['positives']} | {text(found['auc'])} | {text(found['f1'])} |" in card
    for emotion, found in embedded["emotions"].items():
        naming = label_schemes()["goemotions"][emotion]
        row = f"| {emotion} | {', '.join(naming.labels)} | {naming.match} | {found['positives']} | {text(found)} | "
        assert row + f"{text(words['emotions'][emotion])} |" in card
    for part in (embedded["macro"]["auc"], embedded["macro"]["f1"], embedded["passages"]["accuracy"]):
        assert text(part) in card

"""What must be true: synonyms hit, other groups miss, F1 equals scikit-learn's, hand-computed wheels agree."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from lens_affect.results import Provenance
from lens_affect.stimuli import EMOTIONS
from lens_affect.task_data import EKMAN
from lens_affect.task_metrics import (
    f1_by_label,
    hit_rate,
    load_wheels,
    macro_f1,
    measure_task,
    sentiment_f1,
    set_scores,
    weighted_f1,
)
from lens_affect.tasks import TaskScores

LABELS = ("anger", "fear", "joy", "sadness")


def scores_of(gold, predicted, groups=None, log_probabilities=None):
    n = len(gold)
    return TaskScores(
        task="t",
        title="a task",
        metric="accuracy",
        better="high",
        affective=True,
        values=torch.tensor([float(a == b) for a, b in zip(gold, predicted, strict=True)]),
        log_probabilities=torch.zeros(n, 0) if log_probabilities is None else log_probabilities,
        labels=LABELS,
        gold=tuple((g,) for g in gold),
        predicted=tuple(predicted),
        groups=tuple(groups or map(str, range(n))),
        scoring="likelihood",
        provenance=Provenance(model="m"),
    )


def test_our_wheels_hold_every_label_once_and_follow_the_cards_sources():
    wheels = load_wheels()
    labels = {wheel: set(of) for wheel, of in wheels.groups.items()}
    assert len({frozenset(found) for found in labels.values()}) == 1
    known = next(iter(labels.values()))
    assert set(wheels.synonyms.values()) <= known
    assert set(wheels.forms.values()) <= known | set(wheels.synonyms)
    for group, members in EKMAN.items():
        assert {wheels.group(label, "ekman") for label in members} == {group}
    for name, emotion in EMOTIONS.items():
        assert wheels.group(name, "quadrant") == emotion.quadrant
        assert wheels.group(name, "sentiment") == emotion.valence


def test_the_card_counts_what_the_file_holds():
    from importlib.resources import files

    card = files("lens_affect.data").joinpath("emotion_wheels.md").read_text("utf-8")
    wheels = load_wheels()
    n = len(wheels.groups["ekman"])
    assert (
        f"{n} labels, {len(wheels.synonyms)} synonyms, {len(wheels.forms)} word forms, {len(wheels.groups)} wheels"
        in card
    )


def test_a_word_goes_through_form_synonym_and_wheel():
    wheels = load_wheels()
    assert wheels.group(" Annoying ", "ekman") == "anger"  # form -> annoyance -> anger
    assert wheels.group("furious", "plutchik") == "anger"  # synonym -> rage -> anger
    assert wheels.group("zugzwang", "ekman") == "zugzwang"  # unknown words agree with themselves only
    with pytest.raises(ValueError, match="received wheel 'dial'"):
        wheels.group("joy", "dial")


def test_hit_rate_of_hand_computed_wheels(tmp_path):
    (tmp_path / "w.json").write_text(
        json.dumps(
            {"wheels": {"coarse": {"bad": ["anger", "fear"], "good": ["joy"]}, "fine": {"a": ["anger"], "f": ["fear"]}}}
        )
    )
    wheels = load_wheels(tmp_path / "w.json")
    found = hit_rate(["anger", "anger", "joy", "joy"], [["fear"], ["joy", "anger"], [], "joy"], wheels=wheels)
    assert found.tolist() == [[1, 1, 0, 1], [0, 1, 0, 1]]


def test_wheels_of_a_table_and_refused_ones(tmp_path):
    (tmp_path / "mine.csv").write_text("label,group\nanger,bad\nfear,bad\njoy,good\n")
    assert load_wheels(tmp_path / "mine.csv").mapped(["fear", "anger"], "mine") == {"bad"}
    (tmp_path / "two.csv").write_text("label,group\nanger,bad\nanger,good\n")
    with pytest.raises(ValueError, match="'anger' in two groups of the wheel 'two'"):
        load_wheels(tmp_path / "two.csv")
    (tmp_path / "broken.json").write_text("[1]")
    with pytest.raises(ValueError, match="which is no table of wheels"):
        load_wheels(tmp_path / "broken.json")
    (tmp_path / "empty.json").write_text('{"wheels": {}}')
    with pytest.raises(ValueError, match="no labels in the wheels"):
        load_wheels(tmp_path / "empty.json")
    with pytest.raises(ValueError, match="which is no file"):
        load_wheels(tmp_path / "absent.json")


def test_set_scores_by_hand():
    found = set_scores([["joy", "fear"], ["sadness"]], [["happy", "happiness"], ["glad", "grief", "worry"]])
    row = found.wheels.index("ekman")
    assert found.precision[row].tolist() == [1.0, 1 / 3]
    assert found.recall[row].tolist() == [0.5, 1.0]
    p, r = found.precision.mean(1), found.recall.mean(1)
    assert found.f == pytest.approx((2 * p * r / (p + r)).mean())
    assert set_scores(["joy"], [""]).f == 0
    with pytest.raises(ValueError, match="no right word in example 0"):
        set_scores([""], ["joy"])
    with pytest.raises(ValueError, match="1 right and 2 predicted"):
        set_scores(["joy"], ["joy", "fear"])


@pytest.mark.parametrize("n", [1, 7, 300])
def test_f1_equals_scikit_learn(n):
    rng = np.random.default_rng(n)
    gold, predicted = (rng.choice(["a", "b", "c", "d"], n, p=[0.6, 0.2, 0.15, 0.05]).tolist() for _ in range(2))
    assert weighted_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted, average="weighted", zero_division=0))
    assert macro_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
    labels, each, support = f1_by_label(gold, predicted)
    assert each == pytest.approx(f1_score(gold, predicted, average=None, labels=labels, zero_division=0))
    assert support.tolist() == [gold.count(label) for label in labels]


def test_sentiment_f1_leaves_zeros_out():
    strength, predicted = [-1.0, 2.0, 0.0, 0.4], ["negative", "negative", "positive", "positive"]
    expected = f1_score(["negative", "positive", "positive"], ["negative", "negative", "positive"], average="weighted")
    assert sentiment_f1(strength, predicted) == pytest.approx(expected)
    with pytest.raises(ValueError, match="only texts of strength 0"):
        sentiment_f1([0.0], ["positive"])


def test_metrics_of_scores_have_intervals_that_hold_the_value():
    rng = np.random.default_rng(0)
    gold = rng.choice(LABELS, 120).tolist()
    predicted = [g if rng.random() < 0.7 else str(rng.choice(LABELS)) for g in gold]
    logits = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    found = measure_task(
        scores_of(gold, predicted, groups=[f"g{i // 4}" for i in range(120)], log_probabilities=logits)
    )
    table = found.to_frame().set_index("metric")
    assert list(table.index) == ["accuracy", "weighted F1", "macro F1", "hit rate", "log share of the right label"]
    assert ((table["low"] < table["value"]) & (table["value"] < table["high"])).all()
    assert table.loc["weighted F1", "value"] == pytest.approx(weighted_f1(gold, predicted))
    assert "accuracy" in str(found)


def test_a_perfect_prediction_scores_one_everywhere():
    found = measure_task(scores_of(LABELS * 5, LABELS * 5)).to_frame()
    assert found["value"].tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0])


def test_a_synonym_that_was_said_hits_by_the_wheels_and_is_a_wrong_label():
    found = scores_of(["anger", "joy"], ["furious", "joy"])
    assert "furious" not in found.labels
    table = measure_task(found).to_frame().set_index("metric")["value"]
    assert table["hit rate"] == 1.0
    assert table["weighted F1"] == pytest.approx(0.5)


@pytest.mark.parametrize("predicted", ["aaa", "aab", "abb", "bbb"])
def test_shares_of_three_examples_stay_between_0_and_1_and_have_a_width(predicted):
    scores = scores_of(["a", "a", "a"], list(predicted))
    table = measure_task(scores).table.set_index("metric")
    shares = table.loc[["accuracy", "hit rate"]]
    assert (shares["low"] >= 0).all()
    assert (shares["high"] <= 1).all()
    assert (shares["high"] - shares["low"] > 0.4).all()
    assert (shares["low"] <= shares["value"] + 1e-9).all()
    assert (shares["value"] <= shares["high"] + 1e-9).all()
    assert f"[{float(scores.interval().low):.3f}, " in str(scores)

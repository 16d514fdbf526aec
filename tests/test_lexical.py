"""The bag-of-words bar: scikit-learn computes the same, and curves are compared with it topic by topic."""

import re
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from lens_affect.lexical import lexical_bar
from lens_affect.localization import localize
from tests.test_localization import EMOTIONS
from tests.test_vectors import planted


def test_the_lexical_bar_is_scikit_learn_with_leave_one_group_out(passages):
    chosen = passages.select(emotions=["happy", "sad", "angry", "calm", "neutral"])
    bar = lexical_bar(chosen)
    emotional = chosen.select(emotions=["happy", "sad", "angry", "calm"])
    labels, groups = np.array(emotional.emotions), np.array(emotional.groups)
    classifiers = {
        "tf-idf logistic": make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)),
        "naive Bayes": make_pipeline(CountVectorizer(), MultinomialNB()),
    }
    found = {}
    for name, classifier in classifiers.items():
        predicted = cross_val_predict(classifier, list(emotional.texts), labels, groups=groups, cv=LeaveOneGroupOut())
        found[name] = np.array([(predicted == labels)[groups == g].mean() for g in dict.fromkeys(groups)])
    assert bar.accuracy == pytest.approx(max(f.mean() for f in found.values()))
    np.testing.assert_allclose(bar.per_cluster, found[bar.classifier])
    assert bar.n_texts == 48
    low, high = stats.t.interval(0.95, 11, loc=bar.accuracy, scale=stats.sem(found[bar.classifier]))
    assert (bar.low, bar.high) == pytest.approx((low, high))
    assert f"{bar.accuracy:.3f} [{bar.low:.3f}, {bar.high:.3f}], 48 texts" in str(bar)


def test_a_curve_is_compared_with_the_bar_topic_by_topic(passages):
    chosen = passages.select(emotions=list(EMOTIONS))
    bar = lexical_bar(chosen)
    values = torch.randn(len(chosen), 2, 6, generator=torch.Generator().manual_seed(0))
    values[:, 1, :4] += 20 * torch.eye(4)[[EMOTIONS.index(e) for e in chosen.emotions]]
    activations = replace(planted(values, chosen.emotions, chosen.groups), stimuli=chosen)
    difference = bar.compare(localize(activations, n_permutations=0))
    assert float(difference.estimate) == pytest.approx(1 - bar.accuracy)
    paired = stats.t.interval(0.95, 11, loc=1 - bar.accuracy, scale=stats.sem(1 - bar.per_cluster.numpy()))
    assert (float(difference.low), float(difference.high)) == pytest.approx(paired)
    with pytest.raises(
        ValueError, match=r"received a curve of dprime over 12 groups; the bar needs an accuracy over 12"
    ):
        bar.compare(localize(activations, score="dprime", n_permutations=0))


def test_the_bar_of_our_passages_is_the_one_on_their_card(passages):
    card = (files("lens_affect") / "data" / "passages.md").read_text(encoding="utf-8")
    stated = re.search(r"bag of words, topics held out, 20 classes .* \| (\S+) \[(\S+), (\S+)\]", card)
    found = lexical_bar(passages)
    assert [found.accuracy, found.low, found.high] == pytest.approx([float(x) for x in stated.groups()], abs=0.02)
    assert str(found) in found._repr_html_()

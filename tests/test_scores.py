"""Scores of one layer: each equals a slow loop by hand, with plain numpy or scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

from lens_affect.designs import make_design
from lens_affect.scores import SCORE_LAYER, SCORES
from lens_affect.vectors import fit_vectors
from tests.test_vectors import crossed, planted

EMOTIONS = ("happy", "calm", "sad", "angry")


def noisy(seed=0, *, n_topics=6, per_cell=1, n_neutral=6, signal=1.0, d=10, topic=2.0):
    """Texts of four emotions on the same topics, with topic offsets, far from the origin."""
    rng = np.random.default_rng(seed)
    labels, groups = crossed(EMOTIONS, n_topics, per_cell=per_cell, n_neutral=n_neutral)
    means, offsets = {e: signal * rng.standard_normal(d) for e in EMOTIONS}, rng.standard_normal((n_topics, d))
    x = np.stack([means.get(e, np.zeros(d)) + topic * offsets[int(g[6:])] for e, g in zip(labels, groups, strict=True)])
    x += rng.standard_normal(x.shape) + 30
    return planted(x[:, None], labels, groups)


def run(name, activations, **options):
    design, emotions = make_design(activations.stimuli, **options)
    found = SCORE_LAYER[name](activations.values[:, 0], torch.from_numpy(design.labels)[None], design)
    return found, design, emotions


def by_fold(activations):
    """For each topic: held-out texts measured from the grand mean, class directions of the other topics, held-out labels."""
    x, labels = activations.values[:, 0].double().numpy(), np.array(activations.stimuli.emotions)
    groups, emotional = np.array(activations.stimuli.groups), labels != "neutral"
    for topic in dict.fromkeys(groups[emotional]):
        train, test = emotional & (groups != topic), emotional & (groups == topic)
        means = np.stack([x[train & (labels == e)].mean(0) for e in EMOTIONS])
        origin = means.mean(0)
        yield x[test] - origin, means - origin, labels[test]


@pytest.mark.parametrize("per_cell", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_nearest_mean_equals_leave_one_topic_out_by_hand(seed, per_cell):
    activations = noisy(seed, per_cell=per_cell)
    found, _, emotions = run("nearest_mean", activations)
    right = []
    for held_out, directions, labels in by_fold(activations):
        cosines = held_out @ (directions / np.linalg.norm(directions, axis=1, keepdims=True)).T
        right.append(np.array(EMOTIONS)[cosines.argmax(1)] == labels)
    np.testing.assert_allclose(found.per_cluster[0], [r.mean() for r in right])
    assert found.score.item() == pytest.approx(np.mean(right))
    assert 0.25 < found.score.item() < 1
    true = np.concatenate([labels for *_, labels in by_fold(activations)])
    for i, emotion in enumerate(emotions):
        assert found.per_emotion[0, i].item() == pytest.approx(np.concatenate(right)[true == emotion].mean())


def test_nearest_mean_with_folds_of_several_topics_holds_them_out_together():
    activations = noisy(4, n_topics=8)
    found, design, _ = run("nearest_mean", activations, n_splits=4)
    x, labels = activations.values[:, 0].double().numpy(), design.labels
    right = np.full(len(x), np.nan)
    for fold in range(4):
        train, test = (design.folds != fold) & (labels >= 0), design.folds == fold
        assert len(set(design.clusters[test])) == 2
        means = np.stack([x[train & (labels == e)].mean(0) for e in range(4)])
        directions = means - means.mean(0)
        cosines = (x[test] - means.mean(0)) @ (directions / np.linalg.norm(directions, axis=1, keepdims=True)).T
        right[test] = cosines.argmax(1) == labels[test]
    assert found.score.item() == pytest.approx(np.nanmean(right))


def test_logistic_equals_scikit_learn_with_leave_one_group_out():
    activations = noisy(1, n_topics=6, per_cell=2, n_neutral=0)
    found, design, _ = run("logistic", activations)
    x = activations.values[:, 0].double().numpy()
    x = x - x.mean(0)
    x /= np.linalg.svd(x, compute_uv=False)[0] / np.sqrt(len(x))  # the first principal coordinate gets unit spread
    predicted = cross_val_predict(
        LogisticRegression(C=1.0, max_iter=2000), x, design.labels, groups=design.clusters, cv=LeaveOneGroupOut()
    )
    right = predicted == design.labels
    np.testing.assert_allclose(found.per_cluster[0], [right[design.clusters == c].mean() for c in range(6)])
    assert 0.3 < found.score.item() < 1


@pytest.mark.parametrize("per_cell", [1, 3])
def test_dprime_equals_numpy_by_hand(per_cell):
    activations = noisy(2, per_cell=per_cell)
    found, _, emotions = run("dprime", activations)
    expected = {}
    for i, emotion in enumerate(EMOTIONS):
        gaps, variances = [], []
        for held_out, directions, labels in by_fold(activations):
            along = held_out @ directions[i] / np.linalg.norm(directions[i])
            gaps.append(along[labels == emotion].mean() - along[labels != emotion].mean())
            variances.append(along[labels != emotion].var(ddof=1))
        expected[emotion] = np.array(gaps) / np.sqrt(np.mean(variances))
    np.testing.assert_allclose(found.emotion_cluster[0], [expected[e] for e in emotions], rtol=1e-6)
    np.testing.assert_allclose(found.per_emotion[0], [expected[e].mean() for e in emotions], rtol=1e-6)
    np.testing.assert_allclose(found.per_cluster[0], np.mean(list(expected.values()), axis=0), rtol=1e-6)
    assert found.score.item() == pytest.approx(np.mean(list(expected.values())))


@pytest.mark.parametrize("per_cell", [1, 3])
def test_valence_equals_scikit_learns_auc_within_each_topic(per_cell):
    activations = noisy(3, per_cell=per_cell)
    found, _, _ = run("valence", activations)
    areas = []
    for held_out, directions, labels in by_fold(activations):
        axis = directions[:2].mean(0) - directions[2:].mean(0)
        areas.append(roc_auc_score(np.isin(labels, EMOTIONS[:2]), held_out @ axis))
    np.testing.assert_allclose(found.per_cluster[0], areas)
    assert found.score.item() == pytest.approx(np.mean(areas))


def mean_off_diagonal(table):
    return table[~np.eye(len(table), dtype=bool)].mean()


def test_the_neutral_cosine_and_its_leave_one_out_values_are_those_of_the_fitted_vectors():
    activations = noisy(5)
    found, _, _ = run("mean_cosine_neutral", activations)

    def fitted(part):
        return mean_off_diagonal(fit_vectors(part, baseline="neutral").similarity(0).to_numpy())

    assert found.score.item() == pytest.approx(fitted(activations), abs=1e-5)
    topics = list(dict.fromkeys(activations.stimuli.groups))
    left_out = [fitted(activations.select(groups=[g for g in topics if g != t])) for t in topics]
    np.testing.assert_allclose(found.per_cluster[0], left_out, atol=1e-5)


@pytest.mark.parametrize("n_neutral", [0, 6])
def test_the_centred_cosine_equals_numpy_by_hand_with_neutral_as_one_of_the_classes(n_neutral):
    activations = noisy(6, n_neutral=n_neutral)
    x, labels = activations.values[:, 0].double().numpy(), np.array(activations.stimuli.emotions)
    means = np.stack([x[labels == e].mean(0) for e in dict.fromkeys(labels)])
    unit = means - means.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert len(unit) == 4 + bool(n_neutral)
    found, _, _ = run("mean_cosine_centred", activations)
    assert found.score.item() == pytest.approx(mean_off_diagonal(unit @ unit.T), abs=1e-9)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_the_centred_cosine_of_equal_norms_is_pinned_however_well_emotions_separate(size):
    labels, groups = crossed(EMOTIONS, 3)
    x = np.stack([size * np.eye(6)[EMOTIONS.index(e)] for e in labels]) + 3
    found, _, _ = run("mean_cosine_centred", planted(x[:, None], labels, groups))
    assert found.score.item() == pytest.approx(-1 / 3, abs=1e-4)


@pytest.mark.parametrize("name", SCORES)
def test_a_relabelled_score_is_that_of_relabelled_texts(name):
    activations = noisy(7, n_topics=4, n_neutral=4)
    design, _ = make_design(activations.stimuli)
    labels = torch.from_numpy(design.labels)
    emotional = (labels >= 0).nonzero()[:, 0]
    order = emotional.view(4, 4).flip(1).flatten()  # another order of emotions within each topic
    shuffled = labels.clone()
    shuffled[emotional] = labels[order]
    together = SCORE_LAYER[name](activations.values[:, 0], torch.stack([labels, shuffled]), design)
    alone = SCORE_LAYER[name](activations.values[:, 0], labels[None], design)
    by_hand = activations.values.clone()
    by_hand[order] = activations.values[emotional]  # moves the texts instead of the labels
    moved = SCORE_LAYER[name](by_hand[:, 0], labels[None], design)
    torch.testing.assert_close(together.score, torch.cat([alone.score, moved.score]))


@pytest.mark.parametrize("name", SCORES)
def test_a_score_depends_neither_on_the_origin_nor_on_the_scale_of_the_activations(name):
    activations = noisy(8)
    design, _ = make_design(activations.stimuli)
    labels, x = torch.from_numpy(design.labels)[None], activations.values[:, 0].double()
    first, second = (SCORE_LAYER[name](y.float(), labels, design).score for y in (x, 4 * x + 7))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["nearest_mean", "logistic"])
def test_topics_without_emotions_leave_accuracy_at_chance(name):
    activations = noisy(9, signal=0.0, topic=50.0, n_topics=12, n_neutral=0)
    found, _, _ = run(name, activations)
    assert abs(found.score.item() - 0.25) < 0.15
    # the same texts without holding topics out: one's own topic must not help either, since every emotion is on it
    separated = noisy(9, signal=8.0, topic=50.0, n_topics=12, n_neutral=0)
    assert run("nearest_mean", separated)[0].per_cluster.shape == (1, 12)


def test_a_topic_that_goes_with_an_emotion_earns_nothing_when_it_is_held_out():
    # each topic has its own strong offset and mostly one emotion: a split that leaks topics would be nearly perfect
    rng, rows = np.random.default_rng(0), []
    for t in range(12):
        rows += [(EMOTIONS[t % 4], f"topic {t}")] * 5 + [(EMOTIONS[(t + 1) % 4], f"topic {t}")]
    offsets = 20 * rng.standard_normal((12, 30))
    x = np.stack([offsets[int(g[6:])] for _, g in rows]) + rng.standard_normal((72, 30))
    activations = planted(x[:, None], *zip(*rows, strict=True))
    leaky = cross_val_predict(LogisticRegression(max_iter=500), x / 20, np.array(activations.stimuli.emotions), cv=6)
    assert (leaky == np.array(activations.stimuli.emotions)).mean() > 0.75
    assert run("nearest_mean", activations)[0].score.item() < 0.4

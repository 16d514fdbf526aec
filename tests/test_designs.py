"""Designs: groups stay whole, relabellings keep the design, what cannot be split is refused."""

import numpy as np
import pytest

from lens_affect.designs import draw_labellings, make_design
from lens_affect.localization import localize
from tests.test_localization import layers, nested_noise


def test_groups_are_never_split_between_folds():
    for activations, n in ((layers(0, [0.0]), 3), (nested_noise(0), 2)):
        design, _ = make_design(activations.stimuli, n_splits=n)
        for cluster in range(design.n_clusters):
            assert len(set(design.folds[design.clusters == cluster])) == 1
        assert set(design.folds) == set(range(n))


def test_relabellings_of_a_crossed_design_keep_every_topics_emotions():
    stimuli = layers(0, [0.0], n_neutral=4).stimuli
    design, _ = make_design(stimuli)
    drawn = draw_labellings(stimuli, design, 20, seed=0)
    assert drawn.shape == (21, len(stimuli))
    assert (drawn[0].numpy() == design.labels).all()
    for labels in drawn.numpy():
        assert (labels[design.labels < 0] == -1).all()
        for cluster in range(design.n_clusters):
            of = (design.clusters == cluster) & (design.labels >= 0)
            assert sorted(labels[of]) == sorted(design.labels[of])
    assert len(np.unique(drawn.numpy(), axis=0)) > 15


def test_relabellings_of_a_nested_design_move_whole_groups_within_a_fold():
    stimuli = nested_noise(0).stimuli
    design, _ = make_design(stimuli, n_splits=2)
    for labels in draw_labellings(stimuli, design, 20, seed=0).numpy():
        for cluster in range(design.n_clusters):
            assert len(set(labels[design.clusters == cluster])) == 1
        for fold in range(design.n_folds):
            of = design.folds == fold
            assert sorted(labels[of]) == sorted(design.labels[of])


@pytest.mark.parametrize("n_splits", [1, 9])
def test_more_folds_than_groups_and_a_single_fold_are_refused(n_splits):
    with pytest.raises(ValueError, match=rf"received 8 groups for {n_splits} folds; allowed are 2 to 8 folds"):
        make_design(layers(0, [0.0]).stimuli, n_splits=n_splits)


def test_a_nested_emotion_with_fewer_groups_than_folds_is_refused():
    with pytest.raises(ValueError, match=r"an emotion with 4 groups for 5 folds.*n_splits=4"):
        make_design(nested_noise(0).stimuli)


def test_an_emotion_on_one_topic_only_is_refused():
    activations = layers(0, [0.0], n_topics=3)
    lonely = [i for i, (e, g) in enumerate(zip(activations.stimuli.emotions, activations.stimuli.groups, strict=True))
              if e != "sad" or g == "topic 1"]  # fmt: skip
    with pytest.raises(ValueError, match=r"no text of 'sad' is left to learn from: add groups"):
        make_design(activations.select(rows=lonely).stimuli)


def test_a_single_emotion_is_refused():
    with pytest.raises(ValueError, match=r"received the emotions \['sad'\]; telling apart needs at least two"):
        make_design(layers(0, [0.0], n_neutral=8).select(emotions=["sad", "neutral"]).stimuli)


def test_a_published_split_holds_out_its_groups_and_learns_from_the_others():
    activations = layers(0, [0.0, 2.0], n_topics=9)
    topics = list(dict.fromkeys(activations.stimuli.groups))
    design, _ = make_design(activations.stimuli, test_groups=topics[6:])
    assert design.n_folds == 1
    held = np.isin(activations.stimuli.groups, topics[6:])
    assert ((design.folds == 0) == held).all()
    curve = localize(activations, test_groups=topics[6:], n_permutations=50)
    x, labels = activations.values[:, 1].numpy(), design.labels
    means = np.stack([x[~held][labels[~held] == c].mean(0) for c in range(4)])
    directions = means - means.mean(0)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chosen = ((x[held] - means.mean(0)) @ directions.T).argmax(1)
    assert float(curve.values[1]) == pytest.approx((chosen == labels[held]).mean())
    assert curve.per_cluster.shape == (3, 2)
    assert curve.n_texts == 12
    assert curve.p_family[1] < 0.05 < curve.p_family[0]


def test_a_published_split_must_leave_something_to_learn_from_and_to_test():
    activations = layers(0, [0.0])
    topics = list(dict.fromkeys(activations.stimuli.groups))
    for wrong in ([], topics, ["nowhere"]):
        with pytest.raises(ValueError, match="allowed are some, not all, of the 8 groups"):
            make_design(activations.stimuli, test_groups=wrong)
    with pytest.raises(ValueError, match=r"received score='dprime' with test_groups; allowed are"):
        localize(activations, score="dprime", test_groups=topics[:2])

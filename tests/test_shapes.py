"""Shapes: planted curves get their label, noise is flat, error rates are what the docstring says, nonsense is refused."""

import numpy as np
import pytest
from scipy import stats

from lens_affect.localization import localize
from lens_affect.shapes import LABELS, curve_shape
from tests.test_localization import layers

DEPTH = (np.arange(30) + 1) / 30
PLANTED = {
    "u": 4 * (DEPTH - 0.5) ** 2,
    "inverted_u": -4 * (DEPTH - 0.5) ** 2,
    "rising": DEPTH,
    "falling": -(DEPTH**2),
    "flat": 0 * DEPTH,
}


def ar1(rng, *, n_topics=12, n_layers=30, correlation=0.8):
    steps = rng.standard_normal((n_topics, n_layers))
    for layer in range(1, n_layers):
        steps[:, layer] = correlation * steps[:, layer - 1] + np.sqrt(1 - correlation**2) * steps[:, layer]
    return steps


def resampled(curve, rng, *, n_topics=12, n_resamples=500):
    topics = curve + ar1(rng, n_topics=n_topics, n_layers=len(curve))
    return topics[rng.integers(0, n_topics, (n_resamples, n_topics))].mean(1)


@pytest.mark.parametrize("label", PLANTED)
def test_a_planted_shape_is_named_with_high_probability(label):
    shape = curve_shape(DEPTH, resampled(6 * PLANTED[label], np.random.default_rng(1)))
    assert shape.label == label
    assert shape.probability[label] > 0.9 or label == "flat"
    assert sum(shape.probability.values()) == pytest.approx(1)
    assert set(shape.probability) == set(LABELS)


@pytest.mark.parametrize("turn", [0.3, 0.5, 0.7])
def test_the_turning_depth_of_two_lines_is_found_within_its_interval(turn):
    shape = curve_shape(DEPTH, resampled(8 * np.abs(DEPTH - turn), np.random.default_rng(2)), better="low")
    assert shape.label == "u"
    assert abs(shape.turning_depth - turn) < 0.05
    low, high = shape.turning_interval
    assert low <= turn <= high
    assert high - low < 0.2


def test_what_a_best_middle_is_depends_on_the_direction_of_the_score():
    curves = resampled(6 * PLANTED["u"], np.random.default_rng(3))
    assert curve_shape(DEPTH, curves, better="low").middle_is_best
    assert not curve_shape(DEPTH, curves, better="high").middle_is_best
    assert curve_shape(DEPTH, -curves, better="high").middle_is_best
    assert "low is better, so a best middle would be a u: yes" in str(curve_shape(DEPTH, curves, better="low"))


def test_only_turning_curves_have_a_turning_depth():
    shape = curve_shape(DEPTH, resampled(6 * PLANTED["rising"], np.random.default_rng(4)))
    assert np.isnan([shape.turning_depth, *shape.turning_interval]).all()
    assert "turning" not in str(shape)


def test_flat_noise_with_autocorrelated_layers_is_called_a_u_in_at_most_five_percent():
    rng = np.random.default_rng(5)
    labels = [curve_shape(DEPTH, resampled(PLANTED["flat"], rng)).label for _ in range(150)]
    # With a true rate of 5 % more than 14 of 150 come up with probability 0.008.
    assert labels.count("u") + labels.count("inverted_u") <= 14
    assert labels.count("flat") >= 128


def test_a_u_of_one_and_a_half_standard_deviations_is_found_in_at_least_80_percent():
    rng = np.random.default_rng(6)
    labels = [curve_shape(DEPTH, resampled(1.5 * PLANTED["u"], rng), n_groups=12).label for _ in range(100)]
    assert labels.count("u") >= 80


def test_a_curve_inside_its_null_band_is_flat_however_smooth_it_is():
    curves = resampled(6 * PLANTED["u"], np.random.default_rng(7))
    wide = np.random.default_rng(8).normal(3, 5, (1000, 30))
    assert curve_shape(DEPTH, curves).label == "u"
    assert curve_shape(DEPTH, curves, null=wide).label == "flat"
    assert curve_shape(DEPTH, curves, null=np.stack([np.full(30, -100.0), np.full(30, 100.0)])).label == "flat"
    assert curve_shape(DEPTH, curves, null=np.stack([np.full(30, -3.0), np.full(30, -2.0)])).label == "u"


def test_the_null_band_is_simultaneous():
    rng = np.random.default_rng(9)
    null = rng.normal(size=(2000, 30))
    tight = PLANTED["u"] + rng.normal(0, 0.001, (500, 30))  # a clear u, from 0 to 1
    assert curve_shape(DEPTH, 2.5 * tight, null=null).label == "flat"  # beyond the pointwise limit of 1.96 ...
    assert curve_shape(DEPTH, 4.0 * tight, null=null).label == "u"  # ... and beyond the simultaneous one of about 3.1


def test_shifting_and_scaling_change_no_label_and_mirroring_turns_it():
    curves = resampled(3 * PLANTED["u"], np.random.default_rng(10))
    shape = curve_shape(DEPTH, curves)
    other = curve_shape(DEPTH, 1e-4 * curves + 7)
    assert (other.label, other.probability, other.turning_depth) == (
        shape.label,
        shape.probability,
        shape.turning_depth,
    )
    mirrored = curve_shape(1 + DEPTH[0] - DEPTH[::-1], curves[:, ::-1])
    assert mirrored.label == shape.label
    assert mirrored.turning_depth == pytest.approx(1 + DEPTH[0] - shape.turning_depth)
    assert curve_shape(DEPTH, -curves).label == "inverted_u"


def test_slopes_and_limits_are_those_of_a_regression_by_hand():
    curves = resampled(6 * PLANTED["u"], np.random.default_rng(11))
    shape = curve_shape(DEPTH, curves, n_groups=12)
    table = shape.table.set_index("evidence")
    away = DEPTH - shape.turning_depth
    design = np.stack([np.ones(30), np.minimum(away, 0), np.maximum(away, 0)], 1)
    fits = np.linalg.lstsq(design, curves.T, rcond=None)[0]
    left = table.loc["slope left of the break (score per depth)"]
    assert left["estimate"] == pytest.approx(fits[1].mean())
    half = stats.t.ppf(0.975, 11) * fits[1].std() * np.sqrt(12 / 11)
    assert (left["low"], left["high"]) == pytest.approx((fits[1].mean() - half, fits[1].mean() + half))
    layers_only = table.loc["slope left of the break, layers as independent (HC3)"]
    assert layers_only["estimate"] == pytest.approx(fits[1].mean())


def test_more_groups_make_the_limits_narrower():
    curves = resampled(3 * PLANTED["u"], np.random.default_rng(12))
    few, many = (curve_shape(DEPTH, curves, n_groups=n).table.loc[0] for n in (4, 100))
    assert many["high"] - many["low"] < few["high"] - few["low"]


def test_a_constant_and_a_straight_line_are_no_u():
    assert curve_shape(DEPTH, np.full((100, 30), 0.25)).label == "flat"
    assert curve_shape(DEPTH, np.tile(DEPTH, (100, 1))).label == "rising"


def test_the_shape_of_a_localization_curve_leaves_the_embedding_out():
    strengths = [0.2, 0.6, 1.2, 2.0, 3.0, 2.0, 1.2, 0.6, 0.2]
    curve = localize(layers(0, strengths, n_topics=12, embedding=50.0), score="dprime", n_permutations=100)
    shape = curve.shape()
    assert shape.label == "inverted_u"
    assert shape.middle_is_best
    assert shape.n_layers == 9
    assert shape.turning_depth == pytest.approx(5 / 9, abs=0.12)
    assert str(curve.shape()) == str(shape)


def test_noise_curves_are_flat():
    found = [localize(layers(seed, [0.0] * 9), n_permutations=99).shape().label for seed in range(20)]
    assert found.count("flat") >= 16
    assert found.count("inverted_u") + found.count("u") <= 2


def test_scaling_a_layer_changes_no_accuracy_and_a_constant_vector_no_centred_score():
    activations = layers(3, [0.5, 1.0, 2.0])
    curve = localize(activations, n_permutations=0)
    activations.values[:, 1] *= 1000
    np.testing.assert_allclose(localize(activations, n_permutations=0).values, curve.values)
    activations.values.add_(3.0)
    for score in ("nearest_mean", "dprime", "mean_cosine_centred"):
        before = localize(layers(3, [0.5, 1.0, 2.0]), score=score, n_permutations=0).values
        activations = layers(3, [0.5, 1.0, 2.0])
        activations.values.add_(3.0)
        np.testing.assert_allclose(localize(activations, score=score, n_permutations=0).values, before, rtol=1e-4)


@pytest.mark.parametrize(
    ("depth", "scores", "message"),
    [
        (DEPTH[:6], np.zeros((500, 6)), "received 6 layers; a shape needs at least 7"),
        (DEPTH, np.zeros((99, 30)), "received 99 resampled curves; at least 100"),
        (DEPTH, np.zeros((500, 29)), r"\[layer\] and \[resample, layer\]"),
        (DEPTH, np.full((500, 30), np.nan), "not finite"),
        (DEPTH[::-1], np.zeros((500, 30)), "do not increase"),
    ],
)
def test_what_has_no_shape_is_refused(depth, scores, message):
    with pytest.raises(ValueError, match=message):
        curve_shape(depth, scores)


def test_a_null_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"received a null of shape \(10, 29\); allowed are \[relabelling, 30\]"):
        curve_shape(DEPTH, np.zeros((500, 30)), null=np.zeros((10, 29)))

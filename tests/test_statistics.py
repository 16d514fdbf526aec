"""Random streams, intervals with their measured coverage, many tests at once."""

import doctest
import math

import numpy as np
import pytest
from scipy import stats

from lens_affect import statistics
from lens_affect.statistics import (
    adjust_p,
    bca_interval,
    derive_generator,
    derive_seed,
    jackknife_interval,
    mean_interval,
    resample_clusters,
    share_interval,
)

CLUSTERS = 12
REPEATS = 20_000


# Streams


def test_a_named_stream_repeats_itself_and_leaves_the_global_one_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not change
    first = derive_generator(7, "permutation", "sad").random(1000)
    again = derive_generator(7, "permutation", "sad").random(1000)
    assert (first == again).all()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_streams_of_other_names_and_seeds_are_unrelated():
    names = [(0,), (1,), (0, "split"), (0, "permutation"), (0, "permutation", "sad"), (0, "permutation", "happy")]
    names += [(0, "sad", "permutation"), (0, "permutationsad"), (0, "p", "ermutation")]
    drawn = np.array([derive_generator(*name).normal(size=20_000) for name in names])
    correlation = np.corrcoef(drawn) - np.eye(len(names))
    assert np.abs(correlation).max() < 5 / math.sqrt(20_000)


def test_derived_seeds_of_a_thousand_labels_are_distinct_and_fit_torch():
    seeds = {derive_seed(0, "row", i) for i in range(1000)} | {derive_seed(i, "row") for i in range(1, 1000)}
    assert len(seeds) == 1999
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bootstrap_draws_whole_clusters_with_equal_chances_and_repeats():
    draws = resample_clusters(5, 4000, 3, "curve")
    assert draws.shape == (4000, 5)
    assert (draws == resample_clusters(5, 4000, 3, "curve")).all()
    assert (draws != resample_clusters(5, 4000, 3, "other")).any()
    assert stats.chisquare(np.bincount(draws.ravel())).pvalue > 1e-4


# Intervals


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 12])
def test_the_mean_interval_is_scipys_t_interval(n, confidence):
    values = np.random.default_rng(n).gamma(2.0, size=(n, 3, 4))
    found = mean_interval(values, confidence=confidence)
    low, high = stats.t.interval(confidence, n - 1, loc=values.mean(0), scale=stats.sem(values, axis=0))
    np.testing.assert_allclose(found.estimate, values.mean(0))
    np.testing.assert_allclose(found.low, low)
    np.testing.assert_allclose(found.high, high)


def test_one_cluster_has_a_mean_but_no_interval():
    found = mean_interval(np.array([[0.25, 0.5]]))
    assert found.estimate.tolist() == [0.25, 0.5]
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()


def test_the_jackknife_of_a_mean_is_the_t_interval():
    values = np.random.default_rng(0).exponential(size=(CLUSTERS, 7))
    leave_one_out = (values.sum(0) - values) / (CLUSTERS - 1)
    mean, jackknife = mean_interval(values), jackknife_interval(values.mean(0), leave_one_out)
    for name in ("estimate", "low", "high"):
        np.testing.assert_allclose(getattr(jackknife, name), getattr(mean, name))


def _accuracies(rng: np.random.Generator, *, chance: float, spread: float, texts: int = 20) -> np.ndarray:
    """Share of right answers per topic, topics unequally hard: what leave-one-topic-out scores look like."""
    hardness = rng.beta(chance * spread, (1 - chance) * spread, (CLUSTERS, REPEATS))
    return rng.binomial(texts, hardness) / texts


PLANTED = {
    "normal": lambda rng: (rng.normal(0.3, 1.0, (CLUSTERS, REPEATS)), 0.3),
    "accuracy at 0.5": lambda rng: (_accuracies(rng, chance=0.5, spread=20), 0.5),
    "accuracy at 0.1": lambda rng: (_accuracies(rng, chance=0.1, spread=40), 0.1),
    "accuracy at 0.9": lambda rng: (_accuracies(rng, chance=0.9, spread=20), 0.9),
}


def _coverage(interval, truth: float) -> float:
    return float(((interval.low <= truth) & (truth <= interval.high)).mean())


@pytest.mark.parametrize("planted", PLANTED)
def test_mean_intervals_of_twelve_topics_cover_the_planted_mean(planted, record_property):
    values, truth = PLANTED[planted](np.random.default_rng(1))
    coverage = _coverage(mean_interval(values), truth)
    record_property("coverage", coverage)
    print(f"mean_interval, 12 clusters, {planted}: coverage {coverage:.3f}")
    assert 0.92 <= coverage <= 0.97
    assert 0.86 <= _coverage(mean_interval(values, confidence=0.9), truth) <= 0.93


@pytest.mark.parametrize("planted", PLANTED)
def test_jackknife_intervals_of_twelve_topics_cover_a_planted_ratio(planted, record_property):
    rng = np.random.default_rng(2)
    values, truth = PLANTED[planted](rng)
    weights = rng.integers(10, 31, values.shape)  # topics of unequal size: the pooled share is no mean of the shares

    def ratio(top, bottom):
        return top / bottom

    top, bottom = (weights * values).sum(0), weights.sum(0)
    without = ratio(top - weights * values, bottom - weights)
    coverage = _coverage(jackknife_interval(ratio(top, bottom), without), truth)
    record_property("coverage", coverage)
    print(f"jackknife_interval, 12 clusters, {planted}: coverage {coverage:.3f}")
    assert 0.92 <= coverage <= 0.97


def test_the_examples_in_the_docstrings_hold():
    found = doctest.testmod(statistics)
    assert found.attempted >= 1
    assert found.failed == 0


# Bootstrap over clusters


def test_bca_on_a_symmetric_sample_is_symmetric_and_draws_whole_clusters():
    values = np.stack([np.arange(-6.0, 7.0), 2 * np.arange(-6.0, 7.0) + 1], axis=1)
    found = bca_interval(values)
    assert found.estimate.tolist() == [0.0, 1.0]
    np.testing.assert_allclose(found.low[1], 2 * found.low[0] + 1)  # one draw for both rows
    np.testing.assert_allclose(found.high[1], 2 * found.high[0] + 1)
    assert abs(found.low[0] + found.high[0]) < 0.2
    assert 1.6 < found.high[0] < 2.4  # 1.96 standard errors are 2.1


def test_bca_is_scipys_for_any_statistic_and_row():
    values = np.random.default_rng(0).gamma(1.0, size=(CLUSTERS, 2, 3))
    found = bca_interval(values, np.median, confidence=0.9, n_resamples=500, seed=4)
    assert found.low.shape == (2, 3)
    for row in np.ndindex(2, 3):
        alone = stats.bootstrap(
            (values[:, *row],), np.median, n_resamples=500, confidence_level=0.9, rng=derive_generator(4, "bca")
        ).confidence_interval
        np.testing.assert_allclose([found.low[row], found.high[row]], alone)
    assert (found.low == bca_interval(values, np.median, confidence=0.9, n_resamples=500, seed=4).low).all()
    assert (found.low != bca_interval(values, np.median, confidence=0.9, n_resamples=500, seed=5).low).any()


def test_bca_without_spread_is_the_t_interval_and_undefined_limits_are_nan():
    values = np.random.default_rng(0).normal(size=(CLUSTERS, 3))
    values[:, 0], values[3, 1] = 0.1, np.nan
    found, mean = bca_interval(values, n_resamples=200), mean_interval(values)
    np.testing.assert_allclose([found.low[0], found.high[0]], [mean.low[0], mean.high[0]])
    assert np.isnan([found.low[1], found.high[1]]).all()
    assert found.low[2] < found.estimate[2] < found.high[2]
    single = bca_interval(values[:1, 2])
    assert single.estimate == values[0, 2]
    assert np.isnan([single.low, single.high]).all()


SKEWED = {
    "normal": (lambda rng, size: rng.normal(0.3, 1.0, size), (0.87, 0.93)),
    "exponential": (lambda rng, size: 0.3 * rng.exponential(size=size), (0.87, 0.91)),
    "log-normal": (lambda rng, size: 0.3 * rng.lognormal(-0.5, 1.0, size), (0.81, 0.87)),
}


@pytest.mark.parametrize("planted", SKEWED)
def test_bca_intervals_of_twelve_skewed_topics_are_too_narrow_by_a_known_amount(planted, record_property):
    draw, (least, most) = SKEWED[planted]
    values = draw(np.random.default_rng(3), (CLUSTERS, 2000))
    coverage = _coverage(bca_interval(values), 0.3)
    record_property("coverage", coverage)
    by_t = _coverage(mean_interval(values), 0.3)
    print(f"bca_interval, 12 clusters, {planted}: coverage {coverage:.3f} (mean_interval {by_t:.3f})")
    assert least <= coverage <= most


# Many tests


def test_adjusted_p_by_hand():
    p = np.array([[0.01, np.nan, 0.04], [0.03, 0.005, np.nan]])
    # Sorted 0.005, 0.01, 0.03, 0.04. Holm: times 4, 3, 2, 1, never falling. BH: times 4/1, 4/2, 4/3, 4/4, never rising from above.
    holm = np.array([[0.03, np.nan, 0.06], [0.06, 0.02, np.nan]])
    bh = np.array([[0.02, np.nan, 0.04], [0.04, 0.02, np.nan]])
    np.testing.assert_allclose(adjust_p(p), holm)
    np.testing.assert_allclose(adjust_p(p, method="bh"), bh)
    assert np.isnan(adjust_p(np.full((2, 2), np.nan))).all()
    assert adjust_p(np.array([0.6, 0.7])).tolist() == [1.0, 1.0]
    assert adjust_p(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize(("method", "theirs"), [("holm", "holm"), ("bh", "fdr_bh")])
def test_adjusted_p_is_that_of_statsmodels(method, theirs):
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(0).beta(0.3, 3, (2, 400)).round(3)  # with ties
    for row in p:
        np.testing.assert_allclose(adjust_p(row, method=method), multipletests(row, method=theirs)[1], rtol=1e-12)


def test_adjusted_p_refuses_what_is_no_p():
    with pytest.raises(ValueError, match="received p = 1.5"):
        adjust_p(np.array([0.5, 1.5, np.nan]))


@pytest.mark.parametrize("right", range(4))
def test_three_zeros_and_ones_get_wilsons_interval_within_0_and_1(right):
    values = np.array([1.0] * right + [0.0] * (3 - right))
    found = share_interval(values)
    expected = stats.binomtest(right, 3).proportion_ci(method="wilson")
    assert (float(found.low), float(found.high)) == pytest.approx((expected.low, expected.high))
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert found.high - found.low > 0.4  # three examples say little, all right or not
    t = mean_interval(values)
    assert right in (0, 3) or t.low < 0 or t.high > 1  # what it replaces


def test_shares_of_three_topics_are_cut_off_where_no_share_lies():
    shares = np.array([[0.9, 0.5], [1.0, 0.52], [0.4, 0.48]])  # the first row's t interval ends at 1.57
    t, found = mean_interval(shares), share_interval(shares)
    assert t.high[0] > 1
    assert found.high.tolist() == [1.0, t.high[1]]
    assert found.low.tolist() == [max(t.low[0], 0.0), t.low[1]]
    assert np.isnan(share_interval(np.array([0.4])).low)


def test_no_share_gets_an_interval_beyond_0_and_1():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 12):
        shares = rng.beta(0.3, 0.3, (n, 500)).round(1)
        found = share_interval(shares)
        assert (found.low >= 0).all()
        assert (found.high <= 1).all()
        assert (found.low <= found.estimate + 1e-12).all()
        assert (found.estimate <= found.high + 1e-12).all()

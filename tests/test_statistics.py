"""Random streams, intervals with their measured coverage, and comparisons of two groups."""

import doctest
import inspect
import itertools
import math
import re

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from lens_affect import statistics
from lens_affect.statistics import (
    adjust_p,
    bca_interval,
    check_effect_size,
    derive_generator,
    derive_seed,
    effect_sizes,
    equivalence,
    find_sizes,
    jackknife_interval,
    mann_whitney,
    mean_interval,
    paired_tests,
    resample_clusters,
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
    assert found.attempted >= 9
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


# Two independent groups


def _groups_with_u(n1: int, n2: int, u: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups without ties whose Mann-Whitney statistic is u: each x stands above a chosen number of y."""
    above = [min(n2, max(0, u - i * n2)) for i in range(n1)]
    return np.array(above) - 0.5 + np.arange(n1) / (2 * n1), np.arange(n2) * 1.0


def test_mann_whitney_of_three_against_three_by_hand():
    apart = mann_whitney(np.array([4, 5, 6]), np.array([1, 2, 3]))
    assert (apart.u, apart.n1, apart.n2, apart.exact, apart.cliffs_delta) == (9.0, 3, 3, True, 1.0)
    assert apart.p == pytest.approx(2 / 20)  # 2 of the 20 arrangements are as extreme
    one_over = mann_whitney(np.array([1, 2, 4]), np.array([3, 5, 6]))
    assert one_over.u == 1.0
    assert one_over.p == pytest.approx(4 / 20)
    assert one_over.cliffs_delta == pytest.approx((1 - 8) / 9)
    assert str(one_over) == "U = 1, n1 = 3, n2 = 3, p = 0.2 (exact distribution)"


def test_mann_whitney_with_ties_counts_every_arrangement():
    x, y = np.array([1.0, 2, 2, 5]), np.array([2.0, 3, 5, 5, 6])
    pooled = np.concatenate([x, y])

    def statistic(chosen):
        rest = np.delete(pooled, chosen)
        return sum((a > b) + (a == b) / 2 for a in pooled[list(chosen)] for b in rest)

    null = np.array([statistic(c) for c in itertools.combinations(range(9), 4)])
    observed = statistic((0, 1, 2, 3))
    expected = min(1.0, 2 * min((null <= observed).mean(), (null >= observed).mean()))
    found = mann_whitney(x, y)
    assert found.u == observed == 4.0
    assert found.exact
    assert found.method == "ties: all 126 arrangements"
    assert found.p == pytest.approx(expected)
    assert found.p != pytest.approx(stats.mannwhitneyu(x, y, method="exact").pvalue)  # what ties must not get


def test_random_arrangements_have_a_floor_a_seed_and_the_right_p():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 12, 25)
    far = mann_whitney(y + 20, y)
    assert not far.exact
    assert far.p == pytest.approx(2 / 20_000)
    near = mann_whitney(y + 3, y, seed=1)
    assert near.p == mann_whitney(y + 3, y, seed=1).p
    assert near.p == pytest.approx(stats.mannwhitneyu(y + 3, y).pvalue, rel=0.15)


def test_mann_whitney_of_equal_values_finds_nothing_and_of_many_is_approximate():
    assert mann_whitney(np.ones(4), np.ones(5)).p == 1.0
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=250), rng.normal(size=251)
    many = mann_whitney(x, y)
    assert (many.exact, many.method) == (False, "normal approximation")
    assert many.p == pytest.approx(stats.mannwhitneyu(x, y).pvalue)


def test_missing_values_and_empty_groups_are_refused():
    fine = np.arange(3.0)
    with pytest.raises(ValueError, match="received 1 of 3 values in y that are not finite"):
        mann_whitney(fine, np.array([0.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match="received no values in x"):
        effect_sizes(fine[:0], fine)
    with pytest.raises(ValueError, match="received 1 of 3 values in x"):
        paired_tests(np.array([0.0, np.inf, 1.0]), fine)
    with pytest.raises(ValueError, match="3 values in x and 1 in y"):
        inspect.unwrap(paired_tests)(fine, fine[:1])  # without the type checks of the test run
    with pytest.raises(ValueError, match="at least 3"):
        effect_sizes(fine[:1], fine[:1])


# Pairs


def test_seven_wins_of_seven_by_hand():
    found = paired_tests(np.array([2, 4, 6, 8, 10, 12, 14]), np.array([1, 2, 3, 4, 5, 6, 7]))
    assert (found.wins, found.losses, found.zeros, found.n) == (7, 0, 0, 7)
    assert found.p_sign == 0.015625
    assert found.p == 0.015625  # 2 of 128 sign flips
    assert (found.statistic, found.exact, found.method) == (0.0, True, "exact distribution")
    assert float(found.d_z.estimate) == pytest.approx(4 / math.sqrt(28 / 6))
    assert str(found).startswith("7 of 7 pairs higher, 0 lower, 0 equal: sign test p = 0.0156; Wilcoxon W = 0")


@pytest.mark.parametrize("n", [6, 20])
def test_signed_ranks_without_ties_are_scipys(n):
    x, y = np.random.default_rng(n).normal([[0.4], [0.0]], size=(2, n))
    expected, found = stats.wilcoxon(x, y, method="exact"), paired_tests(x, y)
    assert (found.statistic, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert found.p_sign == pytest.approx(stats.binomtest(int((x > y).sum()), n).pvalue)


def test_signed_ranks_with_ties_and_zeros_count_every_flip():
    difference = np.array([0, 1, 1, -2, 3, 3, 0, 4])
    ranks = np.array([1.5, 1.5, 3, 4.5, 4.5, 6])  # of the six that differ, by hand
    null = np.array([ranks @ flip for flip in itertools.product([0, 1], repeat=6)])
    observed = ranks.sum() - 3
    found = paired_tests(difference, np.zeros(8))
    assert (found.wins, found.losses, found.zeros, found.statistic) == (5, 1, 2, 3.0)
    assert found.p == pytest.approx(2 * (null >= observed).mean())
    assert found.p == pytest.approx(stats.wilcoxon(difference, method=stats.PermutationMethod()).pvalue)
    assert found.method == "ties: all 64 arrangements"
    assert found.p_sign == pytest.approx(2 * 7 / 64)


def test_rounding_errors_hide_no_ties_and_no_zeros():
    found = paired_tests(np.array([0.3, 0.2, 0.7, 0.1 + 0.2]), np.array([0.1, 0.0, 0.5, 0.3]))
    assert (found.wins, found.losses, found.zeros) == (3, 0, 1)
    assert found.method == "ties: all 8 arrangements"
    single = paired_tests(np.array([0.3, 0.2, 0.7, 0.6], np.float32), np.array([0.1, 0.0, 0.5, 0.6], np.float32))
    assert (single.wins, single.zeros, single.method) == (3, 1, "ties: all 8 arrangements")


def test_random_flips_have_a_floor_and_agree_with_the_normal_approximation():
    difference = np.random.default_rng(0).integers(-4, 7, 60)
    found = paired_tests(difference, np.zeros(60), seed=2)
    assert not found.exact
    assert found.p == paired_tests(difference, np.zeros(60), seed=2).p
    assert found.p == pytest.approx(stats.wilcoxon(difference, method="asymptotic").pvalue, rel=0.2)
    assert paired_tests(np.ones(30), np.zeros(30)).p == pytest.approx(2 / 20_000)


def test_pairs_without_any_difference_give_p_one_and_no_d():
    found = paired_tests(np.ones(5), np.ones(5))
    assert (found.p, found.p_sign, found.zeros) == (1.0, 1.0, 5)
    assert np.isnan(found.d_z.estimate)
    same = paired_tests(np.ones(5), np.zeros(5))
    assert same.d_z.estimate == math.inf
    assert np.isnan([same.d_z.low, same.d_z.high]).all()


# Effect sizes


def test_effect_sizes_by_hand():
    found = effect_sizes(np.array([3, 4, 5, 8]), np.array([1, 2, 3]))
    pooled = math.sqrt((14 + 2) / 5)
    assert float(found.d.estimate) == pytest.approx(3 / pooled)
    # Five degrees of freedom: gamma(5/2) / (sqrt(5/2) * gamma(2)) = 0.75 * sqrt(pi) / sqrt(2.5)
    assert float(found.g.estimate) == pytest.approx(3 / pooled * 0.75 * math.sqrt(math.pi / 2.5))
    assert float(found.delta.estimate) == pytest.approx(11 / 12)  # 11 pairs above, one tie
    turned = effect_sizes(np.array([1, 2, 3]), np.array([3, 4, 5, 8]))
    for name in ("d", "g", "delta"):
        here, there = getattr(found, name), getattr(turned, name)
        np.testing.assert_allclose([here.estimate, here.low, here.high], [-there.estimate, -there.high, -there.low])


@pytest.mark.parametrize("d", [0.0, 0.3, -2.0, 10.0, 107.5, -1e4, 1e9])
@pytest.mark.parametrize(("n1", "n2"), [(2, 2), (7, 9)])
def test_the_limits_of_d_are_where_the_noncentral_t_says(d, n1, n2):
    shape = np.concatenate([np.arange(n1), np.arange(n2)]).astype(float)
    x, y = shape[:n1] - shape[:n1].mean(), shape[n1:] - shape[n1:].mean()
    df, root = n1 + n2 - 2, math.sqrt(n1 * n2 / (n1 + n2))
    found = effect_sizes(x + d * math.sqrt((x @ x + y @ y) / df), y)
    assert float(found.d.estimate) == pytest.approx(d)

    def probability(limit):
        """P(T <= t), by integrating over the spread instead of scipy's distribution function."""

        def given_share(share):
            return stats.norm.cdf(d * root * math.sqrt(stats.chi2.ppf(share, df) / df) - limit * root)

        # The integrand is a step at the spread that turns d into the limit.
        step = stats.chi2.cdf(df * (limit / d) ** 2, df) if d and limit / d > 0 else 0.5
        return integrate.quad(given_share, 0, 1, points=[step], limit=200)[0]

    assert probability(float(found.d.low)) == pytest.approx(0.975, abs=2e-4)
    assert probability(float(found.d.high)) == pytest.approx(0.025, abs=2e-4)


def test_groups_without_spread_are_infinitely_far_apart_and_say_so():
    found = effect_sizes(np.full(3, 0.1), np.full(4, 0.3))
    assert (found.d.estimate, found.g.estimate, found.delta.estimate) == (-math.inf, -math.inf, -1.0)
    assert np.isnan([found.d.low, found.d.high, found.g.low, found.g.high]).all()
    assert np.isnan(effect_sizes(np.full(3, 0.1), np.full(7, 0.1)).d.estimate)
    assert "d = -inf [nan, nan]" in str(found)


@pytest.mark.parametrize("larger", [0.5, 0.8, 47 / 49, 1.0])
@pytest.mark.parametrize(("n1", "n2"), [(7, 7), (3, 10)])
def test_the_limits_of_delta_are_roots_of_newcombes_quartic(larger, n1, n2):
    u = round(larger * n1 * n2)
    found = effect_sizes(*_groups_with_u(n1, n2, u)).delta
    theta, z2, half = u / (n1 * n2), stats.norm.ppf(0.975) ** 2, (n1 + n2) / 2 - 1
    one = np.polynomial.Polynomial
    t = one([0, 1])
    # (estimate - theta)^2 = z^2 * variance(theta), multiplied by (2 - theta) * (1 + theta)
    variance = t * (1 - t) * ((2 - t) * (1 + t) + half * (1 - t) * (1 + t) + half * t * (2 - t)) / (n1 * n2)
    roots = ((theta - t) ** 2 * (2 - t) * (1 + t) - z2 * variance).roots()
    roots = np.sort(roots[np.isreal(roots)].real)
    low = roots[(roots > -1e-9) & (roots < theta - 1e-6)]
    high = roots[(roots > theta - 1e-9) & (roots < 1 + 1e-9)]
    assert (len(low), len(high)) == (1, 1)
    np.testing.assert_allclose([found.low, found.high], [2 * low[0] - 1, 2 * high[0] - 1], atol=1e-7)
    assert found.low < found.high


def test_intervals_of_d_g_and_d_z_cover_the_planted_effect():
    rng, planted, repeats, covered = np.random.default_rng(5), 0.8, 250, {"d": 0, "g": 0, "d_z": 0}
    for _ in range(repeats):
        found = effect_sizes(rng.normal(planted, 1, 5), rng.normal(0, 1, 9))
        pairs = paired_tests(rng.normal(planted, 1, CLUSTERS), np.zeros(CLUSTERS))
        for name, interval in (("d", found.d), ("g", found.g), ("d_z", pairs.d_z)):
            covered[name] += bool(interval.low <= planted <= interval.high)
    shares = {name: count / repeats for name, count in covered.items()}
    print(f"effect_sizes (5 against 9) and paired_tests (12 pairs), normal, d = {planted}: coverage {shares}")
    assert all(0.92 <= share <= 0.98 for share in shares.values())


@pytest.mark.parametrize(("n1", "n2"), [(7, 7), (4, 12)])
def test_intervals_of_cliffs_delta_cover_the_planted_one(n1, n2, record_property):
    # The interval depends on U alone, so each is computed once.
    of_u = [effect_sizes(*_groups_with_u(n1, n2, u)).delta for u in range(n1 * n2 + 1)]
    rng = np.random.default_rng(6)
    for shift in (0.0, 0.8, 2.0):
        x, y = rng.normal(shift, 1, (REPEATS, n1, 1)), rng.normal(0, 1, (REPEATS, 1, n2))
        drawn = (x > y).sum(axis=(1, 2))
        truth = 2 * stats.norm.cdf(shift / math.sqrt(2)) - 1
        coverage = float(np.array([i.low <= truth <= i.high for i in of_u])[drawn].mean())
        record_property(f"coverage at {truth:.2f}", coverage)
        print(f"Cliff's delta, {n1} against {n2}, planted {truth:.2f}: coverage {coverage:.3f}")
        assert 0.93 <= coverage <= 0.99


# Impossible effect sizes


def _cohens_d(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """d along the last axis, the groups' values of many samples at once."""
    n1, n2 = x.shape[-1], y.shape[-1]
    pooled = (n1 * x.var(axis=-1) + n2 * y.var(axis=-1)) / (n1 + n2 - 2)
    return (x.mean(axis=-1) - y.mean(axis=-1)) / np.sqrt(pooled)


def _largest_d_by_u(n1: int, n2: int, *, ties: bool) -> dict[float, tuple]:
    """By the smaller U: the largest |d| over every order of the groups (and every tie), and the sample that has it.

    The sample: places of both groups in the order, fitted values by place, and whether these rise.
    """
    n, best = n1 + n2, {}
    breaks = list(itertools.product([0, 1], repeat=n - 1)) if ties else [(1,) * (n - 1)]
    for chosen, between in itertools.product(itertools.combinations(range(n), n1), breaks):
        member = np.zeros(n)
        member[list(chosen)] = 1.0
        block = np.concatenate([[0], np.cumsum(between)])
        u = sum((block[i] > block[j]) + (block[i] == block[j]) / 2 for i in chosen for j in np.flatnonzero(member == 0))
        weights = np.bincount(block).astype(float)
        shares = np.bincount(block, member) / weights
        for increasing in (True, False):
            fitted = optimize.isotonic_regression(shares, weights=weights, increasing=increasing).x[block]
            x, y = fitted[member == 1], fitted[member == 0]
            apart = np.ptp(x) == np.ptp(y) == 0
            size = (math.inf if x[0] != y[0] else 0.0) if apart else abs(float(_cohens_d(x, y)))
            key = min(u, n1 * n2 - u)
            if size > best.get(key, (-1.0,))[0]:
                best[key] = (size, np.arange(n)[member == 1], np.arange(n)[member == 0], fitted, increasing)
    return best


@pytest.mark.parametrize(
    ("u", "bound"), [(0, math.inf), (1, 4.5356), (4, 3.4017), (7, 3.2071), (42, 3.2071), (0.5, 4.5356), (3.5, 3.4017)]
)
def test_known_bounds_of_seven_against_seven(u, bound):
    found = check_effect_size(1.0, 7, 7, u)
    assert found.possible
    assert found.bound == pytest.approx(bound, abs=5e-5)


@pytest.mark.parametrize(("n1", "n2"), [(1, 4), (2, 5), (3, 4), (4, 4)])
def test_the_bound_is_the_largest_over_all_orders(n1, n2):
    best = _largest_d_by_u(n1, n2, ties=False)
    assert set(best) == {float(u) for u in range(n1 * n2 // 2 + 1)}
    for u, (largest, *_) in best.items():
        for a, b in ((n1, n2), (n2, n1)):
            for either in (u, n1 * n2 - u):
                assert check_effect_size(0.0, a, b, either).bound == pytest.approx(largest, abs=1e-7)


@pytest.mark.parametrize(("n1", "n2"), [(2, 3), (3, 3)])
def test_the_bound_holds_for_tied_values_and_half_u(n1, n2):
    best = _largest_d_by_u(n1, n2, ties=True)
    assert set(best) == {u / 2 for u in range(n1 * n2 + 1)}
    for u, (largest, *_) in best.items():
        assert check_effect_size(0.0, n1, n2, u).bound == pytest.approx(largest, abs=1e-7)


def test_the_bound_is_approached_by_a_sample_with_exactly_this_u():
    for u, (largest, *sample) in _largest_d_by_u(4, 4, ties=False).items():
        first, second, fitted, increasing = sample
        values = fitted + (1e-6 if increasing else -1e-6) * np.arange(8)  # ties undone in the given order
        x, y = values[first], values[second]
        found = mann_whitney(x, y).u
        assert min(found, 16 - found) == u
        size = abs(float(_cohens_d(x, y)))
        assert size > 1e4 if u == 0 else largest * 0.999 < size <= largest + 1e-9


@pytest.mark.parametrize(("n1", "n2"), [(3, 10), (7, 7), (5, 12)])
def test_no_random_sample_goes_beyond_the_bound(n1, n2):
    rng, share = np.random.default_rng(7), []
    bounds = np.array([check_effect_size(0.0, n1, n2, u).bound for u in range(n1 * n2 + 1)])
    for power, shift in itertools.product([0.02, 0.3, 1.0, 3.0], [0.0, 1.0, 3.0]):  # from two-valued to heavy tails
        values = rng.normal(0, 1, (4000, n1 + n2)) + shift * (np.arange(n1 + n2) < n1)
        values = np.sign(values - shift / 2) * np.abs(values - shift / 2) ** power
        x, y = values[:, :n1], values[:, n1:]
        u = (x[:, :, None] > y[:, None, :]).sum(axis=(1, 2))
        share.append(np.abs(_cohens_d(x, y)) / bounds[u])
    assert np.max(share) <= 1.0
    assert np.max(share) > 0.9  # the search comes close, so it would have found a bound that is too low


def test_verdicts_are_sentences():
    impossible = check_effect_size(-107.5, 7, 7, 4)
    assert not impossible.possible
    assert str(impossible) == "d = -107.5 is impossible: with n1 = 7, n2 = 7 and U = 4 no sample exceeds |d| = 3.40"
    assert check_effect_size(-107.5, 3, 10, 0).possible
    assert "no bound" in str(check_effect_size(-107.5, 3, 10, 30))
    assert check_effect_size(4.54, 7, 7, 1).possible  # 4.5356, rounded to two decimals
    assert not check_effect_size(4.54, 7, 7, 1, rounding=0.0).possible
    assert not check_effect_size(math.inf, 7, 7, 0.5).possible


@pytest.mark.parametrize(
    ("numbers", "possible", "says"),
    [
        ((1.0, 7, 7, 50), False, "between 0 and n1 \\* n2 = 49"),
        ((1.0, 7, 7, -1), False, "between 0"),
        ((1.0, 7, 7, 3.3), False, "steps of one half"),
        ((1.0, 0, 7, 0), False, "whole numbers"),
        ((1.0, 7.5, 2, 0), False, "whole numbers"),
        ((1.0, math.inf, 2, 0), False, "whole numbers"),
        ((1.0, 1, 1, 0), False, "three values"),
        ((math.nan, 7, 7, 3), True, "not checked"),
        ((None, "many", 7, 3), True, "not checked"),
        ((math.inf, None, 7, 3), True, "not checked"),
        ((1.0, 31, 30, 3), True, "more than 900"),
        ((1.0, 10**400, 30, 3), True, "not checked"),
    ],
)
def test_senseless_numbers_get_a_verdict_instead_of_an_exception(numbers, possible, says):
    found = check_effect_size(*numbers)
    assert found.possible is possible
    assert math.isnan(found.bound)
    assert re.search(says, str(found))


def test_the_sizes_behind_a_reported_p_and_d_are_found():
    assert find_sizes(0.007, -107.5) == [(3, 10, 0)]
    assert find_sizes(0.007, 107.5, digits=5) == []  # 2 / 286 is 0.00699
    assert (7, 7, 4) in find_sizes(0.007, 3.40)
    assert (7, 7, 4) not in find_sizes(0.007, 3.42)


@pytest.mark.parametrize(("p", "d", "digits"), [(0.05, 2.0, 2), (0.1, 0.5, 1), (1.0, 0.2, 3), (0.029, 3.0, 3)])
def test_found_sizes_are_all_there_are(p, d, digits):
    expected = []
    for n1, n2 in itertools.combinations_with_replacement(range(1, 7), 2):
        for u in range(n1 * n2 // 2 + 1):
            exact = stats.mannwhitneyu(*_groups_with_u(n1, n2, u), method="exact")
            assert exact.statistic == u
            rounds = abs(exact.pvalue - p) <= 0.5 * 10**-digits + 1e-12  # halves may be rounded either way
            if rounds and n1 + n2 > 2 and check_effect_size(d, n1, n2, u).possible:
                expected.append((n1, n2, u))
    assert expected
    assert find_sizes(p, d, largest=6, digits=digits) == expected


def test_sizes_cannot_be_found_for_numbers_that_are_none():
    with pytest.raises(ValueError, match="p = 1.5"):
        find_sizes(1.5, 1.0)
    with pytest.raises(ValueError, match="1 to 30 can be checked"):
        find_sizes(0.5, 1.0, largest=31)


# Equivalence, and many tests


def test_equivalence_is_statsmodels_tost_and_its_interval_agrees():
    from statsmodels.stats.weightstats import DescrStatsW

    for seed, margin, confidence in [(0, 0.3, 0.95), (1, 0.6, 0.95), (2, 1.0, 0.9), (3, 0.5, 0.99)]:
        differences = np.random.default_rng(seed).normal(0.1, 0.6, CLUSTERS)
        found = equivalence(differences, margin=margin, confidence=confidence)
        assert found.p == pytest.approx(DescrStatsW(differences).ttost_mean(-margin, margin)[0])
        inside = bool(-margin < found.interval.low and found.interval.high < margin)
        assert found.equivalent == inside == (found.p < 1 - confidence)
        low, high = stats.t.interval(2 * confidence - 1, CLUSTERS - 1, differences.mean(), stats.sem(differences))
        np.testing.assert_allclose([found.interval.low, found.interval.high], [low, high])


def test_equivalence_says_what_it_shows():
    small = np.array([0.1, -0.2, 0.0, 0.1, -0.1])
    assert equivalence(small, margin=1.0).verdict == "equivalent within +-1"
    assert equivalence(small, margin=0.05).verdict == "not shown to be equivalent"
    assert "equivalent within +-0.5: mean difference -0.02 [" in str(equivalence(small, margin=0.5))
    for nothing in (np.zeros(4), np.zeros(1)):
        found = equivalence(nothing, margin=1.0)
        assert math.isnan(found.p)
        assert not found.equivalent
        assert found.verdict.startswith("not shown to be equivalent (")
    with pytest.raises(ValueError, match="received margin = 0"):
        equivalence(small, margin=0.0)


def test_a_difference_as_large_as_the_margin_is_called_equivalent_in_five_percent():
    rng, repeats = np.random.default_rng(8), 1000
    wrong = [equivalence(rng.normal(1.0, 0.3, CLUSTERS), margin=1.0).equivalent for _ in range(repeats)]
    print(f"equivalence, 12 clusters at the margin: called equivalent in {np.mean(wrong):.3f}")
    assert 0.03 <= np.mean(wrong) <= 0.07


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


def test_adjusted_p_refuses_what_is_no_p():
    with pytest.raises(ValueError, match="received p = 1.5"):
        adjust_p(np.array([0.5, 1.5, np.nan]))

"""Two groups: exact tests by hand and by scipy, effect sizes with their measured coverage, equivalence."""

import doctest
import inspect
import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from lens_affect import effects
from lens_affect.effects import effect_sizes, equivalence, mann_whitney, paired_tests

CLUSTERS = 12
REPEATS = 20_000


# Two independent groups


def groups_with_u(n1: int, n2: int, u: int) -> tuple[np.ndarray, np.ndarray]:
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
    found = effect_sizes(*groups_with_u(n1, n2, u)).delta
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
    of_u = [effect_sizes(*groups_with_u(n1, n2, u)).delta for u in range(n1 * n2 + 1)]
    rng = np.random.default_rng(6)
    for shift in (0.0, 0.8, 2.0):
        x, y = rng.normal(shift, 1, (REPEATS, n1, 1)), rng.normal(0, 1, (REPEATS, 1, n2))
        drawn = (x > y).sum(axis=(1, 2))
        truth = 2 * stats.norm.cdf(shift / math.sqrt(2)) - 1
        coverage = float(np.array([i.low <= truth <= i.high for i in of_u])[drawn].mean())
        record_property(f"coverage at {truth:.2f}", coverage)
        print(f"Cliff's delta, {n1} against {n2}, planted {truth:.2f}: coverage {coverage:.3f}")
        assert 0.93 <= coverage <= 0.99


# Equivalence


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


def test_the_examples_in_the_docstrings_hold():
    found = doctest.testmod(effects)
    assert found.attempted >= 1
    assert found.failed == 0

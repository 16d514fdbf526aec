"""Published numbers: what cannot be is called impossible, and what can is not."""

import doctest
import itertools
import math
import re

import numpy as np
import pytest
from scipy import optimize, stats

from lens_affect import reported
from lens_affect.effects import mann_whitney
from lens_affect.reported import check_effect_size, find_sizes
from tests.test_effects import groups_with_u


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
            exact = stats.mannwhitneyu(*groups_with_u(n1, n2, u), method="exact")
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


def test_the_examples_in_the_docstrings_hold():
    found = doctest.testmod(reported)
    assert found.attempted >= 1
    assert found.failed == 0

"""Relabellings keep the design, p-values are uniform under noise and exact by hand, the family-wise null holds its level."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lens_affect.nulls import count_permutations, max_null, p_text, permute_labels, sign_flips, simultaneous_interval
from lens_affect.statistics import mean_interval

CLUSTERS = 12


def test_crossed_labels_stay_within_their_group():
    labels, groups = ["a", "b", "c"] * 4, [f"topic {i // 3}" for i in range(12)]
    drawn = permute_labels(labels, groups, design="crossed", n_permutations=500, seed=0)
    assert drawn.shape == (500, 12)
    assert (np.asarray(groups)[drawn] == np.asarray(groups)).all()
    assert (np.sort(drawn, 1) == np.arange(12)).all()  # every item's label is given away exactly once


def test_every_crossed_relabelling_comes_up_equally_often():
    labels, groups = ["a", "b", "c", "a", "b", "c"], ["x", "x", "x", "y", "y", "y"]
    drawn = permute_labels(labels, groups, design="crossed", n_permutations=7200, seed=1)
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 36
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_nested_groups_swap_labels_as_wholes():
    sizes = {"a1": 2, "a2": 1, "a3": 3, "a4": 2, "b1": 1, "b2": 4, "b3": 2, "b4": 2}
    groups = [g for g, n in sizes.items() for _ in range(n)]
    labels = [g[0] for g in groups]
    drawn = permute_labels(labels, groups, design="nested", n_permutations=300, seed=0)
    moved = 0
    for row in np.asarray(labels)[drawn]:
        per_group = {g: {label for label, at in zip(row, groups, strict=True) if at == g} for g in sizes}
        assert all(len(found) == 1 for found in per_group.values())
        assert Counter(next(iter(found)) for found in per_group.values()) == {"a": 4, "b": 4}
        moved += list(row) != labels
    assert moved > 270


def test_permutations_repeat_with_their_seed_only():
    arguments = {"labels": ["a", "b"] * 6, "groups": [f"t{i // 2}" for i in range(12)], "design": "crossed"}
    first = permute_labels(**arguments, n_permutations=20, seed=0)
    assert (first == permute_labels(**arguments, n_permutations=20, seed=0)).all()
    assert (first != permute_labels(**arguments, n_permutations=20, seed=1)).any()


@pytest.mark.parametrize(
    ("labels", "groups", "design", "count"),
    [
        ("ab" * 4, "wwxxyyzz", "crossed", 16),  # two orders in each of four topics
        ("aab", "xxx", "crossed", 3),
        ("aaabbb", "uvwxyz", "nested", 20),  # 6 choose 3
        ("aaaabb", "uuvvwx", "nested", 6),  # groups count, texts do not: 4 choose 2
        ("abc", "xyz", "crossed", 1),  # nothing can move
    ],
)
def test_the_number_of_relabellings_is_counted(labels, groups, design, count):
    assert count_permutations(list(labels), list(groups), design) == pytest.approx(count)


def test_an_astronomic_number_of_relabellings_is_no_error():
    labels, groups = [f"e{i}" for i in range(20)] * 12, [f"t{i // 20}" for i in range(240)]
    assert count_permutations(labels, groups, "crossed") > 1e200
    assert count_permutations(["a", "b"] * 2000, [str(i) for i in range(4000)], "nested") == math.inf


@pytest.mark.parametrize(
    ("labels", "groups", "design"), [("ab" * 4, "wwxxyyzz", "crossed"), ("aabb", "wxyz", "nested")]
)
def test_too_few_relabellings_are_refused_with_the_number_and_the_way_out(labels, groups, design):
    with pytest.raises(ValueError, match=r"design that allows only (16|6) relabellings; 20 .*add groups"):
        permute_labels(list(labels), list(groups), design=design, n_permutations=100, seed=0)


def test_exactly_twenty_relabellings_are_enough_for_five_percent_and_not_for_one():
    arguments = {"labels": list("aaabbb"), "groups": list("uvwxyz"), "design": "nested"}
    assert len(permute_labels(**arguments, n_permutations=50, seed=0)) == 50
    with pytest.raises(ValueError, match="only 20 relabellings; 100 are needed"):
        permute_labels(**arguments, n_permutations=50, seed=0, alpha=0.01)


# The null


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows that follow each other like layers do, some of them ten times as noisy."""
    steps = rng.normal(size=shape)
    smooth = steps + np.roll(steps, 1, -1) + np.roll(steps, 2, -1)
    return smooth * np.linspace(1, 10, shape[-1]) + np.linspace(0, 5, shape[-1])


@pytest.mark.parametrize("better", ["high", "low"])
def test_with_nothing_planted_p_values_are_uniform(better):
    rng = np.random.default_rng(3)
    repeats, n, rows = 2000, 99, 12
    smallest, pointwise, beyond = [], [], []
    for _ in range(repeats):
        drawn = _noise(rng, (n + 1, rows))
        null = max_null(drawn[0], drawn[1:], better=better)
        smallest.append(null.p_family.min())
        pointwise.append(null.p)
        sign = 1 if better == "high" else -1
        beyond.append((sign * (drawn[0] - null.threshold) > 0).any())
    smallest, pointwise = np.array(smallest), np.concatenate(pointwise)
    assert min(smallest.min(), pointwise.min()) >= 1 / (1 + n)
    for level in (0.01, 0.05, 0.2, 0.5, 0.8):
        allowed = 4 * math.sqrt(level * (1 - level) / repeats)
        # the observed row is standardised by a null without it, so the exact level is reached up to O(1/n)
        assert abs((smallest <= level + 1e-12).mean() - level) < allowed + 1 / n
        assert abs((pointwise <= level + 1e-12).mean() - level) < allowed
    assert np.mean(beyond) <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / repeats) + 1 / n


@pytest.mark.parametrize("design", ["crossed", "nested"])
def test_relabelled_data_without_an_effect_rejects_five_percent(design):
    """From labels to family-wise p, with groups that differ far more than the noise."""
    rng = np.random.default_rng(4)
    labels = ["a", "b"] * 8 if design == "crossed" else ["a"] * 8 + ["b"] * 8
    groups = [f"g{i // 2}" for i in range(16)]
    sign = np.where(np.asarray(labels) == "a", 1.0, -1.0)
    hits, repeats = 0, 500
    for repeat in range(repeats):
        values = np.repeat(rng.normal(size=(8, 6)) * 5, 2, axis=0) + rng.normal(size=(16, 6))
        order = permute_labels(labels, groups, design=design, n_permutations=99, seed=repeat)
        null = max_null(np.abs(sign @ values), np.abs(sign[order] @ values), better="high")
        hits += null.p_family.min() <= 0.05
    assert abs(hits / repeats - 0.05) < 4 * math.sqrt(0.05 * 0.95 / repeats)


def test_shuffling_labels_over_groups_would_reject_far_too_often():
    """Why nested groups move as wholes: the same data with every text on its own."""
    rng = np.random.default_rng(5)
    labels = ["a"] * 8 + ["b"] * 8
    sign = np.where(np.asarray(labels) == "a", 1.0, -1.0)
    hits = 0
    for repeat in range(200):
        values = np.repeat(rng.normal(size=(4, 1)) * 5, 4, axis=0) + rng.normal(size=(16, 1))
        order = permute_labels(labels, [str(i) for i in range(16)], design="nested", n_permutations=99, seed=repeat)
        hits += max_null(np.abs(sign @ values), np.abs(sign[order] @ values), better="high").p_family[0] <= 0.05
    assert hits / 200 > 0.3


@pytest.mark.parametrize(("better", "sign"), [("high", 1), ("low", -1)])
def test_the_planted_row_is_found_and_no_other(better, sign):
    rng = np.random.default_rng(6)
    drawn = _noise(rng, (1000, 12))
    observed = drawn[1:].mean(0)
    observed[3] += sign * 8 * drawn[1:, 3].std()
    null = max_null(observed, drawn[1:], better=better)
    assert null.p_family[3] == pytest.approx(1 / 1000)
    assert (np.delete(null.p_family, 3) > 0.5).all()
    assert sign * (observed[3] - null.threshold[3]) > 0
    other_way = max_null(observed, drawn[1:], better="low" if better == "high" else "high")
    assert other_way.p[3] == 1


def test_p_values_equal_a_count_by_hand():
    rng = np.random.default_rng(7)
    observed, permuted = rng.normal(size=4), rng.normal(size=(50, 4))
    null = max_null(observed, permuted, better="high")
    z = (permuted - permuted.mean(0)) / permuted.std(0, ddof=1)
    z_observed = (observed - permuted.mean(0)) / permuted.std(0, ddof=1)
    for row in range(4):
        assert null.p[row] == (1 + sum(value >= observed[row] for value in permuted[:, row])) / 51
        assert null.p_family[row] == (1 + sum(best >= z_observed[row] for best in z.max(1))) / 51
    np.testing.assert_allclose(null.low, np.percentile(permuted, 2.5, axis=0))
    np.testing.assert_allclose(null.high, np.percentile(permuted, 97.5, axis=0))


def test_the_noisiest_row_does_not_set_the_threshold():
    rng = np.random.default_rng(8)
    permuted = rng.normal(size=(999, 2)) * [1, 1000]
    assert max_null(np.array([6.0, 0.0]), permuted, better="high").p_family[0] == pytest.approx(1 / 1000)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), rows=st.integers(1, 5), seed=st.integers(0, 10**6), size=st.floats(-50, 50))
def test_no_p_value_leaves_its_range_and_the_family_never_helps(n, rows, seed, size):
    if n < 2:
        n = 2  # a spread needs two
    rng = np.random.default_rng(seed)
    null = max_null(rng.normal(size=rows) * size, rng.normal(size=(n, rows)), better="high")
    assert (null.p >= 1 / (1 + n)).all()
    assert (null.p_family <= 1).all()
    assert (null.p_family >= null.p - 1e-12).all()


@pytest.mark.parametrize(
    "n",
    [19, 99, 100, 199, 200, 1000, *(pytest.param(n) for n in (30, 50, 210))],
)
def test_a_score_is_beyond_the_threshold_exactly_when_its_family_wise_p_is_significant(n):
    rng = np.random.default_rng(9)
    permuted = rng.normal(size=(n, 1))
    for observed in np.linspace(-4, 4, 400):
        null = max_null(np.array([observed]), permuted, better="high")
        assert (observed > null.threshold[0]) == (null.p_family[0] <= 0.05 + 1e-12)


def test_too_few_permutations_for_five_percent_leave_nothing_beyond_the_threshold():
    permuted = np.random.default_rng(10).normal(size=(10, 3))
    null = max_null(np.full(3, 100.0), permuted, better="high")
    assert (null.p_family > 0.05).all()
    assert not (np.full(3, 100.0) > null.threshold).any()


@pytest.mark.parametrize("constant", [0.0, *(pytest.param(c) for c in (0.05, 0.1, 1 / 3))])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_whose_null_has_no_spread_cannot_reject(constant, dtype):
    permuted = np.random.default_rng(11).normal(size=(199, 2)).astype(dtype)
    permuted[:, 0] = constant
    null = max_null(np.array([0.9, 0.0], dtype), permuted, better="high")
    assert null.p[0] == 1
    assert null.p_family[0] == 1


@pytest.mark.parametrize("dtype", [pytest.param(np.float32), np.float64])
def test_equal_scores_summed_in_another_order_count_as_hits(dtype):
    rng = np.random.default_rng(12)
    per_topic = (rng.integers(0, 21, CLUSTERS) / 20).astype(dtype)
    same = np.array([rng.permutation(per_topic).mean(dtype=dtype) for _ in range(100)])
    other = (rng.integers(0, 21, (99, CLUSTERS)) / 20).astype(dtype).mean(1, dtype=dtype)
    permuted = np.concatenate([same, other])[:, None].astype(dtype)
    assert permuted[:100].std() > 0  # rounding does differ
    null = max_null(np.array([same.max()], dtype), permuted, better="high")
    exact = per_topic.astype(float).sum()
    expected = (1 + 100 + sum(float(value) * CLUSTERS > exact - 1e-3 for value in other)) / 200
    assert null.p[0] == pytest.approx(expected)


def test_a_p_value_is_never_printed_below_what_the_permutations_allow():
    assert p_text(1 / 201, 200) == "p = 0.00498, the smallest that 200 permutations allow"
    assert p_text(0.0, 999) == "p = 0.001, the smallest that 999 permutations allow"
    assert p_text(2 / 201, 200) == "p = 0.00995"
    assert p_text(0.25, 200) == "p = 0.25"


def test_every_sign_flip_is_used_once_where_there_are_few_and_the_true_signs_are_left_out():
    flips = sign_flips(4, 4095, 0)
    assert flips.shape == (15, 4)
    assert len({tuple(row) for row in flips}) == 15
    assert not (flips == 1).all(1).any()
    assert sign_flips(40, 100, 0).shape == (100, 40)
    assert np.isin(sign_flips(40, 100, 0), (-1, 1)).all()


def test_a_simultaneous_interval_of_one_row_is_nearly_the_t_interval_and_more_rows_widen_it():
    x = np.random.default_rng(1).standard_normal((12, 40))
    one, t = simultaneous_interval(x[:, :1]), mean_interval(x[:, :1])
    assert one.estimate == pytest.approx(t.estimate)
    assert (one.high - one.low) == pytest.approx(t.high - t.low, rel=0.15)
    many = simultaneous_interval(x)
    assert (many.high - many.low)[0] > 1.3 * (one.high - one.low)[0]
    copies = simultaneous_interval(np.repeat(x[:, :1], 40, axis=1))  # one row forty times is one test
    assert copies.low == pytest.approx(np.full(40, one.low[0]))
    np.testing.assert_allclose(simultaneous_interval(x.reshape(12, 8, 5)).low, many.low.reshape(8, 5))


def test_simultaneous_intervals_cover_all_rows_at_once():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        x = rng.standard_normal((12, 60))
        for row in range(1, 60):
            x[:, row] = 0.8 * x[:, row - 1] + 0.6 * x[:, row]
        found = simultaneous_interval(x)
        inside += bool(((found.low <= 0) & (found.high >= 0)).all())
    assert 0.90 <= inside / 200 <= 0.99  # 0.93 over 300 such data sets; 0.72 where clusters are log-normal


def test_rows_without_spread_have_no_width_and_two_clusters_are_refused():
    found = simultaneous_interval(np.ones((5, 2)))
    assert (found.low == 1).all()
    assert (found.high == 1).all()
    with pytest.raises(ValueError, match="received 2 clusters"):
        simultaneous_interval(np.ones((2, 2)))

"""Comparisons of two groups: exact tests, effect sizes with intervals, equivalence."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Real
from scipy import optimize, stats

from lens_affect.statistics import Interval, derive_generator, mean_interval

ARRANGEMENTS = 19_999
"""Relabellings of a permutation test: all of them where there are no more, this many random ones otherwise."""
LARGEST_EXACT = 40_000
"""Pairs n1 * n2 up to which the distribution of U is counted (about half a second)."""
LARGEST_EXACT_PAIRED = 500
"""Pairs with a difference up to which the distribution of signed ranks is counted."""


@dataclass(frozen=True)
class MannWhitney:
    """Mann-Whitney test of two independent groups."""

    u: float
    """U of x: the number of pairs with x > y, ties counting one half; between 0 and n1 * n2."""
    n1: int
    """Number of values in x."""
    n2: int
    """Number of values in y."""
    p: float
    """Two-sided p: twice the smaller tail, at most 1."""
    exact: bool
    """Whether p is exact: neither a random sample of the arrangements nor a normal approximation."""
    method: str
    """Where p comes from."""
    cliffs_delta: float
    """P(x > y) - P(x < y) in the samples: 1 where all x lie above all y, 0 without a tendency, -1 the other way."""

    def __str__(self) -> str:
        return f"U = {self.u:g}, n1 = {self.n1}, n2 = {self.n2}, p = {self.p:.3g} ({self.method})"


def mann_whitney(x: Real[np.ndarray, " n1"], y: Real[np.ndarray, " n2"], *, seed: int = 0) -> MannWhitney:
    """Mann-Whitney U test whose p is exact wherever that is affordable.

    Without ties p comes from the distribution of U (normal approximation above `LARGEST_EXACT` pairs). With ties that
    distribution is wrong, so the labels are permuted: all arrangements up to `ARRANGEMENTS`, else as many random ones,
    where each tail counts the observed one, so that p is at least 2 / (1 + ARRANGEMENTS).

    The test speaks about independent values: texts that share a topic are not. It does not show how large a
    difference is; report U with n1 and n2 (see `check_effect_size`).

    Args:
        x: values of the first group.
        y: values of the second group.
        seed: of the stream "mann_whitney" (random arrangements only).

    Returns:
        U, sizes, p and Cliff's delta.

    Raises:
        ValueError: an empty group, or a value that is not finite.

    Source: Mann and Whitney (1947, doi:10.1214/aoms/1177730491); Cliff (1993, doi:10.1037/0033-2909.114.3.494).

    Example:
        >>> print(mann_whitney(np.arange(10.0, 17.0), np.arange(7.0)))
        U = 49, n1 = 7, n2 = 7, p = 0.000583 (exact distribution)
    """
    _require_values(x=x, y=y)
    n1, n2 = len(x), len(y)
    arrangements = math.comb(n1 + n2, n1)
    if len(np.unique(np.concatenate([x, y]))) < n1 + n2:
        how, exact, method = _permute(arrangements, derive_generator(seed, "mann_whitney"))
    elif n1 * n2 <= LARGEST_EXACT:
        how, exact, method = _EXACT
    else:
        how, exact, method = _NORMAL
    u, p = stats.mannwhitneyu(x, y, method=how)
    return MannWhitney(float(u), n1, n2, float(p), exact, method, float(2 * u / (n1 * n2) - 1))


_EXACT: tuple[Any, bool, str] = ("exact", True, "exact distribution")
_NORMAL: tuple[Any, bool, str] = ("asymptotic", False, "normal approximation")


def _permute(arrangements: int, rng: np.random.Generator) -> tuple[Any, bool, str]:
    """How scipy shall permute, whether that is exact, and what to call it; scipy enumerates where it can."""
    exact = arrangements <= ARRANGEMENTS
    how = stats.PermutationMethod(n_resamples=ARRANGEMENTS, batch=1000, rng=rng)
    return how, exact, f"ties: {'all' if exact else 'random'} {min(arrangements, ARRANGEMENTS)} arrangements"


def _require_values(**groups: np.ndarray) -> None:
    for name, values in groups.items():
        if not len(values):
            raise ValueError(f"received no values in {name}; at least one is needed: check how the groups are selected")
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise ValueError(
                f"received {bad} of {len(values)} values in {name} that are not finite; numbers are needed: drop the unmeasured ones first"
            )


@dataclass(frozen=True)
class PairedTests:
    """Tests of paired differences x - y."""

    statistic: float
    """Wilcoxon's statistic: the smaller of the two signed rank sums."""
    p: float
    """Two-sided p of the signed rank test; 1 where all differences are 0."""
    exact: bool
    """Whether p is exact rather than from random sign flips."""
    method: str
    """Where p comes from."""
    p_sign: float
    """Two-sided p of the sign test (binomial over wins and losses); 1 where all differences are 0."""
    wins: int
    """Pairs with x > y."""
    losses: int
    """Pairs with x < y."""
    zeros: int
    """Pairs with x = y; both tests leave them out."""
    n: int
    """All pairs."""
    d_z: Interval
    """Mean difference over the standard deviation of the differences, zeros included."""

    def __str__(self) -> str:
        return (
            f"{self.wins} of {self.n} pairs higher, {self.losses} lower, {self.zeros} equal: sign test p = {self.p_sign:.3g}; "
            f"Wilcoxon W = {self.statistic:g}, p = {self.p:.3g} ({self.method}); d_z = {_limits(self.d_z)}"
        )


def paired_tests(
    x: Real[np.ndarray, " pair"], y: Real[np.ndarray, " pair"], *, confidence: float = 0.95, seed: int = 0
) -> PairedTests:
    """Wilcoxon signed rank test, sign test and d_z of paired values.

    Pairs without a difference are left out of both tests and counted. The signed rank p is exact without ties among
    the sizes of the differences; with ties signs are flipped in all ways up to `ARRANGEMENTS`, else in as many random
    ones. Differences that agree to 12 digits of the largest value (float32: 6) are ties: 0.3 - 0.1 and 0.2 - 0 must be.

    Args:
        x: values under the first condition, one per pair (topic, layer, model).
        y: values under the second, in the same order.
        confidence: level of the interval of d_z.
        seed: of the stream "wilcoxon" (random sign flips only).

    Returns:
        Both tests and d_z. d_z is infinite (0 differences: NaN) and its limits are NaN where all differences are equal.

    Raises:
        ValueError: no pairs, values without a partner, or a value that is not finite.

    Source: Wilcoxon (1945, doi:10.2307/3001968); Lakens (2013, doi:10.3389/fpsyg.2013.00863) for d_z.

    Example:
        >>> paired_tests(np.arange(1.0, 8.0), np.zeros(7)).p_sign
        0.015625
    """
    _require_values(x=x, y=y)
    if len(x) != len(y):
        raise ValueError(f"received {len(x)} values in x and {len(y)} in y; pairs need as many: align them first")
    difference = _equal_up_to_rounding(x, y)
    n, wins, losses = len(difference), int((difference > 0).sum()), int((difference < 0).sum())
    unequal = difference[difference != 0]
    statistic, p, exact, method = _signed_ranks(unequal, seed)
    p_sign = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    d_z = _standardised(difference.mean(), difference.std(ddof=1) if np.ptp(difference) else 0.0)
    interval = _noncentral_interval(d_z, math.sqrt(n), n - 1, confidence)
    return PairedTests(statistic, p, exact, method, p_sign, wins, losses, n - wins - losses, n, interval)


def _signed_ranks(unequal: Float[np.ndarray, " pair"], seed: int) -> tuple[float, float, bool, str]:
    """Wilcoxon's statistic, its p, whether that is exact, and its method."""
    if not len(unequal):
        return 0.0, 1.0, True, "no differences"
    ranks = stats.rankdata(np.abs(unequal))
    signed = np.sign(unequal) * ranks
    statistic = float(min(ranks[unequal > 0].sum(), ranks[unequal < 0].sum()))
    if len(np.unique(ranks)) == len(ranks):
        how, exact, method = _EXACT if len(ranks) <= LARGEST_EXACT_PAIRED else _NORMAL
        result: Any = stats.wilcoxon(unequal, method=how)
        return statistic, float(result.pvalue), exact, method
    # Not scipy's wilcoxon(method=PermutationMethod()): it ranks every flip anew, one by one, and takes ten seconds.
    how, exact, method = _permute(2 ** len(ranks), derive_generator(seed, "wilcoxon"))
    flipped = stats.permutation_test((signed,), np.sum, permutation_type="samples", vectorized=True, **how._asdict())
    return statistic, float(flipped.pvalue), exact, method


def _equal_up_to_rounding(x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " pair"]:
    """x - y, freed of rounding errors that would hide ties and zeros."""
    digits = min([12, *(np.finfo(v.dtype).precision for v in (x, y) if np.issubdtype(v.dtype, np.floating))])
    x, y = x.astype(np.float64), y.astype(np.float64)
    scale = float(max(np.abs(x).max(), np.abs(y).max())) or 1.0
    return np.round((x - y) / scale, digits) * scale


def _standardised(difference: float, sd: float) -> float:
    """Difference over spread; without spread infinite with the sign of the difference, or NaN where there is none."""
    if sd > 0:
        return float(difference / sd)
    return math.copysign(math.inf, difference) if difference else math.nan


def _noncentral_interval(d: float, root_n: float, df: int, confidence: float) -> Interval:
    """The noncentralities under which t = d * root_n is just not surprising, in units of d (Cumming and Finch, 2001)."""
    if not math.isfinite(d) or df < 1:
        return Interval(np.asarray(d), np.asarray(math.nan), np.asarray(math.nan))
    t = abs(d) * root_n
    low, high = (_noncentrality(t, df, 0.5 + side * confidence / 2) / root_n for side in (1, -1))
    return Interval(np.asarray(d), np.asarray(low if d >= 0 else -high), np.asarray(high if d >= 0 else -low))


def _noncentrality(t: float, df: int, probability: float) -> float:
    """The noncentrality under which a value up to t has this probability."""
    if t > 300 * math.sqrt(df):
        # scipy's distribution function fails out here (1.17), but the spread of the numerator has ceased to matter.
        return float(t * np.sqrt(stats.chi2.ppf(1 - probability, df) / df))

    def excess(noncentrality: float) -> float:
        return float(stats.nct.cdf(t, df, noncentrality)) - probability

    # Values up to t >= 0 are at least as probable as negative ones, which bounds the root from below.
    low = -float(stats.norm.ppf(probability)) - 1
    high = low + 2 + t
    while excess(high) > 0:  # the distribution function falls as the noncentrality grows
        high += high - low
    root: Any = optimize.brentq(excess, low, high)
    return float(root)


def _limits(interval: Interval) -> str:
    return f"{float(interval.estimate):.3g} [{float(interval.low):.3g}, {float(interval.high):.3g}]"


@dataclass(frozen=True)
class EffectSizes:
    """Sizes of the difference between two independent groups; positive where x is the larger."""

    d: Interval
    """Cohen's d: difference of the means over the pooled standard deviation."""
    g: Interval
    """Hedges' g: d without its bias in small samples; NaN with fewer than four values in all."""
    delta: Interval
    """Cliff's delta, -1 to 1; its interval has a width even at -1 and 1."""
    n1: int
    """Number of values in x."""
    n2: int
    """Number of values in y."""

    def __str__(self) -> str:
        return (
            f"d = {_limits(self.d)}, g = {_limits(self.g)}, Cliff's delta = {_limits(self.delta)} "
            f"(n1 = {self.n1}, n2 = {self.n2})"
        )


def effect_sizes(x: Real[np.ndarray, " n1"], y: Real[np.ndarray, " n2"], *, confidence: float = 0.95) -> EffectSizes:
    """Cohen's d, Hedges' g and Cliff's delta of x against y, each with an interval.

    The intervals of d and g invert the noncentral t distribution, so they hold for normal values of equal spread; that
    of delta is Newcombe's method 5, which needs no normality and is never empty.

    Args:
        x: values of the first group.
        y: values of the second group.
        confidence: level of the intervals.

    Returns:
        The three sizes. Where neither group has any spread d and g are infinite (equal means: NaN) without limits.

    Raises:
        ValueError: an empty group, fewer than three values in all, or a value that is not finite.

    Source: Hedges (1981, doi:10.3102/10769986006002107); Cumming and Finch (2001, doi:10.1177/0013164401614002);
    Newcombe (2006, doi:10.1002/sim.2324).

    Example:
        >>> sizes = effect_sizes(np.array([3.0, 4.0, 5.0]), np.array([1.0, 2.0, 3.0]))
        >>> float(sizes.d.estimate)
        2.0
    """
    _require_values(x=x, y=y)
    n1, n2 = len(x), len(y)
    x, y, df = x.astype(np.float64), y.astype(np.float64), n1 + n2 - 2
    if df < 1:
        raise ValueError("received 2 values in all; a pooled standard deviation needs at least 3: add values")
    difference, pooled = x[0] - y[0], 0.0  # the mean and variance of equal values can have rounding errors
    if np.ptp(x) or np.ptp(y):
        difference, pooled = x.mean() - y.mean(), math.sqrt((n1 * np.var(x) + n2 * np.var(y)) / df)
    d = _noncentral_interval(_standardised(difference, pooled), math.sqrt(n1 * n2 / (n1 + n2)), df, confidence)
    # With one degree of freedom d has no mean, so there is no bias to correct.
    correction = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2) if df > 1 else math.nan
    g = Interval(*(np.asarray(part * correction) for part in (d.estimate, d.low, d.high)))
    ranks = stats.rankdata(np.concatenate([x, y]))
    larger = float((ranks[:n1].mean() - (n1 + 1) / 2) / n2)
    below, above = (_newcombe_low(share, n1, n2, confidence) for share in (larger, 1 - larger))
    delta = Interval(*(np.asarray(2 * part - 1) for part in (larger, below, 1 - above)))
    return EffectSizes(d, g, delta, n1, n2)


def _newcombe_low(estimate: float, n1: int, n2: int, confidence: float) -> float:
    """Lower limit of P(x > y): where the estimate lies z standard errors above, with the standard error at the limit."""
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    half = (n1 + n2) / 2 - 1

    def excess(theta: float) -> float:
        variance = theta * (1 - theta) * (1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)) / (n1 * n2)
        return estimate - theta - z * math.sqrt(variance)

    # At an estimate of 1 the equation holds at 1 itself; the limit is the other root.
    root: Any = optimize.brentq(excess, 0.0, min(estimate, 1 - 1e-12)) if estimate > 0 else 0.0
    return float(root)


# Can these numbers come from one sample?


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests that a mean difference lies within a margin."""

    interval: Interval
    """Mean difference with the interval that decides: at 1 - 2 * alpha, so 90% for a confidence of 95%."""
    margin: float
    """Largest difference that counts as none, in units of the differences."""
    p: float
    """The larger of the two one-sided p; NaN where the differences have no spread."""
    n: int
    """Number of differences."""
    equivalent: bool
    """Whether p < alpha."""
    verdict: str
    """The verdict in words."""

    def __str__(self) -> str:
        return f"{self.verdict}: mean difference {_limits(self.interval)}, n = {self.n}, TOST p = {self.p:.3g}"


def equivalence(differences: Real[np.ndarray, " cluster"], *, margin: float, confidence: float = 0.95) -> Equivalence:
    """Two one-sided t tests (TOST) of paired differences: is the mean difference small enough to be called none?

    A large p of a usual test is no evidence for "no difference"; this is the test that can give it. The margin has to
    be chosen before looking at the data.

    Args:
        differences: one per cluster (topic), not one per text.
        margin: largest difference that counts as none.
        confidence: 1 - alpha of each one-sided test.

    Returns:
        p, the interval at 2 * confidence - 1 and the verdict. Fewer than two differences, or differences without
        spread, show nothing: p is NaN.

    Raises:
        ValueError: a margin that is not positive, no differences, or one that is not finite.

    Source: Schuirmann (1987, doi:10.1007/BF01068419).

    Example:
        >>> print(equivalence(np.array([0.1, -0.2, 0.0, 0.1, -0.1]), margin=1.0).verdict)
        equivalent within +-1
    """
    _require_values(differences=differences)
    if not 0 < margin < math.inf:
        raise ValueError(
            f"received margin = {margin}; a positive number is needed: choose the largest difference that counts as none"
        )
    n = len(differences)
    p, why = math.nan, " (no spread: a t test does not apply)"
    if n < 2:
        why = " (a single difference)"
    elif np.ptp(differences):
        above: Any = stats.ttest_1samp(differences, -margin, alternative="greater")
        below: Any = stats.ttest_1samp(differences, margin, alternative="less")
        p, why = float(max(above.pvalue, below.pvalue)), ""
    equivalent = bool(p < 1 - confidence)
    verdict = f"equivalent within +-{margin:g}" if equivalent else f"not shown to be equivalent{why}"
    return Equivalence(
        mean_interval(differences, confidence=2 * confidence - 1), float(margin), p, n, equivalent, verdict
    )

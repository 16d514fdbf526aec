"""Random streams, cluster intervals and comparisons of two groups. Arrays in, arrays out; nothing here knows about models."""

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import optimize, stats

Better = Literal["high", "low"]

ARRANGEMENTS = 19_999
"""Relabellings of a permutation test: all of them where there are no more, this many random ones otherwise."""
LARGEST_EXACT = 40_000
"""Pairs n1 * n2 up to which the distribution of U is counted (about half a second)."""
LARGEST_EXACT_PAIRED = 500
"""Pairs with a difference up to which the distribution of signed ranks is counted."""
LARGEST_BOUNDED = 900
"""Pairs n1 * n2 up to which an effect size is checked (about a second)."""


def derive_seed(seed: int, *labels: object) -> int:
    """A 63-bit seed for one named stream, so that a new analysis never shifts the numbers of an old one."""
    text = "\x1f".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_generator(seed: int, *labels: object) -> np.random.Generator:
    """A NumPy generator for one named stream.

    Example:
        >>> a, b = derive_generator(0, "permutation", "sad"), derive_generator(0, "permutation", "sad")
        >>> bool(a.random() == b.random())
        True
    """
    return np.random.default_rng(derive_seed(seed, *labels))


@dataclass(frozen=True)
class Interval:
    """Estimates with confidence limits, one per row."""

    estimate: Float[np.ndarray, "*rows"]
    """The point estimate."""
    low: Float[np.ndarray, "*rows"]
    """Lower limit."""
    high: Float[np.ndarray, "*rows"]
    """Upper limit."""


def mean_interval(per_cluster: Float[np.ndarray, "cluster *rows"], *, confidence: float = 0.95) -> Interval:
    """Mean over clusters with a t interval (clusters - 1 degrees of freedom).

    With a dozen clusters the percentile bootstrap is too narrow; t is not (its coverage here is measured in
    tests/test_statistics.py). NaN where fewer than two clusters have a value.
    """
    n = per_cluster.shape[0]
    mean = np.asarray(per_cluster.mean(axis=0))  # a 0-d array, not a scalar, for one row
    if n < 2:
        return Interval(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan))
    half = stats.t.ppf(0.5 + confidence / 2, n - 1) * per_cluster.std(axis=0, ddof=1) / math.sqrt(n)
    return Interval(mean, np.asarray(mean - half), np.asarray(mean + half))


def jackknife_interval(
    estimate: Float[np.ndarray, "*rows"],
    leave_one_out: Float[np.ndarray, "cluster *rows"],
    *,
    confidence: float = 0.95,
) -> Interval:
    """Delete-one-cluster jackknife with a t interval, for statistics that are no mean over clusters (Efron and Stein, 1981)."""
    n = leave_one_out.shape[0]
    spread = np.sqrt((n - 1) / n * ((leave_one_out - leave_one_out.mean(axis=0)) ** 2).sum(axis=0))
    half = stats.t.ppf(0.5 + confidence / 2, n - 1) * spread
    return Interval(estimate, np.asarray(estimate - half), np.asarray(estimate + half))


def resample_clusters(
    n_clusters: int, n_resamples: int, seed: int, *labels: object
) -> Int[np.ndarray, "resample cluster"]:
    """Row numbers of `n_resamples` bootstrap draws of whole clusters."""
    return derive_generator(seed, "bootstrap", *labels).integers(0, n_clusters, (n_resamples, n_clusters))


def bca_interval(
    per_cluster: Float[np.ndarray, "cluster *rows"],
    statistic: Callable[..., Any] = np.mean,
    *,
    confidence: float = 0.95,
    n_resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval over whole clusters, for statistics that are no mean.

    All rows see the same draws. For a mean over a dozen clusters prefer `mean_interval`: at 95% BCa covers 0.90 of
    normal, 0.89 of exponential and 0.84 of log-normal means of 12 clusters, t 0.95, 0.91 and 0.85 (measured in
    tests/test_statistics.py).

    Args:
        per_cluster: values by cluster and any further axes.
        statistic: `statistic(values, axis=...)`, such as `np.mean` or `np.median`.
        confidence: level of the interval.
        n_resamples: bootstrap draws.
        seed: of the stream "bca".

    Returns:
        Estimates with limits. Rows without spread get a zero-width interval, as from `mean_interval`; the limits are
        NaN with fewer than two clusters, for rows with NaN, and where BCa is undefined (all leave-one-out values
        equal).

    Source: Efron (1987, doi:10.1080/01621459.1987.10478410), through scipy.stats.bootstrap.

    Example:
        >>> median = bca_interval(np.arange(12.0), np.median)
        >>> bool(median.low < median.estimate < median.high)
        True
    """
    estimate = np.asarray(statistic(per_cluster, axis=0), dtype=np.float64)
    if per_cluster.shape[0] < 2:
        return Interval(estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the NaN limits say it
        found = stats.bootstrap(
            (per_cluster,),
            statistic,
            axis=0,
            vectorized=True,
            method="BCa",
            confidence_level=confidence,
            n_resamples=n_resamples,
            batch=max(1, 10_000_000 // max(1, per_cluster.size)),  # 80 MB at a time
            rng=derive_generator(seed, "bca"),
        ).confidence_interval
    no_spread = np.ptp(per_cluster, axis=0) == 0
    return Interval(
        estimate,
        np.asarray(np.where(no_spread, estimate, found.low)),
        np.asarray(np.where(no_spread, estimate, found.high)),
    )


# Comparing two groups


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
class EffectSizeCheck:
    """Verdict whether d, the sizes and U can come from one sample."""

    possible: bool
    """False where no sample has these numbers; True where one may, or where it was not checked."""
    bound: float
    """Supremum of |d| over all samples with these sizes and this U; infinite at U = 0, NaN where not checked."""
    message: str
    """The verdict as a sentence."""

    def __str__(self) -> str:
        return self.message


def check_effect_size(d: object, n1: object, n2: object, u: object, *, rounding: float = 0.005) -> EffectSizeCheck:
    """Whether a reported Cohen's d can go with a reported Mann-Whitney U; never raises, so that no run ends over it.

    Overlapping groups cannot be arbitrarily far apart in units of their pooled standard deviation. In a given order of
    the values the largest correlation of non-decreasing values with group membership is that of the isotonic regression
    of membership on the order; the bound takes the largest over all orders with U inversions. "Possible" does not show
    that the numbers are right: neither the sign of d nor a d that is too small is looked at.

    Args:
        d: mean difference over the pooled standard deviation, of either sign.
        n1: size of the first group.
        n2: size of the second group.
        u: Mann-Whitney statistic of either group, 0 to n1 * n2, with halves from ties.
        rounding: how far |d| may exceed the bound: half a unit of its last reported digit.

    Returns:
        The verdict. Numbers that no sample can have (a U beyond n1 * n2) are not possible, with a bound of NaN; missing
        numbers and more than `LARGEST_BOUNDED` pairs are not checked.

    Source: isotonic regression maximises the correlation under an order (Robertson, Wright and Dykstra, 1988, Order
    Restricted Statistical Inference, ch. 1); the maximum over orders is ours.

    Example:
        >>> print(check_effect_size(-107.5, 7, 7, 4))
        d = -107.5 is impossible: with n1 = 7, n2 = 7 and U = 4 no sample exceeds |d| = 3.40
    """
    numbers = d, first, second, u = [_number(value) for value in (d, n1, n2, u)]
    given = f"d = {d:g} with n1 = {first:g}, n2 = {second:g} and U = {u:g}"
    if any(math.isnan(number) for number in numbers):
        return EffectSizeCheck(True, math.nan, f"not checked: {given} is incomplete; give four numbers")
    if not (first >= 1 and second >= 1 and first % 1 == 0 and second % 1 == 0):
        return EffectSizeCheck(False, math.nan, f"{given} is impossible: sizes are whole numbers from 1")
    if not (0 <= u <= first * second and (2 * u) % 1 == 0):
        allowed = f"U lies between 0 and n1 * n2 = {first * second:g} in steps of one half"
        return EffectSizeCheck(False, math.nan, f"{given} is impossible: {allowed}")
    if first + second < 3:
        return EffectSizeCheck(False, math.nan, f"{given} is impossible: d needs at least three values in all")
    if first * second > LARGEST_BOUNDED:
        why = f"n1 * n2 is more than {LARGEST_BOUNDED}"
        return EffectSizeCheck(True, math.nan, f"not checked: {given}: {why}, the search would take too long")
    bound = _effect_bound(int(first), int(second), math.ceil(min(u, first * second - u)))
    possible = abs(d) <= bound + rounding
    limit = "d has no bound, the groups do not overlap" if math.isinf(bound) else f"no sample exceeds |d| = {bound:.2f}"
    verdict = "possible" if possible else "impossible"
    return EffectSizeCheck(
        possible, bound, f"d = {d:g} is {verdict}: with n1 = {first:g}, n2 = {second:g} and U = {u:g} {limit}"
    )


def _number(value: Any) -> float:
    """The value as a float, NaN where it is none."""
    try:
        return float(value)
    except Exception:  # whatever it is, it is no number
        return math.nan


def _effect_bound(n1: int, n2: int, u: int) -> float:
    """Supremum of |d| with U inversions, u <= n1 * n2 / 2: d**2 = (N - 2) * (1 / W - N / (n1 * n2)), W within blocks."""
    if u == 0:
        return math.inf
    within = float(_smallest_within(max(n1, n2), min(n1, n2))[u])
    return math.sqrt(max(0.0, (n1 + n2 - 2) * (1 / within - (n1 + n2) / (n1 * n2))))


@lru_cache(maxsize=256)
def _smallest_within(n_ones: int, n_twos: int) -> Float[np.ndarray, " u"]:
    """Smallest sum of squares of group membership around its isotonic regression, over orders with u inversions.

    An isotonic regression cuts the order into blocks whose share of twos rises; a block of a ones and b twos costs
    a * b / (a + b). Each one in it is behind the j twos of earlier blocks and up to b of its own. So blocks are laid in
    the order of their share, and `best[j, i, u]` is the smallest cost of i ones and j twos that allow u inversions or
    more. More than u inversions are no loophole: undoing one never lowers the correlation. Halves need no extra
    steps: a tie lies within a block, and the whole block allows the next integer.
    """
    blocks = [(a, b) for a in range(n_ones + 1) for b in range(n_twos + 1) if a + b]
    size = math.ceil(n_ones * n_twos / 2) + 1  # the larger U is the smaller one of the other group
    best = np.full((n_twos + 1, n_ones + 1, size), np.inf)
    best[0, 0, 0] = 0.0
    for a, b in sorted(blocks, key=lambda block: block[1] / (block[0] + block[1])):
        for j in range(b, n_twos + 1):
            before = best[j - b, : n_ones + 1 - a] + a * b / (a + b)
            after, gained = best[j, a:], min(a * j, size)
            np.minimum(after[:, gained:], before[:, : size - gained], out=after[:, gained:])
            np.minimum(after[:, :gained], before[:, :1], out=after[:, :gained])
    return best[n_twos, n_ones].copy()  # the cache shall not keep the whole table


def find_sizes(p: float, d: float, *, largest: int = 12, digits: int = 3) -> list[tuple[int, int, int]]:
    """Group sizes and U that would explain a reported exact Mann-Whitney p together with a reported Cohen's d.

    Args:
        p: two-sided exact p, as reported.
        d: mean difference over the pooled standard deviation, of either sign.
        largest: largest group considered.
        digits: decimals p was rounded to.

    Returns:
        (n1, n2, U) with n1 <= n2 and the smaller U, in rising order. Ties are not considered. An empty list says that
        no sizes up to `largest` fit both numbers; several entries say that the report leaves it open.

    Raises:
        ValueError: p outside 0 to 1, d not a number, or `largest` beyond what can be checked.

    Source: counts of U by Mann and Whitney's recursion (1947, doi:10.1214/aoms/1177730491); see `check_effect_size`.

    Example:
        >>> find_sizes(0.007, -107.5)
        [(3, 10, 0)]
    """
    if not 0 <= p <= 1 or math.isnan(d):
        raise ValueError(f"received p = {p} and d = {d}; p lies between 0 and 1 and d is a number: check the report")
    if not 1 <= largest**2 <= LARGEST_BOUNDED:
        raise ValueError(
            f"received largest = {largest}; 1 to {math.isqrt(LARGEST_BOUNDED)} can be checked: lower `largest`"
        )
    found = []
    for (n1, n2), counts in _count_u(largest).items():
        if n1 > n2:
            continue
        tail = 2 * np.cumsum(counts[: n1 * n2 // 2 + 1]) / counts.sum()
        matching = np.abs(np.minimum(tail, 1) - round(p, digits)) <= 0.5 * 10.0**-digits + 1e-12
        found += [(n1, n2, int(u)) for u in np.flatnonzero(matching) if check_effect_size(d, n1, n2, int(u)).possible]
    return found


def _count_u(largest: int) -> dict[tuple[int, int], Float[np.ndarray, " u"]]:
    """Number of orders of n1 and n2 untied values by U, for all sizes up to `largest`."""
    counts: dict[tuple[int, int], np.ndarray] = {}
    for n1 in range(1, largest + 1):
        for n2 in range(1, largest + 1):
            total = np.zeros(n1 * n2 + 1)
            # The largest value is a one, above all n2 twos, or a two, above none.
            fewer_ones = counts.get((n1 - 1, n2), np.ones(1))
            total[n2 : n2 + len(fewer_ones)] += fewer_ones
            fewer_twos = counts.get((n1, n2 - 1), np.ones(1))
            total[: len(fewer_twos)] += fewer_twos
            counts[n1, n2] = total
    return counts


# Equivalence and many tests at once


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


def adjust_p(p: Float[np.ndarray, "*rows"], *, method: Literal["holm", "bh"] = "holm") -> Float[np.ndarray, "*rows"]:
    """p-values corrected for being many, in the shape they came in.

    Args:
        p: p-values of any shape (layers by emotions); NaN where a test was not made.
        method: `holm` bounds the chance of any false finding, `bh` (Benjamini-Hochberg) the expected share of false
            ones among the findings; the latter for independent or positively dependent tests.

    Returns:
        Adjusted p-values, at most 1. NaN stays NaN and does not count as a test.

    Raises:
        ValueError: a p outside 0 to 1, or an unknown method.

    Source: Holm (1979); Benjamini and Hochberg (1995, doi:10.1111/j.2517-6161.1995.tb02031.x), through statsmodels.

    Example:
        >>> adjust_p(np.array([0.01, 0.04, np.nan])).tolist()
        [0.02, 0.04, nan]
    """
    names = {"holm": "holm", "bh": "fdr_bh"}
    if method not in names:
        raise ValueError(f"received method {method!r}; methods are {list(names)}: choose one")
    made = ~np.isnan(p)
    if ((p[made] < 0) | (p[made] > 1)).any():
        outside = p[made][(p[made] < 0) | (p[made] > 1)][0]
        raise ValueError(
            f"received p = {outside}; p-values lie between 0 and 1: pass p-values, NaN where there is none"
        )
    adjusted = np.full(p.shape, np.nan)
    if made.any():
        from statsmodels.stats.multitest import multipletests

        adjusted[made] = multipletests(p[made], method=names[method])[1]
    return adjusted

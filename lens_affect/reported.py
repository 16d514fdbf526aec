"""Can a published effect size and p-value belong to the same data? Bounds of d for given group sizes and ranks."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

LARGEST_BOUNDED = 900
"""Pairs n1 * n2 up to which an effect size is checked (about a second)."""


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

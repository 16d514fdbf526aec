"""Random streams and cluster intervals. Arrays in, arrays out; nothing here knows about models."""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

Better = Literal["high", "low"]


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

"""The shape of a curve over depth: u, inverted u, rising, falling or flat, and how often the rule is wrong."""

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

from lens_affect.statistics import Better

LABELS = ("u", "inverted_u", "rising", "falling", "flat")
"""Every label. "The middle is best" is `u` for a score that is better when low and `inverted_u` for one that is better when high."""
BREAKS = (0.15, 0.85)
"""Depths between which two lines may meet."""
MINIMUM_LAYERS = 7
"""Fewer layers leave no room for two lines with three layers each."""
ALPHA = 0.05
"""Level of the gate (two-sided, simultaneous) and of each of the two slopes (one-sided)."""
ASSUMED_GROUPS = 12
"""Groups behind the resamples where the caller does not say; decides how much wider than normal the limits are."""


@dataclass(frozen=True)
class CurveShape:
    """A label for the curve, how sure it is, and the evidence."""

    label: str
    """One of LABELS."""
    probability: dict[str, float]
    """Share of resampled curves to which the same rule gives each label: what other topics would have given. Sums to 1."""
    turning_depth: float
    """Depth at which two lines meet; NaN unless the label is u or inverted_u."""
    turning_interval: tuple[float, float]
    """95 % percentile interval of the turning depth over resamples; NaN unless the label is u or inverted_u."""
    better: Better
    """Direction of the score."""
    table: pd.DataFrame
    """evidence, estimate, low, high, p: slopes of both lines and where they meet, over resamples and (for comparison) over layers."""
    n_layers: int
    """Layers in the fit; the embedding is never one of them."""
    n_resamples: int
    """Resampled curves."""

    @property
    def middle_is_best(self) -> bool:
        """Whether the shape says so: `u` where low is better, `inverted_u` where high is."""
        return self.label == ("u" if self.better == "low" else "inverted_u")

    def __str__(self) -> str:
        name = self.label.replace("_", " ")
        text = f"shape: {name} (probability {self.probability[self.label]:.2f} over {self.n_resamples} resamples of topics)"
        if np.isfinite(self.turning_depth):
            low, high = self.turning_interval
            text += f", turning at depth {self.turning_depth:.2f} [{low:.2f}, {high:.2f}]"
        wanted = "u" if self.better == "low" else "inverted u"
        answer = "yes" if self.middle_is_best else "no"
        return f"{text}; {self.better} is better, so a best middle would be {'an' if wanted[0] == 'i' else 'a'} {wanted}: {answer}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>{self.table.round(3).to_html(index=False, border=0)}"


def curve_shape(
    depth: ArrayLike,
    scores: ArrayLike,
    *,
    better: Better = "high",
    null: ArrayLike | None = None,
    n_groups: int | None = None,
) -> CurveShape:
    """Label a curve from resampled curves. Whole groups are resampled; layers are never treated as independent.

    The rule: (1) `flat` if every layer lies inside the null band; (2) `flat` if a simultaneous 95 % resampling band over the
    slopes of all straight pieces contains a constant; (3) two lines that meet are fitted (the break where they fit best, between
    depths 0.15 and 0.85), and the curve is `u` or `inverted_u` if both slopes differ from 0 in opposite directions, each at
    one-sided 5 % (Simonsohn, 2018, doi:10.1177/2515245918805755, with the spread taken over groups); (4) otherwise `rising` or
    `falling` by the slope of one line.

    Error rates, measured by analyses/benchmarks/shape_errors.py on 400 curves each (12 topics, 30 layers, AR(1) 0.8 noise; heights
    from peak to trough in between-topic standard deviations at a layer). Called `u` or `inverted_u` by mistake: 0.015 of flat
    noise (0.065 are called something), 0 of 100 curves of SmolLM2 with shuffled labels, 0.01 of rising lines, and 0.06 to 0.09 of
    curves that rise on one half and are level on the other. A planted U is found in 0.47 at height 1, 0.89 at 1.5 and 0.99 at 2
    (parabola), 0.42, 0.85 and 0.99 (V), 0.42, 0.84 and 0.99 (V that turns at depth 0.7).

    Args:
        depth: depth of each layer, without the embedding.
        scores: `[resample, layer]`, curves of bootstrap samples of groups (LocalizationCurve.resample).
        better: direction of the score; it decides only what "the middle is best" means.
        null: `[relabelling, layer]` curves under permuted labels (their simultaneous 95 % band is used), or two rows: the
            lower and the upper end of a band.
        n_groups: groups behind the resamples; 12 are assumed otherwise.

    Returns:
        The label with its probability, the turning depth with its interval, and the evidence.

    Raises:
        ValueError: fewer than 7 layers, fewer than 100 resamples, values that are not finite, or shapes that do not match.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> depth = np.linspace(0.1, 1, 10)
        >>> print(curve_shape(depth, 4 * (depth - 0.5) ** 2 + rng.normal(0, 0.05, (500, 10)), better="low").label)
        u
    """
    x, curves = np.asarray(depth, dtype=float), np.asarray(scores, dtype=float)
    band = _null_band(null, len(x))
    _check(x, curves)
    n = n_groups or ASSUMED_GROUPS
    rule = _Rule(x, curves, band, n)
    observed = curves.mean(0)
    label = str(rule.labels(observed[None])[0])
    again = rule.labels(curves)
    probability = {name: float((again == name).mean()) for name in LABELS}
    turns = label in ("u", "inverted_u")
    at = rule.breaks(curves)
    low, high = np.quantile(at, [0.025, 0.975], method="nearest") if turns else (np.nan, np.nan)
    return CurveShape(
        label=label,
        probability=probability,
        turning_depth=float(rule.breaks(observed[None])[0]) if turns else float("nan"),
        turning_interval=(float(low), float(high)),
        better=better,
        table=rule.evidence(observed, curves),
        n_layers=len(x),
        n_resamples=len(curves),
    )


def _check(x: np.ndarray, curves: np.ndarray) -> None:
    if curves.ndim != 2 or x.ndim != 1 or curves.shape[1] != len(x):
        raise ValueError(
            f"received depths of shape {x.shape} and scores of shape {curves.shape}; allowed are [layer] and [resample, layer]"
        )
    if len(x) < MINIMUM_LAYERS:
        raise ValueError(
            f"received {len(x)} layers; a shape needs at least {MINIMUM_LAYERS}: look at the curve with its interval instead"
        )
    if len(curves) < 100:
        raise ValueError(
            f"received {len(curves)} resampled curves; at least 100 are needed: use LocalizationCurve.resample(2000)"
        )
    if not (np.isfinite(x).all() and np.isfinite(curves).all()):
        raise ValueError("received depths or scores that are not finite; leave such layers out")
    if (np.diff(x) <= 0).any():
        raise ValueError("received depths that do not increase; sort the layers by depth")


def _null_band(null: ArrayLike | None, n_layers: int) -> Float[np.ndarray, "end layer"] | None:
    if null is None:
        return None
    found = np.asarray(null, dtype=float)
    if found.ndim != 2 or found.shape[1] != n_layers or len(found) < 2:
        raise ValueError(
            f"received a null of shape {found.shape}; allowed are [relabelling, {n_layers}], or two rows: the band's lower and upper end"
        )
    if len(found) == 2:
        return found
    mean, sd = found.mean(0), found.std(0, ddof=1)
    furthest = np.abs((found - mean) / np.where(sd > 0, sd, np.inf)).max(1)
    half = np.quantile(furthest, 1 - ALPHA) * sd
    return np.stack([mean - half, mean + half])


class _Rule:
    """The rule with its critical values, which come from the spread of the resampled curves around their mean."""

    def __init__(self, x: np.ndarray, curves: np.ndarray, band: np.ndarray | None, n_groups: int) -> None:
        self.x, self.band, self.df = x, band, n_groups - 1
        spread = curves - curves.mean(0)
        # A bootstrap over n groups has a variance that is (n - 1) / n of the mean's.
        self._wider = np.sqrt(n_groups / (n_groups - 1))
        places = np.arange(2, len(x) - 2)
        places = places[(x[places] >= BREAKS[0]) & (x[places] <= BREAKS[1])]
        self.places = places if len(places) else np.array([len(x) // 2])
        hinges = [self._hinge(int(k)) for k in self.places]
        self._two_lines = np.stack([np.linalg.pinv(a)[1:] for a in hinges])  # break, side, layer
        self._residual = np.stack([np.eye(len(x)) - a @ np.linalg.pinv(a) for a in hinges])
        self._slope_sd = np.einsum("rl,ksl->rks", spread, self._two_lines).std(0) * self._wider
        self._pieces = np.stack(
            [w for k in self.places for w in (self._slope(slice(0, k + 1)), self._slope(slice(k, None)))]
        )
        along = spread @ self._pieces.T
        self._piece_sd = np.maximum(along.std(0) * self._wider, 1e-12 * max(np.abs(curves).max(), 1e-300))
        furthest = np.quantile(np.abs(along / (self._piece_sd / self._wider)).max(1), 1 - ALPHA)
        # The same tail probability in a t distribution, because the spread itself is estimated from few groups.
        self.critical = max(float(stats.t.isf(stats.norm.sf(furthest), self.df)), 1.0)

    def _hinge(self, place: int) -> np.ndarray:
        away = self.x - self.x[place]
        return np.stack([np.ones_like(away), np.minimum(away, 0), np.maximum(away, 0)], 1)

    def _slope(self, part: slice) -> np.ndarray:
        weights = np.zeros_like(self.x)
        centred = self.x[part] - self.x[part].mean()
        weights[part] = centred / (centred**2).sum()
        return weights

    def _best(self, curves: np.ndarray) -> np.ndarray:
        left_over = np.einsum("rl,klm,rm->rk", curves, self._residual, curves, optimize=True)
        return left_over.argmin(1)

    def breaks(self, curves: np.ndarray) -> np.ndarray:
        """Depth at which two lines fit each curve best."""
        return self.x[self.places[self._best(curves)]]

    def slopes(self, curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slopes left and right of each curve's break, and their standard deviations over groups: both `[curve, side]`."""
        best = self._best(curves)
        return np.einsum("rsl,rl->rs", self._two_lines[best], curves), self._slope_sd[best]

    def labels(self, curves: np.ndarray) -> np.ndarray:
        """The rule's label of each curve."""
        constant = (np.abs(curves @ self._pieces.T) / self._piece_sd).max(1) <= self.critical
        if self.band is not None:
            constant |= ((curves >= self.band[0]) & (curves <= self.band[1])).all(1)
        slopes, sd = self.slopes(curves)
        limit = stats.t.isf(ALPHA, self.df) * sd
        down, up = slopes < -limit, slopes > limit
        trend = curves @ self._slope(slice(None))
        found = np.where(trend > 0, "rising", "falling").astype(object)
        found[down[:, 0] & up[:, 1]] = "u"
        found[up[:, 0] & down[:, 1]] = "inverted_u"
        found[constant] = "flat"
        return found

    def evidence(self, observed: np.ndarray, curves: np.ndarray) -> pd.DataFrame:
        """What speaks for the label, one row per number."""
        slopes, sd = (a[0] for a in self.slopes(observed[None]))
        half = stats.t.isf(0.025, self.df) * sd
        rows: list[dict[str, Any]] = []
        for side, name in enumerate(("left", "right")):
            p = 2 * stats.t.sf(abs(slopes[side]) / max(sd[side], 1e-300), self.df)
            rows.append(
                _row(
                    f"slope {name} of the break (score per depth)",
                    slopes[side],
                    slopes[side] - half[side],
                    slopes[side] + half[side],
                    p,
                )
            )
        at = float(self.breaks(observed[None])[0])
        low, high = np.quantile(self.breaks(curves), [0.025, 0.975]).tolist()
        rows.append(_row("break (two lines, resampled groups)", at, low, high, np.nan))
        steepest = float((np.abs(self._pieces @ observed) / self._piece_sd).max())
        rows.append(
            _row(
                f"steepest piece in standard errors (above {self.critical:.2f}: not constant)",
                steepest,
                np.nan,
                np.nan,
                np.nan,
            )
        )
        if self.band is not None:
            outside = ((observed < self.band[0]) | (observed > self.band[1])).mean()
            rows.append(_row("share of layers outside the null band", outside, np.nan, np.nan, np.nan))
        return pd.DataFrame(rows + self._over_layers(observed, at))

    def _over_layers(self, observed: np.ndarray, at: float) -> list[dict[str, Any]]:
        """The same by textbook fits that take layers for independent; too sure by far, for comparison only."""
        import pwlf
        import statsmodels.api as sm

        fit: Any = sm.OLS(observed, self._hinge(int(np.abs(self.x - at).argmin()))).fit(cov_type="HC3")
        limits = fit.conf_int()
        rows = [
            _row(f"slope {name} of the break, layers as independent (HC3)", fit.params[i], *limits[i], fit.pvalues[i])
            for i, name in ((1, "left"), (2, "right"))
        ]
        pieces: Any = pwlf.PiecewiseLinFit(self.x, observed)
        try:
            place = float(pieces.fit_guess([at])[1])
            error = float(pieces.standard_errors(method="non-linear", step_size=1e-4)[-1])
        except (ValueError, np.linalg.LinAlgError):  # a straight line has no break
            place, error = float("nan"), float("nan")
        half = stats.t.isf(0.025, max(len(self.x) - 4, 1)) * error
        return [*rows, _row("break (pwlf), layers as independent", place, place - half, place + half, np.nan)]


def _row(evidence: str, *numbers: Any) -> dict[str, Any]:
    return {"evidence": evidence} | {
        k: float(v) for k, v in zip(("estimate", "low", "high", "p"), numbers, strict=True)
    }

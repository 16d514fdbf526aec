"""Arms of a tuning comparison side by side: size, score, what each keeps of the gain of tuning everything, and what differences could be seen.

Two numbers per arm that are easily confused: the share of the tuned model's *score* (the percentage that arXiv:2601.15906 reports) and the share
of its *gain* over the untuned model (retention). The first is high for an arm that learned nothing where the base is already good; the second is 0
for it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from lens_affect.results import Provenance, load_result, save_result
from lens_affect.tasks import SHARES, TaskScores
from lens_affect.tuned import Tuned

MEASURES = ("score", "log_share")
"""`score`: the task's own; `log_share`: log of the right label's share among all labels, in nats, finer than accuracy."""
POWER = 0.8
"""Chance of seeing a difference of the minimum detectable size."""


@dataclass(frozen=True)
class TwoWay:
    """A mean over seeds and groups of examples, with a t interval over both."""

    estimate: float
    """The mean."""
    low: float
    """Lower limit."""
    high: float
    """Upper limit."""
    detectable: float
    """Smallest true value that would differ from 0 (two-sided 5 %) with probability POWER."""
    p: float
    """Two-sided p that the mean is 0."""
    n_seeds: int
    """Seeds."""
    n_groups: int
    """Groups of examples."""


def two_way_interval(
    values: Float[np.ndarray, "seed example"], groups: Sequence[str], *, confidence: float = 0.95
) -> TwoWay:
    """Mean with an interval that holds for new seeds and new examples.

    The variance of the mean is the sum of the variance of seed means over their number and of that of group means (over seeds) over theirs; degrees
    of freedom after Welch and Satterthwaite. In simulations (200 examples, 1,500 draws) nominal 95 % intervals hold the truth in 97 % where seeds do not
    differ; where their standard deviation is 2.6 (7) times the standard error over examples, in 93 % (91 %) with 3 seeds, 95 % (93 %) with 5 and only
    90 % (87 %) with 2. With one seed it holds for that seed only.

    Args:
        values: finite values, one row per seed.
        groups: of the examples.
        confidence: level of the interval.

    Raises:
        ValueError: no values, or values that are not finite.

    Source: Satterthwaite (1946, doi:10.2307/3002019); Owen (2007, doi:10.1214/07-AOAS122) for crossed random effects.
    """
    if not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"received {values.shape} values, of which {int((~np.isfinite(values)).sum())} are not finite; leave those runs out"
        )
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(member)
    means = np.stack([np.bincount(member, row) / sizes for row in values])
    by_group, by_seed = means.mean(axis=0), means.mean(axis=1)
    parts = [(x.var(ddof=1) / len(x), len(x) - 1) for x in (by_group, by_seed) if len(x) > 1]
    total = sum(v for v, _ in parts)
    mean = float(by_group.mean())
    if not parts or not total:
        same = mean if parts else math.nan
        return TwoWay(mean, same, same, math.nan, math.nan, len(by_seed), len(by_group))
    freedom = total**2 / sum(v**2 / df for v, df in parts if v)
    error = math.sqrt(total)
    half = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * error
    detectable = float(stats.t.ppf(0.5 + confidence / 2, freedom) + stats.t.ppf(POWER, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return TwoWay(mean, mean - half, mean + half, detectable, p, len(by_seed), len(by_group))


@dataclass(frozen=True)
class ModuleTable:
    """Arms side by side."""

    arms: pd.DataFrame
    """One row per arm: arm, n_parameters, size_difference (trained over wanted weights, minus 1), share_of_parameters (of the reference's), n_seeds, n_exploded, score, low, high, gain, gain_low,
    gain_high, retention, retention_low, retention_high, percent_of_tuned, percent_low, percent_high, cpu_seconds, peak_megabytes."""
    contrasts: pd.DataFrame
    """One row per pair of arms: arm, other, difference in score (positive: arm is better), low, high, p, detectable."""
    runs: pd.DataFrame
    """One row per run: Tuned.to_frame with the arm's label."""
    base: float
    """Score of the untuned model."""
    reference: str
    """Arm that stands for tuning everything."""
    task: str
    """Task as a reader knows it."""
    metric: str
    """What scores are; for a loss, gains and differences are turned so that positive is better."""
    n_examples: int
    """Examples that every run was scored on."""
    provenance: Provenance
    """Of the first run."""

    def to_frame(self) -> pd.DataFrame:
        """One row per arm."""
        return self.arms.copy()

    def contrast(self, arm: str, other: str) -> pd.Series:
        """Row of one pair; turned around where it is stored the other way.

        Raises:
            ValueError: a pair that was not compared.
        """
        for a, b, sign in ((arm, other, 1), (other, arm, -1)):
            found = self.contrasts[(self.contrasts["arm"] == a) & (self.contrasts["other"] == b)]
            if len(found):
                row = found.iloc[0].copy()
                if sign < 0:
                    row["arm"], row["other"] = arm, other
                    row["difference"], row["low"], row["high"] = -row["difference"], -row["high"], -row["low"]
                return row
        raise ValueError(f"received the pair {arm!r} and {other!r}; arms are {list(self.arms['arm'])}")

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder; see results.save_result."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ModuleTable":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    @property
    def detectable(self) -> float:
        """True difference between two arms that this design sees four times out of five: median over the pairs, NaN without one."""
        return float(np.median(self.contrasts["detectable"].to_numpy(dtype=float))) if len(self.contrasts) else math.nan

    def _gains(self, ranked: Any) -> str:
        """What is told where there are no shares."""
        told = [
            f"{row['arm']} {row['gain']:+.3f} [{row['gain_low']:.3f}, {row['gain_high']:.3f}]"
            for row in ranked.to_dict("records")
            if math.isfinite(row["gain"])
        ]
        return f"no share of it, since {self.reference} gained nothing for certain; gains (95 %): {', '.join(told) or 'none'}"

    def __str__(self) -> str:
        ranked: Any = self.arms.sort_values("score", ascending=self.metric == "nats per token")
        kept = ", ".join(
            f"{row['arm']} {row['retention']:.2f} [{row['retention_low']:.2f}, {row['retention_high']:.2f}]"
            for row in ranked.to_dict("records")
            if row["arm"] != self.reference and math.isfinite(row["retention"])
        )
        best = [row["score"] for row in ranked.to_dict("records") if row["arm"] == self.reference]
        whole = f"{best[0]:.3f}" if best else "not there"
        seeds = ranked["n_seeds"].tolist()
        return (
            f"{self.provenance.title} on {self.task}: {self.metric} {self.base:.3f} untuned, {whole} with {self.reference}\n"
            f"{f'share of that gain (95 %): {kept}' if kept else self._gains(ranked)}\n"
            f"{self.n_examples} examples, {min(seeds)}-{max(seeds)} seeds per arm; "
            f"minimum detectable difference between two arms {self.detectable:.3f} (median, power {POWER:.0%})"
        )

    def _repr_html_(self) -> str:
        return self.arms.round(3).to_html(index=False)


def compare_arms(
    runs: Mapping[str, Sequence[Tuned]],
    *,
    reference: str,
    measure: str = "score",
    after: Mapping[str, Sequence[TaskScores]] | None = None,
    before: TaskScores | None = None,
    calibrated: bool = False,
) -> ModuleTable:
    """Put the runs of several arms side by side.

    Args:
        runs: label of an arm -> its runs, one per seed, all scored on the same examples.
        reference: label of the arm that tunes everything; retention is NaN where it is not among the arms or gained nothing for certain.
        measure: `score` or `log_share` (MEASURES).
        after: scores on another task with the same weights, one per run in the same order, instead of the task that was learned.
        before: scores of the untuned model on that task.
        calibrated: take label priors out of all scores, the untuned model's too (TaskScores.calibrated).

    Returns:
        The table. Runs that exploded are counted and left out.

    Raises:
        ValueError: no runs, runs on different examples, an unknown measure, or after without before.

    Source: percent of the tuned score as in arXiv:2601.15906; retention is ours.
    """
    if measure not in MEASURES:
        raise ValueError(f"received measure {measure!r}; allowed are {list(MEASURES)}")
    if (after is None) != (before is None):
        raise ValueError("received only one of after and before; scores on another task need both")
    if not runs or not all(runs.values()):
        raise ValueError("received an arm without runs, or no arm; pass at least one run of each")
    first = next(iter(runs.values()))[0]
    base = before or first.before
    base = base.calibrated() if calibrated else base
    sign = 1.0 if base.better == "high" or measure == "log_share" else -1.0
    origin = sign * _values(base, measure)
    groups = base.groups
    found: dict[str, dict[int, np.ndarray]] = {}
    for label, several in runs.items():
        scored = after[label] if after is not None else [run.after for run in several]
        found[label] = {}
        for run, scores in zip(several, scored, strict=True):
            if scores.provenance.stimuli_hash != base.provenance.stimuli_hash or scores.task != base.task:
                raise ValueError(
                    f"received {label!r}, seed {run.seed}, scored on other examples than the untuned model; score it on the same"
                )
            if not run.exploded:
                found[label][run.seed] = sign * _values(scores.calibrated() if calibrated else scores, measure)
    metric = base.metric if measure == "score" else "log share of the right label"
    rows = [
        _row(label, several, found, origin, groups, reference, sign, metric in SHARES)
        for label, several in runs.items()
    ]
    labelled = [run.to_frame().assign(label=label) for label, several in runs.items() for run in several]
    return ModuleTable(
        arms=_with_shares(pd.DataFrame(rows), reference),
        contrasts=_contrasts(found, groups),
        runs=pd.concat(labelled, ignore_index=True),
        base=float(_values(base, measure).mean()),
        reference=reference,
        task=base.title,
        metric=metric,
        n_examples=len(groups),
        provenance=first.provenance,
    )


def _values(scores: TaskScores, measure: str) -> Float[np.ndarray, " example"]:
    values = scores.values if measure == "score" else scores.gold_log_probability()
    return values.double().numpy()


def _paired(a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """Values of two arms at the seeds that both have; None where there is none. Seeds are paired: they share batches."""
    seeds = sorted(set(a) & set(b))
    return (np.stack([a[s] for s in seeds]), np.stack([b[s] for s in seeds])) if seeds else None


def _row(
    label: str,
    runs: Sequence[Tuned],
    found: Mapping[str, Mapping[int, np.ndarray]],
    base: Float[np.ndarray, " example"],
    groups: Sequence[str],
    reference: str,
    sign: float,
    share: bool,
) -> dict[str, Any]:
    mine = found[label]
    row: dict[str, Any] = {
        "arm": label,
        "n_parameters": float(np.mean([run.arm.n_parameters for run in runs])),
        "size_difference": float(np.mean([run.arm.difference for run in runs])),
        "n_seeds": len(mine),
        "n_exploded": sum(run.exploded for run in runs),
        "cpu_seconds": float(np.mean([run.cpu_seconds for run in runs])),
        "peak_megabytes": float(np.mean([run.peak_megabytes for run in runs])),
    }
    names = ("score", "gain", "retention", "percent_of_tuned")
    row |= dict.fromkeys([f for n in names for f in (n, *_limits(n))], math.nan)
    if not mine:
        return row
    values = np.stack(list(mine.values()))
    score, gain = two_way_interval(values, groups), two_way_interval(values - base, groups)
    ends = sorted((sign * score.low, sign * score.high))
    if (
        share
    ):  # few seeds and examples give wide t intervals; no share lies beyond 0 and 1, so the cut takes nothing true away
        ends = [min(max(end, 0.0), 1.0) for end in ends]
    row |= {"score": sign * score.estimate, "low": ends[0], "high": ends[1]}
    row |= {"gain": gain.estimate, "gain_low": gain.low, "gain_high": gain.high}
    whole = _paired(mine, found.get(reference, {}))
    if whole is not None:
        arm, all_ = whole
        origin = base[None]
        if two_way_interval(all_ - origin, groups).low > 0:
            row |= _ratio("retention", arm - origin, all_ - origin, groups)
        if sign > 0 and all_.mean() > 0:
            row |= _ratio("percent_of_tuned", 100 * arm, all_, groups)
    return row


def _limits(name: str) -> tuple[str, str]:
    if name == "score":
        return "low", "high"
    short = "percent" if name == "percent_of_tuned" else name
    return f"{short}_low", f"{short}_high"


def _ratio(
    name: str, top: Float[np.ndarray, "seed example"], bottom: Float[np.ndarray, "seed example"], groups: Sequence[str]
) -> dict[str, float]:
    return dict(zip((name, *_limits(name)), two_way_ratio(top, bottom, groups), strict=True))


def two_way_ratio(
    top: Float[np.ndarray, "seed example"], bottom: Float[np.ndarray, "seed example"], groups: Sequence[str]
) -> tuple[float, float, float]:
    """Ratio of two means over seeds and groups of examples with its limits (linear approximation, the delta method).

    Args:
        top: finite values, one row per seed.
        bottom: the same; its mean should lie far from 0.
        groups: of the examples.
    """
    below = two_way_interval(bottom, groups).estimate
    ratio = two_way_interval(top, groups).estimate / below
    around = two_way_interval((top - ratio * bottom) / below, groups)
    return ratio, ratio + around.low, ratio + around.high


def _with_shares(arms: pd.DataFrame, reference: str) -> pd.DataFrame:
    whole = arms.loc[arms["arm"] == reference, "n_parameters"]
    share = arms["n_parameters"] / whole.iloc[0] if len(whole) and whole.iloc[0] else math.nan
    arms.insert(2, "share_of_parameters", share)
    columns = [
        "arm",
        "n_parameters",
        "size_difference",
        "share_of_parameters",
        "n_seeds",
        "n_exploded",
        "score",
        "low",
        "high",
    ]
    columns += ["gain", "gain_low", "gain_high", "retention", "retention_low", "retention_high"]
    columns += ["percent_of_tuned", "percent_low", "percent_high", "cpu_seconds", "peak_megabytes"]
    return pd.DataFrame(arms[columns])


def _contrasts(found: Mapping[str, Mapping[int, np.ndarray]], groups: Sequence[str]) -> pd.DataFrame:
    rows = []
    labels = list(found)
    for i, arm in enumerate(labels):
        for other in labels[i + 1 :]:
            both = _paired(found[arm], found[other])
            if both is not None:
                d = two_way_interval(both[0] - both[1], groups)
                rows.append(
                    {
                        "arm": arm,
                        "other": other,
                        "difference": d.estimate,
                        "low": d.low,
                        "high": d.high,
                        "p": d.p,
                        "detectable": d.detectable,
                        "n_seeds": d.n_seeds,
                    }
                )
    columns = ["arm", "other", "difference", "low", "high", "p", "detectable", "n_seeds"]
    return pd.DataFrame(rows, columns=columns)


def learning_curves(runs: Mapping[str, Sequence[Tuned]]) -> pd.DataFrame:
    """Validation loss by step and run: columns arm, seed, step, train_loss, validation_loss, validation_exact.

    Args:
        runs: as for `compare_arms`.
    """
    several = [
        run.curve.assign(arm=label, seed=run.seed) for label, found in runs.items() for run in found if len(run.curve)
    ]
    columns = ["arm", "seed", "step", "train_loss", "validation_loss", "validation_exact"]
    return pd.DataFrame(pd.concat(several, ignore_index=True)[columns]) if several else pd.DataFrame(columns=columns)


@dataclass(frozen=True)
class LearningCurves:
    """Curves as they are drawn, for the numbers beside a figure (save_figure)."""

    curves: pd.DataFrame
    """Of learning_curves."""
    provenance: Provenance
    """Of the first run."""
    column: str = "validation_loss"
    """What is drawn."""

    def to_frame(self) -> pd.DataFrame:
        """Mean over seeds by arm and step, with the lowest and highest seed: columns arm, step, mean, lowest, highest."""
        return mean_curve(self.curves, self.column).dropna()


def load_runs(folder: str | os.PathLike[str]) -> dict[str, Tuned]:
    """All finished runs of a campaign by folder name (analyses/tune_arms.py): every subfolder with a `tuned` result in it.

    Args:
        folder: of the campaign.

    Raises:
        FileNotFoundError: no finished run is there.
    """
    place = Path(folder)
    found = {p.parent.parent.name: Tuned.load(p.parent) for p in sorted(place.glob("*/tuned/manifest.json"))}
    if not found:
        raise FileNotFoundError(f"received {place}, which holds no finished run; run analyses/tune_arms.py first")
    return found


def mean_curve(curves: pd.DataFrame, column: str = "validation_loss") -> pd.DataFrame:
    """Mean over seeds by arm and step, with the lowest and highest seed: columns arm, step, mean, lowest, highest."""
    found = curves.groupby(["arm", "step"], sort=False)[column].agg(["mean", "min", "max"]).reset_index()
    return found.rename(columns={"min": "lowest", "max": "highest"})

"""Verification: does steering make a text express the emotion, and does a random push of the same strength not?

The paper's criterion asks only whether an external classifier's probability of the target rises above that of the unsteered text. A coin rises in
half of the scenarios, so its count means nothing alone: here random directions of the same strength are judged by the same criterion on the same
scenarios, and the difference is the result. Where the sweep also pushed along other emotions, their successes stand beside it: is it this emotion, or
any? A strict criterion asks that the target becomes the emotion on top while the text stays sound.
"""

import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from lens_affect.doses import UNSTEERED, DoseResponse
from lens_affect.judgements import Judgement
from lens_affect.regimes import Thresholds, damage_labels
from lens_affect.results import Provenance, load_result, save_result
from lens_affect.scenarios import Scenarios
from lens_affect.statistics import Interval, clustered_mean

CRITERIA = {
    "rises": "the judge's probability of the target is higher than for the unsteered text (arXiv:2604.04064, as far as it is public)",
    "strict": "the target is the judge's emotion on top, and the text is sound (regimes.DAMAGE)",
}
"""What counts as a success."""
CONTROLLED = ("random", "other")
"""What successes are set against: random directions, and directions of other emotions where the sweep has them."""


@dataclass(frozen=True)
class Verification:
    """Successes of steering and of random directions, scenario by scenario."""

    table: pd.DataFrame
    """One row per scenario and strength: prompt (number), emotion, pull, group, strength, p_unsteered, p_steered, p_random (mean over random directions;
    probabilities of the target), sound, top, change, change_random, change_other, and for each of CRITERIA the success (0 or 1; NaN where there is no text
    to judge it by), `<criterion>_random`, the share of random directions that succeed, and `<criterion>_other`, of the push along another emotion (NaN where
    the sweep has none)."""
    strength: float
    """The strength that the printed result is about, declared before."""
    n_random: int
    """Random directions per scenario."""
    left_out: tuple[str, ...]
    """Targets that the judge cannot name, or not well enough: their scenarios are in no count."""
    thresholds: Thresholds
    """What made a text sound."""
    judge: str
    """Title of the judge."""
    name: str
    """Name of the scenarios."""
    provenance: Provenance
    """Of the dose-response."""

    def difference(
        self, criterion: str = "rises", strength: float | None = None, *, control: str = "random"
    ) -> Interval:
        """Success under steering minus share of successes under a control, mean over scenarios with a 95 % interval over topics.

        Args:
            criterion: one of CRITERIA.
            strength: one that was run; the declared one by default.
            control: `random`, or `other` for directions of other emotions.

        Raises:
            ValueError: an unknown criterion or control, or a strength that was not run.
        """
        rows = self._rows(criterion, strength)
        if control not in CONTROLLED or not np.isfinite(rows[f"{criterion}_{control}"].to_numpy(float)).any():
            raise ValueError(
                f"received control={control!r}; allowed are {list(CONTROLLED)}, 'other' where the sweep had controls=('random', 'other_emotion')"
            )
        return _mean_of_known(
            rows[criterion].to_numpy(float) - rows[f"{criterion}_{control}"].to_numpy(float), rows["group"].tolist()
        )

    def successes(self, criterion: str = "rises", strength: float | None = None) -> tuple[int, int]:
        """Successes, and scenarios that count.

        Raises:
            ValueError: an unknown criterion, or a strength that was not run.
        """
        rows = self._rows(criterion, strength)
        return int(rows[criterion].to_numpy(float).sum()), len(rows)

    def _rows(self, criterion: str, strength: float | None) -> pd.DataFrame:
        if criterion not in CRITERIA:
            raise ValueError(f"received criterion={criterion!r}; allowed are {list(CRITERIA)}")
        at = self.strength if strength is None else strength
        found = pd.DataFrame(self.table[self.table["strength"] == at])
        if found.empty:
            raise ValueError(f"received strength {at}; allowed are {sorted(set(self.table['strength']))}")
        return found.dropna(subset=[criterion, f"{criterion}_random"])

    def to_frame(self) -> pd.DataFrame:
        """One row per strength, criterion and pull (`all` first): successes, n, rate with Wilson limits, random (share of random directions that succeed),
        difference with its 95 % limits over topics, other and difference_other (the same for directions of other emotions; NaN without), gain (mean rise of the
        target's probability above random) with limits, change, change_random and change_other (mean achieved change of the residual stream), n_without (no text
        to judge)."""
        pulls = ["all", *(p for p in dict.fromkeys(self.table["pull"]) if p)]
        rows = []
        for strength in dict.fromkeys(self.table["strength"]):
            for criterion in CRITERIA:
                for pull in pulls if len(pulls) > 2 else pulls[:1]:
                    at = (self.table["strength"] == strength) & ((self.table["pull"] == pull) | (pull == "all"))
                    rows.append(
                        {"strength": strength, "criterion": criterion, "pull": pull}
                        | _summary(pd.DataFrame(self.table[at]), criterion)
                    )
        return pd.DataFrame(rows)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Verification":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        summary = self.to_frame()
        own = summary[(summary["strength"] == self.strength) & (summary["pull"] == "all")]
        lines = [
            f"{self.provenance.title}, {self.name}, strength {self.strength:+g}, judge: {self.judge}, {self.n_random} random directions per scenario; achieved change "
            f"{np.mean(own['change']):.2f}, random {np.mean(own['change_random']):.2f}"
        ]
        for row in pd.DataFrame(own).to_dict("records"):
            lines.append(
                f"{row['criterion']}: {row['successes']} of {row['n']} ({row['rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}]), random {row['random']:.2f}, "
                f"difference {row['difference']:+.2f} [{row['difference_low']:+.2f}, {row['difference_high']:+.2f}] over topics"
                + (
                    f"; another emotion {row['other']:.2f}, difference {row['difference_other']:+.2f} [{row['difference_other_low']:+.2f}, "
                    f"{row['difference_other_high']:+.2f}]"
                    if math.isfinite(row["other"])
                    else ""
                )
            )
        without = int(np.max(own["n_without"]))
        if without or self.left_out:
            lines.append(
                f"{without} scenarios without a text to judge; targets left out: {', '.join(self.left_out) or 'none'}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, border=0, float_format="{:.2f}".format)
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{table}"


def _summary(rows: pd.DataFrame, criterion: str) -> dict[str, Any]:
    from statsmodels.stats.proportion import proportion_confint

    known = rows.dropna(subset=[criterion, f"{criterion}_random"])
    n, successes = len(known), int(known[criterion].to_numpy(float).sum())
    found: dict[str, Any] = {"successes": successes, "n": n, "n_without": len(rows) - n}
    limits: Any = proportion_confint(successes, n, method="wilson") if n else (math.nan, math.nan)
    found |= {"rate": successes / n if n else math.nan, "low": float(limits[0]), "high": float(limits[1])}
    found["random"] = _mean(known[f"{criterion}_random"].to_numpy(float))
    found["other"] = _mean(known[f"{criterion}_other"].to_numpy(float))
    found |= {name: _mean(rows[name].to_numpy(float)) for name in ("change", "change_random", "change_other")}
    groups = known["group"].tolist()
    effects = {
        "difference": known[criterion].to_numpy(float) - known[f"{criterion}_random"].to_numpy(float),
        "difference_other": known[criterion].to_numpy(float) - known[f"{criterion}_other"].to_numpy(float),
        "gain": known["p_steered"].to_numpy(float) - known["p_random"].to_numpy(float),
    }
    for name, values in effects.items():
        interval = _mean_of_known(values, groups)
        found |= {
            name: float(interval.estimate),
            f"{name}_low": float(interval.low),
            f"{name}_high": float(interval.high),
        }
    return found


def verify_steering(
    dose: DoseResponse,
    judgement: Judgement,
    *,
    strength: float | None = None,
    scenarios: Scenarios | None = None,
    thresholds: Thresholds | None = None,
    every_target: bool = False,
) -> Verification:
    """Count the scenarios in which steering works, beside random directions under the same criterion.

    Args:
        dose: of sweep_strengths with emotions=None (each scenario steered to its own target) and random directions, five or more per scenario.
        judgement: of `dose.texts`, in that order.
        strength: the one that the result is about; declare it before looking. By default the smallest positive one.
        scenarios: what was continued, for counts per pull (with or against the target).
        thresholds: of the strict criterion; by default Thresholds.of(dose).
        every_target: also count targets whose measured AUC of the judge is below judge_labels.MINIMUM_AUC, or was not measured.

    Returns:
        Counts with Wilson intervals, and differences from random directions with intervals over topics.

    Raises:
        ValueError: no random directions, a judgement of other texts, other scenarios, a strength that was not run, or no target that counts.

    Source: arXiv:2604.04064 reports 37 of 40 scenarios by an external classifier, without a control.
    """
    _check(dose, judgement, scenarios)
    positive = [s for s in dose.strengths if s > 0]
    at = strength if strength is not None else (positive or list(dose.strengths))[0]
    if at not in dose.strengths:
        raise ValueError(f"received strength {at}; allowed are {list(dose.strengths)}")
    counted = [e for e in dose.emotions if e in (judgement.emotions if every_target else judgement.reliable)]
    if not counted:
        raise ValueError(
            f"received targets {list(dose.emotions)}; {judgement.title} was measured good enough for {list(judgement.reliable)}: use another judge, or "
            "every_target=True"
        )
    limits = thresholds or Thresholds.of(dose)
    sound = damage_labels(dose, limits) == "sound"
    columns = {name: dose.column(name) for name in ("kind", "emotion", "strength", "prompt", "change", "group")}
    plain = np.flatnonzero(columns["kind"] == UNSTEERED[0])
    probabilities = {e: judgement.probability(e).double().numpy() for e in counted}
    rows = []
    for row in np.flatnonzero((columns["kind"] == "steered") & np.isin(columns["emotion"], counted)).tolist():
        emotion, prompt = str(columns["emotion"][row]), int(columns["prompt"][row])
        same = (columns["prompt"] == prompt) & (columns["strength"] == columns["strength"][row])
        random = np.flatnonzero((columns["kind"] == "random") & same)
        other = np.flatnonzero((columns["kind"] == "other_emotion") & same & (columns["emotion"] == emotion))
        probability = probabilities[emotion]
        before = float(probability[plain[columns["prompt"][plain] == prompt]][0])
        found = _scenario(probability, before, judgement, emotion, row, (random, other), sound)
        rows.append(
            {
                "prompt": prompt,
                "emotion": emotion,
                "pull": "" if scenarios is None else scenarios.pulls[prompt],
                "group": str(columns["group"][row]),
                "strength": float(columns["strength"][row]),
                "change": float(columns["change"][row]),
                "change_random": _mean(columns["change"][random].astype(float)),
                "change_other": _mean(columns["change"][other].astype(float)),
            }
            | found
        )
    n_random = min(
        np.unique(columns["prompt"][(columns["kind"] == "random") & (columns["strength"] == at)], return_counts=True)[1]
    )
    return Verification(
        table=pd.DataFrame(rows),
        strength=at,
        n_random=int(n_random),
        left_out=tuple(e for e in dose.emotions if e not in counted),
        thresholds=limits,
        judge=judgement.title,
        name=dose.name,
        provenance=dose.provenance,
    )


def _check(dose: DoseResponse, judgement: Judgement, scenarios: Scenarios | None) -> None:
    if "random" not in dose.kinds:
        raise ValueError(
            f"received a dose-response with {list(dose.kinds)}; a success rate needs random directions: sweep with controls=('random',)"
        )
    if len(judgement.probabilities) != len(dose.table):
        raise ValueError(
            f"received a judgement of {len(judgement.probabilities)} texts for {len(dose.table)}; use judge_texts(judge, dose.texts)"
        )
    if scenarios is not None and dose.prompts not in (scenarios.requests, scenarios.openings):
        raise ValueError(
            f"received {len(scenarios)} scenarios that are not the {len(dose.prompts)} prompts of the sweep"
        )


def _scenario(
    probability: Float[np.ndarray, " text"],
    before: float,
    judgement: Judgement,
    emotion: str,
    row: int,
    controls: tuple[Int[np.ndarray, " random"], Int[np.ndarray, " other"]],
    sound: np.ndarray,
) -> dict[str, object]:
    def rises(rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, " text"]:
        values = probability[np.asarray(rows, dtype=int)]
        return np.where(np.isnan(values) | math.isnan(before), np.nan, (values > before).astype(float))

    # An empty text does not express anything: under the strict criterion it fails rather than being left out.
    def strict(rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, " text"]:
        return np.array([float(judgement.top[i] == emotion and bool(sound[i])) for i in rows])

    random, other = controls
    exact = judgement.matches[judgement.emotions.index(emotion)] == "exact"
    return {
        "p_unsteered": before,
        "p_steered": float(probability[row]),
        "p_random": _mean(probability[random]),
        "sound": bool(sound[row]),
        "top": judgement.top[row],
        "rises": float(rises([row])[0]),
        "rises_random": _mean(rises(random)),
        "rises_other": _mean(rises(other)),
        "strict": float(strict([row])[0]) if exact else math.nan,
        "strict_random": _mean(strict(random)) if exact else math.nan,
        "strict_other": _mean(strict(other)) if exact else math.nan,
    }


def _mean_of_known(values: Float[np.ndarray, " scenario"], groups: Sequence[Any]) -> Interval:
    known = np.isfinite(values)
    return clustered_mean(values[known], [g for g, k in zip(groups, known, strict=True) if k])


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan

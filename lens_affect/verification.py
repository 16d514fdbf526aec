"""Verification: does steering make a text express the emotion, and does a random push of the same strength not?

The paper's criterion asks only whether an external classifier's probability of the target rises above that of the unsteered text. A coin rises in
half of the scenarios, so its count means nothing alone: here random directions of the same strength are judged by the same criterion on the same
scenarios, and the difference is the result. Isotropic directions may break a text that an emotion's direction of equal change leaves whole, so the shares of
sound texts stand beside the counts; random directions within the spread of the emotions' vectors break it less. Where the sweep also pushed along other
emotions, their successes stand beside it: is it this emotion, or any? A strict criterion asks that the target becomes the emotion on top while the text stays
sound.
"""

import html
import math
import os
from collections.abc import Mapping, Sequence
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
CONTROLLED = {"random": "random", "spread": "random_in_spread", "other": "other_emotion"}
"""What successes are set against, with the kind of text behind it (doses.CONTROLS); one of the first two is needed."""
WORDS = {"random": "random", "spread": "random in the emotions' spread", "other": "another emotion"}
"""Controls in words."""


@dataclass(frozen=True)
class Verification:
    """Successes of steering and of random directions, scenario by scenario."""

    table: pd.DataFrame
    """One row per scenario and strength: prompt (number), emotion, pull, group, strength, p_unsteered, p_steered (probabilities of the target), top, sound, change, kl,
    and for each of CRITERIA the success (0 or 1; NaN where there is no text to judge it by). For each of CONTROLLED `p_<control>`, `sound_<control>` (share),
    `change_<control>`, `kl_<control>` and `<criterion>_<control>` (share that succeeds): means over its directions, NaN where the sweep has none."""
    strength: float
    """The strength that the printed result is about, declared before."""
    n_random: int
    """Random directions per scenario (of `random`, or of `random_in_spread` where that stands in its place)."""
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

    @property
    def controls(self) -> tuple[str, ...]:
        """Those of CONTROLLED that the sweep had; the first is what the printed difference is taken from."""
        return tuple(c for c in CONTROLLED if np.isfinite(_column(self.table, f"rises_{c}")).any())

    @property
    def _first(self) -> str:
        return self.controls[0] if self.controls else "random"

    def difference(
        self, criterion: str = "rises", strength: float | None = None, *, control: str | None = None
    ) -> Interval:
        """Success under steering minus share of successes under a control, mean over scenarios with a 95 % interval over topics.

        Args:
            criterion: one of CRITERIA.
            strength: one that was run; the declared one by default.
            control: `random`, `spread` for random directions within the emotions' spread, or `other` for directions of other emotions; the first that
                there is by default.

        Raises:
            ValueError: an unknown criterion or control, or a strength that was not run.
        """
        rows, chosen = self._rows(criterion, strength), control or self._first
        if chosen not in self.controls:
            raise ValueError(
                f"received control={control!r}; allowed are {list(self.controls)}, which this sweep had: {CONTROLLED} are swept by sweep_strengths(controls=...)"
            )
        return _mean_of_known(
            rows[criterion].to_numpy(float) - _column(rows, f"{criterion}_{chosen}"), rows["group"].tolist()
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
        return _judged(found, criterion, self._first)

    def to_frame(self) -> pd.DataFrame:
        """One row per strength, criterion and pull (`all` first): successes, n, rate with Wilson limits; random, spread and other (shares of each control's directions
        that succeed; NaN without); difference (from the first of `controls`), difference_spread and difference_other with 95 % limits over topics; gain (mean
        rise of the target's probability above the first control) with limits; sound (share of sound texts), kl (mean, nats per token) and change (mean achieved
        change of the residual stream) of the steered texts and, with `_random`, `_spread` and `_other` behind, of the controls; n_without (no text to judge)."""
        pulls = ["all", *(p for p in dict.fromkeys(self.table["pull"]) if p)]
        rows = []
        for strength in dict.fromkeys(self.table["strength"]):
            for criterion in CRITERIA:
                for pull in pulls if len(pulls) > 2 else pulls[:1]:
                    at = (self.table["strength"] == strength) & ((self.table["pull"] == pull) | (pull == "all"))
                    rows.append(
                        {"strength": strength, "criterion": criterion, "pull": pull}
                        | _summary(pd.DataFrame(self.table[at]), criterion, self._first)
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
        own = pd.DataFrame(summary[(summary["strength"] == self.strength) & (summary["pull"] == "all")])
        first = self._first

        def beside(name: str, digits: int = 2) -> str:
            """One measure of the steered texts and of each control."""
            values = {"": "", **{f"_{c}": f"{WORDS[c]} " for c in self.controls}}
            means = {k: float(np.mean(own[name + k].to_numpy(float))) for k in values}
            return ", ".join(f"{words}{means[k]:.{digits}f}" for k, words in values.items() if math.isfinite(means[k]))

        lines = [
            f"{self.provenance.title}, {self.name}, strength {self.strength:+g}, judge: {self.judge}, {self.n_random} random directions per scenario; achieved change "
            f"{beside('change')}",
            f"sound texts {beside('sound')}" + (f"; KL {beside('kl')} nats per token" if beside("kl") else ""),
        ]
        for row in own.to_dict("records"):
            parts = []
            for control in self.controls:
                name = "difference" if control == first else f"difference_{control}"
                parts.append(
                    f"{WORDS[control]} {row[control]:.2f}, difference {row[name]:+.2f} [{row[f'{name}_low']:+.2f}, {row[f'{name}_high']:+.2f}]"
                    + (" over topics" if control == first else "")
                )
            lines.append(
                f"{row['criterion']}: {row['successes']} of {row['n']} ({row['rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}]), {'; '.join(parts)}"
            )
        without = int(np.max(own["n_without"].to_numpy(int)))
        if without or self.left_out:
            lines.append(
                f"{without} scenarios without a text to judge; targets left out: {', '.join(self.left_out) or 'none'}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, border=0, float_format="{:.2f}".format)
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{table}"


def _column(table: pd.DataFrame, name: str) -> Float[np.ndarray, " row"]:
    """A column as numbers; NaN where a table that was saved earlier has none."""
    return table[name].to_numpy(float) if name in table else np.full(len(table), math.nan)


def _judged(rows: pd.DataFrame, criterion: str, control: str) -> pd.DataFrame:
    """Scenarios whose text and whose control's texts can be judged."""
    return pd.DataFrame(
        rows[np.isfinite(_column(rows, criterion)) & np.isfinite(_column(rows, f"{criterion}_{control}"))]
    )


def _summary(rows: pd.DataFrame, criterion: str, first: str) -> dict[str, Any]:
    """What stands in a row of Verification.to_frame; `first` is the control that the difference is taken from."""
    from statsmodels.stats.proportion import proportion_confint

    known = _judged(rows, criterion, first)
    n, successes = len(known), int(known[criterion].to_numpy(float).sum())
    found: dict[str, Any] = {"successes": successes, "n": n, "n_without": len(rows) - n}
    limits: Any = proportion_confint(successes, n, method="wilson") if n else (math.nan, math.nan)
    found |= {"rate": successes / n if n else math.nan, "low": float(limits[0]), "high": float(limits[1])}
    found |= {control: _mean(_column(known, f"{criterion}_{control}")) for control in CONTROLLED}
    kinds = ("", *(f"_{control}" for control in CONTROLLED))
    found |= {name + kind: _mean(_column(rows, name + kind)) for name in ("sound", "kl", "change") for kind in kinds}
    groups, success = known["group"].tolist(), _column(known, criterion)
    effects = {"difference": success - _column(known, f"{criterion}_{first}")}
    effects |= {f"difference_{c}": success - _column(known, f"{criterion}_{c}") for c in ("spread", "other")}
    effects["gain"] = _column(known, "p_steered") - _column(known, f"p_{first}")
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
        dose: of sweep_strengths with emotions=None (each scenario steered to its own target) and random directions (`random`, `random_in_spread` or both), five
            or more per scenario.
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
    columns = {name: dose.column(name) for name in ("kind", "emotion", "strength", "prompt", "change", "kl", "group")}
    plain = np.flatnonzero(columns["kind"] == UNSTEERED[0])
    probabilities = {e: judgement.probability(e).double().numpy() for e in counted}
    rows = []
    for row in np.flatnonzero((columns["kind"] == "steered") & np.isin(columns["emotion"], counted)).tolist():
        emotion, prompt = str(columns["emotion"][row]), int(columns["prompt"][row])
        same = (columns["prompt"] == prompt) & (columns["strength"] == columns["strength"][row])
        # Random texts serve every emotion and have none of their own.
        mine = same & np.isin(columns["emotion"], ("", emotion))
        beside = {c: np.flatnonzero((columns["kind"] == kind) & mine) for c, kind in CONTROLLED.items()}
        probability = probabilities[emotion]
        before = float(probability[plain[columns["prompt"][plain] == prompt]][0])
        found = _scenario(probability, before, judgement, emotion, row, beside, sound)
        for name in ("change", "kl"):
            found[name] = float(columns[name][row])
            found |= {f"{name}_{c}": _mean(columns[name][at_once].astype(float)) for c, at_once in beside.items()}
        rows.append(
            {
                "prompt": prompt,
                "emotion": emotion,
                "pull": "" if scenarios is None else scenarios.pulls[prompt],
                "group": str(columns["group"][row]),
                "strength": float(columns["strength"][row]),
            }
            | found
        )
    first = "random" if "random" in dose.kinds else CONTROLLED["spread"]
    n_random = min(
        np.unique(columns["prompt"][(columns["kind"] == first) & (columns["strength"] == at)], return_counts=True)[1]
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
    if not {"random", CONTROLLED["spread"]} & set(dose.kinds):
        raise ValueError(
            f"received a dose-response with {list(dose.kinds)}; a success rate needs random directions: sweep with controls=('random', 'other_emotion')"
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
    controls: Mapping[str, Int[np.ndarray, "_"]],
    sound: np.ndarray,
) -> dict[str, Any]:
    def rises(rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, " text"]:
        values = probability[np.asarray(rows, dtype=int)]
        return np.where(np.isnan(values) | math.isnan(before), np.nan, (values > before).astype(float))

    # An empty text does not express anything: under the strict criterion it fails rather than being left out.
    def strict(rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, " text"]:
        return np.array([float(judgement.top[i] == emotion and bool(sound[i])) for i in rows])

    exact = judgement.matches[judgement.emotions.index(emotion)] == "exact"
    found: dict[str, Any] = {"p_unsteered": before, "p_steered": float(probability[row]), "top": judgement.top[row]}
    found |= {"sound": bool(sound[row]), "rises": float(rises([row])[0])}
    found["strict"] = float(strict([row])[0]) if exact else math.nan
    for name, rows in controls.items():
        found |= {f"p_{name}": _mean(probability[rows]), f"sound_{name}": _mean(sound[rows].astype(float))}
        found |= {f"rises_{name}": _mean(rises(rows)), f"strict_{name}": _mean(strict(rows)) if exact else math.nan}
    return found


def _mean_of_known(values: Float[np.ndarray, " scenario"], groups: Sequence[Any]) -> Interval:
    known = np.isfinite(values)
    return clustered_mean(values[known], [g for g, k in zip(groups, known, strict=True) if k])


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan

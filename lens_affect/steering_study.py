"""A steering study: texts at every dose, what a judge reads in them, their regimes and scripts, and in how many scenarios steering works.

One call and one folder for what otherwise takes five; a report and a scorecard read the folder without a model.
"""

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens_affect.adapter import LensModel
from lens_affect.boundaries import RegimeBoundaries, compare_onsets, locate_boundaries
from lens_affect.crosslingual import ScriptTable, script_entanglement
from lens_affect.doses import UNSTEERED, DoseResponse, sweep_strengths
from lens_affect.inside import InsideOutside, correlate_inside
from lens_affect.judgements import Judgement, judge_texts
from lens_affect.judges import Judge
from lens_affect.languages import TransferTable
from lens_affect.meaning import MeaningTable, foreign_meaning
from lens_affect.regimes import RegimeMap, classify_regimes, in_words
from lens_affect.scenarios import Scenarios, load_scenarios
from lens_affect.scripts import script_shares, text_languages
from lens_affect.statistics import cluster_means, mean_interval
from lens_affect.vectors import EmotionVectors
from lens_affect.verification import Verification, verify_steering

EMOTIONS = ("happy", "sad", "afraid", "angry")
"""Targets on neutral prompts: four that every judge of ours can name, one of each quadrant but the quiet pleasant one."""
VERIFIED_AT = (0.2, 0.4)
"""Strengths at which the scenarios are continued; the first is the declared one, the second for comparison."""
PARTS: dict[str, type] = {
    "dose": DoseResponse,
    "judgement": Judgement,
    "regimes": RegimeMap,
    "scenario_dose": DoseResponse,
    "scenario_judgement": Judgement,
    "verification": Verification,
    "scripts": ScriptTable,
    "meaning": MeaningTable,
    "transfer": TransferTable,
    "inside": InsideOutside,
}
"""Parts of a study, each a folder; all but the first three may be missing."""
LANGUAGES = ("English", "Chinese", "Spanish", "French", "German", "Japanese", "Russian", "Arabic", "Hindi")
"""Languages between which lingua chooses: English, and those of our word lists."""
CONFIDENT = 0.8
"""Smallest probability (among the candidates) at which a text counts as being in a language."""
BOUNDARIES = "boundaries"
"""Folder with one more part per emotion that was bisected."""


@dataclass(frozen=True)
class SteeringStudy:
    """Everything that was asked about pushing one model."""

    dose: DoseResponse
    """Texts on neutral prompts."""
    judgement: Judgement
    """Of these texts."""
    regimes: RegimeMap
    """Of their cells."""
    scenario_dose: DoseResponse | None = None
    """Texts on the scenarios, each steered to its own target."""
    scenario_judgement: Judgement | None = None
    """Of those texts."""
    verification: Verification | None = None
    """Successes against random directions."""
    scripts: ScriptTable | None = None
    """Scripts of the tokens that the vectors raise, at the steered layer."""
    meaning: MeaningTable | None = None
    """Whether foreign tokens among them mean the emotion."""
    transfer: TransferTable | None = None
    """Whether vectors of one language tell emotions apart in another (language_transfer)."""
    inside: InsideOutside | None = None
    """Whether what the judge reads in the texts goes with what other vectors of the model read in them."""
    boundaries: tuple[RegimeBoundaries, ...] = ()
    """Strengths at which the regime of an emotion changes, by bisection, where that was asked."""

    def script_table(self) -> pd.DataFrame:
        """Scripts of the texts, dose by dose: kind, strength, then one column per script with its mean share of letters, texts_with_foreign (share of texts with a
        letter that is not Latin) with `_low` and `_high` (95 %, t over groups of prompts), n."""
        shares = script_shares(self.dose.texts)
        names = [c for c in shares.columns if c != "n_letters"]
        foreign = shares[[c for c in names if c not in ("Latin", "Common")]].sum(axis=1).to_numpy() > 0
        return self._by_dose(pd.DataFrame(shares[names]), foreign, "texts_with_foreign")

    def language_table(self, candidates: Sequence[str] = LANGUAGES) -> pd.DataFrame:
        """Languages of the texts, dose by dose, as lingua names them: kind, strength, one column per language with its share of texts, `undecided` (empty texts, and
        those below CONFIDENT: noise has no language), texts_in_foreign (share in a language other than English) with `_low` and `_high` (95 %, t over groups of
        prompts), n.

        Args:
            candidates: English names of languages to choose between.

        Raises:
            ModuleNotFoundError: lingua is not installed.
        """
        found = text_languages(self.dose.texts, candidates=candidates)
        sure = found["confidence"].to_numpy(float) >= CONFIDENT
        named = np.where(sure, found["language"].to_numpy(object), "undecided")
        order = [*(c.lower() for c in candidates if c.lower() in named), "undecided"]
        table = pd.DataFrame({name: (named == name).astype(float) for name in order})
        return self._by_dose(table, ~np.isin(named, ("english", "undecided")), "texts_in_foreign")

    def _by_dose(self, shares: pd.DataFrame, foreign: np.ndarray, name: str) -> pd.DataFrame:
        kind, strength, group = (self.dose.column(c) for c in ("kind", "strength", "group"))
        rows = []
        for key in dict.fromkeys(zip(kind.tolist(), strength.tolist(), strict=True)):
            own = (kind == key[0]) & (strength == key[1])
            row: dict[str, Any] = {"kind": key[0], "strength": key[1]} | dict(shares[own].mean())
            limits = mean_interval(cluster_means(foreign[own].astype(float), group[own].tolist()))
            row |= {name: float(foreign[own].mean()), f"{name}_low": max(0.0, float(limits.low))}
            rows.append(row | {f"{name}_high": min(1.0, float(limits.high)), "n": int(own.sum())})
        return pd.DataFrame(rows)

    def samples(self, per_regime: int = 2) -> list[tuple[str, str]]:
        """Texts of every damage label that occurs, with what was done, the first ones of each in the order of the table."""
        found: dict[str, list[tuple[str, str]]] = {}
        columns = [self.dose.column(c) for c in ("kind", "emotion", "strength")]
        for i, (label, kind, emotion, strength) in enumerate(zip(self.regimes.damage, *columns, strict=True)):
            if kind in UNSTEERED or not self.dose.texts[i].strip():
                continue
            pushed = f"{emotion} {strength:+g}" if kind == "steered" else f"{in_words(str(kind))} {strength:+g}"
            kept = found.setdefault(str(label), [])
            if len(kept) < per_regime and all(pushed != other for other, _ in kept):
                kept.append((pushed, " ".join(self.dose.texts[i].split())))
        return [(f"{in_words(label)} ({pushed})", text) for label, rows in found.items() for pushed, text in rows]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save every part in a folder of its own."""
        for name in PARTS:
            part = getattr(self, name)
            if part is not None:
                part.save(Path(folder) / name, overwrite=overwrite)
        for found in self.boundaries:
            found.save(Path(folder) / BOUNDARIES / found.emotion, overwrite=overwrite)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "SteeringStudy":
        """Load what `save` wrote.

        Raises:
            FileNotFoundError: no dose-response, judgement or regimes there.
        """
        there = {n: kind for n, kind in PARTS.items() if (Path(folder) / n / "manifest.json").is_file()}
        missing = [n for n in ("dose", "judgement", "regimes") if n not in there]
        if missing:
            raise FileNotFoundError(
                f"received {folder}, which has no {', '.join(missing)}; give a folder that study_steering saved"
            )
        searched = sorted(path.parent for path in (Path(folder) / BOUNDARIES).glob("*/manifest.json"))
        return cls(
            **{name: kind.load(Path(folder) / name) for name, kind in there.items()},
            boundaries=tuple(RegimeBoundaries.load(path) for path in searched),
        )

    def __str__(self) -> str:
        lines = [str(self.regimes).splitlines()[0], str(self.regimes).splitlines()[1]]
        if len([s for s in self.dose.strengths if s > 0]) > 1:
            lines.append(str(compare_onsets({self.dose.provenance.title: self.dose})))
        if self.verification is not None:
            lines += str(self.verification).splitlines()[:2]
        lines += map(str, self.boundaries)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>"


def study_steering(
    model: LensModel,
    vectors: EmotionVectors,
    judge: Judge,
    *,
    prompts: Scenarios | Sequence[str] | None = None,
    emotions: Sequence[str] = EMOTIONS,
    layers: int | Sequence[int] | None = None,
    strengths: Sequence[float] | str = "auto",
    scenarios: Scenarios | None = None,
    verified_at: Sequence[float] = VERIFIED_AT,
    n_random: int = 5,
    languages: bool = False,
    bisected: Sequence[str] = (),
    reading: EmotionVectors | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **asked: Any,
) -> SteeringStudy:
    """Sweep doses on neutral prompts, judge and classify; verify on scenarios; look at scripts.

    Args:
        model: what is steered.
        vectors: directions of this model, read at resid_post.
        judge: an external classifier (load_judge).
        prompts: what is continued at every dose; every second of our neutral scenarios by default.
        emotions: targets on the prompts.
        layers: one block, several, or None for the middle one.
        strengths: of the sweep.
        scenarios: each is steered to its own target (load_scenarios()); None leaves the verification out.
        verified_at: strengths on the scenarios; the first is the declared one.
        n_random: random directions per scenario.
        languages: also look at scripts and meaning of the tokens that the vectors raise.
        bisected: emotions whose boundaries between regimes are located by bisection, with new texts at every strength tried.
        reading: vectors from other texts than those that steer (half of the topics each, say): the texts on the prompts are projected on them, and that is
            correlated with the judge (correlate_inside).
        seed: of sampling and controls.
        progress: called with (texts done, texts in all) of the sweep that runs.
        asked: further options of sweep_strengths.

    Raises:
        ValueError: as sweep_strengths, judge_texts, verify_steering and correlate_inside.

    Example:
        >>> study_steering(model, vectors, load_judge(), layers=14, scenarios=load_scenarios())  # doctest: +SKIP
    """
    if prompts is None:
        neutral = load_scenarios("neutral")
        prompts = neutral.select(rows=range(0, len(neutral), 2))
    common: dict[str, Any] = {"layers": layers, "seed": seed, "progress": progress} | asked
    dose = sweep_strengths(model, vectors, prompts, emotions=emotions, strengths=strengths, **common)
    judgement = judge_texts(judge, dose.texts)
    parts: dict[str, Any] = {"dose": dose, "judgement": judgement, "regimes": classify_regimes(dose, judgement)}
    if scenarios is not None:
        tried = sweep_strengths(model, vectors, scenarios, strengths=verified_at, n_random=n_random, **common)
        read = judge_texts(judge, tried.texts)
        checked = verify_steering(tried, read, strength=verified_at[0], scenarios=scenarios)
        parts |= {"scenario_dose": tried, "scenario_judgement": read, "verification": checked}
    if languages:
        parts["scripts"] = script_entanglement(model, vectors, layer=dose.layers[-1])
        parts["meaning"] = foreign_meaning(model, vectors, layer=dose.layers[-1])
    if reading is not None:
        parts["inside"] = correlate_inside(model, dose, judgement, reading, seed=seed)
    parts["boundaries"] = tuple(
        locate_boundaries(model, vectors, prompts, emotion, judge=judge, layers=layers, seed=seed, **asked)
        for emotion in bisected
    )
    return SteeringStudy(**parts)

"""Claims against runs: a scorecard whose verdicts follow declared rules.

A verdict speaks about the models that were run, at the precision they were run in, on the texts that were read.
"""

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lens_affect.activations import Activations
from lens_affect.catalogue import CATALOGUE
from lens_affect.effects import mann_whitney, paired_tests
from lens_affect.localization import LocalizationCurve, localize
from lens_affect.module_claims import module_rows
from lens_affect.module_study import ModuleStudy
from lens_affect.reported import check_effect_size
from lens_affect.results import Provenance, load_result, save_result
from lens_affect.shapes import CurveShape
from lens_affect.statistics import adjust_p, mean_interval
from lens_affect.steering_claims import steering_rows
from lens_affect.steering_study import SteeringStudy
from lens_affect.stimuli import NEUTRAL
from lens_affect.sweeps import Sweep
from lens_affect.verdicts import COLUMNS, FAILS, FAMILIES_NEEDED, HOLDS, OPEN, ModelFacts, by_sign, claim_row

_OF_A_MODEL = ["P4", "P9", "G1"]
MIDDLE = (0.35, 0.65)
"""Depths that count as the middle (P4)."""


@dataclass(frozen=True)
class Scorecard:
    """One row per claim and run, with the paper's statistic, a sound one, its interval and null, the rule and the verdict."""

    table: pd.DataFrame
    """Columns COLUMNS; statistics are explained in `note`."""
    provenance: Provenance
    """Of the first run."""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def verdicts(self) -> dict[str, list[str]]:
        """Verdict -> claims; a claim whose rows disagree is named with its source and, with several runs, its model."""
        found: dict[str, list[str]] = {HOLDS: [], FAILS: [], OPEN: []}
        several = len(set(self.table.loc[self.table["id"].isin(_OF_A_MODEL), "model"])) > 1
        for id, rows in self.table.groupby("id", sort=False):
            agree = len(set(rows["verdict"])) == 1
            for verdict, source, model in zip(rows["verdict"], rows["source"], rows["model"], strict=True):
                where = f"{source}, {model}" if several else str(source)
                name = str(id) if agree else f"{id} ({where})"
                if name not in found[verdict]:
                    found[verdict].append(name)
        return found

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Scorecard":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        models = ", ".join(dict.fromkeys(self.table.loc[self.table["id"].isin(_OF_A_MODEL), "model"]))
        parts = [f"{verdict}: {', '.join(ids)}" for verdict, ids in self.verdicts().items() if ids]
        return f"{models}\n" + "; ".join(parts)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{self.table.round(3).to_html(index=False, border=0)}"


def make_scorecard(
    sweeps: Sweep | Sequence[Sweep],
    facts: Mapping[str, ModelFacts] | None = None,
    *,
    modules: Sequence[ModuleStudy] = (),
) -> Scorecard:
    """Judge the claims of arXiv:2604.04064 by the runs given: about extraction and localization (P1 to P7), and about steering (P8 to P12) where a run holds a steering study.

    Args:
        sweeps: one finished run or several.
        facts: family, tuning and pair by the model name of the run's spec; catalogue models are known.
        modules: studies of modules, for the claims of arXiv:2601.15906 (G1 to G4).

    Returns:
        The scorecard. Claims about modules have rows only where a study is given.

    Raises:
        ValueError: no run.

    Example:
        >>> print(make_scorecard(load_sweep("runs/demo")))  # doctest: +SKIP
    """
    runs = [sweeps] if isinstance(sweeps, Sweep) else list(sweeps)
    if not runs:
        raise ValueError("received no run; give at least one finished sweep (load_sweep)")
    known = {run.spec.model: _facts(run.spec.model, facts or {}) for run in runs}
    advantages: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for run in runs:
        if len(run.spec.methods) == 2:
            try:
                advantages[run.spec.model] = source_advantage(run)
            except (
                ValueError
            ) as error:  # a user's texts on other topics: the claim stays open, everything else is judged
                rows.append(_better_source(run, None, str(error)))
            else:
                rows.append(_better_source(run, advantages[run.spec.model]))
    if len(advantages) > 1:
        rows.append(_better_source_in_all([r for r in runs if r.spec.model in advantages], advantages))
    rows += [_tuning(advantages, known), _architecture(advantages, known)]
    shapes: list[tuple[Sweep, str, CurveShape | None]] = []
    for run in runs:
        for method in run.spec.methods:
            rows.append(_middle(run, method))
            shape = _shape(main_curve(run, method))
            shapes.append((run, method, shape))
            rows.append(_u_shape(run, method, shape))
    rows.append(_everywhere(shapes, known))
    rows += [_beyond_anisotropy(run, method) for run in runs for method in run.spec.methods if method in run.directions]
    rows += steering_rows([(run.spec.model, study) for run in runs for study in run.steering.values()], known)
    rows += [row for study in modules for row in module_rows(study)]
    return _scorecard(rows, main_curve(runs[0], runs[0].spec.methods[0]).provenance)


def steering_scorecard(
    studies: Mapping[str, SteeringStudy], facts: Mapping[str, ModelFacts] | None = None
) -> Scorecard:
    """Judge the claims about steering (P8 to P12) by studies that belong to no sweep.

    Args:
        studies: by the name of the model.
        facts: as for make_scorecard.

    Raises:
        ValueError: no study.
    """
    if not studies:
        raise ValueError("received no study; give at least one (study_steering)")
    known = {name: _facts(name, facts or {}) for name in studies}
    return _scorecard(steering_rows(list(studies.items()), known), next(iter(studies.values())).dose.provenance)


def module_scorecard(studies: ModuleStudy | Sequence[ModuleStudy]) -> Scorecard:
    """Judge the claims of arXiv:2601.15906 about gate_proj (G1 to G4).

    Args:
        studies: one study of a model's modules or several (study_modules, necessity_sufficiency_efficiency).

    Raises:
        ValueError: no study.
    """
    several = [studies] if isinstance(studies, ModuleStudy) else list(studies)
    if not several:
        raise ValueError("received no study; give at least one (study_modules)")
    return _scorecard([row for study in several for row in module_rows(study)], several[0].landing.provenance)


def _scorecard(rows: list[dict[str, Any]], provenance: Provenance) -> Scorecard:
    rows = sorted(rows, key=lambda row: (str(row["id"])[0] != "P", int(str(row["id"])[1:])))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in ("paper_statistic", "sound_statistic", "low", "high", "null"):
        table[column] = table[column].astype(float)
    return Scorecard(table, provenance)


def _facts(model: str, given: Mapping[str, ModelFacts]) -> ModelFacts:
    if model in given:
        return given[model]
    entry = CATALOGUE.get(model)
    if entry is None:
        return ModelFacts()
    return ModelFacts(
        family=entry.family, tuning="instruct" if "instruct" in model or model.endswith("-it") else "base"
    )


def main_curve(run: Sweep, method: str) -> LocalizationCurve:
    """nearest_mean of one method, or the first score of a run that lacks it."""
    return run.curves.get((method, "nearest_mean")) or run.curves[method, run.spec.scores[0]]


# P1 to P3: who wrote the text


def source_advantage(run: Sweep) -> np.ndarray:
    """Accuracy of stories minus passages per topic, on the topics and emotions that both have, every topic at the layer
    that is best on the other topics of its own source: `[topic]`.

    Raises:
        ValueError: fewer than 3 common topics.
    """
    stories, passages = run.activations("generation"), run.activations("comprehension")
    common = [g for g in dict.fromkeys(stories.stimuli.groups) if g in set(passages.stimuli.groups)]
    if len(common) < 3:
        raise ValueError(
            f"received a run whose stories and passages share {len(common)} topics; 3 are needed: use our prompts and passages"
        )
    sources = [_common_cells(one, other, common) for one, other in ((stories, passages), (passages, stories))]
    found = []
    for chosen in sources:
        curve = localize(chosen, n_permutations=0, seed=run.spec.seed)
        order = list(dict.fromkeys(chosen.stimuli.groups))
        found.append(dict(zip(order, curve.selected().tolist(), strict=True)))
    return np.array([found[0][g] - found[1][g] for g in common])


def _common_cells(activations: Activations, other: Activations, groups: Sequence[str]) -> Activations:
    """Emotional texts whose emotion and topic the other source has too: a model may lack some stories."""
    there = set(zip(other.stimuli.emotions, other.stimuli.groups, strict=True))
    cells = zip(activations.stimuli.emotions, activations.stimuli.groups, strict=True)
    return activations.select(
        rows=[i for i, (e, g) in enumerate(cells) if e != NEUTRAL and g in groups and (e, g) in there]
    )


BETTER_SOURCE = (
    "P1",
    "text that the model writes separates emotions better than text that it reads",
    "Mann-Whitney p = 0.007, d = -107.5",
)


def _papers_cosines(run: Sweep) -> tuple[float, float]:
    """Mean cosine with neutral baseline at the middle layer: stories, passages; NaN where it was not asked for."""
    curves = [run.curves.get((m, "mean_cosine_neutral")) for m in ("generation", "comprehension")]
    found = [float(c.values[c.row(len(c.layer_rows) // 2)]) if c else float("nan") for c in curves]
    return found[0], found[1]


def _better_source(run: Sweep, advantage: np.ndarray | None, reason: str = "") -> dict[str, Any]:
    stories, passages = _papers_cosines(run)
    start = claim_row(
        *BETTER_SOURCE,
        "holds if the 95 % interval over topics of accuracy(stories) - accuracy(passages) lies above 0, does not hold if below",
        paper_statistic=stories - passages,
        model=main_curve(run, "generation").provenance.title,
        source="stories against passages",
        note=reason,
    )
    if advantage is None:
        return start
    interval = mean_interval(advantage)
    return start | {
        "sound_statistic": float(interval.estimate),
        "low": float(interval.low),
        "high": float(interval.high),
        "null": 0.0,
        "n": len(advantage),
        "verdict": by_sign(interval),
        "note": "paper's statistic: mean cosine of stories minus passages, neutral baseline, middle layer (below 0: stories are called better). "
        f"The published pair itself: {check_effect_size(-107.5, 7, 7, 4)}",
    }


def _better_source_in_all(runs: Sequence[Sweep], advantages: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The paper's test as it is, models as its sample, beside the mean advantage with an interval over models."""
    cosines = np.array([_papers_cosines(run) for run in runs])
    means = np.array([a.mean() for a in advantages.values()])
    interval = mean_interval(means)
    complete = bool(np.isfinite(cosines).all())
    paper = mann_whitney(cosines[:, 0], cosines[:, 1]) if complete else None
    paired = f"; sign test p = {paired_tests(cosines[:, 0], cosines[:, 1]).p_sign:.3g}" if complete else ""
    return claim_row(
        *BETTER_SOURCE,
        f"over models: holds if the 95 % t interval of their mean advantages lies above 0; needs {FAMILIES_NEEDED} models",
        paper_statistic=paper.p if paper else float("nan"),
        sound_statistic=float(interval.estimate),
        low=float(interval.low),
        high=float(interval.high),
        null=0.0,
        n=len(means),
        verdict=by_sign(interval) if len(means) >= FAMILIES_NEEDED else OPEN,
        model=f"all {len(means)}",
        source="stories against passages",
        note=f"paper's statistic: p of {paper}, models as the sample{paired}"
        if paper
        else "the mean cosine was not among the scores",
    )


def _tuning(advantages: Mapping[str, np.ndarray], facts: Mapping[str, ModelFacts]) -> dict[str, Any]:
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for model, advantage in advantages.items():
        if facts[model].pair:
            pairs.setdefault(facts[model].pair, {})[facts[model].tuning] = advantage
    whole = {k: v for k, v in pairs.items() if {"base", "instruct"} <= set(v)}
    start = claim_row(
        "P2",
        "the advantage of written text is larger after instruction tuning",
        "stated without a number",
        "needs a base model and its instruct version; holds if the 95 % interval over topics of the difference of advantages lies above 0",
    )
    if not whole:
        return start | {"note": "no base model with its instruct version among the runs"}
    n = min(len(v) for pair in whole.values() for v in pair.values())
    differences = np.mean([p["instruct"][:n] - p["base"][:n] for p in whole.values()], axis=0)
    interval = mean_interval(differences)
    return start | {
        "sound_statistic": float(interval.estimate),
        "low": float(interval.low),
        "high": float(interval.high),
        "null": 0.0,
        "n": n,
        "verdict": by_sign(interval),
        "model": ", ".join(whole),
    }


def _architecture(advantages: Mapping[str, np.ndarray], facts: Mapping[str, ModelFacts]) -> dict[str, Any]:
    families: dict[str, list[np.ndarray]] = {}
    for model, advantage in advantages.items():
        families.setdefault(facts[model].family, []).append(advantage)
    families.pop("unknown", None)
    start = claim_row(
        "P3",
        "the advantage of written text depends on the architecture",
        "stated without a number",
        f"needs {FAMILIES_NEEDED} families; holds if two of them differ (paired t over topics, Holm over pairs, 5 %)",
    )
    if len(families) < FAMILIES_NEEDED:
        return start | {
            "note": f"{len(families)} of {FAMILIES_NEEDED} families among the runs: {', '.join(families) or 'none'}"
        }
    n = min(len(a) for group in families.values() for a in group)
    means = {k: np.mean([a[:n] for a in v], axis=0) for k, v in families.items()}
    names = list(means)
    gaps = {(a, b): means[a] - means[b] for i, a in enumerate(names) for b in names[i + 1 :]}
    p = adjust_p(np.array([_paired_p(gap) for gap in gaps.values()]), method="holm")
    (a, b), gap = max(gaps.items(), key=lambda item: abs(item[1].mean()))
    interval = mean_interval(gap)
    return start | {
        "sound_statistic": float(interval.estimate),
        "low": float(interval.low),
        "high": float(interval.high),
        "null": 0.0,
        "n": n,
        "verdict": HOLDS if p.min() < 0.05 else OPEN,
        "model": ", ".join(names),
        "note": f"largest gap: {a} against {b}",
    }


def _paired_p(gap: np.ndarray) -> float:
    test: Any = stats.ttest_1samp(gap, 0) if gap.std() > 1e-12 else None
    return float(test.pvalue) if test else float(abs(gap.mean()) < 1e-12)


# P4 to P6: where


def _middle(run: Sweep, method: str) -> dict[str, Any]:
    curve = main_curve(run, method)
    low, high = curve.best_depth_interval(seed=run.spec.seed)
    inside = low >= MIDDLE[0] and high <= MIDDLE[1]
    outside = high < MIDDLE[0] or low > MIDDLE[1]
    paper = run.curves.get((method, "mean_cosine_neutral"))
    return claim_row(
        "P4",
        "emotions are represented at middle depth",
        "about 50 % depth",
        f"holds if the 95 % interval of the best depth lies inside [{MIDDLE[0]}, {MIDDLE[1]}], does not hold if it lies outside",
        paper_statistic=float(paper.depth[paper.row(paper.best_layer)]) if paper else float("nan"),
        sound_statistic=float(curve.depth[curve.row(curve.best_layer)]),
        low=low,
        high=high,
        n=len(curve.per_cluster),
        verdict=HOLDS if inside else FAILS if outside else OPEN,
        model=curve.provenance.title,
        source=curve.method,
        note=f"depth (layer + 1) / layers of the best {curve.score}; paper's statistic: depth of the lowest mean cosine with neutral baseline",
    )


def _shape(curve: LocalizationCurve) -> CurveShape | None:
    try:
        return curve.shape()
    except ValueError:
        return None  # too few layers for a shape


def _u_shape(run: Sweep, method: str, shape: CurveShape | None) -> dict[str, Any]:
    curve = main_curve(run, method)
    wanted = "u" if curve.better == "low" else "inverted_u"
    start = claim_row(
        "P5",
        "the curve over depth is a U (turned over for scores that are better when high)",
        "U-shaped",
        f"holds if the shape of {curve.score} is {wanted} (shapes.curve_shape), does not hold if it is another shape, undecided if flat",
        n=len(curve.per_cluster),
        model=curve.provenance.title,
        source=curve.method,
    )
    if shape is None:
        return start | {"note": "too few layers for a shape"}
    paper = run.curves.get((method, "mean_cosine_neutral"))
    of_paper = _shape(paper) if paper else None
    turning = f", turning at {shape.turning_depth:.2f}" if np.isfinite(shape.turning_depth) else ""
    return start | {
        "paper_statistic": of_paper.probability["u"] if of_paper else float("nan"),
        "sound_statistic": shape.probability[wanted],
        "low": shape.turning_interval[0],
        "high": shape.turning_interval[1],
        "verdict": HOLDS if shape.label == wanted else OPEN if shape.label == "flat" else FAILS,
        "note": f"probability of {wanted}; the shape is {shape.label.replace('_', ' ')}{turning} (interval: turning depth); paper's statistic: probability "
        f"of u for the mean cosine with neutral baseline, whose shape is {of_paper.label.replace('_', ' ') if of_paper else 'unknown'}",
    }


def _everywhere(
    shapes: Sequence[tuple[Sweep, str, CurveShape | None]], facts: Mapping[str, ModelFacts]
) -> dict[str, Any]:
    families: dict[str, list[bool]] = {}
    for run, _, shape in shapes:
        if shape is not None and shape.label != "flat":
            families.setdefault(facts[run.spec.model].family, []).append(shape.middle_is_best)
    families.pop("unknown", None)
    contrary = [k for k, v in families.items() if not all(v)]
    enough = len(families) >= FAMILIES_NEEDED
    return claim_row(
        "P6",
        "the curve is such a U in every architecture from 124M to 3B",
        "architecture-invariant",
        f"does not hold if one family has another shape than P5's; holds if {FAMILIES_NEEDED} or more families all have it",
        n=len(families),
        sound_statistic=float(np.mean([all(v) for v in families.values()])) if families else float("nan"),
        verdict=FAILS if contrary else HOLDS if enough else OPEN,
        model=", ".join(families),
        note=f"another shape in: {', '.join(contrary)}"
        if contrary
        else f"{len(families)} of {FAMILIES_NEEDED} families with a shape among the runs",
    )


# P7: anisotropy


def _beyond_anisotropy(run: Sweep, method: str) -> dict[str, Any]:
    labels, directions = run.curves[method, "nearest_mean"], run.directions[method]
    i = labels.row(labels.best_layer)
    thresholds = float(labels.threshold[i]), float(directions.threshold[i])
    p = max(float(labels.p_family[i]), float(directions.p_family[i]))
    decidable = 1 / (1 + labels.n_permutations) < 0.05
    return claim_row(
        "P7",
        "separation survives anisotropy baselines",
        "baselines in 4 models",
        "holds if accuracy at the best layer exceeds the family-wise 5 % limits of random labels and of random directions from the same activations",
        paper_statistic=run.anisotropy.at(labels.best_layer)["mean_cosine"],
        sound_statistic=float(labels.values[i]),
        low=float(labels.low[i]),
        high=float(labels.high[i]),
        null=max(thresholds),
        n=labels.n_texts,
        verdict=(HOLDS if p < 0.05 else FAILS) if decidable else OPEN,
        model=labels.provenance.title,
        source=labels.method,
        note=f"layer {labels.best_layer}; null: the higher of two limits, {thresholds[0]:.3f} (labels) and {thresholds[1]:.3f} (directions); paper's "
        "statistic: mean cosine of neutral sentences there",
    )

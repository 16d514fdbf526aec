"""The paper's claims about steering (P8 to P12) against steering studies, each by its declared rule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lens_affect.boundaries import compare_onsets
from lens_affect.crosslingual import HOME
from lens_affect.meaning import SMALLEST_EFFECT
from lens_affect.statistics import Interval, jackknife_interval
from lens_affect.steering_study import SteeringStudy
from lens_affect.verdicts import FAILS, FAMILIES_NEEDED, HOLDS, OPEN, ModelFacts, by_sign, claim_row
from lens_affect.verification import WORDS

REGIMES = ("surgical", "repetitive_collapse", "explosive")
"""The three of the paper."""
SURE = 0.95
"""Bootstrap probability from which a cell's regime counts as seen."""
APART = 0.8
"""AUC from which two kinds of text count as told apart."""
SMALLEST_SHARE = 0.05
"""Smallest difference in the share of raised tokens whose absence is stated."""


def steering_rows(
    studies: Sequence[tuple[str, SteeringStudy]], facts: Mapping[str, ModelFacts]
) -> list[dict[str, Any]]:
    """Rows of the scorecard; none without a study.

    Args:
        studies: name of the model as in `facts`, and its study.
        facts: family, tuning and pair of every model.
    """
    if not studies:
        return []
    rows: list[dict[str, Any]] = []
    for _, study in studies:
        rows += _causal(study)
        rows += [_regimes(study), _ratio(study)]
        rows += _foreign(study)
    return [*rows, _architecture(studies, facts), _tuning(studies, facts)]


def _causal(study: SteeringStudy) -> list[dict[str, Any]]:
    found = study.verification
    if found is None:
        return []
    rows = []
    table = found.to_frame()
    for criterion in ("rises", "strict"):
        against = {control: found.difference(criterion, control=control) for control in found.controls}
        hardest = min(against, key=lambda control: np.nan_to_num(float(against[control].low), nan=-math.inf))
        interval = against[hardest]
        successes, n = found.successes(criterion)
        at = (table["strength"] == found.strength) & (table["criterion"] == criterion) & (table["pull"] == "all")
        own: dict[str, Any] = pd.DataFrame(table[at]).to_dict("records")[0]
        stated = [
            f"{WORDS[c]} {own[c]:.2f} (difference {float(i.estimate):+.2f} [{float(i.low):+.2f}, {float(i.high):+.2f}])"
            for c, i in against.items()
        ]
        sound = [f"{WORDS[c]} {own[f'sound_{c}']:.2f}" for c in against if math.isfinite(own[f"sound_{c}"])]
        missing = "" if "other" in against else "; no other emotion's directions to compare with"
        rows.append(
            claim_row(
                "P8",
                "steering makes texts express the target emotion",
                "37 of 40 scenarios, without a control",
                "holds if the 95 % intervals over topics of success - share of a control's directions that succeed lie above 0 for random directions and for those of "
                "another emotion of equal achieved change, does not hold if one lies below, cannot be decided without another emotion's",
                paper_statistic=successes / n if n else math.nan,
                sound_statistic=float(interval.estimate),
                low=float(interval.low),
                high=float(interval.high),
                null=own[hardest],
                n=n,
                verdict=_above_all(against),
                model=found.provenance.title,
                source=criterion,
                note=f"{successes} of {n} at strength {found.strength:+g}; {found.judge}; {found.n_random} random directions per scenario; paper's statistic: "
                f"success rate; sound statistic and null: against {WORDS[hardest]}, where the difference is least sure; {'; '.join(stated)}{missing}; sound texts: "
                f"steered {own['sound']:.2f}" + "".join(f", {s}" for s in sound),
            )
        )
    return rows


def _above_all(against: Mapping[str, Interval]) -> str:
    """Random directions may break texts that an emotion's of equal change leave whole, so success must be above that of another emotion's too."""
    verdicts = {by_sign(interval) for interval in against.values()}
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts == {HOLDS} and "other" in against else OPEN


def _regimes(study: SteeringStudy) -> dict[str, Any]:
    table = study.regimes.table
    own = table[table["kind"] == "steered"]
    most = {name: float(np.max(own[f"p_{name}"])) for name in REGIMES}
    seen = [name for name, p in most.items() if p >= SURE]
    absent = [name for name, p in most.items() if p < 1 - SURE]
    return claim_row(
        "P9",
        "steering has three regimes: surgical, repetitive collapse, explosive",
        "stated without a number",
        f"holds if each is the regime of some cell with a bootstrap probability of {SURE} or more, does not hold if one has less than {1 - SURE:.2f} everywhere",
        sound_statistic=float(len(seen)),
        n=len(own),
        verdict=HOLDS if len(seen) == len(REGIMES) else FAILS if absent else OPEN,
        model=study.regimes.provenance.title,
        source="regimes",
        note="regimes seen of three; highest probability of a cell: "
        + ", ".join(f"{k} {v:.2f}" for k, v in most.items()),
    )


def _ratio(study: SteeringStudy) -> dict[str, Any]:
    """Does the perplexity ratio alone tell texts that loop from others?"""
    dose = study.dose
    kind = dose.column("kind")
    known = np.isin(kind, ("steered", "random")) & np.isfinite(dose.log_ratio)
    loops = np.array(study.regimes.damage)[known] == "repetitive_collapse"
    ratio, groups = dose.log_ratio[known], dose.column("group")[known]
    names = sorted(set(groups.tolist()))
    start = claim_row(
        "P9",
        "the regimes are told apart by the perplexity ratio",
        "stated without a number",
        f"AUC of the ratio between texts that loop and texts that do not; holds if its 95 % interval lies above {APART} or below {1 - APART:.1f}, does not hold "
        "if between",
        model=dose.provenance.title,
        source="ratio",
        null=0.5,
        n=int(known.sum()),
    )
    parts = [_auc(ratio[groups != g], loops[groups != g]) for g in names]
    if len(names) < 3 or any(math.isnan(a) for a in parts):
        return start | {"note": "too few texts that loop"}
    interval = jackknife_interval(np.asarray(_auc(ratio, loops)), np.array(parts))
    low, high = float(interval.low), float(interval.high)
    holds = low > APART or high < 1 - APART
    between = low > 1 - APART and high < APART
    return start | {
        "sound_statistic": float(interval.estimate),
        "low": low,
        "high": high,
        "verdict": HOLDS if holds else FAILS if between else OPEN,
        "note": f"{int(loops.sum())} texts are repetitive",
    }


def _auc(values: np.ndarray, positive: np.ndarray) -> float:
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return math.nan
    return float((stats.rankdata(values)[positive].sum() - n * (n + 1) / 2) / (n * m))


def _foreign(study: SteeringStudy) -> list[dict[str, Any]]:
    scripts, meaning = study.scripts, study.meaning
    if scripts is None or meaning is None:
        return []
    above = [s for s, p in zip(scripts.scripts, scripts.p_family.tolist(), strict=True) if p <= 0.05 and s not in HOME]
    holds = meaning.table[(meaning.table["verdict"] == "holds") & (meaning.table["language"] != "English")]
    languages = [str(name) for name in holds["language"]]
    share = scripts.foreign.double()
    half = float(stats.t.ppf(0.975, len(share) - 1) * share.std() / math.sqrt(len(share)))
    foreign = scripts._foreign
    most = (scripts.high - scripts.random.mean(0))[foreign]
    no_script = not above and bool((most < SMALLEST_SHARE).all())
    verdicts = [str(v) for v in meaning.table[meaning.table["language"] != "English"]["verdict"]]
    # Languages whose words have no tokens say nothing; one that stays open leaves the claim open.
    measured = [
        v
        for v, e in zip(verdicts, meaning.table[meaning.table["language"] != "English"]["effect"], strict=True)
        if math.isfinite(e)
    ]
    no_meaning = bool(measured) and all(v == FAILS for v in measured)
    verdict = HOLDS if above and languages else FAILS if no_script or no_meaning else OPEN
    return [
        claim_row(
            "P11",
            "emotion vectors bring up foreign tokens of matching meaning",
            "in Qwen",
            "holds if some foreign script is above random directions (family-wise p <= 0.05) and the words of some foreign language above other emotions' vectors and "
            f"everyday words; does not hold if the 95 % interval over emotions of every foreign script's share lies below {SMALLEST_SHARE} above random directions', or "
            f"if in every foreign language that is measured the interval of an effect lies below {SMALLEST_EFFECT:g} percentile points; else it cannot be decided",
            sound_statistic=float(share.mean()),
            low=float(share.mean()) - half,
            high=float(share.mean()) + half,
            null=float(scripts.random[:, foreign].sum(1).mean()),
            n=len(share),
            verdict=verdict,
            model=scripts.provenance.title,
            source=f"layer {scripts.layer}",
            note=f"share of the top {scripts.k} tokens in foreign scripts (interval over emotions; null: the same of random directions; of the vocabulary "
            f"{float(scripts.vocabulary[foreign].sum()):.2f}); scripts above random: {', '.join(above) or 'none'}; meaning holds in: {', '.join(languages) or 'none'}",
        )
    ]


def _architecture(studies: Sequence[tuple[str, SteeringStudy]], facts: Mapping[str, ModelFacts]) -> dict[str, Any]:
    usable = {name: study.dose for name, study in studies if len([s for s in study.dose.strengths if s > 0]) > 1}
    families = {facts[name].family for name in usable if name in facts} - {"unknown"}
    start = claim_row(
        "P10",
        "regimes separate by architecture rather than scale",
        "stated without a number",
        f"needs {FAMILIES_NEEDED} families with two sizes each, compared at equal achieved change",
        n=len(families),
        model=", ".join(usable),
    )
    if not usable:
        return start
    onsets = compare_onsets(usable).to_frame()
    own = pd.DataFrame(onsets[(onsets["damage"] == "any") & (onsets["kind"] == "steered")]).to_dict("records")
    named = [
        f"{r['model']} {r['change']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        if r["reached"]
        else f"{r['model']} above {r['low']:.2f}"
        for r in own
    ]
    return start | {
        "note": f"{len(families)} of {FAMILIES_NEEDED} families among the studies; change at which half of the texts are damaged: {'; '.join(named)}"
    }


def _tuning(studies: Sequence[tuple[str, SteeringStudy]], facts: Mapping[str, ModelFacts]) -> dict[str, Any]:
    pairs: dict[str, set[str]] = {}
    for name, _ in studies:
        if name in facts and facts[name].pair:
            pairs.setdefault(facts[name].pair, set()).add(facts[name].tuning)
    whole = [k for k, v in pairs.items() if {"base", "instruct"} <= v]
    return claim_row(
        "P12",
        "instruction tuning does not suppress the foreign tokens",
        "stated without a number",
        "needs a base model and its instruct version: script_entanglement(base=, tuned=) compares them",
        verdict=OPEN,
        note=f"pairs among the studies: {', '.join(whole) or 'none'}",
    )

"""The claims of arXiv:2601.15906 about gate_proj (G1 to G4) against a module study, each by its declared rule.

All of them say that the gate is special. It is special only if it does more than what costs the same: `up`, `down`, and attention. A difference whose
95 % interval lies within a stated margin around 0 counts as none, so that a precise draw decides against the claim and a vague one leaves it open.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lens_affect.module_study import ModuleStudy
from lens_affect.module_table import ModuleTable, TwoWay
from lens_affect.part_scores import PartScores
from lens_affect.statistics import Interval
from lens_affect.verdicts import FAILS, HOLDS, OPEN, claim_row

GATE = "gate"
MARGIN = 0.02
"""Difference of the score (of an accuracy: two points) below which two arms count as equal."""
RATIO_MARGIN = 1.1
"""Ratio of mean squared changes below which two modules count as equal."""
MOST = 0.5
"""Share of the gain that a sufficient module brings alone, and that goes with a necessary one."""
KEPT = 0.9
"""Share of the gain of tuning everything that an efficient module keeps."""
Limits = Mapping[str, tuple[float, float, float]]
"""What the gate is compared with -> estimate, lower and upper limit; positive where the gate does more."""


def module_rows(study: ModuleStudy) -> list[dict[str, Any]]:
    """Rows of the scorecard.

    Args:
        study: of one model.
    """
    rows = [_lands(study), _sufficient(study.transfer)]
    rows += [_efficient(study.equal_rank, "equal rank"), _efficient(study.equal_size, "equal size")]
    if study.writing is not None:
        rows.append(_efficient(study.writing, "writing, equal rank"))
    return [*rows, _necessary(study), _necessary_at_equal_damage(study.equal_damage)]


def special(limits: Limits, margin: float) -> str:
    """Better than all: holds. Worse than one, or equal to one within the margin: does not hold. Otherwise open.

    Args:
        limits: differences to everything that costs the same.
        margin: largest difference that counts as none.
    """
    # scores without any spread have intervals without width, which are no evidence
    known = [x for x in limits.values() if all(math.isfinite(v) for v in x) and x[2] > x[1]]
    if any(high < 0 or (low > -margin and high < margin) for _, low, high in known):
        return FAILS
    return HOLDS if known and len(known) == len(limits) and all(low > 0 for _, low, _ in known) else OPEN


def _both(special_verdict: str, low: float, high: float, level: float) -> str:
    """Two conditions: special, and a share above a level."""
    if not math.isfinite(low):
        return FAILS if special_verdict == FAILS else OPEN
    if special_verdict == FAILS or high < level:
        return FAILS
    return HOLDS if special_verdict == HOLDS and low > level else OPEN


def _words(limits: Limits, unit: str = "") -> str:
    return ", ".join(f"{n} {e:+.3f}{unit} [{lo:+.3f}, {hi:+.3f}]" for n, (e, lo, hi) in limits.items())


def _siblings(arms: Sequence[str], difference: Callable[[str], TwoWay]) -> Limits:
    found = {}
    for arm in arms:
        if arm not in (GATE, "all") and "+" not in arm and arm != "mlp":
            d = difference(arm)
            found[arm] = (d.estimate, d.low, d.high)
    return found


def _lands(study: ModuleStudy) -> dict[str, Any]:
    landing = study.landing
    run, controls = landing.runs[0], landing.runs[1:]
    own: Any = landing.by_module()
    own = own[own["run"] == run].set_index("module")
    start = claim_row(
        "G1",
        "affective adaptation lands in gate_proj",
        "stated without a number",
        "squared change per weight of the gate over that of up, down and attention, and the gate's concentration over that in fine-tunes without affect (95 % over "
        f"seeds); holds if all lie above 1, does not hold if one lies below 1 or within 1/{RATIO_MARGIN} to {RATIO_MARGIN}",
        model=landing.provenance.title,
        source="tuned on everything",
        null=1.0,
    )
    if GATE not in own.index:
        return start | {"note": "a model without a gate"}
    gate = own.loc[GATE]
    intervals: dict[str, Interval] = {}
    try:
        intervals |= {f"over {other}": landing.ratio(GATE, other) for other in ("up", "down", "attention")}
        intervals |= {f"over its share in {c}": landing.against(GATE, c) for c in controls}
    except ValueError as error:
        return start | {"note": str(error)}
    logs = {k: (math.log(v.estimate), math.log(v.low), math.log(v.high)) for k, v in intervals.items()}
    verdict = special(logs, math.log(RATIO_MARGIN))
    told = ", ".join(f"{k} {v.estimate:.2f} [{v.low:.2f}, {v.high:.2f}]" for k, v in intervals.items())
    return start | {
        "paper_statistic": float(gate["relative_frobenius"]),
        "sound_statistic": float(gate["concentration"]),
        "low": float(gate["low"]),
        "high": float(gate["high"]),
        "n": int(gate["n_seeds"]),
        # without a control nothing can say that the landing has to do with affect
        "verdict": OPEN if verdict == HOLDS and not controls else verdict,
        "note": f"share of the squared change over share of parameters (null: 1), n: seeds; paper's statistic: relative Frobenius norm; gate {told}",
    }


def _sufficient(parts: PartScores) -> dict[str, Any]:
    start = claim_row(
        "G2",
        "gate_proj is sufficient: transferred alone it brings what tuning brought",
        "gate_proj best of single modules",
        f"share of the gain that the gate alone brings to the untuned model; holds if its 95 % interval lies above {MOST} and the gate brings more than up, down and "
        f"attention; does not hold if the share lies below {MOST}, or one of them brings more or the same within {MARGIN}",
        model=parts.provenance.title,
        source=parts.title,
        n=len(parts.before),
    )
    return start | _by_parts(parts, lambda score, before, after: 100 * score / after, "percent of the tuned score")


def _by_parts(parts: PartScores, paper: Callable[[float, float, float], float], paper_words: str) -> dict[str, Any]:
    table: Any = parts.to_frame().set_index("arm")
    if GATE not in table.index or not table.loc[GATE, "n_seeds"]:
        return {"note": "the gate was not measured"}
    row: Any = table.loc[GATE]
    limits = _siblings(parts.arms, lambda other: parts.contrast(GATE, other))
    siblings = [float(table.loc[arm, "share"]) for arm in limits]
    low, high = float(row["share_low"]), float(row["share_high"])
    before, after = float(parts.before.mean()), float(parts.after.mean())
    return {
        "paper_statistic": paper(float(row["score"]), before, after) if parts.metric == "accuracy" else math.nan,
        "sound_statistic": float(row["share"]),
        "low": low,
        "high": high,
        "null": max(siblings) if siblings else math.nan,
        "verdict": _both(special(limits, MARGIN), low, high, MOST),
        "note": f"share of the gain (null: the best of {', '.join(limits)}); gate minus others in {parts.metric}: {_words(limits)}; "
        f"{len(parts.seeds)} seeds; paper's statistic: {paper_words}",
    }


def _efficient(table: ModuleTable, source: str) -> dict[str, Any]:
    arms: Any = table.arms.set_index("arm")
    start = claim_row(
        "G3",
        "gate_proj is efficient: tuned alone it keeps what tuning everything reaches",
        "24.5 % of the parameters, 96.6 % of the score",
        f"share of the gain of tuning everything; holds if its 95 % interval lies above {KEPT} and the gate is better than every other arm of the comparison; does not "
        f"hold if the share lies below {KEPT}, or another arm is better or the same within {MARGIN}",
        model=table.provenance.title,
        source=source,
        n=table.n_examples,
    )
    if GATE not in arms.index or not arms.loc[GATE, "n_seeds"]:
        return start | {"note": "the gate was not tuned"}
    row: Any = arms.loc[GATE]
    limits: dict[str, tuple[float, float, float]] = {}
    for other in arms.index:
        if other not in (GATE, table.reference, "none") and arms.loc[other, "n_seeds"]:
            d: Any = table.contrast(GATE, other)
            limits[str(other)] = (float(d["difference"]), float(d["low"]), float(d["high"]))
    low, high = float(row["retention_low"]), float(row["retention_high"])
    rivals = [float(arms.loc[arm, "retention"]) for arm in limits]
    return start | {
        "paper_statistic": float(row["percent_of_tuned"]),
        "sound_statistic": float(row["retention"]),
        "low": low,
        "high": high,
        "null": max(rivals) if rivals else math.nan,
        "verdict": _both(special(limits, MARGIN), low, high, KEPT),
        "note": f"{float(row['share_of_parameters']):.1%} of the parameters of {table.reference}; share of its gain (null: the best of {', '.join(limits)}); gate minus "
        f"others in {table.metric}: {_words(limits)}; {int(row['n_seeds'])} seeds; paper's statistic: percent of the score of {table.reference}",
    }


def _necessary(study: ModuleStudy) -> dict[str, Any]:
    parts, noise = study.revert, study.random_equal_norm
    start = claim_row(
        "G4",
        "gate_proj is necessary: without its change affect is lost",
        "destructive ablation, no number",
        f"share of the gain that goes when the gate is taken back to the base; holds if its 95 % interval lies above {MOST} and more goes than with up, down and "
        f"attention; does not hold if the share lies below {MOST}, or as much or more goes with one of them (within {MARGIN})",
        model=parts.provenance.title,
        source="reverted",
        n=len(parts.before),
    )
    found = _by_parts(
        parts, lambda score, before, after: 100 * (1 - score / after), "percent of the tuned score that is lost"
    )
    other: Any = noise.to_frame().set_index("arm")
    if GATE in other.index and "note" in found:
        row: Any = other.loc[GATE]
        found["note"] += (
            f"; with noise of its norm in its place {row['share']:.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}] of the gain goes"
        )
    return start | found


def _necessary_at_equal_damage(parts: PartScores) -> dict[str, Any]:
    rise = float(parts.rises.nanmean())
    start = claim_row(
        "G4",
        "gate_proj is necessary: damaging it costs more affect than damaging others",
        "destructive ablation, no number",
        f"score lost when noise in a module raises the loss on neutral text by the same amount; holds if more is lost through the gate than through up, down and "
        f"attention, does not hold if as much or more is lost through one of them (within {MARGIN})",
        model=parts.provenance.title,
        source=f"equal damage, {rise:.2f} nats",
        n=len(parts.before),
    )
    found = _by_parts(parts, lambda score, before, after: 100 * (1 - score / after), "percent of the tuned score lost")
    if "verdict" in found:
        found["verdict"] = special(_siblings(parts.arms, lambda other: parts.contrast(GATE, other)), MARGIN)
    return start | found

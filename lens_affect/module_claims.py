"""The claims of arXiv:2601.15906 about gate_proj (G1 to G4) against a module study, each by its declared rule.

All of them say that the gate is special. It is special only if it does more than what costs the same: `up`, `down`, and attention. A difference whose
95 % interval lies within a stated margin around 0 counts as none, so that a precise draw decides against the claim and a vague one leaves it open.
What was not measured, or with fewer than three seeds, leaves it open too; what speaks against a claim goes before what speaks for it. A gate that is
special is special for affect only where the same was measured in a task without affect and shown not to be so there: without that no claim holds.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from lens_affect.module_study import ModuleStudy
from lens_affect.module_table import ModuleTable
from lens_affect.part_scores import PartScores
from lens_affect.statistics import Interval
from lens_affect.verdicts import FAILS, HOLDS, OPEN, claim_row

GATE = "gate"
SIBLINGS = ("up", "down", "attention")
"""What costs as much as the gate, or, attention, may have as many weights."""
FEWEST_SEEDS = 3
"""Seeds without which no verdict about tuned models is given: intervals over two are too narrow (module_table.two_way_interval)."""
MARGIN = 0.05
"""Difference, as a share of the gain of tuning everything, below which two arms count as equal."""
RATIO_MARGIN = 1.1
"""Ratio of mean squared changes below which two modules count as equal."""
MOST = 0.5
"""Share of the gain that a sufficient module brings alone, and that goes with a necessary one."""
KEPT = 0.9
"""Share of the gain of tuning everything that an efficient module keeps."""
Limits = Mapping[str, tuple[float, float, float]]
"""What the gate is compared with -> estimate, lower and upper limit; positive where the gate does more, NaN where it was not measured."""
UNKNOWN = (math.nan, math.nan, math.nan)


def module_rows(study: ModuleStudy) -> list[dict[str, Any]]:
    """Rows of the scorecard.

    Args:
        study: of one model.
    """
    rows = [_lands(study), _sufficient(study.transfer, study.control_transfer)]
    if study.writing_transfer is not None:
        rows.append(_sufficient(study.writing_transfer, study.control_transfer))
    for table, source in ((study.equal_rank, "equal rank"), (study.equal_size, "equal size")):
        rows.append(_efficient(table, source, study.control))
    if study.writing is not None:
        rows.append(_efficient(study.writing, "writing, equal rank", study.control))
    rows.append(_necessary(study.revert, study.control_revert, study.random_equal_norm))
    if study.writing_revert is not None:
        rows.append(_necessary(study.writing_revert, study.control_revert))
    return [*rows, _necessary_at_equal_damage(study.equal_damage, study.control_equal_damage)]


def judge_efficiency(
    table: ModuleTable, control: ModuleTable | None = None, *, source: str = "equal rank"
) -> pd.Series:
    """The claim that gate_proj is efficient (G3) by its rule, from a table of arms alone.

    Args:
        table: of compare_arms, on an affect task.
        control: the same on a task without affect; without one the claim never holds.
        source: what is compared, for the row.

    Returns:
        One row of the scorecard, with the columns of verdicts.COLUMNS.

    Example:
        >>> judge_efficiency(compare_arms(runs, reference="all"))["verdict"]  # doctest: +SKIP
    """
    return pd.Series(_efficient(table, source, control))


def special(limits: Limits, margin: float) -> str:
    """Worse than one, or equal to one within the margin: does not hold. Better than all: holds. Otherwise open.

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
        return OPEN
    if special_verdict == FAILS or high < level:
        return FAILS
    return HOLDS if special_verdict == HOLDS and low > level else OPEN


def _for_affect(verdict: str, without: Limits) -> str:
    """What holds must be shown not to hold in a task without affect: not measured there, or vague, leaves it open."""
    return OPEN if verdict == HOLDS and special(without, MARGIN) != FAILS else verdict


def _words(limits: Limits) -> str:
    return ", ".join(
        f"{n} {e:+.3f} [{low:+.3f}, {high:+.3f}]" if math.isfinite(e) else f"{n} not measured"
        for n, (e, low, high) in limits.items()
    )


def _largest(values: Mapping[str, float]) -> float:
    known = [v for v in values.values() if math.isfinite(v)]
    return max(known) if known else math.nan


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
        f"seeds, {FEWEST_SEEDS} or more); does not hold if one lies below 1 or within 1/{RATIO_MARGIN} to {RATIO_MARGIN}, holds if all lie above 1",
        model=landing.provenance.title,
        source="tuned on everything",
        null=1.0,
    )
    if GATE not in own.index:
        return start | {"note": "a model without a gate"}
    gate = own.loc[GATE]
    intervals: dict[str, Interval] = {}
    missing = []
    asked: dict[str, Callable[[], Interval]] = {f"over {m}": lambda m=m: landing.ratio(GATE, m) for m in SIBLINGS}
    asked |= {f"over its share in {c}": lambda c=c: landing.against(GATE, c) for c in controls}
    for name, measure in asked.items():
        try:
            intervals[name] = measure()
        except ValueError:  # too few seeds of it
            missing.append(name)
    logs: dict[str, tuple[float, float, float]] = dict.fromkeys(missing, UNKNOWN)
    logs |= {k: (math.log(v.estimate), math.log(v.low), math.log(v.high)) for k, v in intervals.items()}
    verdict = special(logs, math.log(RATIO_MARGIN)) if int(gate["n_seeds"]) >= FEWEST_SEEDS else OPEN
    told = ", ".join(f"{k} {v.estimate:.2f} [{v.low:.2f}, {v.high:.2f}]" for k, v in intervals.items())
    told += "".join(f", {name} not measured" for name in missing)
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


_ONLY_HERE = (
    "and in a task without affect was shown not to (one of them does more there, or the same within the margin)"
)


def _rule(what: str, level: float, rivals: str) -> str:
    return (
        f"{what}; does not hold if its 95 % interval lies below {level}, or if one of {rivals} does more or the same within {MARGIN} of the gain; holds if the interval "
        f"lies above {level} and the gate does more than all of them, {_ONLY_HERE}; undecided otherwise, with fewer than {FEWEST_SEEDS} seeds, or where tuning gained "
        "nothing for certain"
    )


def _sufficient(parts: PartScores, control: PartScores | None) -> dict[str, Any]:
    start = claim_row(
        "G2",
        "gate_proj is sufficient: transferred alone it brings what tuning brought",
        "gate_proj best of single modules",
        _rule("share of the gain that the gate's change alone brings to the untuned model", MOST, ", ".join(SIBLINGS)),
        model=parts.provenance.title,
        source=f"transferred, {parts.title}",
        n=len(parts.before),
    )
    found, _ = _by_parts(parts, "brought by the gate minus by others", control)
    return start | found | _papers_percent(parts, lambda score, after: 100 * score / after)


def _by_parts(parts: PartScores, words: str, control: PartScores | None = None) -> tuple[dict[str, Any], Limits]:
    """Numbers of a row, and the gate against its siblings in shares of the gain, beside a task without affect."""
    table: Any = parts.to_frame().set_index("arm")
    if GATE not in table.index or not table.loc[GATE, "n_seeds"]:
        return {"note": "the gate was not measured"}, {}
    row: Any = table.loc[GATE]
    gain = float(parts.after.mean()) - float(parts.before.mean())
    limits, n_seeds = _part_contrasts(parts, gain)
    shares = {arm: float(table.loc[arm, "share"]) for arm in SIBLINGS if arm in table.index}
    low, high = float(row["share_low"]), float(row["share_high"])
    verdict = _both(special(limits, MARGIN), low, high, MOST) if n_seeds >= FEWEST_SEEDS else OPEN
    without, beside = _without_affect(control)
    return {
        "sound_statistic": float(row["share"]),
        "low": low,
        "high": high,
        "null": _largest(shares),
        "verdict": _for_affect(verdict, without),
        "note": f"{_nothing(low)}share of the gain of {gain:.3f} in {parts.metric} (null: the best of {', '.join(SIBLINGS)}); {words}, in shares of the gain: {_words(limits)}; "
        f"{n_seeds} seeds; {beside}",
    }, limits


def _without_affect(control: PartScores | None) -> tuple[Limits, str]:
    """The gate against its siblings in a task without affect, and in words."""
    if control is None:
        return {}, "not compared with a task without affect"
    without, n_seeds = _part_contrasts(control, float(control.after.mean()) - float(control.before.mean()))
    return without, f"in {control.title}: {_words(without)}; {n_seeds} seeds"


def _nothing(low: float) -> str:
    """Said where there is no gain to have a share of."""
    return "" if math.isfinite(low) else "tuning gained nothing for certain; "


def _part_contrasts(parts: PartScores, gain: float) -> tuple[Limits, int]:
    """The gate against its siblings in shares of the gain; and the fewest seeds behind one of them."""
    found: dict[str, tuple[float, float, float]] = {}
    measured = parts.scores.isfinite().all(dim=2).sum(dim=1).tolist()
    n_seeds = dict(zip(parts.arms, measured, strict=True)).get(GATE, 0)
    for other in SIBLINGS:
        try:
            d = parts.contrast(GATE, other)
        except ValueError:  # not among the arms, or never measured beside the gate
            found[other] = UNKNOWN
            continue
        found[other] = (d.estimate / gain, d.low / gain, d.high / gain) if gain > 0 else UNKNOWN
        n_seeds = min(n_seeds, d.n_seeds)
    return found, n_seeds


def _papers_percent(parts: PartScores, percent: Callable[[float, float], float]) -> dict[str, Any]:
    """The paper counts in percent of the tuned model's score, which means something for accuracies only."""
    table: Any = parts.to_frame().set_index("arm")
    after = float(parts.after.mean())
    if parts.metric != "accuracy" or GATE not in table.index or not after > 0:
        return {}
    return {"paper_statistic": percent(float(table.loc[GATE, "score"]), after)}


def _efficient(table: ModuleTable, source: str, control: ModuleTable | None) -> dict[str, Any]:
    arms: Any = table.arms.set_index("arm")
    start = claim_row(
        "G3",
        "gate_proj is efficient: tuned alone it keeps what tuning everything reaches",
        "24.5 % of the parameters, 96.6 % of the score",
        _rule("share of the gain of tuning everything", KEPT, "the other arms"),
        model=table.provenance.title,
        source=source,
        n=table.n_examples,
    )
    if GATE not in arms.index or not arms.loc[GATE, "n_seeds"]:
        return start | {"note": "the gate was not tuned"}
    row: Any = arms.loc[GATE]
    limits, n_seeds = _contrasts(table)
    without = _contrasts(control)[0] if control is not None else {}
    low, high = float(row["retention_low"]), float(row["retention_high"])
    verdict = _both(special(limits, MARGIN), low, high, KEPT) if n_seeds >= FEWEST_SEEDS else OPEN
    rivals = {arm: float(arms.loc[arm, "retention"]) for arm in limits if arm in arms.index}
    return start | {
        "paper_statistic": float(row["percent_of_tuned"]),
        "sound_statistic": float(row["retention"]),
        "low": low,
        "high": high,
        "null": _largest(rivals),
        "verdict": _for_affect(verdict, without),
        "note": f"{_nothing(low)}{float(row['share_of_parameters']):.1%} of the parameters of {table.reference}; share of its gain (null: the best of the other arms); gate minus "
        f"others in shares of the gain: {_words(limits)}; {n_seeds} seeds; paper's statistic: percent of the score of {table.reference}"
        + (
            f"; in {control.task}: {_words(without)}"
            if control is not None and without
            else "; not compared with a task without affect"
        ),
    }


def _contrasts(table: ModuleTable) -> tuple[Limits, int]:
    """The gate against its siblings and every other arm but the reference, in shares of the reference's gain; and the fewest seeds behind one of them."""
    arms: Any = table.arms.set_index("arm")
    if GATE not in arms.index or not arms.loc[GATE, "n_seeds"]:
        return {}, 0
    gain = float(arms.loc[table.reference, "gain"]) if table.reference in arms.index else math.nan
    found: dict[str, tuple[float, float, float]] = {}
    n_seeds = int(arms.loc[GATE, "n_seeds"])
    others = [str(arm) for arm in arms.index if arm not in (GATE, table.reference, "none")]
    for other in dict.fromkeys((*SIBLINGS, *others)):
        try:
            d: Any = table.contrast(GATE, other)
        except ValueError:  # not among the arms, exploded, or no common seed
            found[other] = UNKNOWN
            continue
        found[other] = tuple(float(d[c]) / gain for c in ("difference", "low", "high")) if gain > 0 else UNKNOWN  # pyright: ignore[reportArgumentType]
        n_seeds = min(n_seeds, int(d["n_seeds"]))
    return found, n_seeds


def _necessary(parts: PartScores, control: PartScores | None, noise: PartScores | None = None) -> dict[str, Any]:
    start = claim_row(
        "G4",
        "gate_proj is necessary: without its change affect is lost",
        "destructive ablation, no number",
        _rule("share of the gain that goes when the gate is taken back to the base", MOST, ", ".join(SIBLINGS)),
        model=parts.provenance.title,
        source=f"reverted, {parts.title}",
        n=len(parts.before),
    )
    found, _ = _by_parts(parts, "lost with the gate minus with others", control)
    other: Any = noise.to_frame().set_index("arm") if noise is not None else None
    if other is not None and GATE in other.index and "verdict" in found:
        row: Any = other.loc[GATE]
        if math.isfinite(row["share"]):
            found["note"] += (
                f"; with noise of its norm in its place {row['share']:.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}] of the gain goes"
            )
    lost = _papers_percent(parts, lambda score, after: 100 * (1 - score / after))
    return start | found | lost


def _necessary_at_equal_damage(parts: PartScores, control: PartScores | None) -> dict[str, Any]:
    start = claim_row(
        "G4",
        "gate_proj is necessary: damaging it costs more affect than damaging others",
        "destructive ablation, no number",
        f"score lost when noise in a module raises the loss on neutral text by the same amount; does not hold if through one of {', '.join(SIBLINGS)} more is lost, or the "
        f"same within {MARGIN} of the gain; holds if more is lost through the gate than through all of them, {_ONLY_HERE}; undecided otherwise, with fewer than "
        f"{FEWEST_SEEDS} seeds, or where no module lost anything for certain",
        model=parts.provenance.title,
        source=f"equal damage, {parts.target:.2f} nats",
        n=len(parts.before),
    )
    found, limits = _by_parts(parts, "lost with the gate minus with others", control)
    if "verdict" in found:
        table: Any = parts.to_frame()
        enough = int(table["n_seeds"].min()) >= FEWEST_SEEDS and bool((table["share_low"] > 0).any())
        found["verdict"] = _for_affect(special(limits, MARGIN) if enough else OPEN, _without_affect(control)[0])
    lost = _papers_percent(parts, lambda score, after: 100 * (1 - score / after))
    return start | found | lost

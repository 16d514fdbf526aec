"""What to use for a model, as far as a run decides it; what it does not decide is named."""

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lens_affect.comparison import FACTORS
from lens_affect.results import Provenance
from lens_affect.scorecard import main_curve, source_advantage
from lens_affect.statistics import mean_interval
from lens_affect.steering_claims import SURE
from lens_affect.sweeps import Sweep


@dataclass(frozen=True)
class Recommendation:
    """What to use for this model, and what could not be decided."""

    table: pd.DataFrame
    """question, answer, low, high, decided, why."""
    provenance: Provenance
    """Of the run."""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def __str__(self) -> str:
        decided = self.table[self.table["decided"]]
        undecided = self.table.loc[~self.table["decided"], "question"].tolist()
        text = "; ".join(f"{q}: {a}" for q, a in zip(decided["question"], decided["answer"], strict=True))
        return f"{self.provenance.title}: {text or 'nothing could be decided'}" + (
            f"\nnot decided: {', '.join(undecided)}" if undecided else ""
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{self.table.round(3).to_html(index=False, border=0)}"


def recommend(run: Sweep) -> Recommendation:
    """Layer, text source, pooling and strength for this model, with intervals.

    Args:
        run: a finished sweep; pooling is only answered for one with `compare_methods`, strength for one with a steering study.
    """
    text = _advise_source(run)
    source = "generation" if text["answer"] == "stories that it writes" else run.spec.methods[0]
    rows = [text, _advise_layer(run, source), _advise_pooling(run), _advise_strength(run)]
    return Recommendation(pd.DataFrame(rows), main_curve(run, source).provenance)


def _advice(
    question: str, answer: str, decided: bool, why: str, low: float = np.nan, high: float = np.nan
) -> dict[str, Any]:
    return {"question": question, "answer": answer, "low": low, "high": high, "decided": decided, "why": why}


def _advise_source(run: Sweep) -> dict[str, Any]:
    if len(run.spec.methods) < 2:
        return _advice("text", "", False, f"only {' and '.join(run.spec.methods)} was run; sweep with both methods")
    try:
        advantage = mean_interval(source_advantage(run))
    except ValueError as error:
        return _advice("text", "", False, str(error))
    low, high = float(advantage.low), float(advantage.high)
    why = f"accuracy of stories minus passages on common topics {float(advantage.estimate):+.2f} [{low:+.2f}, {high:+.2f}]"
    if low > 0:
        return _advice("text", "stories that it writes", True, why, low, high)
    return _advice("text", "given passages" if high < 0 else "", high < 0, why, low, high)


def _advise_layer(run: Sweep, method: str) -> dict[str, Any]:
    curve = main_curve(run, method)
    i = curve.row(curve.best_layer)
    low, high = curve.best_depth_interval(seed=run.spec.seed)
    layers = [round(d * len(curve.layer_rows)) - 1 for d in (low, high)]
    beyond = not curve.n_permutations or float(curve.p_family[i]) < 0.05
    why = (
        f"{curve.score} {float(curve.values[i]):.2f} [{float(curve.low[i]):.2f}, {float(curve.high[i]):.2f}] on {curve.method}; other topics would "
        f"choose layers {layers[0]} to {layers[1]}"
    )
    if not beyond:
        return _advice("layer", "", False, f"no layer is above shuffled labels; {why}", *map(float, layers))
    return _advice("layer", str(curve.best_layer), True, why, *map(float, layers))


def _advise_strength(run: Sweep) -> dict[str, Any]:
    """The largest strength at which every emotion's texts are sound and show more of it than under random directions."""
    studies = list(run.steering.values())
    if not studies:
        return _advice(
            "strength",
            "",
            False,
            f"this run holds no steering study; lens-affect regimes MODEL --run {run.folder} makes one",
        )
    found, where = [], []
    for study in studies:
        table = study.regimes.table
        own = pd.DataFrame(table[(table["kind"] == "steered") & (table["strength"] > 0)])
        sure = pd.Series((own["regime"] == "surgical") & (own["p_surgical"] >= SURE))
        found += [float(s) for s in sorted(set(own["strength"])) if bool(sure[own["strength"] == s].all())]
        where.append(f"{study.dose.name}, layer {study.dose.layers[-1]}: {str(study.regimes).splitlines()[1]}")
    why = "; ".join(where)
    if not found:
        return _advice(
            "strength", "", False, f"at no strength are all emotions surgical with a probability of {SURE}; {why}"
        )
    return _advice(
        "strength",
        f"{max(found):g}",
        True,
        f"the largest at which all emotions are surgical; {why}",
        min(found),
        max(found),
    )


def _advise_pooling(run: Sweep) -> dict[str, Any]:
    if run.comparison is None:
        return _advice("pooling", "", False, f"this run read only {run.spec.pooling}; sweep with --compare")
    found, used = run.comparison, run.comparison.reference[FACTORS.index("pooling")]
    rows = found.effects[(found.effects["metric"] == "accuracy") & (found.effects["factor"] == "pooling")]
    better = pd.DataFrame(rows[(rows["difference"] > 0) & (rows["p_holm"] < 0.05)]).sort_values(by="difference")
    as_good = rows.loc[(rows["p_holm"] >= 0.05), "level"].tolist()
    if len(better):
        top: Any = better.iloc[-1]
        gain, low, high = (float(top[k]) for k in ("difference", "low", "high"))
        why = f"accuracy {gain:+.2f} [{low:+.2f}, {high:+.2f}] against {top['against']}, layer {found.layer}"
        return _advice("pooling", str(top["level"]), True, why, low, high)
    why = f"no pooling is better than {used} at layer {found.layer}" + (
        f"; not told from it: {', '.join(as_good)}" if as_good else ""
    )
    return _advice("pooling", used, not as_good, why)

"""Boundaries: the strength at which one regime gives way to another, and the change at which half of a model's texts are damaged.

Boundaries are searched for by bisection with new texts at every strength tried. The onset of damage is read off texts that are there already, on the
scale of the achieved change of the residual stream, which means the same in every model.
"""

import html
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lens_affect.adapter import LensModel
from lens_affect.doses import UNSTEERED, DoseResponse, sweep_strengths
from lens_affect.judgements import judge_texts
from lens_affect.judges import Judge
from lens_affect.regimes import Thresholds, classify_regimes, damage_labels, in_words
from lens_affect.results import Provenance, load_result, save_result
from lens_affect.scenarios import Scenarios
from lens_affect.statistics import resample_clusters
from lens_affect.vectors import EmotionVectors

SEARCH = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Strengths at which a search for boundaries looks first."""


@dataclass(frozen=True)
class Boundary:
    """A strength at which one regime gives way to another."""

    low: float
    """Largest strength at which the first regime was seen."""
    high: float
    """Smallest strength at which the second one was."""
    below: str
    """Regime at `low`."""
    above: str
    """Regime at `high`."""


def find_boundaries(
    label_at: Callable[[float], str], strengths: Sequence[float], *, precision: float = 0.1
) -> tuple[Boundary, ...]:
    """Where labels change along strength, by bisection between neighbours that differ.

    Args:
        label_at: label of a strength, such as the regime of a new sweep at it; called once per strength.
        strengths: where to look first, in order.
        precision: width of the last bracket, as a share of its middle.

    Returns:
        One boundary per pair of neighbours that differ; where a third label lies between two, both boundaries around it.

    Raises:
        ValueError: fewer than two strengths, or not in order.

    Example:
        >>> find_boundaries(lambda s: "surgical" if s < 0.37 else "explosive", [0.1, 0.8])[0].below
        'surgical'
    """
    places = list(strengths)
    if len(places) < 2 or sorted(set(places)) != places:
        raise ValueError(f"received strengths {places}; allowed are two or more in increasing order")
    known = {place: label_at(place) for place in places}
    found = []
    brackets = [(a, b) for a, b in itertools.pairwise(places) if known[a] != known[b]]
    while brackets:
        low, high = brackets.pop(0)
        middle = (low + high) / 2
        if high - low <= precision * max(abs(middle), precision):
            found.append(Boundary(low, high, known[low], known[high]))
            continue
        known[middle] = label_at(middle)
        brackets = [(a, b) for a, b in ((low, middle), (middle, high)) if known[a] != known[b]] + brackets
    return tuple(found)


@dataclass(frozen=True)
class RegimeBoundaries:
    """Boundaries between the regimes of one emotion, with every strength that was tried."""

    table: pd.DataFrame
    """One row per strength tried: strength, regime, p (bootstrap probability of that regime), change (achieved), perplexity_ratio, repetition, gain, n."""
    emotion: str
    """Target."""
    judge: str
    """Title of the judge; empty without one (sound texts are `undecided` then)."""
    layers: tuple[int, ...]
    """0-based steered blocks."""
    name: str
    """Name of the prompts."""
    provenance: Provenance
    """Of the texts."""

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Neighbouring strengths whose regimes differ, in order."""
        tried = list(zip(self.table["strength"].tolist(), self.table["regime"].tolist(), strict=True))
        return tuple(Boundary(s, t, a, b) for (s, a), (t, b) in itertools.pairwise(tried) if a != b)

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RegimeBoundaries":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        parts = [
            f"{in_words(b.below)} up to {b.low:.3g}, {in_words(b.above)} from {b.high:.3g}" for b in self.boundaries
        ]
        n = int(self.table["n"].to_numpy()[0])
        return (
            f"{self.provenance.title}, {self.emotion}, {self.name}: {'; '.join(parts) or 'no boundary between the strengths tried'} "
            f"({len(self.table)} strengths, {n} texts each)"
        )

    def _repr_html_(self) -> str:
        table = self.table.to_html(index=False, border=0, float_format="{:.3f}".format)
        return f"<p>{html.escape(str(self))}</p>{table}"


def locate_boundaries(
    model: LensModel,
    vectors: EmotionVectors,
    prompts: Scenarios | Sequence[str],
    emotion: str,
    *,
    layers: int | Sequence[int] | None = None,
    strengths: Sequence[float] = SEARCH,
    judge: Judge | None = None,
    precision: float = 0.1,
    thresholds: Thresholds | None = None,
    progress: Callable[[int, int], None] | None = None,
    **asked: Any,
) -> RegimeBoundaries:
    """Bisect strength until the boundaries between an emotion's regimes are known to `precision`, with new texts at every strength tried.

    Args:
        model: what is steered.
        vectors: directions of this model, read at resid_post.
        prompts: as for sweep_strengths.
        emotion: target.
        layers: as for sweep_strengths.
        strengths: where to look first, in order.
        judge: tells `surgical` from `inert`, against random directions; without one sound texts are `undecided`.
        precision: width of the last bracket, as a share of its middle.
        thresholds: by default Thresholds.of the first sweep, for all strengths.
        progress: called with (strengths tried, 0): how many there will be is not known before.
        asked: further options of sweep_strengths.

    Raises:
        ValueError: as sweep_strengths and find_boundaries, or controls, which have no choice here.

    Example:
        >>> locate_boundaries(model, vectors, load_scenarios("neutral"), "angry", layers=14)  # doctest: +SKIP
    """
    if "controls" in asked:
        raise ValueError(
            f"received controls={asked['controls']!r}; boundaries are searched with random directions beside the texts where there is a judge: leave it out"
        )
    limits, rows, last = thresholds, [], None

    def label_at(strength: float) -> str:
        nonlocal limits, last
        dose = sweep_strengths(
            model, vectors, prompts, emotions=[emotion], layers=layers, strengths=[strength],
            controls=("random",) if judge else (), **asked,
        )  # fmt: skip
        limits = limits or Thresholds.of(dose)
        judgement = None if judge is None else judge_texts(judge, dose.texts)
        last = classify_regimes(dose, judgement, thresholds=limits)
        cell: dict[str, Any] = pd.DataFrame(last.table[last.table["kind"] == "steered"]).to_dict("records")[0]
        row = {"strength": strength, "regime": cell["regime"], "p": cell[f"p_{cell['regime']}"]}
        rows.append(row | {c: cell[c] for c in ("change", "perplexity_ratio", "repetition", "gain", "n")})
        if progress:
            progress(len(rows), 0)
        return str(cell["regime"])

    find_boundaries(label_at, strengths, precision=precision)
    assert last is not None  # two strengths at least were tried
    return RegimeBoundaries(
        table=pd.DataFrame(rows).sort_values(by="strength", ignore_index=True),
        emotion=emotion,
        judge=last.judge,
        layers=last.layers,
        name=last.name,
        provenance=last.provenance,
    )


@dataclass(frozen=True)
class Onsets:
    """How far the residual stream of each model can be moved before half of its texts are damaged."""

    table: pd.DataFrame
    """One row per model and damage: model, damage (`any`, or a label of regimes.DAMAGE), kind (`steered` or `random`), change (achieved change at which half of
    the texts have it, straight line between doses on a log scale), low, high (95 %, bootstrap over groups of prompts), share_most (largest share at any dose),
    reached (whether half was reached), unsteered (share of unsteered texts that have it: below one half, or the onset says little), n (texts). Where half is never reached `change` is NaN and `low` the largest change tried."""
    shares: pd.DataFrame
    """One row per model, kind and dose: model, kind, strength, change, and share of each damage label."""
    provenance: Provenance
    """Of the first model."""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Onsets":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        lines = []
        own = self.table[(self.table["damage"] == "any") & (self.table["kind"] == "steered")]
        for row in pd.DataFrame(own).to_dict("records"):
            text = (
                f"half of the texts are damaged at a change of {row['change']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                if row["reached"]
                else f"half of the texts stay sound up to a change of {row['low']:.2f}"
            )
            lines.append(f"{row['model']}: {text}, n = {row['n']} (without steering {row['unsteered']:.2f} are)")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{self.table.round(3).to_html(index=False, border=0)}"


def compare_onsets(
    doses: Mapping[str, DoseResponse],
    *,
    thresholds: Mapping[str, Thresholds] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Onsets:
    """The achieved change at which half of the texts are damaged, per model, for pushes towards the emotions (positive strengths).

    Doses of different models cannot be compared as coefficients; the achieved change |x' - x| / |x| can.

    Args:
        doses: of sweep_strengths, by the name of the model.
        thresholds: by name; by default Thresholds.of each.
        n_resamples: draws of whole groups of prompts.
        seed: of the draws.

    Raises:
        ValueError: no model, or one with fewer than two positive strengths.
    """
    if not doses:
        raise ValueError("received no dose-response; give one per model")
    rows, shares = [], []
    for model, dose in doses.items():
        strengths = [s for s in dose.strengths if s > 0]
        if len(strengths) < 2:
            raise ValueError(f"received {model} with positive strengths {strengths}; two or more are needed")
        labels = damage_labels(dose, (thresholds or {}).get(model) or Thresholds.of(dose))
        again = dose.column("kind") == UNSTEERED[1]  # the first sample is its own reference
        for kind in (k for k in dose.kinds if k in ("steered", "random")):
            cells = [cell for s in strengths if len((cell := _Cell.of(dose, kind, s)).rows)]
            if len(cells) < 2:
                continue
            named = {"any": labels != "sound"} | {d: labels == d for d in ("repetitive_collapse", "explosive")}
            rows += [
                {"model": model, "damage": name, "kind": kind}
                | _onset(cells, damaged, n_resamples, seed)
                | {"unsteered": float(damaged[again].mean())}
                for name, damaged in named.items()
            ]
            for cell in cells:
                found = {name: float(damaged[cell.rows].mean()) for name, damaged in named.items()}
                shares.append({"model": model, "kind": kind, "strength": cell.strength, "change": cell.change, **found})
    return Onsets(pd.DataFrame(rows), pd.DataFrame(shares), next(iter(doses.values())).provenance)


@dataclass(frozen=True)
class _Cell:
    """All texts of one kind and strength."""

    strength: float
    change: float
    rows: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, dose: DoseResponse, kind: str, strength: float) -> "_Cell":
        rows = np.flatnonzero((dose.column("kind") == kind) & (dose.column("strength") == strength))
        change = dose.column("change")[rows].astype(float)
        known = change[np.isfinite(change)]
        return cls(strength, float(known.mean()) if len(known) else math.nan, rows, dose.column("group")[rows])


def _onset(cells: Sequence[_Cell], damaged: np.ndarray, n_resamples: int, seed: int) -> dict[str, Any]:
    known = [cell for cell in cells if math.isfinite(cell.change)]
    change = np.log([cell.change for cell in known])
    groups = sorted({str(g) for cell in known for g in cell.groups})
    counts = np.array(
        [[[(damaged[c.rows] & (c.groups == g)).sum(), (c.groups == g).sum()] for g in groups] for c in known]
    )
    share = counts[:, :, 0].sum(1) / counts[:, :, 1].sum(1)
    drawn = counts[:, resample_clusters(len(groups), n_resamples, seed, "onset")].sum(2)
    found = np.array([_crossing(change, draw) for draw in (drawn[:, :, 0] / drawn[:, :, 1]).T])
    # A draw that never gets there has its onset beyond the largest change.
    low, high = np.quantile(np.where(np.isnan(found), np.inf, found), [0.025, 0.975], method="nearest")
    at = _crossing(change, share)
    return {
        "change": math.exp(at),
        "low": math.exp(low) if math.isfinite(low) else math.exp(change[-1]),
        "high": math.exp(high) if math.isfinite(high) else math.inf,
        "share_most": float(share.max()),
        "reached": not math.isnan(at),
        "n": int(counts[:, :, 1].sum()),
    }


def _crossing(change: Float[np.ndarray, " dose"], share: Float[np.ndarray, " dose"]) -> float:
    """First place where the share reaches one half; NaN if it never does. Damage at the smallest dose already counts as there."""
    if share[0] >= 0.5:
        return float(change[0])
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(change.tolist(), share.tolist(), strict=True)):
        if y1 >= 0.5:
            return x0 + (0.5 - y0) / (y1 - y0) * (x1 - x0)
    return math.nan

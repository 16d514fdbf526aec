"""Is the gate special? One verdict over patching maps of several models, by a rule that is stated before any of them is made."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lens_affect.patching import PatchingMap
from lens_affect.results import Provenance

RIVALS = ("up", "attn_out")
"""What the gate has to beat: `up` has its width and its input, `attn_out` is all of attention."""
RULE = (
    "holds if, in two models or more, there is a layer where gate - up and gate - attn_out both have intervals above 0 (95 % over all layers at "
    "once), raw and per relative change of the residual stream, for affective pairs, and no such layer for non-affective ones; does not hold "
    "otherwise; cannot be decided where a map is missing or a model does not show the behaviour"
)


@dataclass(frozen=True)
class GateVerdict:
    """Whether the gate carries affect beyond its siblings, with what decided it."""

    table: pd.DataFrame
    """One row per contrast and map that shows its behaviour: model, pairs, rival, per_change, rank8 (the same at equal rank, where it was run), layer (where the lower limit is
    highest), difference, low, high, mean, mean_low, mean_high (over all layers), layers_above (layers whose interval is above 0)."""
    special: dict[str, bool]
    """`model, pairs` -> whether there is a layer where all intervals are above 0."""
    verdict: str
    """holds, does not hold, or cannot be decided."""
    reason: str
    """What decided it."""
    provenance: Provenance
    """Of the first map."""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def __str__(self) -> str:
        found = "; ".join(f"{name}: {'yes' if yes else 'no'}" for name, yes in self.special.items())
        return f"the gate is special: {self.verdict} ({self.reason})\na layer where the gate beats up and attention, raw and at equal change: {found}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{self.table.round(3).to_html(index=False, border=0)}"


def judge_gate(affective: Sequence[PatchingMap], others: Sequence[PatchingMap]) -> GateVerdict:
    """Judge "affect is carried by the gate" (arXiv:2601.15906, at the level of activations) by RULE.

    Args:
        affective: maps of affective pairs, one per model, of the same positions.
        others: maps of non-affective pairs of the same models.

    Raises:
        ValueError: no map, or one without gate, up and attn_out.

    Example:
        >>> print(judge_gate([smollm2_affect, gemma_affect], [smollm2_number, gemma_number]))  # doctest: +SKIP
    """
    maps = [*affective, *others]
    if not affective:
        raise ValueError("received no map of affective pairs; make one with patch_sites(model, load_pairs('affect'))")
    for one in maps:
        missing = [s for s in ("gate", *RIVALS) if s not in one.sites]
        if missing or len(one.positions) != 1:
            raise ValueError(
                f"received a map of {list(one.sites)} at {list(one.positions)[:3]}; needed are gate, {' and '.join(RIVALS)} at one position "
                "('all' or 'last')"
            )
    rows: list[dict[str, Any]] = []
    special: dict[str, bool] = {}
    for one in maps:
        special[f"{one.provenance.title}, {one.name}"] = False
        if not one.gap_interval[1] > 0:
            continue  # nothing to move: ratios to it would be noise
        contrasts = [_contrast(one, rival, per_change) for rival in RIVALS for per_change in (False, True)]
        rows += contrasts
        common = set.intersection(*(set(c["layers_above"]) for c in contrasts))
        special[f"{one.provenance.title}, {one.name}"] = bool(common)
    verdict, reason = _verdict(affective, others, special)
    return GateVerdict(pd.DataFrame(rows), special, verdict, reason, affective[0].provenance)


def _contrast(one: PatchingMap, rival: str, per_change: bool) -> dict[str, Any]:
    table = one.compare("gate", rival, per_change=per_change)
    layers, mean = table.iloc[:-1], table.iloc[-1].to_dict()  # the last row is the mean over layers
    best: dict[str, Any] = layers.iloc[int(np.nanargmax(layers["low"].to_numpy(float)))].to_dict()
    rank8 = float("nan")
    if "rank8" in one.controls:
        same_rank = one.compare("gate", rival, per_change=per_change, donor="rank8")
        rank8 = float(same_rank["difference"].to_numpy(float)[one.layers.index(int(best["layer"]))])
    return {
        "model": one.provenance.title,
        "pairs": one.name,
        "rival": rival,
        "per_change": per_change,
        "layer": int(best["layer"]),
        **{k: float(best[k]) for k in ("difference", "low", "high")},
        "rank8": rank8,
        "mean": float(mean["difference"]),
        "mean_low": float(mean["low"]),
        "mean_high": float(mean["high"]),
        "layers_above": tuple(layer for layer, low in zip(one.layers, layers["low"], strict=True) if low > 0),
    }


def _verdict(
    affective: Sequence[PatchingMap], others: Sequence[PatchingMap], special: dict[str, bool]
) -> tuple[str, str]:
    silent = [f"{m.provenance.title}, {m.name}" for m in affective if not m.gap_interval[1] > 0]
    models = {m.provenance.title for m in affective}
    without = sorted(models - {m.provenance.title for m in others})
    if silent:
        return "cannot be decided", f"the behaviour is not shown by {'; '.join(silent)}"
    if len(models) < 2 or without:
        missing = f"; no non-affective pairs of {', '.join(without)}" if without else ""
        return "cannot be decided", f"maps of {len(models)} models, 2 are needed{missing}"
    not_special = [n for n in (f"{m.provenance.title}, {m.name}" for m in affective) if not special[n]]
    if not_special:
        return "does not hold", f"no such layer in {'; '.join(not_special)}"
    also = [n for n in (f"{m.provenance.title}, {m.name}" for m in others) if special[n]]
    if also:
        return "does not hold", f"non-affective pairs show the same: {'; '.join(also)}"
    return "holds", "in every model, and for affective pairs only"

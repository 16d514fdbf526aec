"""Do two fine-tunes of one base change a module alike? Tasks, seeds, or strategies (full against LoRA).

A cosine near 0 is what unrelated changes have; the principal angles say whether at least the same input or output directions are involved.
"""

import html
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.checkpoint_pairs import CheckpointPair
from lens_affect.lora import LowRank, multiplied
from lens_affect.results import Provenance, load_result, save_result
from lens_affect.spectra import inner_product, principal_angles, squared_norm, top_directions
from lens_affect.statistics import mean_interval


@dataclass(frozen=True)
class DeltaAgreement:
    """How alike two fine-tunes changed each linear module."""

    modules: tuple[str, ...]
    """Module of each row."""
    layers: tuple[int, ...]
    """0-based block of each row."""
    cosine: Float[Tensor, " tensor"]
    """Cosine between the two changes: 1 is the same direction, 0 is what unrelated ones have; NaN where one of them is 0."""
    chance_sd: Float[Tensor, " tensor"]
    """SD of the cosine of two random directions of that size, 1 / sqrt(entries)."""
    output_overlap: Float[Tensor, " tensor"]
    """Mean squared cosine of the principal angles between their top output directions: 1 for one subspace, chance for unrelated ones."""
    input_overlap: Float[Tensor, " tensor"]
    """The same for the input directions."""
    output_chance: Float[Tensor, " tensor"]
    """Overlap of random subspaces: the larger rank over the number of outputs."""
    input_chance: Float[Tensor, " tensor"]
    """The same over inputs."""
    output_angle: Float[Tensor, " tensor"]
    """Smallest principal angle of the output directions, degrees."""
    input_angle: Float[Tensor, " tensor"]
    """The same for the input directions."""
    rank: Int[Tensor, " tensor"]
    """Directions compared: the smaller of the two changes' counts."""
    names: tuple[str, str]
    """The two fine-tunes."""
    provenance: Provenance
    """Of the first."""

    def to_frame(self) -> pd.DataFrame:
        """One row per module and block, with the columns named as the fields."""
        names = [
            "cosine", "chance_sd", "output_overlap", "output_chance", "output_angle", "input_overlap", "input_chance", "input_angle", "rank",
        ]  # fmt: skip
        columns = {name: getattr(self, name).numpy() for name in names}
        return pd.DataFrame({"module": self.modules, "layer": self.layers, **columns})

    def by_module(self) -> pd.DataFrame:
        """One row per module: mean cosine over blocks with low and high; means of overlaps, their chance, and smallest angles (degrees)."""
        rows = []
        groups: Any = self.to_frame().groupby("module", sort=False)
        for name, table in groups:
            interval = (
                mean_interval(table["cosine"].dropna().to_numpy(float)) if table["cosine"].notna().any() else None
            )
            values = (interval.estimate, interval.low, interval.high) if interval else (math.nan,) * 3
            sides = [f"{side}_{what}" for side in ("output", "input") for what in ("overlap", "chance", "angle")]
            means = table[sides].mean()
            rows.append(
                {"module": name, **dict(zip(("cosine", "low", "high"), map(float, values), strict=True)), **means}
            )
        return pd.DataFrame(rows)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DeltaAgreement":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        table: Any = self.to_frame()
        known = table["cosine"].dropna().to_numpy(float)
        if not len(known):
            return f"{' and '.join(self.names)}: no module that both changed"
        interval = mean_interval(known)
        best: Any = self.by_module().sort_values(by="cosine", ascending=False).iloc[0]
        return (
            f"{' and '.join(self.names)}: mean cosine {float(interval.estimate):.3f} [{float(interval.low):.3f}, {float(interval.high):.3f}] over "
            f"{len(known)} linear modules (unrelated changes: 0 with SD {float(self.chance_sd.mean()):.4f}); most alike in {best['module']}, "
            f"{best['cosine']:.3f}"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>{self.by_module().round(4).to_html(index=False, border=0)}"


def compare_changes(
    first: CheckpointPair,
    second: CheckpointPair,
    names: tuple[str, str],
    provenance: Provenance,
    *,
    rank: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> DeltaAgreement:
    """Compare the changes of two pairs, one tensor at a time; see ModuleDelta.compare.

    Args:
        first: a base and a fine-tune.
        second: the same base and another fine-tune.
        names: of the two.
        provenance: of the first.
        rank: directions of each change that are compared.
        progress: called with (tensors done, tensors in all).

    Raises:
        ValueError: other shapes, or no module that both changed.
    """
    keys = [key for key in first.linear_keys if key in second.keys]
    if not keys or any(first.base.parts[k].shape != second.base.parts[k].shape for k in keys):
        raise ValueError(
            f"received {names[0]} and {names[1]}, which share no linear module of one shape; allowed are fine-tunes of one base that "
            "changed a module both"
        )
    rows = []
    for i, key in enumerate(keys):
        rows.append(_agree(first.change(key), second.change(key), rank))
        if progress:
            progress(i + 1, len(keys))
    columns = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    parts = [first.base.parts[key] for key in keys]
    return DeltaAgreement(
        modules=tuple(p.module for p in parts),
        layers=tuple(p.layer for p in parts),
        **columns,
        names=names,
        provenance=provenance,
    )


def _agree(first: Tensor | LowRank, second: Tensor | LowRank, rank: int) -> dict[str, float | int]:
    a, b = multiplied(first), multiplied(second)
    norms = math.sqrt(squared_norm(a) * squared_norm(b))
    found: dict[str, float | int] = {
        "cosine": inner_product(a, b) / norms if norms else math.nan,
        "chance_sd": 1 / math.sqrt(a.numel()),
    }
    tops = [top_directions(x, min(rank, min(x.shape) - 1)) for x in (a, b)]
    sizes = [len(top[1]) for top in tops]
    for name, place, width in (("output", 0, a.shape[0]), ("input", 2, a.shape[1])):
        angles = principal_angles(tops[0][place], tops[1][place]) if min(sizes) else torch.full((1,), math.nan)
        found[f"{name}_overlap"] = float(torch.deg2rad(angles).cos().square().mean())
        found[f"{name}_chance"] = max(sizes) / width
        found[f"{name}_angle"] = float(angles.min()) if min(sizes) else math.nan
    return {**found, "rank": min(sizes)}

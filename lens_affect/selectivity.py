"""Is an ablation selective? Affect lost minus control lost, each in SDs of the unablated model's scores, with an interval over examples.

Scores come from the caller, one per example and the higher the better, so that any task will do. Layers are scanned in bands. A comparison of the gate
with a sibling refuses what cannot tell them apart.
"""

import contextlib
import html
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from scipy import stats
from torch import Tensor

from lens_affect.ablations import ONE_FUNCTION, ablate_modules
from lens_affect.checkpoints import open_checkpoint
from lens_affect.damage import facts_of
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.sizes import choose_modules

Score = Callable[[Any], Float[np.ndarray, " example"]]
"""A model in, one score per example out; the higher the better."""


def layer_bands(n_layers: int, n_bands: int) -> dict[str, tuple[int, ...]]:
    """Consecutive blocks in bands as equal as can be, by name, such as `0-9`.

    Example:
        >>> layer_bands(5, 2)
        {'0-2': (0, 1, 2), '3-4': (3, 4)}
    """
    if not 1 <= n_bands <= n_layers:
        raise ValueError(f"received {n_bands} bands for {n_layers} blocks; allowed are 1 to {n_layers}")
    parts = [tuple(int(x) for x in part) for part in np.array_split(np.arange(n_layers), n_bands)]
    return {f"{min(p)}-{max(p)}" if len(p) > 1 else str(min(p)): p for p in parts}


@dataclass(frozen=True)
class AblationTable:
    """Scores of a model as it is and with each arm ablated."""

    arms: tuple[str, ...]
    """Modules of each arm."""
    bands: tuple[str, ...]
    """Blocks of each arm, by name."""
    scales: Float[Tensor, " arm"]
    """Scale of each ablation."""
    affect: Float[Tensor, "arm example"]
    """Affect scores under each arm."""
    control: Float[Tensor, "arm control_example"]
    """Control scores under each arm."""
    affect_before: Float[Tensor, " example"]
    """Affect scores of the model as it is."""
    control_before: Float[Tensor, " control_example"]
    """Control scores of the model as it is."""
    affect_groups: tuple[str, ...]
    """Group of each affect example; intervals resample groups."""
    control_groups: tuple[str, ...]
    """Group of each control example."""
    how: str
    """Kind of ablation."""
    seed: int
    """Of random weights."""
    provenance: Provenance
    """Of the model."""

    def to_frame(self) -> pd.DataFrame:
        """One row per arm: arm, band, how, scale, affect_loss, control_loss and selectivity (in SDs of the scores before) with low and high, n, n_control."""
        parts = self._parts()
        rows = []
        for i, arm in enumerate(self.arms):
            weights = np.zeros(len(self.arms))
            weights[i] = 1.0
            estimate, low, high = _contrast(parts, weights)
            losses = [float(part[0][i]) for part in parts]
            rows.append([arm, self.bands[i], self.how, float(self.scales[i]), *losses, estimate, low, high])
        columns = ["arm", "band", "how", "scale", "affect_loss", "control_loss", "selectivity", "low", "high"]
        found = pd.DataFrame(rows, columns=columns)
        return found.assign(n=len(self.affect_before), n_control=len(self.control_before))

    def _parts(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return (
            _standard_losses(
                self.affect_before.double().numpy(), self.affect.double().numpy(), np.array(self.affect_groups)
            ),
            _standard_losses(
                self.control_before.double().numpy(), self.control.double().numpy(), np.array(self.control_groups)
            ),
        )

    def compare(self, first: str, second: str) -> pd.DataFrame:
        """Selectivity of one arm minus another's in every band, on the same examples.

        Args:
            first: modules of an arm, such as `gate`.
            second: of another, such as `up`.

        Returns:
            Columns band, difference, low, high (95 %, pointwise).

        Raises:
            ValueError: an arm that is not there, or two arms that are one function: zeroed gate, up or down.
        """
        if self.how == "zero" and {*choose_modules(first), *choose_modules(second)} <= set(ONE_FUNCTION):
            raise ValueError(
                f"received {first!r} and {second!r} ablated by zero, which is one function (act(0) * up = gate * 0 = 0) and says nothing about "
                "either; compare them by shuffle, mean, base or random_equal_norm at equal damage"
            )
        parts = self._parts()
        rows = []
        for band in dict.fromkeys(self.bands):
            places = [self._place(arm, band) for arm in (first, second)]
            weights = np.zeros(len(self.arms))
            weights[places[0]], weights[places[1]] = 1.0, -1.0
            rows.append([band, *_contrast(parts, weights)])
        return pd.DataFrame(rows, columns=["band", "difference", "low", "high"])

    def _place(self, arm: str, band: str) -> int:
        for i, found in enumerate(zip(self.arms, self.bands, strict=True)):
            if found == (arm, band):
                return i
        raise ValueError(f"received the arm {arm!r} in {band}; arms are {list(dict.fromkeys(self.arms))}")

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "AblationTable":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        table: Any = self.to_frame()
        head = (
            f"{self.provenance.title}: {len(self.arms)} ablations by {self.how}, {len(self.affect_before)} affect and {len(self.control_before)} "
            "control examples"
        )
        if self.how == "zero":
            return f"{head}; zeroing gate, up or down is one function, so no arm is named"
        if table["selectivity"].isna().all():
            return f"{head}; no selectivity (scores without spread)"
        best: Any = table.loc[table["selectivity"].idxmax()]
        return (
            f"{head}\nmost selective: {best['arm']} in blocks {best['band']}, affect lost minus control lost = {best['selectivity']:.2f} "
            f"[{best['low']:.2f}, {best['high']:.2f}] SD (affect {best['affect_loss']:.2f}, control {best['control_loss']:.2f})"
        )

    def _repr_html_(self) -> str:
        text = html.escape(str(self)).replace("\n", "<br>")
        return f"<p>{text}</p>{self.to_frame().round(3).to_html(index=False, border=0)}"


def _standard_losses(
    before: Float[np.ndarray, " example"],
    after: Float[np.ndarray, "arm example"],
    groups: Shaped[np.ndarray, " example"],
) -> tuple[Float[np.ndarray, " arm"], Float[np.ndarray, "group arm"]]:
    """Mean loss in SDs of the scores before, for all examples and without each group; the SD is that of the examples that are left."""

    def loss(keep: np.ndarray) -> np.ndarray:
        sd = before[keep].std(ddof=1) if keep.sum() > 1 else 0.0
        return (before[keep].mean() - after[:, keep].mean(axis=1)) / sd if sd > 0 else np.full(len(after), math.nan)

    whole = loss(np.ones(len(before), bool))
    return whole, np.stack([loss(groups != name) for name in dict.fromkeys(groups.tolist())])


def _contrast(
    parts: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], weights: Float[np.ndarray, " arm"]
) -> tuple[float, float, float]:
    """Affect minus control of a weighted sum of arms, with a t interval from two delete-one-group jackknives (the two sets are independent)."""
    estimate = float(parts[0][0] @ weights - parts[1][0] @ weights)
    variance, degrees = 0.0, 0.0
    for _, without in parts:
        n, values = len(without), without @ weights
        if n < 2:
            return estimate, math.nan, math.nan
        own = (n - 1) / n * float(((values - values.mean()) ** 2).sum())
        variance, degrees = variance + own, degrees + own**2 / (n - 1)
    if variance == 0 or not math.isfinite(variance):
        return estimate, *((estimate, estimate) if variance == 0 else (math.nan, math.nan))
    half = float(stats.t.ppf(0.975, variance**2 / degrees)) * math.sqrt(
        variance
    )  # Welch and Satterthwaite's degrees of freedom
    return estimate, estimate - half, estimate + half


def scan_ablations(
    model: Any,
    *,
    arms: Sequence[str],
    affect: Score,
    control: Score,
    bands: Mapping[str, Sequence[int]] | int = 1,
    how: str = "random_equal_norm",
    base: Any = None,
    scales: Mapping[str, float] | float = 1.0,
    affect_groups: Sequence[str] | None = None,
    control_groups: Sequence[str] | None = None,
    seed: int = 0,
    means: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AblationTable:
    """Ablate each arm in each band of blocks, and score affect and control every time.

    Args:
        model: in memory, as for ablate_modules.
        arms: modules of each arm, such as `gate`, `up`, `attention`.
        affect: model in, one affect score per example out; the higher the better.
        control: the same for what is not affect, such as minus the next-token loss of neutral texts.
        bands: names with their 0-based blocks, or a number of equal bands (layer_bands).
        how: as for ablate_modules.
        base: as for ablate_modules.
        scales: of the ablation: one for all, or one per arm, such as `equal_damage(...).scale_of`.
        affect_groups: group of each affect example, for intervals; each by itself by default.
        control_groups: the same for the control.
        seed: of random weights.
        means: of mean_outputs, for `mean`.
        progress: called with (ablations done, ablations in all).

    Returns:
        The table.

    Raises:
        ValueError: no arm, an arm without a scale, scores of changing length or that are not finite, or as ablate_modules.
    """
    watch = Stopwatch()
    chosen = layer_bands(open_checkpoint(model).n_layers, bands) if isinstance(bands, int) else dict(bands)
    missing = [arm for arm in arms if isinstance(scales, Mapping) and arm not in scales]
    if not arms or not chosen or missing:
        raise ValueError(
            f"received the arms {list(arms)} in {len(chosen)} bands, without a scale for {missing}; allowed are arms with a scale each "
            "(equal_damage leaves out what does not reach its target)"
        )
    before = [_scored(score, model, name) for score, name in ((affect, "affect"), (control, "control"))]
    cells = [(arm, band) for band in chosen for arm in arms]
    after: list[list[Tensor]] = [[], []]
    used = [scales[arm] if isinstance(scales, Mapping) else scales for arm, _ in cells]
    for i, ((arm, band), scale) in enumerate(zip(cells, used, strict=True)):
        with contextlib.ExitStack() as inside:
            options = {"how": how, "base": base, "scale": float(scale), "seed": seed, "means": means}
            inside.enter_context(ablate_modules(model, modules=arm, layers=tuple(chosen[band]), **options))
            for k, (score, name) in enumerate(((affect, "affect"), (control, "control"))):
                after[k].append(_scored(score, model, name, len(before[k])))
        if progress:
            progress(i + 1, len(cells))
    groups = [
        tuple(map(str, given if given is not None else range(len(scores))))
        for given, scores in ((affect_groups, before[0]), (control_groups, before[1]))
    ]
    if any(len(g) != len(b) for g, b in zip(groups, before, strict=True)):
        raise ValueError(
            f"received groups of {[len(g) for g in groups]} examples for {[len(b) for b in before]} scores; allowed is one each"
        )
    return AblationTable(
        arms=tuple(arm for arm, _ in cells),
        bands=tuple(band for _, band in cells),
        scales=torch.tensor(used, dtype=torch.float32),
        affect=torch.stack(after[0]),
        control=torch.stack(after[1]),
        affect_before=before[0],
        control_before=before[1],
        affect_groups=groups[0],
        control_groups=groups[1],
        how=how,
        seed=seed,
        provenance=facts_of(model).updated(seed=seed, elapsed_seconds=watch.seconds),
    )


def _scored(score: Score, model: Any, name: str, n: int | None = None) -> Float[Tensor, " example"]:
    found = np.asarray(score(model), dtype=np.float64)
    if found.ndim != 1 or not len(found) or (n is not None and len(found) != n) or not np.isfinite(found).all():
        raise ValueError(
            f"received {name} scores of shape {found.shape}{'' if np.isfinite(found).all() else ' that are not finite'}; allowed is one finite "
            f"number per example{f', {n} as before' if n else ''}: a smaller scale keeps a model's scores finite"
        )
    return torch.from_numpy(found).float()

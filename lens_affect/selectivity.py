"""Is an ablation selective? Affect lost minus control lost, each in SDs of the unablated model's scores, with an interval over examples.

Scores come from the caller, one per example and the higher the better, so that any task will do. Layers are scanned in bands. Modules are compared
where every one of them does equal damage in its band (`target`), by a control that is not the loss by which the damage was made equal. A comparison
of the gate with a sibling refuses what cannot tell them apart.
"""

import html
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from lens_affect.damage import Loss, equal_damage, facts_of, neutral_loss
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
    """Scale of each ablation; NaN where equal damage was asked for and not reached, and so are its scores."""
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
    control_name: str = "control"
    """What the control is."""
    target: float = math.nan
    """Rise of the loss to which every ablation was brought, nats per token; NaN where scales were given."""
    rises: Float[Tensor, " arm"] | None = None
    """Rise of the loss through each ablation, nats per token (the most that was tried where the target was not reached); None where scales were given."""
    others: dict[str, Float[Tensor, "arm _"]] = field(default_factory=dict)
    """Scores of further controls under each arm, by name."""
    others_before: dict[str, Float[Tensor, " _"]] = field(default_factory=dict)
    """The same of the model as it is."""
    others_groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Group of each of their examples."""
    tuned: str = ""
    """Which fine-tune was ablated, as in PartScores.tuned; empty where that was not said."""

    def to_frame(self) -> pd.DataFrame:
        """One row per arm: arm, band, how, scale, affect_loss, control_loss and selectivity (in SDs of the scores before) with low and high, n, n_control;
        at equal damage also rise; for each further control also NAME_loss, NAME_selectivity, NAME_low, NAME_high, n_NAME."""
        found = pd.DataFrame({"arm": self.arms, "band": self.bands, "how": self.how, "scale": self.scales.numpy()})
        names = ("affect_loss", "control_loss", "selectivity", "low", "high")
        found = found.assign(**dict(zip(names, self._columns(), strict=True)))
        found = found.assign(n=len(self.affect_before), n_control=len(self.control_before))
        if self.rises is not None:
            found["rise"] = self.rises.numpy()
        for name, before in self.others_before.items():
            columns = [f"{name}_{what}" for what in ("loss", "selectivity", "low", "high")]
            found = found.assign(**dict(zip(columns, self._columns(name)[1:], strict=True)))
            found[f"n_{name}"] = len(before)
        return found

    def _columns(self, control: str | None = None) -> list[np.ndarray]:
        """Affect lost, control lost, selectivity, low, high; by arm."""
        parts = self._parts(control)
        limits = [_contrast(parts, weights) for weights in np.eye(len(self.arms))]
        return [parts[0][0], parts[1][0], *np.array(limits).T]

    def _parts(self, control: str | None = None) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        if control is None:
            before, after, groups = self.control_before, self.control, self.control_groups
        else:
            before, after, groups = self.others_before[control], self.others[control], self.others_groups[control]
        return (
            _standard_losses(
                self.affect_before.double().numpy(), self.affect.double().numpy(), np.array(self.affect_groups)
            ),
            _standard_losses(before.double().numpy(), after.double().numpy(), np.array(groups)),
        )

    @property
    def missed(self) -> tuple[str, ...]:
        """Arms, with their blocks, whose ablation cannot do the damage that was asked for."""
        lost = [not math.isfinite(scale) for scale in self.scales.tolist()]
        return tuple(
            f"{arm} in blocks {band}" for arm, band, is_lost in zip(self.arms, self.bands, lost, strict=True) if is_lost
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
            f"{self.control_name} examples (mean scores {float(self.affect_before.mean()):.2f} and {float(self.control_before.mean()):.2f} before)"
        )
        if math.isfinite(self.target):
            lost = ", ".join(self.missed)
            head += f"; each raises the loss by {self.target:.2f} nats per token" + f", not reached: {lost}" * bool(
                lost
            )
        if self.how == "zero":
            return f"{head}; zeroing gate, up or down is one function, so no arm is named"
        if table["selectivity"].isna().all():
            return f"{head}; no selectivity (scores without spread, or no damage as large as was asked for)"
        best: Any = table.loc[table["selectivity"].idxmax()]
        return (
            f"{head}\nmost selective: {best['arm']} in blocks {best['band']}, affect lost minus {self.control_name} lost = {best['selectivity']:.2f} "
            f"[{best['low']:.2f}, {best['high']:.2f}] SD (affect {best['affect_loss']:.2f}, {self.control_name} {best['control_loss']:.2f})"
            + "".join(
                f"; minus {name} lost {best[f'{name}_selectivity']:.2f} [{best[f'{name}_low']:.2f}, {best[f'{name}_high']:.2f}]"
                if math.isfinite(best[f"{name}_selectivity"])
                else f"; {name} had no spread to lose from"
                for name in self.others_before
            )
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
    named = weights != 0  # an arm that was not measured must not reach the others
    estimate = float((parts[0][0] - parts[1][0])[named] @ weights[named])
    variance, degrees = 0.0, 0.0
    for _, without in parts:
        n, values = len(without), without[:, named] @ weights[named]
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
    others: Mapping[str, Score] | None = None,
    bands: Mapping[str, Sequence[int]] | int = 1,
    whole: bool = False,
    how: str = "random_equal_norm",
    base: Any = None,
    scales: Mapping[str, float] | float | None = None,
    target: float | None = None,
    loss: Loss = neutral_loss,
    tolerance: float = 0.05,
    affect_groups: Sequence[str] | None = None,
    control_groups: Sequence[str] | None = None,
    others_groups: Mapping[str, Sequence[str]] | None = None,
    control_name: str = "control",
    seed: int = 0,
    means: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AblationTable:
    """Ablate each arm in each band of blocks, and score affect and controls every time.

    With `target` each arm's scale is found anew in each band, so that every ablation does equal damage; one that cannot is NaN, and said. What that
    takes: per band one loss, per arm and band four or five more as a rule (damage.MOST_TRIALS at most) and one scoring of affect and of each control.
    SmolLM2-135M on one core: 10 s per loss, and 45 s for 192 comments of GoEmotions, 177 sentences by topic and 100 sums, so 25 minutes for four arms
    in three bands and the whole model.

    A control that stands near chance has little to lose, so a selectivity above 0 alone says little; `compare` asks whether one arm's is larger.

    Args:
        model: in memory, as for ablate_modules.
        arms: modules of each arm, such as `gate`, `up`, `attention`.
        affect: model in, one affect score per example out; the higher the better.
        control: the same for what is not affect, such as a task without affect. Not `loss`, if `target` is given: that is equal by construction.
        others: further controls by name, such as arithmetic.
        bands: names with their 0-based blocks, or a number of equal bands (layer_bands).
        whole: also all blocks at once.
        how: as for ablate_modules.
        base: as for ablate_modules.
        scales: of the ablation: one for all (1 by default), or one per arm.
        target: instead of scales, rise of `loss` to which each arm is brought in each band (equal_damage), nats per token.
        loss: model in, one loss per text out, for `target`.
        tolerance: as for equal_damage.
        affect_groups: group of each affect example, for intervals; each by itself by default.
        control_groups: the same for the control.
        others_groups: the same for further controls, by name.
        control_name: what the control is, for what is printed.
        seed: of random weights.
        means: of mean_outputs, for `mean`.
        progress: called with (ablations done, ablations in all).

    Returns:
        The table.

    Raises:
        ValueError: no arm, an arm without a scale, scales beside a target, scores of changing length or that are not finite, or as ablate_modules.
    """
    watch = Stopwatch()
    n_layers = open_checkpoint(model).n_layers
    chosen = layer_bands(n_layers, bands) if isinstance(bands, int) else dict(bands)
    chosen = chosen | (layer_bands(n_layers, 1) if whole else {})
    missing = [arm for arm in arms if isinstance(scales, Mapping) and arm not in scales]
    if not arms or not chosen or missing or (scales is not None and target is not None):
        raise ValueError(
            f"received the arms {list(arms)} in {len(chosen)} bands, without a scale for {missing}"
            f"{' and a target beside scales' if target is not None and scales is not None else ''}; allowed are arms with a scale each "
            "(equal_damage leaves out what does not reach its target), or a target without scales"
        )
    scores = {"affect": affect, control_name: control, **(others or {})}
    given = {"affect": affect_groups, control_name: control_groups, **(others_groups or {})}
    if len(scores) != 2 + len(others or {}):
        raise ValueError(f"received controls named {[control_name, *(others or {})]}; allowed are different names")
    before = {name: _scored(score, model, name) for name, score in scores.items()}
    groups = {name: _groups(given.get(name), scored, name) for name, scored in before.items()}
    options: dict[str, Any] = {"how": how, "base": base, "seed": seed, "means": means}
    cells = [(arm, band) for band in chosen for arm in arms]
    after: dict[str, list[Tensor]] = {name: [] for name in scores}
    used, rises = [], []
    for i, (arm, band) in enumerate(cells):
        blocks = tuple(chosen[band])
        if target is None:
            used.append(float(scales[arm] if isinstance(scales, Mapping) else 1.0 if scales is None else scales))
        elif not i % len(arms):  # the first arm of a band
            asked = {"layers": blocks, "loss": loss, "tolerance": tolerance, **options}
            damage = equal_damage(model, arms=arms, target=target, **asked)
            used += damage.scales.tolist()
            rises += damage.rise.tolist()
        scale = used[i]
        if math.isnan(scale):
            for name, scored in before.items():
                after[name].append(torch.full_like(scored, math.nan))
        else:
            with ablate_modules(model, modules=arm, layers=blocks, scale=scale, **options):
                for name, score in scores.items():
                    after[name].append(_scored(score, model, name, len(before[name])))
        if progress:
            progress(i + 1, len(cells))
    further = list(others or {})
    return AblationTable(
        arms=tuple(arm for arm, _ in cells),
        bands=tuple(band for _, band in cells),
        scales=torch.tensor(used, dtype=torch.float32),
        affect=torch.stack(after["affect"]),
        control=torch.stack(after[control_name]),
        affect_before=before["affect"],
        control_before=before[control_name],
        affect_groups=groups["affect"],
        control_groups=groups[control_name],
        how=how,
        seed=seed,
        provenance=facts_of(model).updated(seed=seed, elapsed_seconds=watch.seconds),
        control_name=control_name,
        target=math.nan if target is None else target,
        rises=None if target is None else torch.tensor(rises, dtype=torch.float32),
        others={name: torch.stack(after[name]) for name in further},
        others_before={name: before[name] for name in further},
        others_groups={name: groups[name] for name in further},
    )


def _groups(given: Sequence[str] | None, scored: Float[Tensor, " example"], name: str) -> tuple[str, ...]:
    found = tuple(map(str, given if given is not None else range(len(scored))))
    if len(found) != len(scored):
        raise ValueError(
            f"received groups of {len(found)} {name} examples for {len(scored)} scores; allowed is one each"
        )
    return found


def _scored(score: Score, model: Any, name: str, n: int | None = None) -> Float[Tensor, " example"]:
    found = np.asarray(score(model), dtype=np.float64)
    if found.ndim != 1 or not len(found) or (n is not None and len(found) != n) or not np.isfinite(found).all():
        raise ValueError(
            f"received {name} scores of shape {found.shape}{'' if np.isfinite(found).all() else ' that are not finite'}; allowed is one finite "
            f"number per example{f', {n} as before' if n else ''}: a smaller scale keeps a model's scores finite"
        )
    return torch.from_numpy(found).float()

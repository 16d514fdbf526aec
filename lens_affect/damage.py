"""Damage to general language, and modules ablated to an equal amount of it.

Damage is the rise of the next-token loss on our neutral passages, predictions from position 0 left out. Comparing modules at equal damage asks which
of them costs more affect for the same loss of language, whatever their size.
"""

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
from jaxtyping import Bool, Float
from torch import Tensor

from lens_affect.ablations import LARGEST_SCALE, ablate_modules
from lens_affect.adapter import LensModel, encode, model_info, require_model
from lens_affect.results import Provenance, Stopwatch, git_state, load_result, package_versions, save_result
from lens_affect.scoring import score_texts
from lens_affect.statistics import mean_interval
from lens_affect.stimuli import NEUTRAL, load_stimuli

Loss = Callable[[Any], Float[np.ndarray, " text"]]
MOST_TRIALS = 24
"""Losses measured per arm at most."""


def neutral_loss(model: LensModel, texts: Sequence[str] | None = None) -> Float[np.ndarray, " text"]:
    """Next-token loss of each text in nats per token, teacher-forced; predictions made at position 0 are left out.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        texts: our 36 neutral passages by default.

    Raises:
        ValueError: a text with fewer than three tokens.
        TypeError: a model without a tokenizer.
    """
    require_model(model)
    found = texts if texts is not None else load_stimuli("passages").select(emotions=[NEUTRAL]).texts
    encoded = [encode(model, text).ids for text in found]
    if any(len(ids) < 3 for ids in encoded):
        raise ValueError("received a text with fewer than three tokens, which has no loss; leave it out")
    return score_texts(model, [ids[:2] for ids in encoded], [ids[2:] for ids in encoded]).nll.double().numpy()


@dataclass(frozen=True)
class EqualDamage:
    """Scales at which modules are equally damaging."""

    arms: tuple[str, ...]
    """Modules of each arm, such as `gate` or `attention`."""
    scales: Float[Tensor, " arm"]
    """Scale of its ablation; NaN where the target is not reached."""
    rise: Float[Tensor, " arm"]
    """Mean rise of the loss over texts there, nats per token; at the largest scale where the target is not reached."""
    low: Float[Tensor, " arm"]
    """Lower 95 % limit over texts."""
    high: Float[Tensor, " arm"]
    """Upper 95 % limit over texts."""
    reached: Bool[Tensor, " arm"]
    """Whether the rise is within `tolerance` of the target."""
    trials: tuple[int, ...]
    """Losses that were measured."""
    target: float
    """Rise of the loss that was wanted, nats per token."""
    tolerance: float
    """Allowed deviation, as a share of the target."""
    base_loss: float
    """Mean loss of the model as it is."""
    n_texts: int
    """Texts behind each loss."""
    how: str
    """Kind of ablation."""
    layers: tuple[int, ...] | None
    """Blocks; None for all."""
    seed: int
    """Of random weights."""
    provenance: Provenance
    """Of the model."""

    @property
    def scale_of(self) -> dict[str, float]:
        """Scale by arm, of those that reach the target."""
        return {a: float(s) for a, s, r in zip(self.arms, self.scales, self.reached, strict=True) if r}

    def to_frame(self) -> pd.DataFrame:
        """One row per arm: arm, scale, rise, low, high, reached, trials, target."""
        columns = {name: getattr(self, name).numpy() for name in ("rise", "low", "high", "reached")}
        return pd.DataFrame(
            {"arm": self.arms, "scale": self.scales.numpy(), **columns, "trials": self.trials, "target": self.target}
        )

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "EqualDamage":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        found = ", ".join(
            f"{arm} {scale:.3g} (+{rise:.3g} [{low:.3g}, {high:.3g}])"
            if reached
            else f"{arm} not reached (+{rise:.3g} at most)"
            for arm, scale, rise, low, high, reached in zip(
                self.arms,
                *(x.tolist() for x in (self.scales, self.rise, self.low, self.high, self.reached)),
                strict=True,
            )
        )
        return (
            f"{self.provenance.title}: loss {self.base_loss:.3f} nats per token on {self.n_texts} texts, raised by {self.target:g} through {self.how}\n"
            f"scales: {found}"
        )

    def _repr_html_(self) -> str:
        text = html.escape(str(self)).replace("\n", "<br>")
        return f"<p>{text}</p>{self.to_frame().round(4).to_html(index=False, border=0)}"


def equal_damage(
    model: Any,
    *,
    arms: Sequence[str],
    target: float,
    how: str = "random_equal_norm",
    base: Any = None,
    layers: Sequence[int] | None = None,
    loss: Loss = neutral_loss,
    tolerance: float = 0.05,
    seed: int = 0,
    means: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EqualDamage:
    """Find the scale at which each arm's ablation raises the loss by the same amount, by interpolation within a shrinking bracket.

    Args:
        model: in memory, as for ablate_modules.
        arms: modules of each arm: names or groups, such as `gate`, `up`, `attention`, `gate+up`.
        target: rise of the mean loss, nats per token.
        how: as for ablate_modules.
        base: as for ablate_modules.
        layers: 0-based blocks; all by default.
        loss: model in, one loss per text out.
        tolerance: allowed deviation from the target, as a share of it.
        seed: of random weights: an arm keeps its noise, only its size changes.
        means: of mean_outputs, for `mean`.
        progress: called with (arms done, arms in all).

    Returns:
        A scale per arm. An arm whose whole way does less than the target has none, and the others are found all the same.

    Raises:
        ValueError: no arm or one twice, a target that is not above 0, or as ablate_modules.
    """
    if not arms or len(set(arms)) != len(arms) or not (math.isfinite(target) and target > 0):
        raise ValueError(
            f"received the arms {list(arms)} and a target of {target}; allowed are different arms and a rise above 0 nats per token"
        )
    watch = Stopwatch()
    before = loss(model)

    def rise_at(arm: str, scale: float) -> Float[np.ndarray, " text"]:
        with ablate_modules(model, modules=arm, layers=layers, how=how, base=base, scale=scale, seed=seed, means=means):
            return loss(model) - before

    rows = []
    for i, arm in enumerate(arms):
        rows.append(_search(lambda scale, arm=arm: rise_at(arm, scale), target, tolerance, how, base is not None))
        if progress:
            progress(i + 1, len(arms))
    intervals = [mean_interval(rise) for _, rise, _, _ in rows]
    return EqualDamage(
        arms=tuple(arms),
        scales=torch.tensor([scale if reached else math.nan for scale, _, reached, _ in rows]),
        rise=torch.tensor([float(interval.estimate) for interval in intervals]),
        low=torch.tensor([float(interval.low) for interval in intervals]),
        high=torch.tensor([float(interval.high) for interval in intervals]),
        reached=torch.tensor([reached for _, _, reached, _ in rows]),
        trials=tuple(trials for _, _, _, trials in rows),
        target=target,
        tolerance=tolerance,
        base_loss=float(before.mean()),
        n_texts=len(before),
        how=how,
        layers=None if layers is None else tuple(layers),
        seed=seed,
        provenance=facts_of(model).updated(seed=seed, elapsed_seconds=watch.seconds),
    )


def _search(
    rise_at: Callable[[float], np.ndarray], target: float, tolerance: float, how: str, has_base: bool
) -> tuple[float, np.ndarray, bool, int]:
    """(scale, rise per text, reached, losses measured)."""
    open_ended = how == "random_equal_norm"
    scale = 0.05 if open_ended and not has_base else 1.0
    low, high = (0.0, 0.0), (math.inf, math.inf)
    rise, trials, above = rise_at(scale), 1, list[bool]()
    while True:
        mean = float(rise.mean()) if np.isfinite(rise).all() else math.inf
        if abs(mean - target) <= tolerance * target:
            return scale, rise, True, trials
        if trials >= MOST_TRIALS:
            return scale, rise, False, trials
        low, high = ((scale, mean), high) if mean < target else (low, (scale, mean))
        above.append(mean > target)
        if math.isinf(high[0]) and (not open_ended or scale >= LARGEST_SCALE):
            return scale, rise, False, trials
        # interpolation that keeps falling on one side closes the bracket slowly
        stuck = not math.isinf(high[0]) and len(above) > 2 and len(set(above[-3:])) == 1
        scale = sum((low[0], high[0])) / 2 if stuck else _between(low, high, target)
        rise, trials = rise_at(scale), trials + 1


def _between(low: tuple[float, float], high: tuple[float, float], target: float) -> float:
    """Next scale from (scale, rise) on both sides of the target, the rise taken as a power of the scale: a square, as of small noise, where only one
    side is known."""
    if math.isinf(high[0]):
        step = math.sqrt(target / low[1]) if low[1] > 0 else 2.0
        return min(low[0] * min(max(1.1 * step, 1.1), 4.0), LARGEST_SCALE)
    middle = (low[0] + high[0]) / 2
    if math.isinf(high[1]):
        return middle
    if low[0] > 0 and low[1] > 0:
        power = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
        found = low[0] * (target / low[1]) ** (1 / power)
    else:
        found = high[0] * math.sqrt(target / high[1])
    return found if low[0] < found < high[0] else middle


def facts_of(model: Any) -> Provenance:
    """Provenance of a model in memory, a plain Hugging Face model included."""
    if hasattr(model, "hook_dict") and getattr(model, "tokenizer", None) is not None:
        return model_info(model).provenance
    commit, dirty = git_state()
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return Provenance(
        model=Path(name).name,
        source=f"in memory ({name})",
        versions=package_versions(),
        git_commit=commit,
        git_dirty=dirty,
    )

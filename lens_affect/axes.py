"""Valence and arousal: how closely the first principal components of the emotions follow them, the choice of component paid for."""

import html
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.activations import Activations
from lens_affect.geometry import FEWEST_EMOTIONS, blocks_of, emotional_texts, emotions_of, entry_of, strata_of
from lens_affect.nulls import p_text
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.statistics import derive_generator, jackknife_interval
from lens_affect.stimuli import EMOTIONS
from lens_affect.vectors import EmotionVectors, fit_vectors

AXES = {"valence": "positive", "arousal": "high"}
"""Axis of stimuli.EMOTIONS -> the side that counts as 1."""
COMPONENTS = ("pc1", "pc2")
"""Columns of EmotionVectors.principal_axes."""


@dataclass(frozen=True)
class AxisAgreement:
    """Valence and arousal on the first two principal components of the emotions."""

    correlations: Float[Tensor, "axis component"]
    """Absolute correlation of each component with each axis (0/1, so point-biserial); NaN for an axis with one side only."""
    best: Float[Tensor, " axis"]
    """The larger one per axis. Even without a relation it is well above 0, since it is chosen: read it with p and null_mean."""
    low: Float[Tensor, " axis"]
    """Lower 95 % limit of `best` over groups of texts (jackknife); NaN from vectors, which have no texts to leave out."""
    high: Float[Tensor, " axis"]
    """Upper 95 % limit."""
    null_mean: Float[Tensor, " axis"]
    """Mean of the best of both components under permuted emotions; NaN without permutations."""
    p: Float[Tensor, " axis"]
    """Permutation p over emotions; every permutation takes its best component too."""
    axes: tuple[str, ...]
    """`valence`, `arousal`."""
    components: tuple[str, ...]
    """`pc1`, `pc2`."""
    explained: tuple[float, ...]
    """Share of the variance between emotions that each component holds."""
    emotions: tuple[str, ...]
    """Emotions with a known place (stimuli.EMOTIONS); others shape the components but are not correlated."""
    n_permutations: int
    """Permutations behind p."""
    layer: int
    """0-based block."""
    method: str
    """Name of the stimuli."""
    provenance: Provenance
    """Model, numerics, stimuli, seed, versions."""

    @property
    def best_components(self) -> tuple[str, ...]:
        """Name of the component that is closer to each axis; `none` for an axis with one side only."""
        return tuple(
            self.components[int(row.argmax())] if row.isfinite().all() else "none" for row in self.correlations
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per axis: axis, pc1, pc2 (absolute correlations), component, best, low, high, null_mean, p, n."""
        table = pd.DataFrame(self.correlations.numpy(), columns=list(self.components))
        table.insert(0, "axis", list(self.axes))
        columns = {name: getattr(self, name).numpy() for name in ("best", "low", "high", "null_mean", "p")}
        return table.assign(component=list(self.best_components), **columns, n=len(self.emotions))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "AxisAgreement":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        shares = " and ".join(f"{share:.0%}" for share in self.explained)
        lines = [
            f"{self.provenance.title}, {self.method}, layer {self.layer}: two components hold {shares} of the variance between emotions"
        ]
        for i, (axis, component) in enumerate(zip(self.axes, self.best_components, strict=True)):
            if component == "none":
                lines.append(f"{axis}: not measured, all {len(self.emotions)} emotions lie on one side")
                continue
            limits = f" [{self.low[i]:.2f}, {self.high[i]:.2f}]" if self.low[i].isfinite() else ""
            chance = (
                f"permuted emotions give {self.null_mean[i]:.2f}, {p_text(float(self.p[i]), self.n_permutations)}"
                if self.n_permutations
                else "no null (n_permutations=0)"
            )
            lines.append(
                f"{axis}: |r| = {self.best[i]:.2f}{limits} with {component}, {len(self.emotions)} emotions; {chance}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "<p>" + html.escape(str(self)).replace("\n", "<br>") + "</p>"


def valence_arousal(
    source: Activations | EmotionVectors, layer: int, *, n_permutations: int = 999, seed: int = 0
) -> AxisAgreement:
    """How closely the first two principal components of the emotions follow valence and arousal (stimuli.EMOTIONS).

    The component is chosen by its correlation, so every permutation of the emotions chooses too: without that a relation to
    either of two components would be found twice as often as p says. Valence and arousal are two tests; p is of each alone.

    Args:
        source: activations of one site (their grand-mean vectors are taken), or fitted vectors.
        layer: 0-based block.
        n_permutations: permutations of the emotions. 0 for none (NaN).
        seed: of the permutations.

    Returns:
        Absolute correlations (the sign of a component is arbitrary), the best per axis with its p, and, from activations, its
        95 % interval over groups of texts. With few emotions p cannot be small: the number of emotions is the sample size here.

    Raises:
        ValueError: an unknown layer, several sites, or fewer than 4 emotions whose place is known.

    Example:
        >>> print(valence_arousal(vectors, 14))  # doctest: +SKIP
    """
    clock = Stopwatch()
    vectors = _vectors_at(source, layer) if isinstance(source, Activations) else source
    table = vectors.principal_axes(layer)
    known = [e for e in table.index if e in EMOTIONS]
    if len(known) < FEWEST_EMOTIONS:
        raise ValueError(
            f"received {len(known)} emotions whose valence and arousal are known ({known}); allowed are {FEWEST_EMOTIONS} or more of "
            f"stimuli.EMOTIONS: {list(EMOTIONS)}"
        )
    correlations = _axis_correlations(table)
    best = correlations.max(1)
    low, high = _axis_interval(source, layer, best) if isinstance(source, Activations) else np.full((2, 2), np.nan)
    null_mean, p = _axis_null(table, best, n_permutations, seed)
    return AxisAgreement(
        correlations=torch.from_numpy(correlations),
        best=torch.from_numpy(best),
        low=torch.from_numpy(low),
        high=torch.from_numpy(high),
        null_mean=torch.from_numpy(null_mean),
        p=torch.from_numpy(p),
        axes=tuple(AXES),
        components=COMPONENTS,
        explained=table.attrs["explained"],
        emotions=tuple(known),
        n_permutations=n_permutations,
        layer=layer,
        method=vectors.source,
        provenance=vectors.provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
    )


def _vectors_at(activations: Activations, layer: int) -> EmotionVectors:
    return fit_vectors(_one_layer(activations, layer), n_halves=0)


def _one_layer(activations: Activations, layer: int) -> Activations:
    entry = entry_of(activations, layer)
    return replace(
        activations,
        arrays={activations.sites[0]: activations.values[:, entry : entry + 1]},
        squares={},
        embedding={},
        layers=(layer,),
        texts_with_sinks={s: n[entry : entry + 1] for s, n in activations.texts_with_sinks.items()},
    )


def _unit_components(table: pd.DataFrame) -> Float[np.ndarray, "emotion component"]:
    """Scores of the emotions with a known place, centred and of length 1; a component without variance stays 0."""
    scores = table.loc[[e in EMOTIONS for e in table.index], list(COMPONENTS)].to_numpy(float)
    centred = scores - scores.mean(0)
    norms = np.linalg.norm(centred, axis=0)
    return np.where(norms > 1e-9, centred / np.maximum(norms, 1e-9), 0.0)


def _unit_side(table: pd.DataFrame, axis: str) -> Float[np.ndarray, " emotion"]:
    """The side of each emotion as 0 or 1, centred and of length 1; NaN where all lie on one side."""
    plus = np.array([getattr(EMOTIONS[e], axis) == AXES[axis] for e in table.index if e in EMOTIONS], dtype=float)
    centred = plus - plus.mean()
    return centred / np.linalg.norm(centred) if centred.any() else np.full(len(plus), np.nan)


def _axis_correlations(table: pd.DataFrame) -> Float[np.ndarray, "axis component"]:
    components = _unit_components(table)
    return np.stack([np.abs(_unit_side(table, axis) @ components) for axis in AXES])


def _axis_null(table: pd.DataFrame, best: np.ndarray, n_permutations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and p of the best of both components when the emotions' places are permuted."""
    null_mean, p = np.full(len(AXES), np.nan), np.full(len(AXES), np.nan)
    components = _unit_components(table)
    for i, axis in enumerate(AXES):
        if not n_permutations or np.isnan(best[i]):
            continue
        rng = derive_generator(seed, "geometry", axis)
        sides = rng.permuted(np.tile(_unit_side(table, axis), (n_permutations, 1)), axis=1)
        permuted = np.abs(sides @ components).max(1)
        null_mean[i] = permuted.mean()
        p[i] = (1 + (permuted >= best[i] - 1e-9).sum()) / (1 + n_permutations)
    return null_mean, p


def _axis_interval(activations: Activations, layer: int, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Jackknife over groups of the larger absolute correlation, whichever component it is without the group."""
    texts = emotional_texts(activations, layer, emotions_of(activations))
    blocks = blocks_of(strata_of(texts, texts))
    unknown = np.full_like(best, np.nan)
    if len(blocks) < 2:
        return unknown, unknown
    only, left_out = _one_layer(activations, layer), []
    for block in blocks:
        rest = only.select(groups=[g for g in dict.fromkeys(texts.groups.tolist()) if g not in block])
        if set(emotions_of(rest)) != set(emotions_of(activations)):
            return unknown, unknown
        left_out.append(_axis_correlations(_vectors_at(rest, layer).principal_axes(layer)).max(1))
    interval = jackknife_interval(best, np.stack(left_out))
    return np.maximum(interval.low, 0.0), np.minimum(interval.high, 1.0)

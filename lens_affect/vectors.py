"""Emotion vectors: one direction per emotion and layer, with baselines, denoising and controls.

Decodable is not the same as used: a vector that names emotions well need not be what the model acts on.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.activations import Activations
from lens_affect.adapter import final_norm_centres, final_norm_scale, model_info, text_of_token, unembedding
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.statistics import derive_generator, derive_seed
from lens_affect.stimuli import NEUTRAL

Baseline = Literal["grand_mean", "neutral", "within_topic", "neutral_pcs"]
NEUTRAL_VARIANCE = 0.5
"""Share of the neutral texts' variance whose principal components `neutral_pcs` removes (Sofroniew et al., 2026, arXiv:2604.07729)."""


@dataclass(frozen=True)
class EmotionVectors:
    """Unit directions per emotion and layer."""

    directions: Float[Tensor, "emotion layer d_model"]
    """Unit vectors; zero where the raw vector is zero."""
    raw_norms: Float[Tensor, "emotion layer"]
    """Length of each vector before it was scaled to 1, in units of the residual stream."""
    reference: Float[Tensor, "layer d_model"]
    """Origin: what was subtracted (grand mean or neutral mean). Projections are taken from here."""
    reliability: Float[Tensor, "emotion layer"]
    """Split-half reliability: mean cosine of the vectors of two random halves of the groups, stepped up by Spearman-Brown;
    NaN with fewer than 2 groups."""
    emotions: tuple[str, ...]
    """Labels of the first axis."""
    layers: tuple[int, ...]
    """0-based blocks of the second axis."""
    site: str
    """Where they were read."""
    n_layers: int
    """Blocks of the model."""
    n_texts: int
    """Emotional texts behind all vectors."""
    baseline: str
    """`grand_mean`, `neutral`, `within_topic` or `neutral_pcs`."""
    pooling: str
    """Pooling of the activations."""
    source: str
    """Name of the stimuli."""
    provenance: Provenance
    """Model, numerics, stimuli, versions."""

    def vector(self, emotion: str, layer: int) -> Float[Tensor, " d_model"]:
        """Unit direction of one emotion at one block, whatever the length of `directions`: that is no part of a dose.

        Raises:
            ValueError: an emotion or layer that is not there.
        """
        direction = self.directions[self._emotion(emotion), self._layer(layer)]
        norm = direction.norm()
        # Directions of fit_vectors have length 1 already and are given out bit by bit.
        return direction if norm == 0 or (norm - 1).abs() < 1e-5 else direction / norm

    def _emotion(self, emotion: str) -> int:
        if emotion not in self.emotions:
            raise ValueError(f"received emotion {emotion!r}; there are vectors for {list(self.emotions)}")
        return self.emotions.index(emotion)

    def _layer(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"received layer {layer}; there are vectors for {self.layers[0]} to {self.layers[-1]}")
        return self.layers.index(layer)

    def similarity(self, layer: int) -> pd.DataFrame:
        """Cosines between all emotions at one layer: a table with emotions as rows and columns, 1 on the diagonal."""
        at = self.directions[:, self._layer(layer)].double()
        return pd.DataFrame((at @ at.T).numpy(), index=list(self.emotions), columns=list(self.emotions))

    def project(self, activations: Activations) -> Float[Tensor, "stimulus emotion layer"]:
        """Length of each text's component along each direction, measured from the reference, in units of the residual stream.

        Raises:
            ValueError: the activations come from another model, revision or numerics, or from another site or layers.
        """
        self.require_match(activations.provenance)
        if activations.sites != (self.site,) or activations.layers != self.layers:
            raise ValueError(
                f"received activations of {activations.sites} at layers {activations.layers}; these vectors were read at "
                f"{self.site}, layers {self.layers}"
            )
        centred = activations.values - self.reference
        return torch.einsum("nld,eld->nel", centred, self.directions)

    def require_match(self, other: Provenance) -> None:
        """Refuse another model, revision, weights or numerics.

        Raises:
            ValueError: names the field that differs.
        """
        mine = self.provenance
        for field in ("model", "revision", "weights_sha256", "numerics"):
            a, b = getattr(mine, field), getattr(other, field)
            if a != b:
                raise ValueError(
                    f"received {field} {b!r}; these vectors were made with {field} {a!r}. Fit vectors on this model, or load that one"
                )

    def top_tokens(self, model: Any, layer: int, *, k: int = 8) -> pd.DataFrame:
        """Logit lens: the tokens that each direction pushes up and down most (nostalgebraist, 2020).

        The direction is scaled by the final norm's weight and multiplied with the unembedding, so raw and compatibility
        numerics agree. What a direction would say if it were read out at once is not what later layers make of it.

        Args:
            model: the model the vectors come from.
            layer: 0-based block.
            k: tokens per side.

        Returns:
            One row per emotion with columns `top` and `bottom` (tuples of k tokens).
        """
        self.require_match(model_info(model).provenance)
        logits = logit_lens(model, self.directions[:, self._layer(layer)])
        rows = []
        for emotion, row in zip(self.emotions, logits, strict=True):
            top, bottom = row.topk(k).indices.tolist(), (-row).topk(k).indices.tolist()
            rows.append(
                {
                    "emotion": emotion,
                    "top": tuple(text_of_token(model, t) for t in top),
                    "bottom": tuple(text_of_token(model, t) for t in bottom),
                }
            )
        return pd.DataFrame(rows).set_index("emotion")

    def random_vectors(self, *, seed: int, n: int = 1) -> Float[Tensor, "draw emotion layer d_model"]:
        """Control directions: uniformly random, each scaled to the raw norm of the emotion vector it stands for.

        Args:
            seed: of the draw.
            n: independent sets.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, "random_vectors"))
        noise = torch.randn(n, *self.directions.shape, generator=generator)
        return noise / noise.norm(dim=-1, keepdim=True) * self.raw_norms[..., None]

    def principal_axes(self, layer: int) -> pd.DataFrame:
        """Emotions on the first two principal components of their vectors, signed so that PC1 is higher for pleasant and PC2 for activated emotions.

        Returns:
            Columns pc1, pc2 (unitless), valence, arousal, quadrant; `.attrs["explained"]` holds the two shares of variance.
        """
        from lens_affect.stimuli import EMOTIONS

        at = self.directions[:, self._layer(layer)].double()
        centred = at - at.mean(0)
        left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
        scores = (left * singular)[:, :2].numpy()
        table = pd.DataFrame(scores, columns=["pc1", "pc2"], index=list(self.emotions))
        known = [EMOTIONS.get(e) for e in self.emotions]
        table["valence"] = [e.valence if e else "unknown" for e in known]
        table["arousal"] = [e.arousal if e else "unknown" for e in known]
        table["quadrant"] = [e.quadrant if e else "unknown" for e in known]
        for component, column, plus in (("pc1", "valence", "positive"), ("pc2", "arousal", "high")):
            is_plus = (table[column] == plus).to_numpy()
            along = table[component].to_numpy()
            if is_plus.any() and not is_plus.all() and along[is_plus].mean() < along[~is_plus].mean():
                table[component] = -along
        table.attrs["explained"] = tuple((singular[:2] ** 2 / (singular**2).sum()).tolist())
        return table

    def to_frame(self) -> pd.DataFrame:
        """One row per emotion and layer: emotion, layer, depth, raw_norm, reliability."""
        rows = [
            {
                "emotion": emotion,
                "layer": layer,
                "depth": (layer + 1) / self.n_layers,
                "raw_norm": self.raw_norms[i, j].item(),
                "reliability": self.reliability[i, j].item(),
            }
            for i, emotion in enumerate(self.emotions)
            for j, layer in enumerate(self.layers)
        ]
        return pd.DataFrame(rows)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "EmotionVectors":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        middle = len(self.layers) // 2
        reliability = self.reliability[:, middle].nanmean().item()
        return (
            f"{len(self.emotions)} emotion vectors at {len(self.layers)} layers of {self.provenance.title} from {self.n_texts} texts "
            f"({self.source})\n{self.site}, {self.pooling} pooling, {self.baseline} baseline; mean split-half reliability "
            f"{reliability:.2f} at layer {self.layers[middle]}"
        )

    def _repr_html_(self) -> str:
        import html

        return "<p>" + html.escape(str(self)).replace("\n", "<br>") + "</p>"


def logit_lens(model: Any, directions: Float[Tensor, "row d_model"]) -> Float[Tensor, "row token"]:
    """What directions would add to the logits if they were read out at once: unembedding times the final norm's weight (nostalgebraist, 2020).

    Raw and compatibility numerics agree, up to a constant per direction, which ranks do not see.

    Args:
        model: where they are read out.
        directions: in the residual stream.
    """
    scale, matrix = final_norm_scale(model).cpu(), unembedding(model).cpu()
    if final_norm_centres(model):
        directions = directions - directions.mean(-1, keepdim=True)
    return (directions * scale) @ matrix


def fit_vectors(
    activations: Activations, *, baseline: Baseline = "grand_mean", n_halves: int = 20, seed: int = 0
) -> EmotionVectors:
    """One direction per emotion and layer: class mean minus baseline, scaled to length 1.

    Args:
        activations: of one site. Rows labelled `neutral` are the neutral class; they never count as an emotion.
        baseline: `grand_mean`, mean of the emotions' class means; `neutral`, mean of the neutral texts (the paper's); `within_topic`,
            each group's mean is subtracted first (Wang et al., 2025, arXiv:2510.11328); `neutral_pcs`, grand mean, then the leading
            principal components of the neutral texts are projected out (arXiv:2604.07729).
        n_halves: random splits behind the reliability.
        seed: of those splits.

    Returns:
        Unit directions, raw norms, and the split-half reliability of every vector.

    Raises:
        ValueError: several sites, fewer than two emotions, or a baseline that needs neutral texts or crossed topics without them.

    Example:
        >>> fit_vectors(activations).directions.shape  # doctest: +SKIP
        torch.Size([20, 30, 576])
    """
    clock = Stopwatch()
    if baseline not in get_args(Baseline):
        raise ValueError(f"received baseline={baseline!r}; allowed are {list(get_args(Baseline))}")
    values, stimuli = activations.values, activations.stimuli
    emotions = tuple(e for e in stimuli.labels if e != NEUTRAL)
    if len(emotions) < 2:
        raise ValueError(f"received the emotions {list(emotions)}; a direction needs at least two to contrast")
    if baseline in ("neutral", "neutral_pcs") and NEUTRAL not in stimuli.labels:
        raise ValueError(f"baseline={baseline!r} needs texts labelled 'neutral'; add some, or use 'grand_mean'")
    if baseline == "neutral_pcs" and activations.squares:
        raise ValueError("baseline='neutral_pcs' needs the components of single texts; extract with keep='pooled'")
    if baseline == "within_topic" and stimuli.design != "crossed":
        raise ValueError(
            "baseline='within_topic' needs groups that hold several emotions; these are nested: use 'grand_mean'"
        )

    labels, groups = np.array(stimuli.emotions), np.array(stimuli.groups)
    weights = activations.counts.double()
    raw, reference = difference_in_means(values, labels, groups, weights, emotions, baseline)
    norms = raw.norm(dim=-1)
    directions = torch.where(norms[..., None] > 0, raw / norms[..., None].clamp_min(1e-30), torch.zeros_like(raw))
    reliability = _split_half(values, labels, groups, weights, emotions, baseline, n_halves, seed)
    return EmotionVectors(
        directions=directions.float(),
        raw_norms=norms.float(),
        reference=reference.float(),
        reliability=reliability.float(),
        emotions=emotions,
        layers=activations.layers,
        site=activations.sites[0],
        n_layers=activations.n_layers,
        n_texts=int(weights[torch.from_numpy(labels != NEUTRAL)].sum()),
        baseline=baseline,
        pooling=activations.pooling,
        source=stimuli.name,
        provenance=activations.provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
    )


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("n,nld->ld", weights / weights.sum(), values.double())


def difference_in_means(
    values: Tensor,
    labels: np.ndarray,
    groups: np.ndarray,
    weights: Tensor,
    emotions: Sequence[str],
    baseline: Baseline,
) -> tuple[Float[Tensor, "emotion layer d_model"], Float[Tensor, "layer d_model"]]:
    """Class means minus a baseline, not normalised, and what was subtracted.

    Args:
        values: `[text, layer, d_model]`.
        labels: emotion of each text; neutral texts serve the baselines that name them.
        groups: topic of each text.
        weights: texts behind each row.
        emotions: which classes, in this order.
        baseline: as in fit_vectors.
    """

    def rows(mask: np.ndarray) -> Tensor:
        return torch.from_numpy(np.flatnonzero(mask))

    if baseline == "within_topic":
        kept = rows(labels != NEUTRAL)
        centred = values[kept].double()
        for group in dict.fromkeys(groups[kept.numpy()]):
            inside = torch.from_numpy(np.flatnonzero(groups[kept.numpy()] == group))
            centred[inside] -= _weighted_mean(centred[inside], weights[kept][inside])
        inner = labels[kept.numpy()]
        means = torch.stack(
            [_weighted_mean(centred[rows(inner == e)], weights[kept][rows(inner == e)]) for e in emotions]
        )
        reference = torch.stack(
            [_weighted_mean(values[rows(labels == e)], weights[rows(labels == e)]) for e in emotions]
        ).mean(0)
        return means - means.mean(0), reference

    means = torch.stack([_weighted_mean(values[rows(labels == e)], weights[rows(labels == e)]) for e in emotions])
    neutral = rows(labels == NEUTRAL)
    if baseline == "neutral":
        reference = _weighted_mean(values[neutral], weights[neutral])
        return means - reference, reference
    reference = means.mean(0)
    raw = means - reference
    if baseline == "neutral_pcs":
        raw = _without_neutral_components(raw, values[neutral].double())
    return raw, reference


def _without_neutral_components(raw: Tensor, neutral: Tensor) -> Tensor:
    cleaned = raw.clone()
    for layer in range(raw.shape[1]):
        centred = neutral[:, layer] - neutral[:, layer].mean(0)
        _, singular, right = torch.linalg.svd(centred, full_matrices=False)
        explained = (singular**2).cumsum(0) / (singular**2).sum().clamp_min(1e-30)
        n = int((explained < NEUTRAL_VARIANCE).sum()) + 1
        axes = right[:n]
        cleaned[:, layer] -= cleaned[:, layer] @ axes.T @ axes
    return cleaned


def _split_half(
    values: Tensor,
    labels: np.ndarray,
    groups: np.ndarray,
    weights: Tensor,
    emotions: Sequence[str],
    baseline: Baseline,
    n_halves: int,
    seed: int,
) -> Float[Tensor, "emotion layer"]:
    """Mean cosine over random halves of the groups, stepped up to full length: 2 r / (1 + r)."""
    names = list(dict.fromkeys(groups[labels != NEUTRAL]))
    extra = [g for g in dict.fromkeys(groups[labels == NEUTRAL]) if g not in names]  # neutral topics of their own
    missing = torch.full((len(emotions), values.shape[1]), torch.nan)
    rng = derive_generator(seed, "split_half")
    cosines = []
    for _ in range(n_halves):
        order = [names[i] for i in rng.permutation(len(names))]
        own = [extra[i] for i in rng.permutation(len(extra))]
        halves = []
        for first in (True, False):
            part = order[: len(order) // 2] if first else order[len(order) // 2 :]
            part += own[: len(own) // 2] if first else own[len(own) // 2 :]
            keep = np.isin(groups, part)
            if baseline == "neutral_pcs":
                keep |= labels == NEUTRAL  # they only say what to remove
            needed = {*emotions, *((NEUTRAL,) if baseline == "neutral" else ())}
            if not needed <= set(labels[keep]):
                break  # nested groups: a half can miss an emotion
            index = torch.from_numpy(np.flatnonzero(keep))
            halves.append(
                difference_in_means(values[index], labels[keep], groups[keep], weights[index], emotions, baseline)[0]
            )
        if len(halves) == 2:
            cosines.append(torch.cosine_similarity(halves[0], halves[1], dim=-1))
    if not cosines:
        return missing
    r = torch.stack(cosines).mean(0)
    return torch.where(r > -1, 2 * r / (1 + r).clamp_min(1e-9), r)

"""Scores of one layer: how well emotions can be told apart, always on topics the directions have not seen.

Everything is computed from the Gram matrix of the texts, so that a relabelling costs a few small matrix products and
thousands of permutations are affordable. Directions are refitted in every fold and under every relabelling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.statistics import Better


@dataclass(frozen=True)
class Score:
    """What a score measures and which way is better."""

    name: str
    """As in `localize(score=...)`."""
    better: Better
    """Direction in which emotions are told apart better."""
    unit: str
    """For axes."""
    kind: Literal["accuracy", "dprime", "auc", "cosine"]
    """Decides how clusters, intervals and per-emotion values are made."""
    description: str
    """One sentence."""


SCORES: dict[str, Score] = {
    s.name: s
    for s in (
        Score(
            "nearest_mean",
            "high",
            "held-out accuracy",
            "accuracy",
            "Share of texts of a held-out topic whose direction from the grand mean is closest (by cosine) to their own emotion's.",
        ),
        Score(
            "logistic",
            "high",
            "held-out accuracy",
            "accuracy",
            "Accuracy of a multinomial logistic regression on held-out topics.",
        ),
        Score(
            "dprime",
            "high",
            "d' (standard deviations)",
            "dprime",
            "Distance of an emotion's held-out texts from the others of their topic, along its direction, in standard deviations of the others.",
        ),
        Score(
            "valence",
            "high",
            "held-out AUC",
            "auc",
            "Probability that a pleasant text lies above an unpleasant one of the same held-out topic on the valence direction.",
        ),
        Score(
            "mean_cosine_neutral",
            "low",
            "mean pairwise cosine",
            "cosine",
            "The paper's: mean cosine between emotion vectors with the neutral mean subtracted (arXiv:2604.04064). Low can also mean a small shift "
            "shared by all emotions; not cross-validated.",
        ),
        Score(
            "mean_cosine_centred",
            "low",
            "mean pairwise cosine",
            "cosine",
            "The same after subtracting the mean of all classes: pinned near -1/(classes - 1) by algebra; for comparison only.",
        ),
    )
}
"""Every score by name."""


@dataclass(frozen=True)
class Design:
    """Labels and folds of the texts that are scored; `neutral` rows have label -1 and belong to no fold."""

    labels: Int[np.ndarray, " item"]
    """Class number of each text, -1 for neutral."""
    n_classes: int
    """Number of emotions."""
    folds: Int[np.ndarray, " item"]
    """Fold in which a text is held out."""
    n_folds: int
    """Number of folds."""
    clusters: Int[np.ndarray, " item"]
    """Group number of each text."""
    n_clusters: int
    """Number of groups."""
    positive: tuple[bool | None, ...]
    """Per class: pleasant, unpleasant, or unknown."""


@dataclass(frozen=True)
class LayerScores:
    """Scores of one layer under one or many labellings."""

    score: Float[Tensor, " labelling"]
    """The score."""
    per_cluster: Float[Tensor, "labelling cluster"]
    """Its value per group (accuracy) or fold (others); for cosines leave-one-group-out values. Their mean is the score, except for cosines."""
    per_emotion: Float[Tensor, "labelling emotion"] | None
    """The same per emotion, where the score has one."""
    emotion_cluster: Float[Tensor, "labelling emotion cluster"] | None
    """Per emotion and group or fold; NaN where a group has no such text."""


Labelling = Int[Tensor, "labelling item"]
ScoreLayer = Callable[[Float[Tensor, "item d"], Labelling, Design], LayerScores]


def gram(x: Float[Tensor, "item d"]) -> Float[Tensor, "item item"]:
    """Inner products after removing the mean of all texts (all scores are invariant to it; digits are not)."""
    centred = x.double() - x.double().mean(0)
    return centred @ centred.T


def _one_hot(labels: Labelling, n_classes: int) -> Float[Tensor, "labelling item label"]:
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), n_classes).double()
    return hot * (labels >= 0)[..., None]


def _held_out(
    kernel: Float[Tensor, "item item"], hot: Float[Tensor, "labelling item label"], test: Int[Tensor, " held"]
) -> tuple[Float[Tensor, "labelling held label"], Float[Tensor, "labelling label label"]]:
    """Projections of held-out texts on (class mean - grand mean) of the others, from the grand mean, and those directions' inner products."""
    train = hot.clone()
    train[:, test] = 0
    means = train / train.sum(1, keepdim=True).clamp(min=1)
    directions = means - means.mean(-1, keepdim=True)  # weights of the training texts
    images = kernel @ directions
    inner = directions.transpose(1, 2) @ images
    origin = means.mean(-1, keepdim=True).transpose(1, 2) @ images
    return images[:, test] - origin, inner


def score_nearest_mean(x: Float[Tensor, "item d"], labellings: Labelling, design: Design) -> LayerScores:
    """Held-out accuracy of the nearest class mean by cosine, averaged over groups."""
    kernel, hot = gram(x), _one_hot(labellings, design.n_classes)
    correct = torch.full(labellings.shape, torch.nan, dtype=torch.double)
    for fold in range(design.n_folds):
        test = torch.from_numpy(np.flatnonzero(design.folds == fold))
        projections, inner = _held_out(kernel, hot, test)
        norms = inner.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()
        chosen = (projections / norms[:, None, :]).argmax(-1)
        correct[:, test] = (chosen == labellings[:, test]).double()
    return accuracy_scores(correct, labellings, design)


def accuracy_scores(correct: Float[Tensor, "labelling item"], labellings: Labelling, design: Design) -> LayerScores:
    """Accuracy from right-or-wrong per text: per group, then the mean over groups."""
    emotional = torch.from_numpy(design.labels >= 0)
    clusters = torch.from_numpy(design.clusters)[emotional]
    right, labels = correct[:, emotional], labellings[:, emotional]
    member = torch.nn.functional.one_hot(clusters, design.n_clusters).double()
    sizes = member.sum(0)
    per_cluster = (right @ member)[:, sizes > 0] / sizes[sizes > 0]
    hot = _one_hot(labels, design.n_classes)
    hits = torch.einsum("pi,pie,ic->pec", right, hot, member)
    texts = torch.einsum("pie,ic->pec", hot, member)
    return LayerScores(per_cluster.mean(1), per_cluster, hits.sum(-1) / texts.sum(-1), hits / texts)


def score_logistic(x: Float[Tensor, "item d"], labellings: Labelling, design: Design) -> LayerScores:
    """Held-out accuracy of a multinomial logistic regression (L2, C = 1) on standardised principal coordinates.

    The rotation to at most n - 1 principal axes loses nothing and makes wide layers affordable. Every relabelling is a full
    refit, so this is hundreds of times slower than nearest_mean.
    """
    from sklearn.linear_model import LogisticRegression

    centred = x.double() - x.double().mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = (left * singular).numpy() / max(float(singular[0]) / np.sqrt(len(x)), 1e-12)
    correct = torch.full(labellings.shape, torch.nan, dtype=torch.double)
    for p, labels in enumerate(labellings.numpy()):
        for fold in range(design.n_folds):
            test = np.flatnonzero(design.folds == fold)
            train = np.flatnonzero((design.folds != fold) & (labels >= 0))
            model = LogisticRegression(C=1.0, max_iter=300, tol=1e-3).fit(coordinates[train], labels[train])
            correct[p, torch.from_numpy(test)] = torch.from_numpy(
                (model.predict(coordinates[test]) == labels[test]).astype(float)
            )
    return accuracy_scores(correct, labellings, design)


def score_dprime(x: Float[Tensor, "item d"], labellings: Labelling, design: Design) -> LayerScores:
    """Held-out d' per emotion, and its mean over emotions."""
    kernel, hot = gram(x), _one_hot(labellings, design.n_classes)
    shape = (len(labellings), design.n_classes, design.n_folds)
    gap, variance = (
        torch.full(shape, torch.nan, dtype=torch.double),
        torch.full(shape, torch.nan, dtype=torch.double),
    )
    for fold in range(design.n_folds):
        test = torch.from_numpy(np.flatnonzero(design.folds == fold))
        projections, inner = _held_out(kernel, hot, test)
        along = projections / inner.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()[:, None, :]
        own = hot[:, test]  # which texts are of the class whose direction this is
        n_own, n_other = own.sum(1), (1 - own).sum(1)
        mean_own = (along * own).sum(1) / n_own
        mean_other = (along * (1 - own)).sum(1) / n_other
        spread = (((along - mean_other[:, None, :]) ** 2) * (1 - own)).sum(1) / (n_other - 1)
        gap[..., fold] = torch.where(n_own > 0, mean_own - mean_other, torch.nan)
        variance[..., fold] = spread
    pooled = variance.nanmean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    per_fold = gap / pooled
    return LayerScores(per_fold.nanmean((1, 2)), per_fold.nanmean(1), per_fold.nanmean(2), per_fold)


def score_valence(x: Float[Tensor, "item d"], labellings: Labelling, design: Design) -> LayerScores:
    """Held-out AUC of pleasant against unpleasant texts within each fold."""
    kernel, hot = gram(x), _one_hot(labellings, design.n_classes)
    sign = torch.tensor([0.0 if p is None else (1.0 if p else -1.0) for p in design.positive], dtype=torch.double)
    weights = torch.where(sign > 0, sign / (sign > 0).sum(), torch.where(sign < 0, sign / (sign < 0).sum(), 0.0))
    areas = torch.full((len(labellings), design.n_folds), torch.nan, dtype=torch.double)
    for fold in range(design.n_folds):
        test = torch.from_numpy(np.flatnonzero(design.folds == fold))
        projections, _ = _held_out(kernel, hot, test)
        along = projections @ weights
        side = hot[:, test] @ sign
        above = along[:, :, None] - along[:, None, :]
        wins = (above > 0).double() + 0.5 * (above == 0).double()
        pairs = ((side > 0)[:, :, None] & (side < 0)[:, None, :]).double()
        areas[:, fold] = (wins * pairs).sum((1, 2)) / pairs.sum((1, 2))
    return LayerScores(areas.nanmean(1), areas, None, None)


def _mean_cosine(x: Float[Tensor, "item d"], labellings: Labelling, design: Design, *, centred: bool) -> LayerScores:
    kernel = gram(x)
    neutral = torch.from_numpy(design.labels < 0)
    clusters = torch.from_numpy(design.clusters)
    hot = _one_hot(labellings, design.n_classes)
    everything = torch.ones(len(x), dtype=torch.double)
    keeps = [everything, *((clusters != c).double() for c in range(design.n_clusters))]
    values = []
    for keep in keeps:
        classes = hot * keep[None, :, None]
        baseline = (neutral.double() * keep)[None, :, None].expand(len(labellings), -1, 1)
        if centred:
            whole = torch.cat([classes, baseline], -1) if neutral.any() else classes
            means = whole / whole.sum(1, keepdim=True).clamp(min=1)
            directions = means - means.mean(-1, keepdim=True)
        else:
            means = classes / classes.sum(1, keepdim=True).clamp(min=1)
            directions = means - baseline / baseline.sum(1, keepdim=True).clamp(min=1)
        inner = directions.transpose(1, 2) @ (kernel @ directions)
        norms = inner.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()
        cosines = inner / norms[:, :, None] / norms[:, None, :]
        n = cosines.shape[-1]
        values.append((cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1)))
    return LayerScores(values[0], torch.stack(values[1:], 1), None, None)


def score_mean_cosine_neutral(x: Float[Tensor, "item d"], labellings: Labelling, design: Design) -> LayerScores:
    """Mean off-diagonal cosine of class mean minus neutral mean; per_cluster holds leave-one-group-out values."""
    return _mean_cosine(x, labellings, design, centred=False)


def score_mean_cosine_centred(x: Float[Tensor, "item d"], labellings: Labelling, design: Design) -> LayerScores:
    """Mean off-diagonal cosine of class means (neutral among them) minus their mean; per_cluster holds leave-one-group-out values."""
    return _mean_cosine(x, labellings, design, centred=True)


SCORE_LAYER: dict[str, ScoreLayer] = {
    "nearest_mean": score_nearest_mean,
    "logistic": score_logistic,
    "dprime": score_dprime,
    "valence": score_valence,
    "mean_cosine_neutral": score_mean_cosine_neutral,
    "mean_cosine_centred": score_mean_cosine_centred,
}
"""The function behind each score."""

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

from lens_affect.designs import Design
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
ScoreLayer = Callable[..., LayerScores]
"""Called with (x[item, d], labellings[labelling, item], design); those that project on directions also take `draws`."""


def gram(x: Float[Tensor, "item d"]) -> Float[Tensor, "item item"]:
    """Inner products after removing the mean of all texts (all scores are invariant to it; digits are not)."""
    centred = x.double() - x.double().mean(0)
    return centred @ centred.T


def _one_hot(labels: Labelling, n_classes: int) -> Float[Tensor, "labelling item label"]:
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), n_classes).double()
    return hot * (labels >= 0)[..., None]


def _folds(
    x: Float[Tensor, "item d"],
    labellings: Labelling,
    design: Design,
    draws: Float[Tensor, "labelling item label"] | None,
) -> "_Folds":
    return _Folds(x, labellings, design) if draws is None else _RandomFolds(x, labellings, design, draws)


class _Folds:
    """Class means of every training set, as inner products only.

    With one-hot labels Y, the sums over a training set are those over all texts minus those over the held-out ones, so K Y is
    needed once per labelling and each fold costs only products as small as itself.
    """

    def __init__(self, x: Float[Tensor, "item d"], labellings: Labelling, design: Design) -> None:
        self.kernel, self.hot = gram(x), _one_hot(labellings, design.n_classes)
        self.images = self.kernel @ self.hot
        self.products = self.hot.transpose(1, 2) @ self.images
        self.sizes = self.hot.sum(1)
        self.tests = [torch.from_numpy(np.flatnonzero(design.folds == fold)) for fold in range(design.n_folds)]

    def held_out(
        self, test: Int[Tensor, " held"]
    ) -> tuple[Float[Tensor, "labelling held label"], Float[Tensor, "labelling label label"]]:
        """Held-out texts projected on (class mean - grand mean), from the grand mean; inner products of those directions."""
        hot, images = self.hot[:, test], self.images[:, test]
        own = self.kernel[test][:, test] @ hot
        crossed = images.transpose(1, 2) @ hot
        products = self.products - crossed - crossed.transpose(1, 2) + hot.transpose(1, 2) @ own
        sizes = (self.sizes - hot.sum(1)).clamp(min=1)
        means = products / sizes[:, :, None] / sizes[:, None, :]
        on_means = (images - own) / sizes[:, None, :]
        with_origin = means.mean(1, keepdim=True)  # class means times grand mean
        origin = with_origin.mean(2, keepdim=True)
        projections = on_means - on_means.mean(2, keepdim=True) - with_origin + origin
        inner = means - with_origin - with_origin.transpose(1, 2) + origin
        return projections, inner


class _RandomFolds(_Folds):
    """Random directions in the place of the class means' directions; everything else as in _Folds.

    Each is a random combination of the training texts, so it lies where the activations spread: in an anisotropic space nearly
    all of them are nearly parallel, which a direction drawn uniformly over the sphere would not show.
    """

    def __init__(
        self,
        x: Float[Tensor, "item d"],
        labellings: Labelling,
        design: Design,
        draws: Float[Tensor, "labelling item label"],
    ) -> None:
        super().__init__(x, labellings, design)
        self.draws = draws.double() * torch.from_numpy(design.labels >= 0)[None, :, None]

    def held_out(
        self, test: Int[Tensor, " held"]
    ) -> tuple[Float[Tensor, "labelling held label"], Float[Tensor, "labelling label label"]]:
        """Held-out texts projected on the random directions, from the training texts' mean; inner products of the directions."""
        train = self.hot.sum((0, 2)) > 0
        train[test] = False
        weights = self.draws[:, train]
        weights = weights - weights.mean(1, keepdim=True)
        kernel = self.kernel[train][:, train]
        from_mean = self.kernel[test][:, train] - kernel.mean(0)
        return from_mean @ weights, weights.transpose(1, 2) @ kernel @ weights


def score_nearest_mean(
    x: Float[Tensor, "item d"],
    labellings: Labelling,
    design: Design,
    draws: Float[Tensor, "labelling item label"] | None = None,
) -> LayerScores:
    """Held-out accuracy of the nearest class mean by cosine, averaged over groups."""
    folds = _folds(x, labellings, design, draws)
    correct = torch.full(labellings.shape, torch.nan, dtype=torch.double)
    for test in folds.tests:
        projections, inner = folds.held_out(test)
        norms = inner.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()
        chosen = (projections / norms[:, None, :]).argmax(-1)
        correct[:, test] = (chosen == labellings[:, test]).double()
    return accuracy_scores(correct, labellings, design)


def accuracy_scores(correct: Float[Tensor, "labelling item"], labellings: Labelling, design: Design) -> LayerScores:
    """Accuracy from right-or-wrong per text: per group, then the mean over groups."""
    scored = torch.from_numpy((design.labels >= 0) & (design.folds >= 0))
    clusters = torch.from_numpy(design.clusters)[scored]
    right, labels = correct[:, scored], labellings[:, scored]
    member = torch.nn.functional.one_hot(clusters, design.n_clusters).double()
    member = member[:, member.sum(0) > 0]  # groups that are never held out have no accuracy
    per_cluster = right @ member / member.sum(0)
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


def score_dprime(
    x: Float[Tensor, "item d"],
    labellings: Labelling,
    design: Design,
    draws: Float[Tensor, "labelling item label"] | None = None,
) -> LayerScores:
    """Held-out d' per emotion, and its mean over emotions."""
    folds = _folds(x, labellings, design, draws)
    shape = (len(labellings), design.n_classes, design.n_folds)
    gap, variance = (
        torch.full(shape, torch.nan, dtype=torch.double),
        torch.full(shape, torch.nan, dtype=torch.double),
    )
    for fold, test in enumerate(folds.tests):
        projections, inner = folds.held_out(test)
        along = projections / inner.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()[:, None, :]
        own = folds.hot[:, test]  # which texts are of the class whose direction this is
        n_own, n_other = own.sum(1), (1 - own).sum(1)
        mean_own = (along * own).sum(1) / n_own
        mean_other = (along * (1 - own)).sum(1) / n_other
        spread = (((along - mean_other[:, None, :]) ** 2) * (1 - own)).sum(1) / (n_other - 1)
        gap[..., fold] = torch.where(n_own > 0, mean_own - mean_other, torch.nan)
        variance[..., fold] = spread
    pooled = variance.nanmean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    per_fold = gap / pooled
    return LayerScores(per_fold.nanmean((1, 2)), per_fold.nanmean(1), per_fold.nanmean(2), per_fold)


def score_valence(
    x: Float[Tensor, "item d"],
    labellings: Labelling,
    design: Design,
    draws: Float[Tensor, "labelling item label"] | None = None,
) -> LayerScores:
    """Held-out AUC of pleasant against unpleasant texts within each fold."""
    folds = _folds(x, labellings, design, draws)
    sign = torch.tensor([0.0 if p is None else (1.0 if p else -1.0) for p in design.positive], dtype=torch.double)
    weights = torch.where(sign > 0, sign / (sign > 0).sum(), torch.where(sign < 0, sign / (sign < 0).sum(), 0.0))
    areas = torch.full((len(labellings), design.n_folds), torch.nan, dtype=torch.double)
    for fold, test in enumerate(folds.tests):
        projections, _ = folds.held_out(test)
        along = projections @ weights
        side = folds.hot[:, test] @ sign
        above = along[:, :, None] - along[:, None, :]
        wins = (above > 0).double() + 0.5 * (above == 0).double()
        pairs = ((side > 0)[:, :, None] & (side < 0)[:, None, :]).double()
        areas[:, fold] = (wins * pairs).sum((1, 2)) / pairs.sum((1, 2))
    return LayerScores(areas.nanmean(1), areas, None, None)


def _mean_cosine(x: Float[Tensor, "item d"], labellings: Labelling, design: Design, *, centred: bool) -> LayerScores:
    kernel, clusters = gram(x), torch.from_numpy(design.clusters)
    neutral = torch.from_numpy(design.labels < 0).double()[None, :, None].expand(len(labellings), -1, 1)
    hot = torch.cat([_one_hot(labellings, design.n_classes), neutral], -1)
    images = kernel @ hot
    values = []
    for left_out in [torch.zeros(len(x), dtype=torch.bool), *(clusters == c for c in range(design.n_clusters))]:
        test = left_out.nonzero()[:, 0]
        crossed = images[:, test].transpose(1, 2) @ hot[:, test]
        own = hot[:, test].transpose(1, 2) @ (kernel[test][:, test] @ hot[:, test])
        products = hot.transpose(1, 2) @ images - crossed - crossed.transpose(1, 2) + own
        sizes = (hot.sum(1) - hot[:, test].sum(1)).clamp(min=1)
        means = products / sizes[:, :, None] / sizes[:, None, :]
        if centred:
            means = means if neutral.any() else means[:, :-1, :-1]
            inner = means - means.mean(1, keepdim=True) - means.mean(2, keepdim=True) + means.mean((1, 2), keepdim=True)
        else:
            baseline = means[:, :-1, -1:]
            inner = means[:, :-1, :-1] - baseline - baseline.transpose(1, 2) + means[:, -1:, -1:]
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

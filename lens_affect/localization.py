"""Where emotions can be told apart: a score per layer, with intervals over topics and permutation nulls.

A score above its null says that the labels can be read from this layer; it does not say that the model uses them.
"""

import contextlib
import html
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.activations import Activations
from lens_affect.designs import Design, draw_labellings, make_design
from lens_affect.nulls import max_null, p_text
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.scores import SCORE_LAYER, SCORES, LayerScores
from lens_affect.shapes import CurveShape, curve_shape
from lens_affect.statistics import (
    Better,
    Interval,
    derive_seed,
    jackknife_interval,
    mean_interval,
    resample_clusters,
    share_interval,
)
from lens_affect.stimuli import EMOTIONS, NEUTRAL

EMBEDDING = "embedding"
WITH_DIRECTIONS = ("nearest_mean", "dprime", "valence")
"""Scores that project on directions, for which random ones can stand in."""
PERMUTATIONS_AT_ONCE = 50
"""Relabellings per matrix product; bounds memory."""


@dataclass(frozen=True)
class LocalizationCurve:
    """One score at every layer. Rows are `embedding` (depth 0, where it was read) and then the layers."""

    score: str
    """Name of the score (scores.SCORES)."""
    better: Better
    """Which way is better."""
    unit: str
    """Unit of the values."""
    rows: tuple[str, ...]
    """`embedding` or the 0-based layer as text."""
    depth: Float[Tensor, " row"]
    """(layer + 1) / n_layers; 0 for the embedding."""
    values: Float[Tensor, " row"]
    """The score."""
    low: Float[Tensor, " row"]
    """Lower 95 % limit over topics."""
    high: Float[Tensor, " row"]
    """Upper 95 % limit over topics."""
    null_mean: Float[Tensor, " row"]
    """Mean under permuted labels; NaN without permutations."""
    null_low: Float[Tensor, " row"]
    """2.5 % point under permuted labels."""
    null_high: Float[Tensor, " row"]
    """97.5 % point under permuted labels."""
    threshold: Float[Tensor, " row"]
    """Family-wise 5 % threshold over all rows."""
    p: Float[Tensor, " row"]
    """Pointwise permutation p."""
    p_family: Float[Tensor, " row"]
    """Permutation p corrected over all rows by the maximum."""
    per_cluster: Float[Tensor, "cluster row"]
    """Score per topic (per fold where folds hold several); jackknife pseudo-values for d' and cosines. Resample these, never the layers."""
    per_emotion: pd.DataFrame
    """emotion, row, depth, score, low, high, null_mean, p, p_family (over rows and emotions); empty where the score has none."""
    n_texts: int
    """Emotional texts that were scored."""
    n_groups: int
    """Topics."""
    n_emotions: int
    """Classes."""
    n_permutations: int
    """Draws behind the null."""
    null: str
    """`labels`: labels permuted within topics; `directions`: random directions in the place of the emotions'."""
    method: str
    """Name of the stimuli."""
    provenance: Provenance
    """Model, numerics, stimuli, seed, versions."""

    @property
    def layer_rows(self) -> list[int]:
        """Row numbers of the layers, without the embedding."""
        return [i for i, row in enumerate(self.rows) if row != EMBEDDING]

    @property
    def best_layer(self) -> int:
        """0-based layer with the best score; the embedding is no candidate."""
        values = self.values[self.layer_rows]
        return int(self.rows[self.layer_rows[int(values.argmax() if self.better == "high" else values.argmin())]])

    def row(self, layer: int | str) -> int:
        """Row number of a layer.

        Raises:
            ValueError: a layer that is not there.
        """
        if str(layer) not in self.rows:
            raise ValueError(f"received layer {layer!r}; there are {', '.join(self.rows)}")
        return self.rows.index(str(layer))

    def resample(self, n_resamples: int = 2000, *, seed: int = 0) -> Float[Tensor, "resample row"]:
        """Curves of bootstrap samples of topics: whole topics are drawn, the layers stay together."""
        draws = resample_clusters(len(self.per_cluster), n_resamples, seed, self.score, self.method)
        return self.per_cluster[torch.from_numpy(draws)].mean(1)

    def best_depth_interval(self, *, seed: int = 0, n_resamples: int = 2000) -> tuple[float, float]:
        """95 % percentile interval of the best layer's depth over bootstrap samples of topics.

        How often it holds the layer that is best in truth was measured on 200 planted data sets per curve (12 topics, 20 emotions, 30 layers,
        accuracy 0.49 at the best layer: analyses/benchmarks/depth_interval.py): 0.995 for a peak in the middle, 0.990 for one at depth 0.8, 0.985 for a
        hump that is almost level, 0.955 for a curve that rises to the last layer. Where a curve rises to a plateau on which later layers are
        better by less than the noise, it holds the very last one in 0.480: there it says where the plateau is, not which of its layers is best.
        """
        curves = self.resample(n_resamples, seed=seed)[:, self.layer_rows]
        best = curves.argmax(1) if self.better == "high" else curves.argmin(1)
        depths = self.depth[self.layer_rows][best].numpy()
        low, high = np.quantile(depths, [0.025, 0.975], method="nearest")
        return float(low), float(high)

    def selected(self) -> Float[Tensor, " cluster"]:
        """Score of each topic at the layer that is best on the other topics: the value at the best layer without the luck of choosing it."""
        at = self.per_cluster[:, self.layer_rows]
        others = (at.sum(0) - at) / (len(at) - 1)
        best = others.argmax(1) if self.better == "high" else others.argmin(1)
        return at[torch.arange(len(at)), best]

    def shape(self, *, seed: int = 0, n_resamples: int = 2000) -> CurveShape:
        """Whether the curve is a u, an inverted u, rising, falling or flat (shapes.curve_shape), over resampled topics; the embedding stays out.

        Raises:
            ValueError: fewer than 7 layers.
        """
        at = self.layer_rows
        null = None
        if self.n_permutations:
            half = (self.threshold - self.null_mean).abs()[at]  # the family-wise 5 % limit, on both sides
            null = torch.stack([self.null_mean[at] - half, self.null_mean[at] + half]).numpy()
            null = null if np.isfinite(null).all() else None
        return curve_shape(
            self.depth[at].numpy(),
            self.resample(n_resamples, seed=seed)[:, at].numpy(),
            better=self.better,
            null=null,
            n_groups=len(self.per_cluster),
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: row, depth, score, low, high, null_mean, null_low, null_high, threshold, p, p_family, n."""
        columns = (
            "depth",
            "values",
            "low",
            "high",
            "null_mean",
            "null_low",
            "null_high",
            "threshold",
            "p",
            "p_family",
        )
        table = pd.DataFrame({name: getattr(self, name).numpy() for name in columns}).rename(
            columns={"values": "score"}
        )
        table.insert(0, "row", list(self.rows))
        return table.assign(n=self.n_texts)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "LocalizationCurve":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        i = self.row(self.best_layer)
        low, high = self.best_depth_interval()
        significance = (
            f"{'shuffled labels' if self.null == 'labels' else 'random directions'} give {self.null_mean[i]:.3f}, family-wise {p_text(float(self.p_family[i]), self.n_permutations)}"
            if self.n_permutations
            else "no null was computed (n_permutations=0)"
        )
        return (
            f"{self.provenance.title}, {self.method}: {self.score} is best at layer {self.best_layer} of {len(self.layer_rows)} "
            f"(depth {self.depth[i]:.2f}, 95 % interval {low:.2f} to {high:.2f} over {len(self.per_cluster)} topics)\n"
            f"{self.unit} {self.values[i]:.3f} [{self.low[i]:.3f}, {self.high[i]:.3f}], {self.n_texts} texts of {self.n_emotions} emotions; {significance}"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{sparkline(self)}{self.to_frame().head(4).round(3).to_html(index=False)}"


def sparkline(curve: LocalizationCurve, *, width: int = 420, height: int = 120) -> str:
    """The curve as inline SVG with its interval and null band; nothing is loaded from anywhere."""
    x = curve.depth.numpy()
    bands = [curve.low.numpy(), curve.high.numpy(), curve.null_low.numpy(), curve.null_high.numpy()]
    bottom, top = float(np.nanmin(bands)), float(np.nanmax(bands))
    scale = (top - bottom) or 1.0

    def point(a: float, b: float) -> str:
        return f"{10 + a * (width - 20):.1f},{height - 10 - (b - bottom) / scale * (height - 20):.1f}"

    def band(low: np.ndarray, high: np.ndarray, colour: str) -> str:
        if np.isnan(low).any():
            return ""
        corners = [point(a, b) for a, b in zip(x, low, strict=True)] + [
            point(a, b) for a, b in zip(x[::-1], high[::-1], strict=True)
        ]
        return f'<polygon points="{" ".join(corners)}" fill="{colour}" fill-opacity="0.35"/>'

    line = " ".join(point(a, b) for a, b in zip(x, curve.values.numpy(), strict=True))
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="score by depth">{band(bands[2], bands[3], "#999999")}'
        f'{band(bands[0], bands[1], "#0072B2")}<polyline points="{line}" fill="none" stroke="#0072B2" stroke-width="2"/></svg>'
    )


def localize(
    activations: Activations,
    *,
    score: str = "nearest_mean",
    n_splits: int | None = None,
    test_groups: Sequence[str] | None = None,
    n_permutations: int = 1000,
    null: str = "labels",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LocalizationCurve:
    """Score every layer on topics that its directions have not seen.

    Args:
        activations: of one site, one row per text. Neutral rows serve only the score that names them.
        score: a name from scores.SCORES.
        n_splits: folds of whole groups; by default one per topic (crossed design), or 5 (groups nested in labels).
        test_groups: a published split: only these groups are held out, and directions come from all others (for accuracies).
        n_permutations: relabellings: within topics, or of whole groups where groups are nested in labels. 0 for none (NaN).
        null: `labels`, or `directions`: what random combinations of the training texts reach in the place of the emotions' directions
            (an anisotropy baseline; for nearest_mean, dprime and valence). Values and intervals are the same for both.
        seed: of relabellings and folds.
        progress: called with (rows done, rows in all).

    Returns:
        Values with a 95 % interval over topics (t on leave-one-topic-out scores; jackknife for d' and cosines), the null, and p-values, pointwise
        and family-wise over all rows.

        How often the intervals hold the expected score was measured on planted data with 12 topics. With 3 emotions (500 data sets each):
        nearest_mean 0.93 to 0.95 at accuracies of 0.50 to 0.80, but 0.87 at 0.38; d' 0.95 to 0.99 at 0.3 to 3.1; valence 0.99 or more at areas
        from 0.88 on, but 0.88 at 0.59 and 0.75; mean_cosine_neutral 0.93 to 0.95 at 0.06 to 0.38. With 20 emotions (200 each): nearest_mean 0.96 at
        accuracies of 0.13 and 0.40; valence 0.89 at an area of 0.61, 0.95 at 0.75; mean_cosine_neutral 0.99. Where little can be told apart,
        intervals of nearest_mean and valence are thus too short, probably because topics are scored by directions that share their noise; the
        p-values do not rest on them.

    Raises:
        ValueError: an unknown score, one that the labels or the folds do not allow, fewer groups than folds, a class that is missing
            from a training set, too few possible relabellings, or activations kept as moments.

    Example:
        >>> print(localize(activations, score="nearest_mean", n_permutations=200, seed=0))  # doctest: +SKIP
    """
    clock = Stopwatch()
    _check(activations, score, null, test_groups)
    stimuli = activations.stimuli
    design, emotions = make_design(stimuli, n_splits=n_splits, test_groups=test_groups, seed=seed)
    check_labels(score, stimuli.labels)
    check_design(score, design, emotions)
    labellings = draw_labellings(stimuli, design, n_permutations if null == "labels" else 0, seed)
    draws = _draw_directions(design, n_permutations, seed) if null == "directions" else None
    rows = _rows(activations)
    measured = []
    for name, depth, x in rows:
        with _one_thread():
            measured.append(_measure(score, name, depth, x, labellings, design, draws))
        if progress:
            progress(len(measured), len(rows))

    better, kind = SCORES[score].better, SCORES[score].kind
    values = torch.cat([m.observed.score for m in measured])
    clusters = torch.stack([m.clusters for m in measured], 1)  # cluster, row
    clusters = clusters[~clusters.isnan().any(1)]  # a fold that lacks one side has no AUC
    interval, per_cluster = _interval(values, clusters, kind)
    return LocalizationCurve(
        score=score,
        better=better,
        unit=SCORES[score].unit,
        rows=tuple(m.name for m in measured),
        depth=torch.tensor([m.depth for m in measured], dtype=torch.double),
        values=values,
        low=torch.from_numpy(interval.low),
        high=torch.from_numpy(interval.high),
        **_null(values, torch.stack([m.permuted for m in measured], 1), better),
        per_cluster=per_cluster,
        per_emotion=_per_emotion(measured, emotions, kind, better),
        n_texts=int(((design.labels >= 0) & (design.folds >= 0)).sum()),
        n_groups=len(set(design.clusters[design.folds >= 0].tolist())),
        n_emotions=design.n_classes,
        n_permutations=n_permutations,
        null=null,
        method=stimuli.name,
        provenance=activations.provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
    )


@dataclass(frozen=True)
class _Measured:
    """One row of a curve before intervals and p-values."""

    name: str
    depth: float
    observed: LayerScores
    permuted: Float[Tensor, " draw"]
    permuted_emotions: Float[Tensor, "draw emotion"] | None
    left_out: LayerScores | None
    """d' without each group in turn."""

    @property
    def clusters(self) -> Float[Tensor, " cluster"]:
        """Score per group, or without each group for d'."""
        return self.observed.per_cluster[0] if self.left_out is None else self.left_out.score


def _measure(
    score: str, name: str, depth: float, x: Tensor, labellings: Tensor, design: Design, draws: Tensor | None
) -> _Measured:
    observed = SCORE_LAYER[score](x, labellings[:1], design)
    null = _null_scores(score, x, labellings, design, draws)
    of_emotions = [n.per_emotion for n in null if n.per_emotion is not None]
    return _Measured(
        name=name,
        depth=depth,
        observed=observed,
        permuted=torch.cat([n.score for n in null]) if null else torch.empty(0, dtype=torch.double),
        permuted_emotions=torch.cat(of_emotions) if of_emotions else None,
        left_out=_leave_one_out(score, x, labellings[:1], design) if SCORES[score].kind == "dprime" else None,
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small products: a second thread waits more than it works, and stalls where the other core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(activations: Activations, score: str, null: str, test_groups: Sequence[str] | None) -> None:
    if score not in SCORES:
        raise ValueError(f"received score={score!r}; allowed are {list(SCORES)}")
    if null not in ("labels", "directions"):
        raise ValueError(f"received null={null!r}; allowed are 'labels' and 'directions'")
    if null == "directions" and score not in WITH_DIRECTIONS:
        raise ValueError(
            f"received score={score!r} with null='directions'; allowed are {list(WITH_DIRECTIONS)}: use null='labels'"
        )
    if test_groups is not None and SCORES[score].kind != "accuracy":
        raise ValueError(
            f"received score={score!r} with test_groups; allowed are scores of kind accuracy: nearest_mean, logistic"
        )
    if int(activations.counts.max()) != 1 or activations.squares:
        raise ValueError(
            "received activations kept as moments; folds need one row per text: extract with keep='pooled'"
        )
    _ = activations.values  # says which sites there are if several


def check_labels(score: str, labels: Sequence[str]) -> None:
    """Whether texts with these labels allow a score.

    Raises:
        ValueError: they do not.
    """
    if score == "mean_cosine_neutral" and NEUTRAL not in labels:
        raise ValueError("score='mean_cosine_neutral' needs texts labelled 'neutral'; add some, or use another score")
    if score == "valence" and len({EMOTIONS[e].valence for e in labels if e in EMOTIONS}) < 2:
        raise ValueError(
            f"score='valence' needs pleasant and unpleasant emotions with known valence (stimuli.EMOTIONS); labels are {list(labels)}"
        )


def check_design(score: str, design: Design, emotions: Sequence[str]) -> None:
    """Whether the folds of a design allow a score, with an interval.

    Raises:
        ValueError: they do not.
    """
    scored = (design.labels >= 0) & (design.folds >= 0)
    texts = np.zeros((design.n_folds, design.n_classes), dtype=int)
    np.add.at(texts, (design.folds[scored], design.labels[scored]), 1)
    if SCORES[score].kind == "dprime":
        # the spread of a fold is a standard deviation of the other emotions' texts in it, and the interval leaves folds out
        usable = ((texts > 0) & (texts.sum(1, keepdims=True) - texts >= 2)).sum(0)
        if usable.min() < 2:
            raise ValueError(
                f"received score={score!r} for folds of which {usable.min()} hold {emotions[int(usable.argmin())]!r} beside two texts of other emotions; "
                "allowed are 2 or more: add emotions or texts per topic, use fewer folds (n_splits), or another score"
            )
    if SCORES[score].kind == "auc":
        positive = np.array([side is True for side in design.positive])
        negative = np.array([side is False for side in design.positive])
        usable = ((texts[:, positive].sum(1) > 0) & (texts[:, negative].sum(1) > 0)).sum()
        if usable < 2:
            raise ValueError(
                f"received score={score!r} for folds of which {usable} hold pleasant and unpleasant texts; allowed are 2 or more: add texts of both "
                "kinds to each topic, use fewer folds (n_splits), or another score"
            )


def _draw_directions(design: Design, n_draws: int, seed: int) -> Tensor:
    """Weights of the texts in each random direction: `[draw, text, emotion]`."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "random directions"))
    return torch.randn(n_draws, len(design.labels), design.n_classes, generator=generator)


def _null_scores(score: str, x: Tensor, labellings: Tensor, design: Design, draws: Tensor | None) -> list[LayerScores]:
    if draws is None:
        return [
            SCORE_LAYER[score](x, batch, design) for batch in labellings[1:].split(PERMUTATIONS_AT_ONCE) if len(batch)
        ]
    true = labellings[:1]
    return [
        SCORE_LAYER[score](x, true.expand(len(batch), -1), design, batch)
        for batch in draws.split(PERMUTATIONS_AT_ONCE)
        if len(batch)
    ]


def _rows(activations: Activations) -> list[tuple[str, float, Tensor]]:
    rows = [
        (str(layer), (layer + 1) / activations.n_layers, activations.values[:, i])
        for i, layer in enumerate(activations.layers)
    ]
    if activations.embedding:
        rows.insert(0, (EMBEDDING, 0.0, activations.embedding[EMBEDDING]))
    return rows


def _interval(values: Tensor, clusters: Tensor, kind: str) -> tuple[Interval, Tensor]:
    if kind not in ("cosine", "dprime"):
        return share_interval(clusters.numpy()), clusters
    n = len(clusters)
    pseudo = n * values - (n - 1) * clusters
    return jackknife_interval(values.numpy(), clusters.numpy()), pseudo


def _leave_one_out(score: str, x: Tensor, labels: Tensor, design: Design) -> LayerScores:
    """The whole procedure without each group in turn (without each of at most 24 blocks of groups where there are more).

    d' takes its spread and its directions from all folds, so its folds vary less than it does: a t interval over folds covers
    too rarely (0.84 measured on planted data), the delete-one-group jackknife does not.
    """
    n_blocks = min(design.n_clusters, 24)
    found = []
    for block in range(n_blocks):
        keep = (design.clusters % n_blocks != block) | (design.clusters < 0)
        folds, clusters = (np.unique(part[keep], return_inverse=True)[1] for part in (design.folds, design.clusters))
        # np.unique sorts, so rows outside every fold (-1) come first where there are any.
        folds, clusters = folds - int((design.folds[keep] < 0).any()), clusters - int((design.clusters[keep] < 0).any())
        rest = Design(
            design.labels[keep],
            design.n_classes,
            folds,
            int(folds.max()) + 1,
            clusters,
            int(clusters.max()) + 1,
            design.positive,
        )
        found.append(SCORE_LAYER[score](x[torch.from_numpy(keep)], labels[:, torch.from_numpy(keep)], rest))
    per_emotion = [f.per_emotion for f in found if f.per_emotion is not None]
    empty = torch.empty(n_blocks, 0)
    return LayerScores(
        torch.cat([f.score for f in found]), empty, torch.cat(per_emotion) if per_emotion else None, None
    )


def _null(values: Tensor, permuted: Tensor, better: Better) -> dict[str, Tensor]:
    names = {"null_mean": "mean", "null_low": "low", "null_high": "high"}
    names |= {name: name for name in ("threshold", "p", "p_family")}
    if not len(permuted):
        return dict.fromkeys(names, torch.full_like(values, torch.nan))
    null = max_null(values.numpy(), permuted.numpy(), better=better)
    return {ours: torch.from_numpy(np.asarray(getattr(null, theirs))) for ours, theirs in names.items()}


def _per_emotion(measured: Sequence[_Measured], emotions: Sequence[str], kind: str, better: Better) -> pd.DataFrame:
    columns = ["emotion", "row", "depth", "score", "low", "high", "null_mean", "p", "p_family"]
    scores = [m.observed.per_emotion for m in measured if m.observed.per_emotion is not None]
    if not scores:
        return pd.DataFrame(columns=columns)
    values = torch.cat(scores)  # row, emotion
    null_mean, p, p_family = (np.full(values.shape, np.nan) for _ in range(3))
    permuted = [m.permuted_emotions for m in measured if m.permuted_emotions is not None]
    if permuted:
        null = max_null(values.flatten().numpy(), torch.stack(permuted, 1).flatten(1).numpy(), better=better)
        null_mean, p, p_family = (a.reshape(values.shape) for a in (null.mean, null.p, null.p_family))
    table = []
    for i, m in enumerate(measured):
        for j, emotion in enumerate(emotions):
            low, high = _emotion_interval(m, j, float(values[i, j]), kind)
            row = emotion, m.name, m.depth, float(values[i, j]), low, high, null_mean[i, j], p[i, j], p_family[i, j]
            table.append(row)
    return pd.DataFrame(table, columns=columns)


def _emotion_interval(measured: _Measured, emotion: int, value: float, kind: str) -> tuple[float, float]:
    """Jackknife for d', an interval within 0 and 1 for accuracies (statistics.share_interval), t for anything else."""
    if measured.left_out is not None:
        assert measured.left_out.per_emotion is not None  # d' has a value per emotion
        left_out = measured.left_out.per_emotion[:, emotion]
        interval = jackknife_interval(np.array(value), left_out[~left_out.isnan()].numpy())
        return float(interval.low), float(interval.high)
    cells = measured.observed.emotion_cluster
    assert cells is not None  # a score with per-emotion values has them per cluster too
    seen = cells[0, emotion][~cells[0, emotion].isnan()].numpy()
    interval = share_interval(seen) if kind in ("accuracy", "auc") and len(seen) else mean_interval(seen)
    return float(interval.low), float(interval.high)

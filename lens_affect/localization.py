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
from scipy import stats
from torch import Tensor

from lens_affect.activations import Activations
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.scores import SCORE_LAYER, SCORES, Design, LayerScores, accuracy_scores
from lens_affect.statistics import (
    Better,
    Interval,
    derive_seed,
    jackknife_interval,
    max_null,
    mean_interval,
    p_text,
    permute_labels,
    resample_clusters,
)
from lens_affect.stimuli import EMOTIONS, NEUTRAL, Stimuli

EMBEDDING = "embedding"
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
    """Relabellings behind the null."""
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
        """95 % percentile interval of the best layer's depth over bootstrap samples of topics."""
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
            f"shuffled labels give {self.null_mean[i]:.3f}, family-wise {p_text(float(self.p_family[i]), self.n_permutations)}"
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
    n_permutations: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LocalizationCurve:
    """Score every layer on topics that its directions have not seen.

    Args:
        activations: of one site, one row per text. Neutral rows serve only the score that names them.
        score: a name from scores.SCORES.
        n_splits: folds of whole groups; by default one per topic (crossed design), or 5 (groups nested in labels).
        n_permutations: relabellings: within topics, or of whole groups where groups are nested in labels. 0 for none (NaN).
        seed: of relabellings and folds.
        progress: called with (rows done, rows in all).

    Returns:
        Values with a 95 % interval over topics (t on leave-one-topic-out scores; jackknife for d' and cosines), the null, and p-values, pointwise
        and family-wise over all rows.

    Raises:
        ValueError: an unknown score, fewer groups than folds, a class that is missing from a training set, too few possible
            relabellings, or activations kept as moments.

    Example:
        >>> print(localize(activations, score="nearest_mean", n_permutations=200, seed=0))  # doctest: +SKIP
    """
    clock = Stopwatch()
    _check(activations, score)
    stimuli = activations.stimuli
    design, emotions = make_design(stimuli, n_splits=n_splits, seed=seed)
    _check_score(score, design, stimuli)
    labellings = _labellings(stimuli, design, n_permutations, seed)
    rows, kind = _rows(activations), SCORES[score].kind

    observed: list[LayerScores] = []
    permuted, permuted_emotions = [], []
    for i, (_, _, x) in enumerate(rows):
        with _one_thread():
            result = SCORE_LAYER[score](x, labellings[:1], design)
            batches = labellings[1:].split(PERMUTATIONS_AT_ONCE) if n_permutations else ()
            parts = [SCORE_LAYER[score](x, batch, design) for batch in batches]
        observed.append(result)
        permuted.append(torch.cat([p.score for p in parts]) if parts else torch.empty(0))
        permuted_emotions.append(
            torch.cat([p.per_emotion for p in parts if p.per_emotion is not None])
            if parts and result.per_emotion is not None
            else None
        )
        if progress:
            progress(i + 1, len(rows))

    values = torch.cat([o.score for o in observed])
    with _one_thread():
        parts = [_leave_one_out(score, x, labellings[:1], design) for _, _, x in rows] if kind == "dprime" else []
    clusters = torch.stack(
        [p.score for p in parts] if parts else [o.per_cluster[0] for o in observed], 1
    )  # cluster, row
    clusters = clusters[~clusters.isnan().any(1)]  # a fold that lacks one side has no AUC
    interval, per_cluster = _interval(values, clusters, jackknife=kind in ("cosine", "dprime"))
    null = _null(values, torch.stack(permuted, 1), SCORES[score].better) if n_permutations else None
    nan = torch.full_like(values, torch.nan)
    depths = torch.tensor([d for _, d, _ in rows], dtype=torch.double)
    names = tuple(name for name, _, _ in rows)
    return LocalizationCurve(
        score=score,
        better=SCORES[score].better,
        unit=SCORES[score].unit,
        rows=names,
        depth=depths,
        values=values,
        low=torch.from_numpy(interval.low),
        high=torch.from_numpy(interval.high),
        **(null or dict.fromkeys(("null_mean", "null_low", "null_high", "threshold", "p", "p_family"), nan)),
        per_cluster=per_cluster,
        per_emotion=_per_emotion(
            observed, permuted_emotions, parts, emotions, names, depths, kind, SCORES[score].better
        ),
        n_texts=int((design.labels >= 0).sum()),
        n_groups=design.n_clusters,
        n_emotions=design.n_classes,
        n_permutations=n_permutations,
        method=stimuli.name,
        provenance=activations.provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
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


def _check(activations: Activations, score: str) -> None:
    if score not in SCORES:
        raise ValueError(f"received score={score!r}; allowed are {list(SCORES)}")
    if int(activations.counts.max()) != 1 or activations.squares:
        raise ValueError(
            "received activations kept as moments; folds need one row per text: extract with keep='pooled'"
        )
    _ = activations.values  # says which sites there are if several


def _check_score(score: str, design: Design, stimuli: Stimuli) -> None:
    if score == "mean_cosine_neutral" and NEUTRAL not in stimuli.labels:
        raise ValueError("score='mean_cosine_neutral' needs texts labelled 'neutral'; add some, or use another score")
    if score == "valence" and {True, False} - set(design.positive):
        raise ValueError(
            f"score='valence' needs pleasant and unpleasant emotions with known valence (stimuli.EMOTIONS); labels are {list(stimuli.labels)}"
        )


def make_design(stimuli: Stimuli, *, n_splits: int | None = None, seed: int = 0) -> tuple[Design, tuple[str, ...]]:
    """Folds that keep groups together, and the classes.

    Raises:
        ValueError: fewer than two emotions, fewer groups than folds, or a fold whose training set lacks a class.
    """
    emotions = tuple(e for e in stimuli.labels if e != NEUTRAL)
    if len(emotions) < 2:
        raise ValueError(f"received the emotions {list(emotions)}; telling apart needs at least two")
    labels = np.array([emotions.index(e) if e != NEUTRAL else -1 for e in stimuli.emotions])
    groups = list(dict.fromkeys(g for g, label in zip(stimuli.groups, labels, strict=True) if label >= 0))
    # Neutral texts of a topic without emotional ones never enter a score that holds topics out.
    number = {g: i for i, g in enumerate(groups)}
    clusters = np.array([number.get(g, -1) for g in stimuli.groups])
    folds_of = _folds(stimuli, groups, labels, n_splits, seed)
    folds = np.array([folds_of[c] if c >= 0 and label >= 0 else -1 for c, label in zip(clusters, labels, strict=True)])
    n_folds = max(folds_of) + 1
    for fold in range(n_folds):
        lacking = set(range(len(emotions))) - set(labels[(folds != fold) & (labels >= 0)].tolist())
        if lacking:
            raise ValueError(
                f"received {len(groups)} groups for {n_folds} folds; without fold {fold} no text of {emotions[min(lacking)]!r} is left to learn "
                "from: add groups for that emotion, or use fewer folds"
            )
    known = [EMOTIONS.get(e) for e in emotions]
    positive = tuple(None if e is None else e.valence == "positive" for e in known)
    return Design(labels, len(emotions), folds, n_folds, clusters, len(groups), positive), emotions


def _folds(stimuli: Stimuli, groups: list[str], labels: np.ndarray, n_splits: int | None, seed: int) -> list[int]:
    n = n_splits if n_splits is not None else (len(groups) if stimuli.design == "crossed" else 5)
    if not 2 <= n <= len(groups):
        raise ValueError(
            f"received {len(groups)} groups for {n} folds; allowed are 2 to {len(groups)} folds (groups are never split)"
        )
    if n == len(groups):
        return list(range(n))
    from sklearn.model_selection import KFold, StratifiedKFold

    random_state = derive_seed(seed, "folds") % 2**32
    found = [0] * len(groups)
    if stimuli.design == "nested":
        of_group = {g: label for g, label in zip(stimuli.groups, labels.tolist(), strict=True) if label >= 0}
        target = np.array([of_group[g] for g in groups])
        smallest = int(np.bincount(target).min())
        if smallest < n:
            raise ValueError(
                f"received an emotion with {smallest} groups for {n} folds; every fold needs one of each emotion: use n_splits={max(smallest, 2)}"
            )
        splitter = StratifiedKFold(n, shuffle=True, random_state=random_state).split(np.zeros(len(groups)), target)
    else:
        splitter = KFold(n, shuffle=True, random_state=random_state).split(np.zeros(len(groups)))
    for fold, (_, held_out) in enumerate(splitter):
        for g in held_out:
            found[g] = fold
    return found


def _labellings(stimuli: Stimuli, design: Design, n_permutations: int, seed: int) -> Tensor:
    """The true labels first, then the relabellings; neutral texts keep theirs."""
    labels = torch.from_numpy(design.labels)
    if not n_permutations:
        return labels[None]
    emotional = np.flatnonzero(design.labels >= 0)
    if stimuli.design == "crossed":
        order = permute_labels(
            [stimuli.emotions[i] for i in emotional],
            [stimuli.groups[i] for i in emotional],
            design="crossed",
            n_permutations=n_permutations,
            seed=seed,
        )
    else:
        # Whole groups swap labels, but within a fold: a fold keeps its composition, so every relabelling has a score.
        first = np.array([emotional[design.clusters[emotional] == c][0] for c in range(design.n_clusters)])
        swapped = permute_labels(
            [stimuli.emotions[i] for i in first],
            [str(design.folds[i]) for i in first],
            design="crossed",
            n_permutations=n_permutations,
            seed=seed,
        )
        position = {int(item): i for i, item in enumerate(emotional)}
        order = np.array([position[int(item)] for item in first])[swapped][:, design.clusters[emotional]]
    drawn = labels[None].repeat(n_permutations + 1, 1)
    drawn[1:, torch.from_numpy(emotional)] = labels[torch.from_numpy(emotional[order])]
    return drawn


def _rows(activations: Activations) -> list[tuple[str, float, Tensor]]:
    rows = [
        (str(layer), (layer + 1) / activations.n_layers, activations.values[:, i])
        for i, layer in enumerate(activations.layers)
    ]
    if activations.embedding:
        rows.insert(0, (EMBEDDING, 0.0, activations.embedding[EMBEDDING]))
    return rows


def _interval(values: Tensor, clusters: Tensor, *, jackknife: bool) -> tuple[Interval, Tensor]:
    if not jackknife:
        return mean_interval(clusters.numpy()), clusters
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
    null = max_null(values.numpy(), permuted.numpy(), better=better)
    found = {
        "null_mean": null.mean,
        "null_low": null.low,
        "null_high": null.high,
        "threshold": null.threshold,
        "p": null.p,
        "p_family": null.p_family,
    }
    return {k: torch.from_numpy(np.asarray(v)) for k, v in found.items()}


def _per_emotion(
    observed: Sequence[LayerScores],
    permuted: Sequence[Tensor | None],
    parts: Sequence[LayerScores],
    emotions: Sequence[str],
    names: Sequence[str],
    depths: Tensor,
    kind: str,
    better: Better,
) -> pd.DataFrame:
    columns = ["emotion", "row", "depth", "score", "low", "high", "null_mean", "p", "p_family"]
    if observed[0].per_emotion is None:
        return pd.DataFrame(columns=columns)
    values = torch.stack([o.per_emotion[0] for o in observed if o.per_emotion is not None])  # row, emotion
    shape = values.shape
    null_mean, p, p_family = (np.full(shape, np.nan) for _ in range(3))
    known = [q for q in permuted if q is not None]
    if known:
        null = max_null(values.flatten().numpy(), torch.stack(known, 1).flatten(1).numpy(), better=better)
        null_mean, p, p_family = (a.reshape(shape) for a in (null.mean, null.p, null.p_family))
    table = []
    for i, name in enumerate(names):
        cells = observed[i].emotion_cluster
        assert cells is not None  # a score with per-emotion values has them per cluster too
        for j, emotion in enumerate(emotions):
            left_out = parts[i].per_emotion if parts else None
            if left_out is not None:
                kept = left_out[:, j][~left_out[:, j].isnan()]
                interval = jackknife_interval(values[i, j].numpy(), kept.numpy())
                low, high = float(interval.low), float(interval.high)
            else:
                low, high = _emotion_interval(cells[0, j][~cells[0, j].isnan()].numpy(), kind)
            table.append(
                [
                    emotion,
                    name,
                    float(depths[i]),
                    float(values[i, j]),
                    low,
                    high,
                    null_mean[i, j],
                    p[i, j],
                    p_family[i, j],
                ]
            )
    return pd.DataFrame(table, columns=columns)


def _emotion_interval(seen: np.ndarray, kind: str) -> tuple[float, float]:
    """Wilson for a share of texts (t has no width at 0 and 1), t for d'."""
    if kind == "accuracy" and len(seen) and np.isin(seen, (0.0, 1.0)).all():
        found = stats.binomtest(int(seen.sum()), len(seen)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    interval = mean_interval(seen)
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class LexicalBar:
    """What a bag of words reaches on the same texts and splits: the bar that a model's vectors must clear."""

    accuracy: float
    """Held-out accuracy, averaged over groups, of the better of two classifiers (chosen on the same texts: a bar that is rather too high)."""
    low: float
    """Lower 95 % limit over groups."""
    high: float
    """Upper 95 % limit over groups."""
    classifier: str
    """`tf-idf logistic` or `naive Bayes`."""
    per_cluster: Float[Tensor, " cluster"]
    """Accuracy per group."""
    n_texts: int
    """Texts."""

    def compare(self, curve: LocalizationCurve) -> Interval:
        """Accuracy of the curve, each topic at the layer that is best on the other topics, minus the bar, paired by topic.

        Raises:
            ValueError: a score that is no accuracy, or other texts.
        """
        if SCORES[curve.score].kind != "accuracy" or curve.per_cluster.shape[0] != len(self.per_cluster):
            raise ValueError(
                f"received a curve of {curve.score} over {curve.per_cluster.shape[0]} groups; the bar needs an accuracy over {len(self.per_cluster)}"
            )
        return mean_interval((curve.selected() - self.per_cluster).numpy())

    def __str__(self) -> str:
        return f"bag of words ({self.classifier}): held-out accuracy {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}], {self.n_texts} texts"


def lexical_bar(stimuli: Stimuli, *, n_splits: int | None = None, seed: int = 0) -> LexicalBar:
    """Held-out accuracy of bag-of-words classifiers on exactly the folds that `localize` uses.

    Args:
        stimuli: the texts; neutral ones are left out.
        n_splits: as in `localize`.
        seed: as in `localize`.
    """
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    design, _ = make_design(stimuli, n_splits=n_splits, seed=seed)
    texts = np.array(stimuli.texts, dtype=object)
    classifiers = {
        "tf-idf logistic": make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)),
        "naive Bayes": make_pipeline(CountVectorizer(), MultinomialNB()),
    }
    found: dict[str, Tensor] = {}
    for name, classifier in classifiers.items():
        correct = torch.full((1, len(texts)), torch.nan, dtype=torch.double)
        for fold in range(design.n_folds):
            train = (design.folds != fold) & (design.labels >= 0)
            test = np.flatnonzero(design.folds == fold)
            classifier.fit(texts[train], design.labels[train])
            correct[0, torch.from_numpy(test)] = torch.from_numpy(
                (classifier.predict(texts[test]) == design.labels[test]).astype(float)
            )
        found[name] = accuracy_scores(correct, torch.from_numpy(design.labels)[None], design).per_cluster[0]
    best = max(found, key=lambda name: float(found[name].mean()))
    interval = mean_interval(found[best].numpy())
    return LexicalBar(
        float(interval.estimate),
        float(interval.low),
        float(interval.high),
        best,
        found[best],
        int((design.labels >= 0).sum()),
    )

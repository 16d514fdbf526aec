"""What judges say about texts, in our emotions, and how far two judges agree."""

import html
import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lens_affect.judge_labels import MINIMUM_AUC, Naming, base_rate, namings
from lens_affect.judges import Judge
from lens_affect.results import (
    Provenance,
    Stopwatch,
    content_hash,
    git_state,
    load_result,
    package_versions,
    save_result,
)
from lens_affect.statistics import resample_clusters, share_interval


def judge_names(judge: Judge) -> dict[str, tuple[str, ...]]:
    """Our emotions that the judge can name, each with the labels that count for it (data/judge_labels.csv)."""
    return {emotion: naming.labels for emotion, naming in namings(judge.labels).items()}


def can_name(judge: Judge, emotion: str) -> bool:
    """Whether the judge has a label for one of our emotions."""
    return emotion in namings(judge.labels)


@dataclass(frozen=True)
class Judgement:
    """What one judge says about texts."""

    probabilities: Float[Tensor, "text emotion"]
    """Probability that the text expresses the emotion; NaN for an empty text. For an emotion with several labels: that any of them is
    present, taking them as independent (multi-label judges), or their sum (others)."""
    emotions: tuple[str, ...]
    """Our emotions, in our order."""
    labels: tuple[tuple[str, ...], ...]
    """The judge's labels that count for each emotion."""
    matches: tuple[str, ...]
    """`exact` or `near` (only the emotion's family) for each emotion."""
    top: tuple[str, ...]
    """Emotion that stands out most among the exact ones, per text; empty for an empty text. For a measured multi-label judge: by odds over the
    emotion's base rate, else every text that it cannot read would get its most frequent emotion; for others by probability. Near ones
    cannot be told from a neighbour and do not compete."""
    auc: Float[Tensor, " emotion"]
    """Measured AUC of the judge per emotion, of a near one for its labels (data/judge.md); NaN where it was not measured."""
    judge: str
    """Name of the judge."""
    title: str
    """Judge's name as a reader knows it."""
    multi_label: bool
    """Whether the judge's labels have probabilities of their own."""
    provenance: Provenance
    """Of this step; its stimuli hash is of the texts."""

    @property
    def n_empty(self) -> int:
        """Texts without anything to judge: they have no value and are in no mean."""
        return sum(not name for name in self.top)

    @property
    def reliable(self) -> tuple[str, ...]:
        """Emotions for which the judge's measured AUC is at least 0.80: the ones that count in a verification (a near one by its family)."""
        return tuple(e for e, auc in zip(self.emotions, self.auc.tolist(), strict=True) if auc >= MINIMUM_AUC)

    def probability(self, emotion: str) -> Float[Tensor, " text"]:
        """Probabilities of one emotion.

        Raises:
            ValueError: an emotion that was not judged.
        """
        if emotion not in self.emotions:
            raise ValueError(f"received {emotion!r}; this judgement has {list(self.emotions)}")
        return self.probabilities[:, self.emotions.index(emotion)]

    def to_frame(self) -> pd.DataFrame:
        """One row per text and emotion: text (number), emotion, probability, match, auc, top (of the text), judge."""
        n_texts, n_emotions = self.probabilities.shape
        return pd.DataFrame(
            {
                "text": np.repeat(np.arange(n_texts), n_emotions),
                "emotion": list(self.emotions) * n_texts,
                "probability": self.probabilities.flatten().numpy(),
                "match": list(self.matches) * n_texts,
                "auc": self.auc.tolist() * n_texts,
                "top": np.repeat(np.array(self.top, dtype=object), n_emotions),
                "judge": self.judge,
            }
        )

    def by_emotion(self) -> pd.DataFrame:
        """One row per emotion: mean probability over the n texts that are not empty with its 95 % interval (t, within 0 and 1), share on top, match, auc."""
        kept = self.probabilities[[bool(name) for name in self.top]].double().numpy()
        mean = share_interval(kept)
        counts = Counter(self.top)
        return pd.DataFrame(
            {
                "emotion": list(self.emotions),
                "mean": mean.estimate,
                "low": mean.low,
                "high": mean.high,
                "top": [
                    counts[e] / len(kept) if m == "exact" else math.nan
                    for e, m in zip(self.emotions, self.matches, strict=True)
                ],
                "match": list(self.matches),
                "auc": self.auc.tolist(),
                "n": len(kept),
            }
        )

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Judgement":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        from statsmodels.stats.proportion import proportion_confint

        n = len(self.top) - self.n_empty
        counts = Counter(name for name in self.top if name).most_common(3)
        shares = []
        for name, count in counts:
            low, high = proportion_confint(count, n, method="wilson")
            shares.append(f"{name} {count / n:.2f} [{low:.2f}, {high:.2f}]")
        least = min((a for a in self.auc.tolist() if not math.isnan(a)), default=math.nan)
        measured = "not measured" if math.isnan(least) else f"{least:.2f} or more where measured"
        return (
            f"{self.title}: {n} texts, {self.n_empty} empty, {len(self.emotions)} emotions\n"
            f"most often on top: {', '.join(shares) or 'none'} (share of texts, Wilson interval)\n"
            f"AUC {measured}; at least {MINIMUM_AUC:.2f} for {len(self.reliable)} emotions"
        )

    def _repr_html_(self) -> str:
        if self.n_empty == len(self.top):
            return f"<p>{html.escape(str(self).splitlines()[0])}</p>"
        table = self.by_emotion().to_html(escape=True, index=False, float_format="{:.3f}".format)
        return f"<p>{html.escape(str(self).splitlines()[0])}</p>{table}"


def judge_texts(judge: Judge, texts: Sequence[str], emotions: Sequence[str] | None = None) -> Judgement:
    """Let a judge read texts, and translate its labels into our emotions.

    Args:
        judge: from load_judge, or anything that fits the protocol `Judge`.
        texts: what is read; empty ones get NaN and are counted.
        emotions: some of ours; by default all that the judge can name.

    Raises:
        ValueError: no texts, or an emotion that the judge cannot name.

    Example:
        >>> judge_texts(load_judge("lexicon"), ["She laughed.", "He wept."]).top  # doctest: +SKIP
        ('happy', 'sad')
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"received {texts!r} as texts; allowed is a list with at least one text")
    watch = Stopwatch()
    chosen = _chosen(judge, emotions)
    scores = torch.full((len(texts), len(judge.labels)), math.nan, dtype=torch.double)
    rows = [row for row, text in enumerate(texts) if text.strip()]
    if rows:
        scores[rows] = judge.score([texts[row] for row in rows]).double().cpu()
    columns = [scores[:, [judge.labels.index(label) for label in naming.labels]] for naming in chosen.values()]
    # 1 - (1 - p) would round small probabilities to the same number, and ranks would suffer.
    combined = [-torch.log1p(-c).sum(dim=1).expm1() if judge.multi_label else c.sum(dim=1) for c in columns]
    probabilities = torch.stack(combined, dim=1).clamp(0, 1).float()
    return Judgement(
        probabilities=probabilities,
        emotions=tuple(chosen),
        labels=tuple(naming.labels for naming in chosen.values()),
        matches=tuple(naming.match for naming in chosen.values()),
        top=_top(judge, probabilities, chosen),
        auc=torch.tensor([judge.auc(emotion) for emotion in chosen], dtype=torch.float32),
        judge=judge.name,
        title=judge.title,
        multi_label=judge.multi_label,
        provenance=_provenance(judge, texts, watch),
    )


def _chosen(judge: Judge, emotions: Sequence[str] | None) -> dict[str, Naming]:
    known = namings(judge.labels)
    unknown = [emotion for emotion in emotions or () if emotion not in known]
    if unknown or not known:
        raise ValueError(
            f"received {unknown or list(judge.labels)!r}, which {judge.title} cannot name; it can name {list(known)}: choose from these, or "
            "another judge"
        )
    return {e: naming for e, naming in known.items() if emotions is None or e in emotions}


def _top(judge: Judge, probabilities: Float[Tensor, "text emotion"], chosen: dict[str, Naming]) -> tuple[str, ...]:
    exact = [i for i, naming in enumerate(chosen.values()) if naming.match == "exact"] or list(range(len(chosen)))
    names = [list(chosen)[i] for i in exact]
    values = torch.logit(probabilities[:, exact].double(), eps=1e-9)
    base = torch.tensor([base_rate(judge.name, name) for name in names], dtype=torch.double)
    if judge.multi_label and not base.isnan().any():
        values = values - torch.logit(base)
    return tuple("" if row.isnan().any() else names[int(row.argmax())] for row in values)


def _provenance(judge: Judge, texts: Sequence[str], watch: Stopwatch) -> Provenance:
    commit, dirty = git_state()
    return Provenance(
        model=judge.title,
        source=judge.name,
        stimuli_hash=content_hash(list(texts)),
        versions=package_versions(),
        git_commit=commit,
        git_dirty=dirty,
        elapsed_seconds=watch.seconds,
    )


def judge_agreement(
    judges: Sequence[Judge],
    texts: Sequence[str],
    emotions: Sequence[str] | None = None,
    *,
    groups: Sequence[str] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlation of two judges' probabilities over texts, per emotion.

    Args:
        judges: two or more.
        texts: what both read; empty ones are left out.
        emotions: some of ours; by default those that both judges of a pair can name.
        groups: topic, prompt or story of each text, resampled as a whole; by default every text stands for itself.
        n_resamples: bootstrap draws behind the 95 % percentile interval (NaN where a judge has no spread in more than 5 % of them).
        seed: of the stream "bootstrap".

    Returns:
        One row per emotion and pair of judges: `emotion, first, second, rho, low, high, n, n_groups`. rho is Spearman's; NaN where a judge
        gives every text the same probability.

    Raises:
        ValueError: fewer than two judges, fewer than three texts, or an emotion that a judge cannot name.
    """
    kept = [row for row, text in enumerate(texts) if text.strip()]
    if len(judges) < 2 or len(kept) < 3:
        raise ValueError(f"received {len(judges)} judges and {len(kept)} texts; allowed are at least 2 and 3")
    if groups is not None and len(groups) != len(texts):
        raise ValueError(f"received {len(groups)} groups for {len(texts)} texts; allowed is one per text")
    found = [judge_texts(judge, [texts[row] for row in kept], emotions) for judge in judges]
    clusters = [str(row) if groups is None else groups[row] for row in kept]
    members = [np.flatnonzero(np.array(clusters) == name) for name in dict.fromkeys(clusters)]
    draws = resample_clusters(len(members), n_resamples, seed, "judge agreement")
    table = []
    for one, two in itertools.combinations(found, 2):
        for emotion in (e for e in one.emotions if e in two.emotions):
            values = np.stack([j.probability(emotion).double().numpy() for j in (one, two)])
            resampled = [_rho(values[:, np.concatenate([members[m] for m in draw])]) for draw in draws]
            low, high = _limits(np.array(resampled))
            table.append([emotion, one.judge, two.judge, _rho(values), low, high, len(kept), len(members)])
    return pd.DataFrame(table, columns=["emotion", "first", "second", "rho", "low", "high", "n", "n_groups"])


def _limits(resampled: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """Percentile limits over the draws that have a correlation; NaN where more than one in 20 has none."""
    if np.isnan(resampled).mean() > 0.05:
        return math.nan, math.nan
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def _rho(values: Float[np.ndarray, "2 text"]) -> float:
    if (np.ptp(values, axis=1) == 0).any():
        return math.nan
    return float(np.corrcoef(stats.rankdata(values, axis=1))[0, 1])

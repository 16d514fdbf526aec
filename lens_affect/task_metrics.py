"""Metrics of affect tasks: hit rate and set scores by emotion wheels, weighted F1, with intervals over groups.

MER-UniBench (Lian et al., 2025, arXiv:2501.16566) lets a model answer with any words. Each word goes through three maps, word form to base form,
synonym to label, label to the group of a wheel, before it is compared; numbers are averaged over wheels. Our own tables are in
data/emotion_wheels.json, so our numbers are not comparable with published ones; a user's wheels are accepted.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from lens_affect.results import Provenance
from lens_affect.statistics import Interval, cluster_means, mean_interval, resample_clusters, share_interval
from lens_affect.tables import read_table, require_columns
from lens_affect.tasks import TaskScores

Answer = str | Sequence[str]
N_RESAMPLES = 1000
"""Bootstrap draws of groups behind the interval of an F1."""


@dataclass(frozen=True)
class Wheels:
    """Which emotion words count as the same answer."""

    forms: Mapping[str, str]
    """Word form -> base form."""
    synonyms: Mapping[str, str]
    """Base form -> label."""
    groups: Mapping[str, Mapping[str, str]]
    """Wheel -> label -> group."""

    def group(self, word: str, wheel: str) -> str:
        """Group of a word in one wheel; the word itself where the wheel does not know it, so that it agrees with itself only.

        Raises:
            ValueError: an unknown wheel.
        """
        if wheel not in self.groups:
            raise ValueError(f"received wheel {wheel!r}; allowed are {list(self.groups)}")
        base = word.strip().lower()
        base = self.forms.get(base, base)
        label = self.synonyms.get(base, base)
        return self.groups[wheel].get(label, label)

    def mapped(self, words: Answer, wheel: str) -> frozenset[str]:
        """Groups of all words of an answer; empty words are left out."""
        several = [words] if isinstance(words, str) else words
        return frozenset(self.group(word, wheel) for word in several if word.strip())


def load_wheels(path: str | os.PathLike[str] | None = None) -> Wheels:
    """Load wheels.

    Args:
        path: nothing for ours (data/emotion_wheels.md); a JSON file of the same form (`forms`, `synonyms`, `wheels`); or a table with columns
            `label`, `group` and optionally `wheel`.

    Raises:
        ValueError: another form, or a label in two groups of a wheel.

    Example:
        >>> load_wheels().group("furious", "ekman")
        'anger'
    """
    if path is None:
        return _from_json(
            json.loads(files("lens_affect.data").joinpath("emotion_wheels.json").read_text("utf-8")), "ours"
        )
    place = Path(path)
    if not place.is_file():
        raise ValueError(
            f"received wheels {str(path)!r}, which is no file; allowed are a JSON file or a table with label and group"
        )
    if place.suffix.lower() == ".json":
        try:
            return _from_json(json.loads(place.read_text(encoding="utf-8")), place.name)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"received {place.name}, which is no table of wheels ({error!r}); allowed is {{'forms': {{word: base}}, 'synonyms': "
                "{base: label}, 'wheels': {wheel: {group: [labels]}}}"
            ) from error
    frame = read_table(place)
    require_columns(frame, ["label", "group"], ["wheel"], place.stem)
    found: dict[str, dict[str, list[str]]] = {}
    for record in frame.to_dict("records"):
        wheel = found.setdefault(str(record.get("wheel", place.stem)), {})
        wheel.setdefault(str(record["group"]), []).append(str(record["label"]))
    return _from_json({"wheels": found}, place.name)


def _from_json(table: Mapping[str, Any], name: str) -> Wheels:
    groups: dict[str, dict[str, str]] = {}
    for wheel, members in table["wheels"].items():
        of = groups.setdefault(str(wheel), {})
        for group, labels in members.items():
            for label in labels:
                if of.setdefault(label.lower(), str(group)) != str(group):
                    raise ValueError(
                        f"received the label {label!r} in two groups of the wheel {wheel!r} of {name}; allowed is one: remove the other"
                    )
    if not groups or not all(groups.values()):
        raise ValueError(f"received no labels in the wheels of {name}; allowed is at least one wheel with labels")
    lower = {k: {a.lower(): b.lower() for a, b in table.get(k, {}).items()} for k in ("forms", "synonyms")}
    return Wheels(lower["forms"], lower["synonyms"], groups)


def hit_rate(
    gold: Sequence[str], predicted: Sequence[Answer], *, wheels: Wheels | None = None
) -> Float[np.ndarray, "wheel example"]:
    """1 where the right label's group is among the predicted groups, else 0; the hit rate is the mean.

    Args:
        gold: right label of each example.
        predicted: predicted word or words; no word is a miss.
        wheels: ours by default.

    Raises:
        ValueError: unequal lengths.

    Source: MER-UniBench's metric for basic emotions (Lian et al., 2025, arXiv:2501.16566).

    Example:
        >>> float(hit_rate(["anger"], [["furious", "sad"]]).mean())
        1.0
    """
    _require_pairs(gold, predicted)
    used = wheels or load_wheels()
    return np.array(
        [
            [float(used.group(g, wheel) in used.mapped(p, wheel)) for g, p in zip(gold, predicted, strict=True)]
            for wheel in used.groups
        ]
    )


@dataclass(frozen=True)
class SetScores:
    """How far predicted and right sets of emotions agree. Arrays have one row per wheel."""

    wheels: tuple[str, ...]
    """Name of each row."""
    precision: Float[np.ndarray, "wheel example"]
    """Share of the predicted groups that are right; 0 where nothing was predicted."""
    recall: Float[np.ndarray, "wheel example"]
    """Share of the right groups that were predicted."""

    @property
    def f(self) -> float:
        """Harmonic mean of mean precision and mean recall, averaged over wheels."""
        p, r = self.precision.mean(axis=1), self.recall.mean(axis=1)
        total = p + r
        return float(np.where(total > 0, 2 * p * r / np.where(total > 0, total, 1), 0.0).mean())

    def __str__(self) -> str:
        return (
            f"set precision {self.precision.mean():.3f}, recall {self.recall.mean():.3f}, F {self.f:.3f} over {len(self.wheels)} wheels, "
            f"n = {self.precision.shape[1]}"
        )


def set_scores(gold: Sequence[Answer], predicted: Sequence[Answer], *, wheels: Wheels | None = None) -> SetScores:
    """Precision and recall of sets of emotions after grouping by each wheel.

    Args:
        gold: right words of each example, at least one.
        predicted: predicted words.
        wheels: ours by default.

    Raises:
        ValueError: unequal lengths, or an example without a right word.

    Source: MER-UniBench's metric for open vocabulary (Lian et al., 2025, arXiv:2501.16566).

    Example:
        >>> print(set_scores([["joy", "fear"]], [["happy"]]))
        set precision 1.000, recall 0.500, F 0.667 over 5 wheels, n = 1
    """
    _require_pairs(gold, predicted)
    used = wheels or load_wheels()
    precision, recall = np.zeros((2, len(used.groups), len(gold)))
    for row, wheel in enumerate(used.groups):
        for column, (g, p) in enumerate(zip(gold, predicted, strict=True)):
            right, said = used.mapped(g, wheel), used.mapped(p, wheel)
            if not right:
                raise ValueError(f"received no right word in example {column}; leave it out")
            precision[row, column] = len(right & said) / len(said) if said else 0.0
            recall[row, column] = len(right & said) / len(right)
    return SetScores(tuple(used.groups), precision, recall)


def _require_pairs(gold: Sequence[Any], predicted: Sequence[Any]) -> None:
    if len(gold) != len(predicted) or not len(gold):
        raise ValueError(
            f"received {len(gold)} right and {len(predicted)} predicted answers; allowed are as many, at least one"
        )


def f1_by_label(
    gold: Sequence[str], predicted: Sequence[str]
) -> tuple[tuple[str, ...], Float[np.ndarray, " label"], Int[np.ndarray, " label"]]:
    """Labels (right or predicted), F1 of each (0 where it is never both right and predicted), and how often each is right.

    Raises:
        ValueError: unequal lengths.
    """
    _require_pairs(gold, predicted)
    labels = tuple(sorted({*gold, *predicted}))
    g, p = (np.array([labels.index(x) for x in side]) for side in (gold, predicted))
    f1, support = _f1(g, p, len(labels))
    return labels, f1, support


def _f1(
    g: np.ndarray, p: np.ndarray, n: int, weights: np.ndarray | None = None
) -> tuple[Float[np.ndarray, " label"], np.ndarray]:
    """F1 of each label and how often it is right; `weights` say how often each example counts."""
    w = np.ones(len(g), dtype=np.int64) if weights is None else weights
    hits, right, said = (np.bincount(x, v, minlength=n) for x, v in ((g[g == p], w[g == p]), (g, w), (p, w)))
    return 2 * hits / np.maximum(right + said, 1), right.astype(np.int64)


def weighted_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """F1 of each label, weighted by how often it is right; 0 to 1.

    Example:
        >>> weighted_f1(["a", "a", "b"], ["a", "b", "b"])
        0.6666666666666666
    """
    _, f1, support = f1_by_label(gold, predicted)
    return float((f1 * support).sum() / support.sum())


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Mean F1 over the labels that are right or predicted somewhere; 0 to 1."""
    return float(f1_by_label(gold, predicted)[1].mean())


def sentiment_f1(strength: Sequence[float], predicted: Sequence[str]) -> float:
    """Weighted F1 of `negative` against `positive`; texts of strength 0 are left out, another answer than these two is wrong.

    Args:
        strength: annotated sentiment, below 0 negative, above 0 positive.
        predicted: `negative`, `positive`, or anything else.

    Raises:
        ValueError: unequal lengths, or only zeros.

    Source: MER-UniBench's metric for sentiment (Lian et al., 2025, arXiv:2501.16566).
    """
    _require_pairs(strength, predicted)
    kept = [(s, p) for s, p in zip(strength, predicted, strict=True) if s != 0]
    if not kept:
        raise ValueError("received only texts of strength 0, which do not count; pass some with a sentiment")
    return weighted_f1(["negative" if s < 0 else "positive" for s, _ in kept], [p for _, p in kept])


@dataclass(frozen=True)
class TaskMetrics:
    """All metrics of one model on one task."""

    table: pd.DataFrame
    """Columns metric, value, low, high (95 % over groups), n."""
    title: str
    """Model and task."""
    provenance: Provenance
    """Of the scores."""

    def to_frame(self) -> pd.DataFrame:
        """One row per metric."""
        return self.table.copy()

    def __str__(self) -> str:
        first = self.table.iloc[0]
        rest = ", ".join(f"{r.metric} {r.value:.3f}" for r in self.table.iloc[1:].itertuples())
        return (
            f"{self.title}: {first.metric} {first.value:.3f} [{first.low:.3f}, {first.high:.3f}], n = {first.n}\n{rest}"
        )


def measure_task(scores: TaskScores, *, wheels: Wheels | None = None, seed: int = 0) -> TaskMetrics:
    """Every metric that applies: the task's own, and for labels weighted and macro F1, hit rate by wheels, and the right label's log share.

    Args:
        scores: of a task.
        wheels: ours by default.
        seed: of the bootstrap of F1.
    """
    rows = [_row(scores.metric, scores.interval(), scores.n)]
    if any(scores.gold) and scores.labels:
        gold = [g[0] for g in scores.gold]
        for name, function in (("weighted F1", _weighted), ("macro F1", _macro)):
            rows.append(_row(name, _bootstrap(function, gold, scores, seed), scores.n))
        if scores.affective:
            hits = hit_rate(gold, scores.predicted, wheels=wheels).mean(axis=0)
            rows.append(_row("hit rate", share_interval(cluster_means(hits, scores.groups)), scores.n))
        if scores.log_probabilities.shape[1]:
            shares = scores.gold_log_probability().double().numpy()
            rows.append(
                _row("log share of the right label", mean_interval(cluster_means(shares, scores.groups)), scores.n)
            )
    return TaskMetrics(pd.DataFrame(rows), f"{scores.provenance.title} on {scores.title}", scores.provenance)


def _row(metric: str, found: Interval, n: int) -> dict[str, Any]:
    return {
        "metric": metric,
        "value": float(found.estimate),
        "low": float(found.low),
        "high": float(found.high),
        "n": n,
    }


def _weighted(f1: np.ndarray, support: np.ndarray, seen: np.ndarray) -> float:
    return float((f1 * support).sum() / support.sum())


def _macro(f1: np.ndarray, support: np.ndarray, seen: np.ndarray) -> float:
    return float(f1[seen].mean())


def _bootstrap(statistic: Callable[..., float], gold: Sequence[str], scores: TaskScores, seed: int) -> Interval:
    """Percentile interval over whole groups."""
    named = [p if p in scores.labels else "" for p in scores.predicted]  # other words are one wrong answer
    labels = sorted({*gold, *named})
    place = {label: i for i, label in enumerate(labels)}
    g, p = (np.array([place[x] for x in side]) for side in (gold, named))
    _, member = np.unique(np.asarray(scores.groups), return_inverse=True)
    n_groups = int(member.max()) + 1

    def value(weights: np.ndarray) -> float:
        f1, support = _f1(g, p, len(labels), weights)
        seen = np.zeros(len(labels), dtype=bool)
        seen[g[weights > 0]] = seen[p[weights > 0]] = True
        return statistic(f1, support, seen)

    draws = resample_clusters(n_groups, N_RESAMPLES, seed, "F1")
    found = [value(np.bincount(draw, minlength=n_groups)[member]) for draw in draws]
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(np.asarray(value(np.ones(len(g), dtype=np.int64))), np.asarray(low), np.asarray(high))

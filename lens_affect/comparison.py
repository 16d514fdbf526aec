"""Which choice makes emotions separate better? Text, context, pooling and baseline, changed one at a time.

"Generation beats comprehension" changes who wrote the text, whether the request is in context, the token that is read, the
baseline and the number of texts at once (arXiv:2604.04064). Here each is a factor of its own, on the same topics, with the same
number of texts, at the same layer.
"""

import html
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lens_affect.activations import Activations, extract_poolings
from lens_affect.adapter import LensModel, model_info
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.statistics import adjust_p, derive_generator, mean_interval
from lens_affect.stimuli import NEUTRAL, PromptSet, Stimuli, load_prompts
from lens_affect.vectors import Baseline, difference_in_means

log = logging.getLogger(__name__)

FACTORS = ("text", "context", "pooling", "baseline")
CONTEXTS = ("request", "bare", "wrong", "none")
"""What stands before a text: the request for its emotion, nothing, the request for another emotion (drawn anew for every text),
or a request that names no emotion."""
METRICS = {
    "accuracy": "held-out accuracy (topics left out one at a time)",
    "mean_cosine": "mean cosine between emotion vectors after subtracting the neutral mean, whatever the cell's baseline (the paper's; low is called better)",
    "mean_cosine_own": "mean cosine between emotion vectors with the cell's own baseline (pinned near -1/(emotions - 1) unless that is neutral)",
    "shift": "b^2: squared length of the shift that all emotions share against neutral texts, in variances of texts (topic taken out)",
    "spread": "w: mean squared distance of the emotions from their own mean, in variances of texts (topic taken out)",
}
"""What is measured in every cell. With a neutral baseline the mean cosine is about b^2 / (b^2 + w): a small shift lowers it as well
as well-separated emotions. Shift and spread have the sampling variance of the means subtracted."""


@dataclass(frozen=True)
class Cell:
    """One combination of choices, read at one layer."""

    text: str
    """Who wrote the texts, such as `stories` or `passages`."""
    context: str
    """One of CONTEXTS."""
    pooling: str
    """As in extract_activations."""
    baseline: Baseline
    """As in fit_vectors."""
    activations: Activations
    """One layer; one text per emotion and topic, and neutral ones."""
    named: tuple[str, ...] = ()
    """Emotion that each text's request names; empty where none is named."""

    @property
    def choices(self) -> tuple[str, ...]:
        """Level of each factor, in the order of FACTORS."""
        return (self.text, self.context, self.pooling, self.baseline)


@dataclass(frozen=True)
class MethodComparison:
    """Every cell with its numbers, and what changing one factor does."""

    table: pd.DataFrame
    """One row per cell and metric: text, context, pooling, baseline, metric, value, low, high, n_texts, n_topics. `named_accuracy` in cells whose
    requests name another emotion: how often the vectors follow the request instead of the text."""
    effects: pd.DataFrame
    """One row per factor, level and metric: difference from the reference level with everything else at reference, low, high, p, p_holm."""
    main_effects: pd.DataFrame
    """The same from all cells at once: per-topic regression on all levels, coefficients averaged over topics."""
    reference: tuple[str, ...]
    """Reference level of each factor."""
    layer: int
    """0-based block at which everything was read."""
    n_topics: int
    """Topics behind every interval."""
    provenance: Provenance
    """Model, numerics, seed, versions."""

    def carrier(self, metric: str = "accuracy") -> str | None:
        """The factor with the largest significant effect on a metric (Holm-corrected p below 0.05), or None."""
        rows = self.effects[(self.effects["metric"] == metric) & (self.effects["p_holm"] < 0.05)]
        return None if rows.empty else str(_largest(rows)["factor"])

    def to_frame(self) -> pd.DataFrame:
        """The table of cells."""
        return self.table

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "MethodComparison":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        lines = [
            f"{self.provenance.title}, layer {self.layer}, {self.n_topics} topics; reference: {', '.join(self.reference)}"
        ]
        for metric in ("accuracy", "mean_cosine"):
            rows = self.effects[self.effects["metric"] == metric]
            if rows.empty:
                continue
            top = _largest(rows)
            sure = "" if float(top["p_holm"]) < 0.05 else ", not significant after correction"
            lines.append(
                f"{metric} changes most with {top['factor']} = {top['level']}: {top['difference']:+.2f} [{top['low']:+.2f}, {top['high']:+.2f}] "
                f"(Holm p = {top['p_holm']:.3g}{sure})"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{self.effects.round(3).to_html(index=False, border=0)}"


def _largest(rows: Any) -> Any:
    return rows.iloc[int(np.abs(rows["difference"].to_numpy(dtype=float)).argmax())]


def compare_methods(
    model: LensModel,
    stories: Stimuli,
    passages: Stimuli,
    *,
    layer: int | None = None,
    poolings: Sequence[str] = ("mean_without_sinks", "mean", "midpoint", "last", "after:20"),
    baselines: Sequence[Baseline] = ("grand_mean", "neutral", "within_topic", "neutral_pcs"),
    prompts: PromptSet | str = "ours",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MethodComparison:
    """Read stories and passages in every context, with every pooling and baseline, and say what each choice does.

    The reference is the first level of each factor: stories, after the request that asked for them, with the first pooling and
    baseline. Text and context are fully crossed; pooling and baseline change at the reference and for bare passages.

    Args:
        model: the model; the stories should be its own.
        stories: with prompts (write_stories(...).stimuli).
        passages: given texts on the same topics.
        layer: 0-based block; the middle one, n_layers // 2, by default (the paper's).
        poolings: the first is the reference.
        baselines: the first is the reference.
        prompts: where the requests for the passages and the other contexts come from.
        seed: of the draw of wrong emotions.
        progress: called with (readings done, readings in all).

    Returns:
        Cells, one-at-a-time effects and main effects; every difference is paired by topic with a t interval.

    Raises:
        ValueError: fewer than 3 common topics, or emotions or topics that one of the two lacks.

    Example:
        >>> print(compare_methods(model, stories.stimuli, load_stimuli("passages")))  # doctest: +SKIP
    """
    clock = Stopwatch()
    asked = load_prompts(prompts) if isinstance(prompts, str) else prompts
    at = int(model.cfg.n_layers) // 2 if layer is None else layer
    written, given = _matched(stories, passages)
    texts: dict[str, Stimuli] = {"stories": written, "passages": given}
    first_baseline = baselines[0]
    readings = [(who, context) for who in texts for context in CONTEXTS]
    cells = []
    for i, (who, context) in enumerate(readings):
        placed, named = place_in_context(texts[who], context, asked, seed=seed)
        varied = (who, context) in (("stories", "request"), ("passages", "bare"))
        read = extract_poolings(model, placed, poolings if varied else poolings[:1], layers=[at])
        cells += [Cell(who, context, p, first_baseline, activations, named) for p, activations in read.items()]
        if varied:
            first = cells[-len(read)]
            cells += [replace(first, baseline=b) for b in baselines[1:]]
        if progress:
            progress(i + 1, len(readings))
    found = compare_cells(cells)
    provenance = model_info(model).provenance.updated(seed=seed, elapsed_seconds=clock.seconds)
    return replace(found, layer=at, provenance=provenance)


def _matched(stories: Stimuli, passages: Stimuli) -> tuple[Stimuli, Stimuli]:
    """One text per emotion and topic, on the topics and emotions that both have."""

    def first_of(stimuli: Stimuli) -> dict[tuple[str, str], int]:
        seen: dict[tuple[str, str], int] = {}
        for row, key in enumerate(zip(stimuli.emotions, stimuli.groups, strict=True)):
            seen.setdefault(key, row)
        return seen

    mine, theirs = first_of(stories), first_of(passages)
    labels, topics = _complete(set(mine) & set(theirs), stories.labels, list(dict.fromkeys(stories.groups)))
    if len(topics) < 3 or len(labels) < 3:
        raise ValueError(
            f"received stories and passages with {len(topics)} complete common topics and the common labels {labels}; at least 3 topics and "
            "2 emotions with neutral texts are needed: write stories with our prompts (their topics are those of our passages)"
        )
    left_out = [e for e in stories.labels if e not in labels] + [
        g for g in dict.fromkeys(stories.groups) if g not in topics
    ]
    if left_out:
        log.warning("compared without %s: a text is missing", ", ".join(left_out))
    order = [(e, g) for e in labels for g in topics]
    return stories.select(rows=[mine[k] for k in order]), passages.select(rows=[theirs[k] for k in order])


def _complete(cells: set[tuple[str, str]], labels: Sequence[str], topics: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels and topics that are fully crossed: the one with the largest share of missing cells goes until none is missing."""
    kept: tuple[list[str], list[str]] = [*labels], [*topics]
    while True:
        missing = [
            [sum((e, g) not in cells for g in kept[1]) / max(len(kept[1]), 1) for e in kept[0]],
            [sum((e, g) not in cells for e in kept[0]) / max(len(kept[0]), 1) for g in kept[1]],
        ]
        worst = [max(shares, default=0.0) for shares in missing]
        if not max(worst):
            return kept
        side = 0 if worst[0] > worst[1] else 1
        kept[side].pop(missing[side].index(worst[side]))


def place_in_context(
    stimuli: Stimuli, context: str, prompts: PromptSet | str = "ours", *, seed: int = 0
) -> tuple[Stimuli, tuple[str, ...]]:
    """The same texts after another request.

    Args:
        stimuli: texts; neutral ones always keep a neutral request (or none).
        context: one of CONTEXTS. `wrong` draws another emotion for every text, within topics, so that what the text shows and what its
            request names are crossed.
        prompts: templates and topics of the requests; texts that have a prompt keep it for `request`.
        seed: of the wrong emotions.

    Returns:
        The stimuli with other prompts, and the emotion that each request names (empty for `bare` and `none`).

    Raises:
        ValueError: an unknown context.
    """
    if context not in CONTEXTS:
        raise ValueError(f"received context {context!r}; allowed are {list(CONTEXTS)}")
    if context == "bare":
        return replace(stimuli, prompts=("",) * len(stimuli)), ()
    asked = load_prompts(prompts) if isinstance(prompts, str) else prompts
    topics = list(dict.fromkeys(stimuli.groups))

    def request(emotion: str, group: str) -> str:
        templates = asked.neutral if emotion == NEUTRAL else asked.templates
        text = templates[topics.index(group) % len(templates)].replace("{emotion}", emotion)
        return text + (f" The story takes place {asked.topics[group]}." if group in asked.topics else "")

    named = list(stimuli.emotions)
    if context == "none":
        named = [NEUTRAL] * len(stimuli)
    if context == "wrong":
        named = _derange(stimuli, topics, seed)
    made = tuple(
        own if context == "request" and own else request(name, group)
        for own, name, group in zip(stimuli.prompts, named, stimuli.groups, strict=True)
    )
    return replace(stimuli, prompts=made), () if context == "none" else tuple(named)


def _derange(stimuli: Stimuli, topics: Sequence[str], seed: int) -> list[str]:
    """Another emotion for every text; within a topic each emotion is named once."""
    named = list(stimuli.emotions)
    for topic in topics:
        rows = [
            i
            for i, (e, g) in enumerate(zip(stimuli.emotions, stimuli.groups, strict=True))
            if g == topic and e != NEUTRAL
        ]
        rng = derive_generator(seed, "wrong emotion", topic)
        own = [stimuli.emotions[i] for i in rows]
        while len(set(own)) > 1:
            drawn = [own[i] for i in rng.permutation(len(own))]
            if all(a != b for a, b in zip(own, drawn, strict=True)):
                for row, name in zip(rows, drawn, strict=True):
                    named[row] = name
                break
    return named


def compare_cells(cells: Sequence[Cell]) -> MethodComparison:
    """Measure every cell and compare those that differ in one factor. The first cell is the reference.

    Args:
        cells: all on the same topics; one layer each.

    Raises:
        ValueError: no cell, a combination that occurs twice, or cells on different topics.
    """
    for cell in cells:
        stimuli = cell.activations.stimuli
        lacking = {(e, g) for e in stimuli.labels for g in stimuli.groups} - set(
            zip(stimuli.emotions, stimuli.groups, strict=True)
        )
        if lacking:
            raise ValueError(
                f"received a cell without a text for {sorted(lacking)[0]}; every label needs one on every topic"
            )
    if not cells:
        raise ValueError("received no cells; at least one is needed")
    if len({c.choices for c in cells}) != len(cells):
        raise ValueError(
            "received two cells with the same text, context, pooling and baseline; each combination may occur once"
        )
    topics = tuple(dict.fromkeys(cells[0].activations.stimuli.groups))
    for cell in cells:
        if set(cell.activations.stimuli.groups) != set(topics):
            raise ValueError(
                f"received cells on different topics ({sorted(set(cell.activations.stimuli.groups) ^ set(topics))[:3]} in one only); "
                "leave topics out with .select(groups=...)"
            )
    measured = {c.choices: _measure(c, topics) for c in cells}
    reference = cells[0]
    return MethodComparison(
        table=_table(cells, measured),
        effects=_effects(cells, measured),
        main_effects=_main_effects(cells, measured),
        reference=reference.choices,
        layer=reference.activations.layers[0],
        n_topics=len(topics),
        provenance=reference.activations.provenance,
    )


Measured = dict[str, tuple[float, Float[np.ndarray, " topic"]]]
"""Metric -> value, and one (pseudo-)value per topic whose mean it is."""


def _measure(cell: Cell, topics: Sequence[str]) -> Measured:
    values, stimuli = cell.activations.values[:, :1].double(), cell.activations.stimuli
    labels, groups = np.array(stimuli.emotions), np.array(stimuli.groups)
    found: Measured = {"accuracy": _accuracy(values, labels, groups, topics, cell.baseline)}
    if cell.named and cell.named != stimuli.emotions:
        found["named_accuracy"] = _accuracy(values, np.array(cell.named), groups, topics, cell.baseline)
    if NEUTRAL in labels:
        whole = _geometry(values, labels, groups, cell.baseline)
        without = [
            _geometry(values[keep], labels[keep.numpy()], groups[keep.numpy()], cell.baseline)
            for keep in (torch.from_numpy(groups != t) for t in topics)
        ]
        n = len(topics)
        for name, value in whole.items():
            found[name] = (value, np.array([n * value - (n - 1) * part[name] for part in without]))
    return found


def _accuracy(
    values: Tensor, labels: np.ndarray, groups: np.ndarray, topics: Sequence[str], baseline: Baseline
) -> tuple[float, Float[np.ndarray, " topic"]]:
    """Share of a held-out topic's texts that lie furthest along their own emotion's direction."""
    emotions = [e for e in dict.fromkeys(labels.tolist()) if e != NEUTRAL]
    share = []
    for topic in topics:
        train = torch.from_numpy(np.flatnonzero(groups != topic))
        test = np.flatnonzero((groups == topic) & (labels != NEUTRAL))
        raw, origin = difference_in_means(
            values[train],
            labels[train.numpy()],
            groups[train.numpy()],
            torch.ones(len(train), dtype=torch.double),
            emotions,
            baseline,
        )
        unit = raw[:, 0] / raw[:, 0].norm(dim=-1, keepdim=True).clamp_min(1e-30)
        chosen = ((values[torch.from_numpy(test), 0] - origin[0]) @ unit.T).argmax(-1).numpy()
        share.append(np.mean(np.array(emotions)[chosen] == labels[test]))
    return float(np.mean(share)), np.array(share)


def _geometry(values: Tensor, labels: np.ndarray, groups: np.ndarray, baseline: Baseline) -> dict[str, float]:
    """Mean cosine of the cell's vectors; shared shift and spread against neutral texts, free of sampling variance."""
    emotions = [e for e in dict.fromkeys(labels.tolist()) if e != NEUTRAL]
    n, ones = len(emotions), torch.ones(len(values), dtype=torch.double)

    def mean_cosine(subtracted: Baseline) -> float:
        raw, _ = difference_in_means(values, labels, groups, ones, emotions, subtracted)
        unit = raw[:, 0] / raw[:, 0].norm(dim=-1, keepdim=True).clamp_min(1e-30)
        return (float((unit.sum(0) ** 2).sum()) - n) / (n * (n - 1))

    topics = list(dict.fromkeys(groups.tolist()))

    def cell_means(emotion: str) -> Tensor:
        return torch.stack([values[torch.from_numpy((labels == emotion) & (groups == t)), 0].mean(0) for t in topics])

    by_topic = torch.stack([cell_means(e) for e in emotions])  # emotion, topic, d
    apart = by_topic - by_topic.mean(0)  # what all emotions share on a topic is gone
    away = by_topic.mean(0) - cell_means(NEUTRAL)
    within = float(((apart - apart.mean(1, keepdim=True)) ** 2).sum() / ((n - 1) * (len(topics) - 1)))
    return {
        "mean_cosine": mean_cosine("neutral"),
        "mean_cosine_own": mean_cosine(baseline),
        "shift": float(_squared_mean(away[None]).mean()) / max(within, 1e-300),
        "spread": float(_squared_mean(apart).mean()) / max(within, 1e-300),
    }


def _squared_mean(values: Float[Tensor, "emotion topic d"]) -> Float[Tensor, " emotion"]:
    """Squared length of the mean over topics, minus the sampling variance of that mean."""
    n = values.shape[1]
    mean = values.mean(1)
    variance = ((values - mean[:, None]) ** 2).sum((1, 2)) / (n * (n - 1))
    return (mean**2).sum(-1) - variance


def _table(cells: Sequence[Cell], measured: dict[tuple[str, ...], Measured]) -> pd.DataFrame:
    rows = []
    for cell in cells:
        n_texts = sum(e != NEUTRAL for e in cell.activations.stimuli.emotions)
        for metric, (value, topics) in measured[cell.choices].items():
            low, high = _around(value, topics)
            rows.append(
                dict(zip(FACTORS, cell.choices, strict=True))
                | {"metric": metric, "value": value, "low": low, "high": high}
                | {"n_texts": n_texts, "n_topics": len(topics)}
            )
    return pd.DataFrame(rows)


def _effects(cells: Sequence[Cell], measured: dict[tuple[str, ...], Measured]) -> pd.DataFrame:
    reference = cells[0].choices
    rows = []
    for cell in cells[1:]:
        changed = [i for i, (a, b) in enumerate(zip(cell.choices, reference, strict=True)) if a != b]
        if len(changed) != 1:
            continue
        for metric in METRICS:
            if metric not in measured[cell.choices] or metric not in measured[reference]:
                continue
            (value, topics), (start, others) = measured[cell.choices][metric], measured[reference][metric]
            rows.append(
                {
                    "factor": FACTORS[changed[0]],
                    "level": cell.choices[changed[0]],
                    "against": reference[changed[0]],
                    "metric": metric,
                }
                | _tested(value - start, topics - others)
            )
    return _with_holm(rows)


def _main_effects(cells: Sequence[Cell], measured: dict[tuple[str, ...], Measured]) -> pd.DataFrame:
    """Ordinary least squares on all levels in every topic, then a t interval over topics: topics are the random factor."""
    reference = cells[0].choices
    names = [
        (f, level)
        for f in range(len(FACTORS))
        for level in dict.fromkeys(c.choices[f] for c in cells)
        if level != reference[f]
    ]
    design = np.array([[1.0, *(float(c.choices[f] == level) for f, level in names)] for c in cells])
    rows = []
    for metric in METRICS:
        if not all(metric in measured[c.choices] for c in cells):
            continue
        outcomes = np.stack([measured[c.choices][metric][1] for c in cells])  # cell, topic
        coefficients = np.linalg.lstsq(design, outcomes, rcond=None)[0][1:]
        for (f, level), topics in zip(names, coefficients, strict=True):
            rows.append(
                {"factor": FACTORS[f], "level": level, "against": reference[f], "metric": metric}
                | _tested(float(topics.mean()), topics)
            )
    return _with_holm(rows)


def _around(value: float, topics: Float[np.ndarray, " topic"]) -> tuple[float, float]:
    """95 % limits from the spread of the (pseudo-)values per topic, around the value itself: the jackknife's for what is no mean."""
    interval = mean_interval(topics)
    half = float(interval.high - interval.low) / 2
    return value - half, value + half


def _tested(difference: float, topics: Float[np.ndarray, " topic"]) -> dict[str, float]:
    low, high = _around(difference, topics)
    spread = float(topics.std(ddof=1)) / np.sqrt(len(topics))
    if spread < 1e-9:  # rounding errors are no evidence
        return {"difference": difference, "low": low, "high": high, "p": float(abs(difference) < 1e-9)}
    p = 2 * stats.t.sf(abs(difference) / spread, len(topics) - 1)
    return {"difference": difference, "low": low, "high": high, "p": float(p)}


def _with_holm(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Corrected within each metric over all levels that were tried."""
    columns = ["factor", "level", "against", "metric", "difference", "low", "high", "p", "p_holm"]
    table = pd.DataFrame(rows, columns=columns[:-1])
    table["p_holm"] = np.nan
    for metric in dict.fromkeys(table["metric"]):
        inside = (table["metric"] == metric).to_numpy()
        table.loc[inside, "p_holm"] = adjust_p(table.loc[inside, "p"].to_numpy(dtype=float), method="holm")
    return table.loc[:, columns]

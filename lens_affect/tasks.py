"""Affect tasks and control tasks behind one protocol: examples, a prompt for each, and a score of a model.

A task that is learned by tuning is learned from `answer`: the loss is on the answer's tokens, over the whole vocabulary, as instruction tuning
does it, so that the same weights can be scored by likelihood and by what they generate. Scores are kept per example; metrics come later
(task_metrics.py).
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect import task_data
from lens_affect.adapter import LensModel, model_info, token_ids
from lens_affect.answers import answer_scores, choice_log_probabilities, text_losses
from lens_affect.generation import generate
from lens_affect.judges import Judge, load_judge
from lens_affect.results import Provenance, Stopwatch, content_hash, load_result, save_result
from lens_affect.statistics import Better, Interval, cluster_means, derive_generator, mean_interval, share_interval
from lens_affect.stimuli import named_emotion
from lens_affect.task_data import Example

SCORINGS = ("likelihood", "first_token", "generation")
"""How a choice is scored."""
SHARES = ("accuracy", "exact answers", "judge's probability")
"""Metrics whose values lie between 0 and 1."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskScores:
    """What one model reached on the examples of one task. Tuples have one entry per example."""

    task: str
    """Name of the task."""
    title: str
    """Task as a reader knows it."""
    metric: str
    """What `values` are, e.g. `accuracy` or `nats per token`."""
    better: Better
    """Whether a high or a low value is good."""
    affective: bool
    """Whether it is an affect task or a control."""
    values: Float[Tensor, " example"]
    """Score of each example; NaN where it was not measured."""
    log_probabilities: Float[Tensor, "example label"]
    """Log-likelihood of each label in nats; no columns where labels were not scored."""
    labels: tuple[str, ...]
    """Label of each column."""
    gold: tuple[tuple[str, ...], ...]
    """Right labels."""
    predicted: tuple[str, ...]
    """Predicted label, or the text that was written; empty where there is none."""
    groups: tuple[str, ...]
    """What is resampled together."""
    scoring: str
    """How the score was taken."""
    provenance: Provenance
    """Of this step; its stimuli hash is of prompts and right labels."""

    @property
    def n(self) -> int:
        """Examples with a value."""
        return int(torch.isfinite(self.values).sum())

    @property
    def value(self) -> float:
        """Mean over examples with a value; NaN without any."""
        return float(self.values.nanmean()) if self.n else float("nan")

    def interval(self) -> Interval:
        """Mean over groups with an interval over groups: t, and for shares one that stays within 0 and 1 (statistics.share_interval)."""
        means = cluster_means(self.values.double().numpy(), self.groups)
        return share_interval(means) if self.metric in SHARES else mean_interval(means)

    def calibrated(self) -> "TaskScores":
        """The same with label priors taken out: each label's mean probability over these (unlabelled) examples becomes equal in the log.

        Source: batch calibration (Zhou et al., 2024, arXiv:2309.17249).

        Raises:
            ValueError: a task without label likelihoods.
        """
        self._require_labels()
        shares = self.log_probabilities.log_softmax(-1)
        prior = shares.logsumexp(0) - np.log(len(shares))
        return dataclasses.replace(
            self, **_decided(shares - prior, self.labels, self.gold), scoring=f"{self.scoring}, calibrated"
        )

    def gold_log_probability(self) -> Float[Tensor, " example"]:
        """Log of the right labels' share among all labels, in nats: a finer measure than accuracy.

        Raises:
            ValueError: a task without label likelihoods.
        """
        self._require_labels()
        shares = self.log_probabilities.log_softmax(-1)
        right = torch.tensor([[label in gold for label in self.labels] for gold in self.gold])
        return shares.masked_fill(~right, -torch.inf).logsumexp(-1)

    def _require_labels(self) -> None:
        if not self.log_probabilities.shape[1]:
            raise ValueError(f"received scores of {self.task} by {self.scoring}; allowed are label likelihoods")

    def to_frame(self) -> pd.DataFrame:
        """One row per example with columns task, metric, group, gold, predicted, value."""
        return pd.DataFrame(
            {
                "task": self.task,
                "metric": self.metric,
                "group": list(self.groups),
                "gold": ["|".join(g) for g in self.gold],
                "predicted": list(self.predicted),
                "value": self.values.tolist(),
            }
        )

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder; see results.save_result."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "TaskScores":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        found = self.interval()
        return (
            f"{self.provenance.title} on {self.title}: {self.metric} {self.value:.3f} "
            f"[{float(found.low):.3f}, {float(found.high):.3f}], n = {self.n} ({self.scoring})"
        )


@runtime_checkable
class Task(Protocol):
    """What a task must offer."""

    @property
    def name(self) -> str:
        """Short name."""
        ...

    @property
    def title(self) -> str:
        """Name for printed results."""
        ...

    @property
    def affective(self) -> bool:
        """Whether it is an affect task."""
        ...

    def examples(self, split: str = "test", *, n: int | None = None, seed: int = 0) -> tuple[Example, ...]:
        """Examples of a split: all, or n drawn at random."""
        ...

    def prompt(self, example: Example) -> str:
        """What stands before the answer."""
        ...

    def answer(self, example: Example) -> str:
        """What should follow, as it is trained."""
        ...

    def score(
        self,
        model: LensModel,
        examples: Sequence[Example] | None = None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> TaskScores:
        """Score a model; the whole test split by default."""
        ...


@dataclass(frozen=True)
class _Base:
    name: str
    """Short name."""
    title: str
    """Name for printed results."""
    affective: bool
    """Whether it is an affect task."""
    splits: Mapping[str, tuple[Example, ...]] = field(repr=False)
    """Examples by split."""

    def examples(self, split: str = "test", *, n: int | None = None, seed: int = 0) -> tuple[Example, ...]:
        """Examples of a split: all, or n drawn at random (in the split's order).

        Raises:
            ValueError: an unknown split, or more examples than there are.
        """
        if split not in task_data.SPLITS:
            raise ValueError(f"received split {split!r}; allowed are {list(task_data.SPLITS)}")
        found = self.splits[split]
        if n is None:
            return found
        if not 1 <= n <= len(found):
            raise ValueError(f"received n={n} for {self.name}, split {split}; it has {len(found)} examples")
        rows = derive_generator(seed, "examples", self.name, split).permutation(len(found))[:n]
        return tuple(found[i] for i in sorted(rows.tolist()))


def _no_labels(n: int) -> Float[Tensor, "example label"]:
    return torch.zeros(n, 0)


def _decided(
    log_probabilities: Float[Tensor, "example label"], labels: tuple[str, ...], gold: tuple[tuple[str, ...], ...]
) -> dict[str, Any]:
    predicted = tuple(labels[i] for i in log_probabilities.argmax(-1).tolist())
    hits = torch.tensor([float(p in g) for p, g in zip(predicted, gold, strict=True)])
    return {"log_probabilities": log_probabilities, "predicted": predicted, "values": hits}


@dataclass(frozen=True)
class ChoiceTask(_Base):
    """One of a few labels for a text: by the likelihood of each label's word after the text, or by what the model generates there."""

    labels: tuple[str, ...]
    """Allowed answers."""
    question: str
    """What stands between the text and the answer, such as `Emotion`."""
    scoring: str = "likelihood"
    """`likelihood` of the whole word, of its `first_token` only, or `generation` (greedy; another word than a label is wrong)."""

    def __post_init__(self) -> None:
        if len(set(self.labels)) < 2:
            raise ValueError(f"received a task with the labels {list(self.labels)}; a choice needs at least two")
        if self.scoring not in SCORINGS:
            raise ValueError(f"received scoring={self.scoring!r}; allowed are {list(SCORINGS)}")
        foreign = {label for rows in self.splits.values() for e in rows for label in e.labels} - set(self.labels)
        if foreign:
            raise ValueError(
                f"received examples with the labels {sorted(foreign)[:5]}; the task has {list(self.labels)}"
            )

    def prompt(self, example: Example) -> str:
        """The text, and the question in a line of its own."""
        return f"{example.text}\n{self.question}:"

    def answer(self, example: Example) -> str:
        """The first right label."""
        return f" {example.labels[0]}"

    def score(
        self,
        model: LensModel,
        examples: Sequence[Example] | None = None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> TaskScores:
        """Share of texts whose likeliest (or generated) label is right."""
        chosen, clock = self.examples() if examples is None else tuple(examples), Stopwatch()
        prompts, answers = [self.prompt(e) for e in chosen], [f" {label}" for label in self.labels]
        gold = tuple(e.labels for e in chosen)
        if self.scoring == "generation":
            length = max(len(token_ids(model.tokenizer, a)) for a in answers)
            texts = generate(
                model, prompts, greedy=True, max_new_tokens=length, form="continue", progress=progress
            ).texts
            predicted = tuple(_said_label(text, self.labels) or text.strip().split("\n")[0] for text in texts)
            hits = torch.tensor([float(p in g) for p, g in zip(predicted, gold, strict=True)])
            decided = {"log_probabilities": _no_labels(len(chosen)), "predicted": predicted, "values": hits}
        else:
            decided = _decided(
                choice_log_probabilities(model, prompts, answers, scoring=self.scoring, progress=progress),
                self.labels,
                gold,
            )
        return _scores(
            self, model, chosen, clock, seed, "accuracy", labels=self.labels, scoring=self.scoring, **decided
        )

    def shuffled(self, *, seed: int = 0) -> "ChoiceTask":
        """A control: labels of the training and validation examples permuted, those of the test examples kept."""

        def permuted(split: str) -> tuple[Example, ...]:
            rows = self.splits[split]
            order = derive_generator(seed, "shuffle labels", split).permutation(len(rows)).tolist()
            return tuple(dataclasses.replace(e, labels=rows[i].labels) for e, i in zip(rows, order, strict=True))

        splits = {split: self.splits[split] if split == "test" else permuted(split) for split in task_data.SPLITS}
        return dataclasses.replace(
            self, name=f"{self.name}_shuffled", title=f"{self.title}, shuffled labels", splits=splits
        )


def _said_label(text: str, labels: Sequence[str]) -> str:
    said = text.strip().lower()
    return next((label for label in sorted(labels, key=len, reverse=True) if said.startswith(label.lower())), "")


def examples_hash(task: "Task", examples: Sequence[Example]) -> str:
    """Hash of prompts and right labels: the stimuli hash of scores on these examples.

    Args:
        task: that asks.
        examples: that are asked.
    """
    return content_hash([task.prompt(e) for e in examples], [e.labels for e in examples])


def _scores(
    task: Any, model: LensModel, examples: Sequence[Example], clock: Stopwatch, seed: int, metric: str, **fields: Any
) -> TaskScores:
    hashed = examples_hash(task, examples)
    return TaskScores(
        **{
            "task": task.name,
            "title": task.title,
            "metric": metric,
            "better": "high",
            "affective": task.affective,
            "labels": (),
            "gold": tuple(e.labels for e in examples),
            "groups": tuple(e.group for e in examples),
            "provenance": model_info(model).provenance.updated(
                stimuli_hash=hashed, seed=seed, elapsed_seconds=clock.seconds
            ),
            **fields,
        }
    )


@dataclass(frozen=True)
class AnswerTask(_Base):
    """One exact answer per prompt; right where every token of it is the likeliest one."""

    solved: str = ""
    """Solved examples that stand before every prompt."""

    def prompt(self, example: Example) -> str:
        """The solved examples and the text."""
        return f"{self.solved}{example.text}"

    def answer(self, example: Example) -> str:
        """The right answer."""
        return f" {example.labels[0]}"

    def score(
        self,
        model: LensModel,
        examples: Sequence[Example] | None = None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> TaskScores:
        """Share of exact answers."""
        chosen, clock = self.examples() if examples is None else tuple(examples), Stopwatch()
        _, exact = answer_scores(model, [self.prompt(e) for e in chosen], [self.answer(e) for e in chosen])
        nothing = _no_labels(len(chosen))
        return _scores(
            *(self, model, chosen, clock, seed, "exact answers"),
            values=exact,
            log_probabilities=nothing,
            predicted=("",) * len(chosen),
            scoring="greedy",
        )


@dataclass(frozen=True)
class TextTask(_Base):
    """Next-token loss on plain text: what a change of the model costs in general."""

    def prompt(self, example: Example) -> str:
        """Nothing stands before the text."""
        return ""

    def answer(self, example: Example) -> str:
        """The text."""
        return example.text

    def score(
        self,
        model: LensModel,
        examples: Sequence[Example] | None = None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> TaskScores:
        """Mean loss per token of each text."""
        chosen, clock = self.examples() if examples is None else tuple(examples), Stopwatch()
        return _scores(
            *(self, model, chosen, clock, seed, "nats per token"),
            better="low",
            values=text_losses(model, [e.text for e in chosen]),
            log_probabilities=_no_labels(len(chosen)),
            predicted=("",) * len(chosen),
            scoring="teacher-forced",
        )


def _default_judge() -> Any:
    return load_judge()


@dataclass(frozen=True)
class WritingTask(_Base):
    """Write one sentence that expresses an emotion; an external judge says how probably it does."""

    judge: Judge = field(default_factory=_default_judge)
    """It must have the emotions among its labels."""
    max_new_tokens: int = 24
    """Longest sentence in tokens; what follows a line break does not count."""

    def prompt(self, example: Example) -> str:
        """The request."""
        return f"Write one sentence that expresses {example.labels[0]}.\nSentence:"

    def answer(self, example: Example) -> str:
        """A sentence that somebody wrote."""
        return f" {example.text}\n"

    def score(
        self,
        model: LensModel,
        examples: Sequence[Example] | None = None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> TaskScores:
        """Judge's probability that each sentence expresses the emotion that was asked for (`judge_written`)."""
        chosen, clock = self.examples() if examples is None else tuple(examples), Stopwatch()
        written = generate(
            model,
            [self.prompt(e) for e in chosen],
            max_new_tokens=self.max_new_tokens,
            form="continue",
            seed=seed,
            row_seeds=[e.group + e.text for e in chosen],
            progress=progress,
        )
        texts = [text.strip().split("\n")[0].strip() for text in written.texts]
        return _scores(
            *(self, model, chosen, clock, seed, "judge's probability"),
            values=judge_written(self.judge, texts, [e.labels[0] for e in chosen]),
            log_probabilities=_no_labels(len(chosen)),
            predicted=tuple(texts),
            scoring=f"{self.judge.title} on sampled text",
        )


FEWEST_WORDS = 4
"""A sentence with fewer different words, the emotion's own name not counted, expresses nothing."""


def judge_written(judge: Judge, texts: Sequence[str], emotions: Sequence[str]) -> Float[Tensor, " text"]:
    """Probability by a judge that each text expresses its emotion, without naming it.

    The emotion's name, with any ending, is taken out before the judge reads: a model that has learned to answer with labels writes
    "joy joy joy", which a judge would call joyful. What then has fewer than FEWEST_WORDS different words gets 0.

    Args:
        judge: it must have the emotions among its labels.
        texts: what was written.
        emotions: what was asked for.

    Raises:
        ValueError: an emotion that the judge cannot name.
    """
    known = judge.labels
    missing = sorted(set(emotions) - set(known))
    if missing:
        raise ValueError(f"received the emotions {missing}; {judge.title} can name {list(known)}: choose among them")
    stripped = [" ".join(_without_name(text, e).split()) for text, e in zip(texts, emotions, strict=True)]
    enough = torch.tensor([len(set(re.findall(r"\w+", text.lower()))) >= FEWEST_WORDS for text in stripped])
    columns = torch.tensor([known.index(emotion) for emotion in emotions])
    found = judge.score(stripped)[torch.arange(len(texts)), columns].nan_to_num(0.0).float()
    return torch.where(enough, found, torch.zeros_like(found))


def _without_name(text: str, emotion: str) -> str:
    while named := named_emotion(text, emotion):
        text = re.sub(rf"\b{re.escape(named)}\b", " ", text)
    return text


TASKS = {
    "goemotions": "GoEmotions comments, 27 emotions",
    "goemotions6": "GoEmotions comments, Ekman's six",
    "meld_emotion": "MELD utterances, 7 emotions (text only)",
    "meld_sentiment": "MELD utterances, sentiment (text only)",
    "passages": "our passages, 20 emotions",
    "writing": "one sentence that expresses one of 27 emotions, judged",
    "topics": "sentences of our passages, 12 topics (control)",
    "arithmetic": "sums and differences up to 20 (control)",
    "neutral_text": "next-token loss on texts without emotion (control)",
}
"""Tasks of `load_task` by name."""


def load_task(
    name: str | os.PathLike[str],
    *,
    scoring: str = "likelihood",
    max_words: int | None = None,
    judge: Judge | None = None,
    affective: bool | None = None,
) -> ChoiceTask | AnswerTask | TextTask | WritingTask:
    """Load a task.

    Args:
        name: one of `TASKS`, or a table with columns `text, label` (and optionally `split`, `group`).
        scoring: of a choice: `likelihood`, `first_token` or `generation`.
        max_words: longest text of GoEmotions and MELD.
        judge: of `writing`; the embedded one by default.
        affective: whether a table is an affect task (by default) or a control; of `TASKS` that is known.

    Raises:
        ValueError: an unknown name, a table with one label only, or `affective` for one of `TASKS`.
        FileNotFoundError: MELD without LENS_AFFECT_DATA, or GoEmotions without that and without the hub.

    Example:
        >>> load_task("arithmetic").title
        'sums and differences up to 20 (control)'
    """
    key, title = str(name), TASKS.get(str(name), Path(name).stem + " (control)" * (affective is False))
    if affective is not None and key in TASKS:
        raise ValueError(
            f"received affective={affective} for {key!r}; allowed is that for a table of your own: leave it out"
        )
    choose = functools.partial(_choice, key if key in TASKS else Path(name).stem, title, scoring)
    match key:
        case "goemotions" | "goemotions6":
            return choose(True, task_data.goemotions(ekman=key == "goemotions6", max_words=max_words), "Emotion")
        case "meld_emotion":
            return choose(True, task_data.meld("Emotion", max_words=max_words), "Emotion")
        case "meld_sentiment":
            return choose(True, task_data.meld("Sentiment", max_words=max_words), "Sentiment")
        case "passages":
            return choose(True, task_data.passages(), "Emotion")
        case "topics":
            return choose(False, task_data.topics(), "Topic")
        case "arithmetic":
            return AnswerTask(key, title, False, task_data.arithmetic(), solved=task_data.SOLVED)
        case "neutral_text":
            return TextTask(key, title, False, task_data.neutral_text())
        case "writing":
            return _writing(key, title, judge or _default_judge(), max_words)
        case _:
            path = task_data.require_table(name, list(TASKS))
            return choose(affective is not False, task_data.table_examples(path), "Label")


def _choice(
    name: str, title: str, scoring: str, affective: bool, splits: task_data.Examples, question: str
) -> ChoiceTask:
    labels = tuple(sorted({label for rows in splits.values() for e in rows for label in e.labels}))
    return ChoiceTask(name, title, affective, splits, labels=labels, question=question, scoring=scoring)


N_WRITTEN = 8
"""Sentences per emotion that a test of writing asks for."""


def _writing(name: str, title: str, judge: Judge, max_words: int | None) -> WritingTask:
    """Training sentences are GoEmotions comments where they are at hand; asking and judging needs no data."""
    emotions = sorted({label for members in task_data.EKMAN.values() for label in members})
    try:
        learned = task_data.goemotions(max_words=max_words)
    except FileNotFoundError:
        learned = {"train": (), "validation": ()}
    asked = tuple(Example(f"{i}", (emotion,), emotion) for i in range(N_WRITTEN) for emotion in emotions)
    return WritingTask(
        name, title, True, {"train": learned["train"], "validation": learned["validation"], "test": asked}, judge=judge
    )

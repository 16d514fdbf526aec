"""Which of our emotions a judge can name, by which of its labels, and how well it was measured to do so."""

import csv
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from lens_affect.stimuli import EMOTIONS

MINIMUM_AUC = 0.80
"""A target emotion counts in a verification only where the judge's AUC is at least this."""


@dataclass(frozen=True)
class Naming:
    """How one judge names one of our emotions."""

    labels: tuple[str, ...]
    """Labels of the judge; any of them counts."""
    match: Literal["exact", "near"]
    """`exact`: the label means this emotion; `near`: it means the emotion's family, which a neighbour of ours has too."""


@functools.cache
def label_schemes() -> dict[str, dict[str, Naming]]:
    """Sets of labels by name (`goemotions`, `ekman`, `lexicon`): our emotion -> labels (data/judge_labels.csv)."""
    text = files("lens_affect.data").joinpath("judge_labels.csv").read_text(encoding="utf-8")
    schemes: dict[str, dict[str, Naming]] = {}
    for row in csv.DictReader(text.splitlines()):
        naming = schemes.setdefault(row["judge"], {})
        if row["labels"]:
            naming[row["emotion"]] = Naming(tuple(row["labels"].split("|")), row["match"])  # pyright: ignore[reportArgumentType]
    return schemes


def namings(labels: Sequence[str]) -> dict[str, Naming]:
    """How a judge with these labels names our emotions, in our order.

    The set in the table that the judge has whole decides, the finest first; a judge with other labels names the emotions whose names it has.
    """
    for scheme in sorted(label_schemes().values(), key=lambda s: -len(_said(s))):
        if _said(scheme) <= set(labels):
            return {e: scheme[e] for e in EMOTIONS if e in scheme}
    return {e: Naming((e,), "exact") for e in EMOTIONS if e in labels}


def _said(scheme: dict[str, Naming]) -> set[str]:
    return {label for naming in scheme.values() for label in naming.labels}


@functools.cache
def measured_scores() -> dict[str, Any]:
    """What was measured of our own judges (data/judge_scores.json, described in data/judge.md)."""
    return json.loads(files("lens_affect.data").joinpath("judge_scores.json").read_text(encoding="utf-8"))


def measured_auc(judge: str, emotion: str) -> float:
    """AUC of a judge for one of our emotions on the published test split of GoEmotions; NaN where it was not measured."""
    found = measured_scores()["judges"].get(judge, {}).get("emotions", {}).get(emotion)
    return math.nan if found is None else float(found["auc"])


def base_rate(judge: str, emotion: str) -> float:
    """Share of comments with the emotion where a judge was measured (so where it is calibrated); NaN where it was not."""
    found = measured_scores()["judges"].get(judge, {}).get("emotions", {}).get(emotion)
    return math.nan if found is None else found["positives"] / found["n"]

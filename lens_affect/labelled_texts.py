"""Texts whose damage two readers have labelled: what the rule of regimes was tuned on, and what it is tested against."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd
from jaxtyping import Bool

from lens_affect.regimes import R_OK, REPETITIVE, Thresholds, damage_of

LABEL_OF_DAMAGE = {
    "sound": "clean",
    "repetitive_collapse": "repetitive",
    "explosive": "noise",
    "degraded": "degraded",
    "invalid": "empty",
}
"""What a reader calls what the rule calls."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with the labels of two readers and what the rule measures of them (data/regime_texts.md)."""

    table: pd.DataFrame
    """One row per text: text, language, origin (`written`, or the model), what (kind of case, or kind and strength), first, second (labels), log_ratio
    (log of perplexity over that of ordinary text), repetition, n_tokens, limit (repetition that 99 % of ordinary prose of that length stays below), r_ok, nll."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The label that both readers gave; empty where they differ: such a text is in no accuracy."""
        pairs = zip(self.table["first"], self.table["second"], strict=True)
        return tuple(str(a) if a == b else "" for a, b in pairs)

    @property
    def kappa(self) -> float:
        """Cohen's kappa of the two readers over all texts."""
        from sklearn.metrics import cohen_kappa_score

        return float(cohen_kappa_score(self.table["first"], self.table["second"]))

    def halves(self) -> Bool[np.ndarray, " text"]:
        """True for every other text of each origin and label: the half that tunes."""
        seen: Counter[tuple[str, str]] = Counter()
        found = []
        for key in zip(self.table["origin"], self.table["first"], strict=True):
            found.append(seen[key] % 2 == 0)
            seen[key] += 1
        return np.array(found)

    def predict(self, least: float = REPETITIVE, *, floor: float = R_OK, power: float = 2.0) -> tuple[str, ...]:
        """Labels by the rule; its declared numbers by default.

        Args:
            least: smallest limit of repetition.
            floor: smallest r_ok.
            power: r_high is r_ok to this power.
        """
        columns = [self.table[name].to_numpy(float) for name in ("log_ratio", "repetition", "limit", "r_ok")]
        found = []
        for log_ratio, repetition, limit, own in zip(*columns, strict=True):
            r_ok = max(floor, own)
            damage = damage_of(float(np.exp(log_ratio)), repetition, Thresholds(r_ok, r_ok**power, max(limit, least)))
            found.append(LABEL_OF_DAMAGE[damage])
        return tuple(found)

    def accuracy(
        self, members: Bool[np.ndarray, " text"], predicted: Sequence[str], label: str = ""
    ) -> tuple[int, int]:
        """How many of these texts get their label, and how many have one; with `label` only whether it is that one counts."""
        own = [(a, b) for a, b, m in zip(self.labels, predicted, members, strict=True) if m and a]
        return sum((a == label) == (b == label) if label else a == b for a, b in own), len(own)

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def __str__(self) -> str:
        origins = Counter(self.table["origin"])
        agreed = [label for label in self.labels if label]
        return (
            f"{len(self.table)} texts ({', '.join(f'{n} {o}' for o, n in origins.most_common())}); two readers agree on {len(agreed)} "
            f"({len(agreed) / len(self.table):.2f}, Cohen's kappa {self.kappa:.2f}): {', '.join(f'{n} {label}' for label, n in Counter(agreed).most_common())}"
        )


def load_labelled_texts() -> LabelledTexts:
    """Our labelled texts.

    Example:
        >>> len(load_labelled_texts().labels) >= 200
        True
    """
    text = files("lens_affect.data").joinpath("regime_texts.jsonl").read_text(encoding="utf-8")
    return LabelledTexts(pd.DataFrame([json.loads(line) for line in text.splitlines()]))

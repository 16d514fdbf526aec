"""Rows of a scorecard: what a claim's row holds, and what a verdict may be."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lens_affect.statistics import Interval

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be decided"
COLUMNS = (
    "id",
    "claim",
    "published",
    "paper_statistic",
    "sound_statistic",
    "low",
    "high",
    "null",
    "n",
    "rule",
    "verdict",
    "model",
    "source",
    "note",
)
FAMILIES_NEEDED = 3
"""Model families without which a claim about architectures cannot be decided."""


class ModelFacts(BaseModel):
    """What claims about families and tuning need to know of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str = "unknown"
    """Architecture family."""
    tuning: Literal["base", "instruct", "unknown"] = "unknown"
    """Whether it was tuned on instructions."""
    pair: str = ""
    """Name shared by a base model and its instruct version."""


def claim_row(id: str, claim: str, published: str, rule: str, **found: Any) -> dict[str, Any]:
    """A row that is open until something decides it; NaN where nothing was found."""
    empty: dict[str, Any] = dict.fromkeys(("paper_statistic", "sound_statistic", "low", "high", "null"), float("nan"))
    empty |= {"n": 0, "model": "", "source": "", "note": "", "verdict": OPEN}
    return {"id": id, "claim": claim, "published": published, "rule": rule} | empty | found


def by_sign(interval: Interval) -> str:
    """Holds if the interval lies above 0, does not hold if it lies below, else it cannot be decided."""
    return HOLDS if float(interval.low) > 0 else FAILS if float(interval.high) < 0 else OPEN

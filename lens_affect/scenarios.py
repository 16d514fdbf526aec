"""Scenarios: beginnings that a model continues, with and without steering.

Steering needs texts that leave open how somebody feels, so that a change in the continuation is the intervention's doing. Half of ours pull
towards the target emotion and half away from it: a vector that only strengthens what the text suggests fails on the second half.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from lens_affect.results import content_hash
from lens_affect.tables import FORMATS, read_table, require_columns

SETS = {
    "scenarios": "40 everyday situations: 10 target emotions, two situations each that suggest it and two that suggest its opposite",
    "neutral": "24 matter-of-fact descriptions without emotional content",
    "jeong2026": "the two scenarios of arXiv:2604.04064 in our words",
}
"""Our sets of scenarios (data/scenarios.md)."""
FORMS = ("chat", "continue")
"""Requests for models with a chat template, openings for base models (generation.generate takes the same names)."""
PULLS = ("with", "against", "none")
"""Whether a situation suggests the target emotion, suggests the opposite, or neither (or nobody has said)."""


@dataclass(frozen=True)
class Scenarios:
    """Beginnings of texts with the emotion to steer them to. All tuples have one entry per scenario."""

    ids: tuple[str, ...]
    """Name of each scenario, no two alike."""
    emotions: tuple[str, ...]
    """Target of the steering; `neutral` where there is none."""
    pulls: tuple[str, ...]
    """`with` the target, `against` it, or `none`."""
    groups: tuple[str, ...]
    """Topic of each scenario; scenarios of one topic are resampled together."""
    requests: tuple[str, ...]
    """For chat models: what to do, and the situation."""
    openings: tuple[str, ...]
    """For base models: the situation and the first words of the next sentence."""
    name: str = field(default="scenarios")
    """Name of the set, for titles."""

    def __post_init__(self) -> None:
        sizes = {len(getattr(self, n)) for n in _columns()}
        if len(sizes) != 1:
            raise ValueError(
                f"received columns of unequal lengths {sorted(sizes)}; allowed is one entry per scenario in each"
            )
        if not self.ids:
            raise ValueError("received no scenarios; allowed is at least one")
        for n in _columns():
            blank = [i for i, value in enumerate(getattr(self, n)) if not value.strip()]
            if blank:
                raise ValueError(f"received empty {n} in rows {blank[:10]} ({len(blank)} in all); fill or remove them")
        unknown = sorted(set(self.pulls) - set(PULLS))
        if unknown:
            raise ValueError(f"received pulls {unknown}; allowed are {list(PULLS)}")
        twice = sorted(name for name, n in Counter(self.ids).items() if n > 1)
        if twice:
            raise ValueError(f"received ids twice: {twice[:10]}; allowed is each id once")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over emotions, pulls, groups, requests and openings."""
        return content_hash(self.emotions, self.pulls, self.groups, self.requests, self.openings)

    def prompts(self, form: str) -> tuple[str, ...]:
        """The texts to hand to a model.

        Args:
            form: `chat` (requests, for models with a chat template) or `continue` (openings, for base models). An opening may break off within
                a sentence: its continuation follows directly, with no line break put between.

        Raises:
            ValueError: another form.
        """
        if form not in FORMS:
            raise ValueError(f"received form={form!r}; allowed are {list(FORMS)}")
        return self.requests if form == "chat" else self.openings

    def select(
        self,
        *,
        emotions: Sequence[str] | None = None,
        pulls: Sequence[str] | None = None,
        rows: Sequence[int] | None = None,
    ) -> "Scenarios":
        """The scenarios with these targets, with these pulls, at these row numbers in this order (all given conditions hold).

        Args:
            emotions: targets to keep.
            pulls: `with`, `against`, `none`.
            rows: row numbers.

        Raises:
            ValueError: a target, pull or row that is not there, or nothing meets all conditions.
            TypeError: a single string instead of a list.
        """
        for asked, column, what in ((emotions, self.emotions, "emotion"), (pulls, self.pulls, "pull")):
            if isinstance(asked, str):
                raise TypeError(f"received a single string; allowed is a list, e.g. {what}s=[{asked!r}]")
            for value in asked or ():
                if value not in column:
                    raise ValueError(f"no scenario has the {what} {value!r}; allowed are {list(dict.fromkeys(column))}")
        asked_rows = range(len(self)) if rows is None else rows
        outside = [r for r in asked_rows if not 0 <= r < len(self)]
        if outside:
            raise ValueError(f"received row numbers {outside[:10]}; allowed are 0 to {len(self) - 1}")
        keep = [
            i
            for i in asked_rows
            if (emotions is None or self.emotions[i] in emotions) and (pulls is None or self.pulls[i] in pulls)
        ]
        if not keep:
            raise ValueError(
                f"no scenario meets all conditions: emotions={emotions}, pulls={pulls}, rows={rows}; ask for fewer at once"
            )
        return Scenarios(**{n: tuple(getattr(self, n)[i] for i in keep) for n in _columns()}, name=self.name)

    def to_frame(self) -> pd.DataFrame:
        """One row per scenario with columns id, emotion, pull, group, request, opening."""
        return pd.DataFrame({n.removesuffix("s"): list(getattr(self, n)) for n in _columns()})

    def __str__(self) -> str:
        targets = ", ".join(f"{e} ({n})" for e, n in Counter(self.emotions).most_common(10))
        pulls = Counter(self.pulls)
        return (
            f"{self.name}: {len(self)} scenarios, {len(set(self.groups))} groups; targets: {targets}\n"
            f"pull: {', '.join(f'{pulls[p]} {p}' for p in PULLS if pulls[p])}"
        )


def _columns() -> tuple[str, ...]:
    return tuple(n for n in Scenarios.__dataclass_fields__ if n != "name")


def load_scenarios(name_or_path: str | os.PathLike[str] = "scenarios") -> Scenarios:
    """Load our scenarios or a user's table.

    Args:
        name_or_path: `scenarios`, `neutral` or `jeong2026` (scenarios.SETS, data/scenarios.md); or a CSV, TSV, Parquet or JSON-lines file
            with columns `prompt, emotion` and optionally `group` (by default each scenario is a group of its own) and `pull`
            (`with`, `against` or `none`; by default `none`). The prompt serves as request and as opening.

    Returns:
        The scenarios in file order.

    Raises:
        ValueError: unknown name or format, missing columns, empty cells, or an unknown pull.

    Example:
        >>> load_scenarios().select(emotions=["happy"]).pulls
        ('with', 'with', 'against', 'against')
    """
    if str(name_or_path) in SETS:
        return _ours(str(name_or_path))
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"received scenarios {str(name_or_path)!r}; allowed are {list(SETS)} or a file: {FORMATS}")
    return _from_frame(read_table(path), path.stem)


def _ours(kind: str) -> Scenarios:
    text = files("lens_affect.data").joinpath("scenarios.jsonl").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = [row for line in text.splitlines() if (row := json.loads(line))["kind"] == kind]
    return Scenarios(**{n: tuple(row[n.removesuffix("s")] for row in rows) for n in _columns()}, name=kind)


def _from_frame(frame: pd.DataFrame, name: str) -> Scenarios:
    require_columns(frame, ["prompt", "emotion"], ["group", "pull"], name)
    ids = tuple(f"scenario {i}" for i in range(len(frame)))
    # A cell without a value becomes the empty text that __post_init__ names by row; labels lose outer blanks, prompts stay as they are.
    cells = {
        c: tuple(frame[c].astype(object).where(frame[c].notna(), "").astype(str))
        for c in ("prompt", "emotion", "group", "pull")
        if c in frame
    }
    labels = {c: tuple(value.strip() for value in column) for c, column in cells.items()}
    return Scenarios(
        ids=ids,
        emotions=labels["emotion"],
        pulls=labels.get("pull") or ("none",) * len(frame),
        groups=labels.get("group") or ids,
        requests=cells["prompt"],
        openings=cells["prompt"],
        name=name,
    )

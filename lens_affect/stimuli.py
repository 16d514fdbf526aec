"""Emotions, prompts and passages; grouped splits; contrast pairs.

Every text carries a group (its topic or template). Texts of one group are never on both sides of a split: a direction
that has seen a topic would otherwise be credited for recognising the topic.
"""

import html
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lens_affect.contrasts import ContrastPairs
from lens_affect.results import content_hash, load_result, save_result
from lens_affect.scripts import count_words, is_unspaced
from lens_affect.statistics import derive_generator
from lens_affect.tables import read_table, require_columns

NEUTRAL = "neutral"
PASSAGES = {"passages": "English", "passages_es": "Spanish", "passages_zh": "Chinese"}
"""Our sets of passages and their languages (data/passages.md)."""


@dataclass(frozen=True)
class Emotion:
    """One emotion word with its place in the valence-arousal plane."""

    name: str
    """The adjective, as the paper spells it."""
    valence: Literal["positive", "negative"]
    """Pleasant or unpleasant."""
    arousal: Literal["high", "low"]
    """Activated or quiet."""
    placed_by: Literal["jeong2026", "ours"] = "jeong2026"
    """Who placed it: the paper's author places 18 of the 20."""

    @property
    def quadrant(self) -> str:
        """For example `negative, high`."""
        return f"{self.valence}, {self.arousal}"


EMOTIONS: dict[str, Emotion] = {
    e.name: e
    for e in (
        Emotion("happy", "positive", "high"),
        Emotion("sad", "negative", "low"),
        Emotion("calm", "positive", "low"),
        Emotion("desperate", "negative", "high"),
        Emotion("afraid", "negative", "high"),
        Emotion("angry", "negative", "high"),
        Emotion("proud", "positive", "high"),
        Emotion("guilty", "negative", "low"),
        Emotion("nervous", "negative", "high", placed_by="ours"),
        Emotion("hopeful", "positive", "low"),
        Emotion("brooding", "negative", "low"),
        Emotion("gloomy", "negative", "low"),
        Emotion("reflective", "positive", "low"),
        Emotion("enthusiastic", "positive", "high"),
        Emotion("hostile", "negative", "high"),
        Emotion("loving", "positive", "low"),
        Emotion("exasperated", "negative", "high", placed_by="ours"),
        Emotion("blissful", "positive", "high"),
        Emotion("anxious", "negative", "high"),
        Emotion("grateful", "positive", "low"),
    )
}
"""The paper's 20 emotions in its order (arXiv:2604.04064): `list(EMOTIONS)` gives the names."""

_STEMS = {
    "happy": r"(un)?happ(y|i)\w*",
    "sad": r"sad(der|dest|den\w*|ly|ness)?",
    "calm": r"(be)?calm\w*",
    "desperate": r"desperat\w*|despair\w*",
    "afraid": r"(un)?afraid|fear\w*",
    "angry": r"ang(ry|ri\w*|er|ers|ered|ering)",
    "proud": r"proud\w*|prid(e|es|ed|ing|eful\w*)",
    "guilty": r"guilt\w*",
    "nervous": r"nervous\w*",
    "hopeful": r"hop(e|es|ed|ing|eful\w*|eless\w*)",
    "brooding": r"brood\w*",
    "gloomy": r"gloom\w*",
    "reflective": r"reflect\w*",
    "enthusiastic": r"enthus\w*",
    "hostile": r"hostil\w*",
    "loving": r"(be|un)?lov(e|es|ed|er|ers|ing\w*|able|el(y|ier|iest|iness)|eless\w*)",
    "exasperated": r"exasperat\w*",
    "blissful": r"bliss\w*",
    "anxious": r"anxi\w*",
    "grateful": r"(un|in)?grat(eful\w*|itude)",
}


def named_emotion(text: str, emotion: str) -> str | None:
    """The first word of a text that names the emotion or is derived from its name, or None.

    Args:
        text: any English text.
        emotion: one of `EMOTIONS`, or any other label (then the label itself with any ending is looked for).
    """
    pattern = _STEMS.get(emotion, re.escape(emotion) + r"\w*")
    found = re.search(rf"\b(?:{pattern})\b", text, flags=re.IGNORECASE)
    return found.group(0) if found else None


@dataclass(frozen=True)
class Stimuli:
    """Labelled texts. All tuples have one entry per text."""

    texts: tuple[str, ...]
    """What is read."""
    emotions: tuple[str, ...]
    """Label of each text; `neutral` is the baseline class."""
    groups: tuple[str, ...]
    """Topic, template or source story; one group never stands on both sides of a split."""
    sources: tuple[str, ...]
    """Who wrote it: a data set's name or a model's."""
    prompts: tuple[str, ...]
    """The request that a generated text answers and is read after; empty for a text that is read bare."""
    name: str = "stimuli"
    """Name of the set, for titles."""

    def __post_init__(self) -> None:
        sizes = {len(self.texts), len(self.emotions), len(self.groups), len(self.sources), len(self.prompts)}
        if len(sizes) != 1:
            raise ValueError(
                f"received columns of unequal lengths {sorted(sizes)}; allowed is one entry per text in each"
            )
        if not self.texts:
            raise ValueError("received no texts; allowed is at least one")
        empty = [i for i, text in enumerate(self.texts) if not text.strip()]
        if empty:
            raise ValueError(f"received empty texts in rows {empty[:10]} ({len(empty)} in all); remove or fill them")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct emotions, `neutral` last, the paper's 20 in the paper's order."""
        order = {name: i for i, name in enumerate(EMOTIONS)} | {NEUTRAL: len(self.texts) + len(EMOTIONS)}
        seen = dict.fromkeys(self.emotions)
        return tuple(sorted(seen, key=lambda e: order.get(e, len(EMOTIONS))))

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over texts, labels, groups and prompts."""
        return content_hash(self.texts, self.emotions, self.groups, self.prompts)

    @property
    def design(self) -> Literal["crossed", "nested"]:
        """`crossed` if some group holds several emotions, `nested` if each group has one emotion only."""
        per_group: dict[str, set[str]] = {}
        for emotion, group in zip(self.emotions, self.groups, strict=True):
            if emotion != NEUTRAL:
                per_group.setdefault(group, set()).add(emotion)
        return "crossed" if any(len(found) > 1 for found in per_group.values()) else "nested"

    def select(
        self,
        *,
        emotions: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        rows: Sequence[int] | None = None,
    ) -> "Stimuli":
        """The texts with these emotions, of these groups, at these row numbers (all given conditions hold).

        Raises:
            ValueError: a label, group or row that is not there.
        """
        if isinstance(emotions, str) or isinstance(groups, str):
            raise TypeError("received a single string; allowed is a list of labels, e.g. emotions=['happy']")
        for asked, there, what in (
            (emotions, self.labels, "labels"),
            (groups, tuple(dict.fromkeys(self.groups)), "groups"),
        ):
            for name in asked or ():
                if name not in there:
                    raise ValueError(f"received {name!r}; allowed {what} are {list(there)}: choose among them")
        if rows is not None and (min(rows, default=0) < 0 or max(rows, default=0) >= len(self)):
            raise ValueError(f"received row numbers up to {max(rows)}; allowed are 0 to {len(self) - 1}")
        keep = [
            i
            for i in (range(len(self)) if rows is None else rows)
            if (emotions is None or self.emotions[i] in emotions) and (groups is None or self.groups[i] in groups)
        ]
        if not keep:
            raise ValueError(f"no stimulus meets all conditions: emotions={emotions}, groups={groups}, rows={rows}")
        return type(self)(
            texts=tuple(self.texts[i] for i in keep),
            emotions=tuple(self.emotions[i] for i in keep),
            groups=tuple(self.groups[i] for i in keep),
            sources=tuple(self.sources[i] for i in keep),
            prompts=tuple(self.prompts[i] for i in keep),
            name=self.name,
        )

    def split(self, fraction: float = 0.5, *, seed: int = 0) -> "tuple[Stimuli, Stimuli]":
        """Two sets with no group in common; the first holds about `fraction` of the groups (at least one each).

        Raises:
            ValueError: fewer than two groups, or a fraction outside (0, 1).
        """
        names = list(dict.fromkeys(self.groups))
        if not 0 < fraction < 1:
            raise ValueError(f"received fraction={fraction}; allowed is a number between 0 and 1")
        if len(names) < 2:
            raise ValueError(f"received {len(names)} group; a split that keeps groups together needs at least 2")
        order = derive_generator(seed, "split", self.hash).permutation(len(names))
        n_first = min(max(round(fraction * len(names)), 1), len(names) - 1)
        first = [names[i] for i in sorted(order[:n_first])]
        second = [names[i] for i in sorted(order[n_first:])]
        return self.select(groups=first), self.select(groups=second)

    def contrast_pairs(self, clean: str, corrupted: str) -> ContrastPairs:
        """Pair texts of two emotions within each group, in order of appearance; texts without a partner are left out.

        The words that may follow are the two labels. Such pairs are rarely of equal length: patching wants minimal ones (load_pairs).

        Raises:
            ValueError: an unknown emotion, or no group that holds both.
        """
        self.select(emotions=[clean, corrupted])  # names the unknown label
        if clean == corrupted:
            raise ValueError(f"received {clean!r} twice; a contrast needs two different emotions")
        pairs: list[tuple[str, str]] = []
        groups: list[str] = []
        for group in dict.fromkeys(self.groups):
            sides = [
                [t for t, e, g in zip(self.texts, self.emotions, self.groups, strict=True) if e == side and g == group]
                for side in (clean, corrupted)
            ]
            found = list(zip(*sides, strict=False))
            pairs += found
            groups += [group] * len(found)
        if not pairs:
            raise ValueError(f"no group holds both {clean!r} and {corrupted!r}; pairs need texts that share a topic")
        return ContrastPairs.from_texts(
            pairs, (clean, corrupted), groups=groups, name=f"{self.name}: {clean}, {corrupted}"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per text with columns text, emotion, group, source, prompt."""
        columns = {
            "text": self.texts,
            "emotion": self.emotions,
            "group": self.groups,
            "source": self.sources,
            "prompt": self.prompts,
        }
        return pd.DataFrame({name: list(values) for name, values in columns.items()})

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Stimuli":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        counts = Counter(self.emotions)
        words = [count_words(text) for text in self.texts]
        unit = "characters" if is_unspaced(self.texts[0]) else "words"
        return (
            f"{self.name}: {len(self)} texts, {len(self.labels)} labels, {len(set(self.groups))} groups ({self.design})\n"
            f"{min(counts.values())}-{max(counts.values())} texts per label, {min(words)}-{max(words)} {unit} each"
        )

    def _repr_html_(self) -> str:
        head = self.to_frame().head(5).to_html(escape=True, index=False)
        return f"<p>{html.escape(str(self).splitlines()[0])}</p>{head}"


@dataclass(frozen=True)
class PromptSet:
    """Requests for stories."""

    templates: tuple[str, ...]
    """With `{emotion}` where the adjective goes."""
    neutral: tuple[str, ...]
    """Requests for emotionally neutral stories in the same format."""
    topics: dict[str, str]
    """Topic key -> place, added to a request as a sentence; empty if the requests name no topic."""
    name: str = "ours"
    """Name of the set, for provenance."""

    def __post_init__(self) -> None:
        if not self.templates or not self.neutral:
            raise ValueError("received a prompt set without templates or without neutral requests; both are needed")
        without = [t for t in self.templates if "{emotion}" not in t]
        if without:
            raise ValueError(f"received templates without the slot {{emotion}}: {without[:2]}; every template needs it")


def load_prompts(name_or_path: str | os.PathLike[str] = "ours") -> PromptSet:
    """Load story prompts: `ours` (topics crossed), `jeong2026` (the paper's ten requests per class, our wording), or a file.

    Args:
        name_or_path: a name, or a JSON file with the keys `templates` and `neutral` (lists) and optionally `topics` (key -> place).

    Raises:
        ValueError: an unknown name, or a file without the keys.
    """
    ours = json.loads(files("lens_affect.data").joinpath("prompts.json").read_text(encoding="utf-8"))
    if str(name_or_path) in ours:
        data, name = ours[str(name_or_path)], str(name_or_path)
    elif Path(name_or_path).is_file():
        data, name = _read_prompts(Path(name_or_path)), Path(name_or_path).stem
    else:
        raise ValueError(f"received prompts {str(name_or_path)!r}; allowed are {sorted(ours)} or a JSON file")
    return PromptSet(tuple(data["templates"]), tuple(data["neutral"]), dict(data.get("topics", {})), name)


def _read_prompts(path: Path) -> dict[str, Any]:
    allowed = "a JSON object with the lists of texts 'templates' and 'neutral', and optionally the object 'topics'"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"received {path}, which is no JSON ({error}); allowed is {allowed}") from error
    keys = sorted(data) if isinstance(data, dict) else type(data).__name__
    if not isinstance(data, dict) or not {"templates", "neutral"} <= set(data) <= {"templates", "neutral", "topics"}:
        raise ValueError(f"received keys {keys} in {path}; allowed is {allowed}")
    for key in ("templates", "neutral"):
        if not isinstance(data[key], list) or not all(isinstance(text, str) for text in data[key]):
            raise ValueError(f"received {key!r} in {path} that is no list of texts; allowed is {allowed}")
    if not isinstance(data.get("topics", {}), dict):
        raise ValueError(f"received 'topics' in {path} that is no object; allowed is {allowed}")
    return data


def load_stimuli(name_or_path: str | os.PathLike[str] = "passages") -> Stimuli:
    """Load our passages or a user's table.

    Args:
        name_or_path: `passages` (20 emotions crossed with 12 topics, and 36 neutral texts; data/passages.md), `passages_es` or
            `passages_zh` (8 of these emotions on the same topics, in Spanish and Chinese, without neutral texts), or a CSV, TSV,
            Parquet or JSON-lines file with columns `text` and `emotion` and optionally `group` and `source`. Without `group`
            every text is a group of its own.

    Returns:
        The texts in file order.

    Raises:
        ValueError: unknown name or format, missing columns, empty texts, or a single emotion.

    Example:
        >>> load_stimuli("passages").select(emotions=["happy", "sad"], groups=["train"]).emotions
        ('happy', 'sad')
    """
    if (name := str(name_or_path)) in PASSAGES:
        text = files("lens_affect.data").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
        frame = pd.DataFrame([json.loads(line) for line in text.splitlines()])
        return _from_frame(frame.assign(source="lens_affect"), name)
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"received stimuli {name!r}; allowed are {', '.join(map(repr, PASSAGES))} or a .csv, .tsv, .parquet or .jsonl file"
        )
    return _from_frame(read_table(path), path.stem)


def _from_frame(frame: pd.DataFrame, name: str) -> Stimuli:
    require_columns(frame, ["text", "emotion"], ["group", "source"], name)
    labels = frame["emotion"].fillna("").astype(str).str.strip()
    unlabelled = [int(i) for i in frame.index[labels == ""]]
    if unlabelled:
        raise ValueError(
            f"received rows without an emotion: {unlabelled[:10]} ({len(unlabelled)} in all); label or remove them"
        )
    if labels.nunique() < 2:
        raise ValueError(
            f"received one emotion only ({labels.iloc[0]!r}); allowed are two or more: a direction needs a contrast"
        )
    if "group" in frame:
        blank = frame["group"].isna() | (frame["group"].astype(str).str.strip() == "")
        if blank.any():
            rows = [int(i) for i in frame.index[blank]]
            raise ValueError(
                f"received rows without a group: {rows[:10]} ({len(rows)} in all); fill them, or drop the column"
            )
    groups = frame["group"].astype(str) if "group" in frame else pd.Series([f"text {i}" for i in range(len(frame))])
    sources = frame["source"].astype(str) if "source" in frame else pd.Series([name] * len(frame))
    return Stimuli(
        texts=tuple(frame["text"].fillna("").astype(str)),
        emotions=tuple(labels),
        groups=tuple(groups),
        sources=tuple(sources),
        prompts=("",) * len(frame),
        name=name,
    )
